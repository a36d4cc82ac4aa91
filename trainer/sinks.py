"""Where a run's numbers go besides metrics.jsonl: TensorBoard and Weights & Biases, each an extra of that name.

    loop ──▶ RunMetrics ──▶ MetricsLog (metrics.jsonl, first; what it holds is what happened)
                       └──▶ MetricsSink … (told each of its lines once, those that a killed run still owed too)

A run that goes on tells a sink nothing twice: each knows what it was told.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from gateway.contracts.errors import ConfigurationError
from trainer.durable import write_text
from trainer.metrics import Evaluation, MetricsLog, StepMetrics, evaluation_figures, figures
from trainer.wandb_sink import WandbSink


class MetricsSink(Protocol):
    """A second place for a run's numbers. `resume` is the first call; a step or evaluation that comes again is left
    out, so that the whole of metrics.jsonl may be told to a sink at every start."""

    def resume(self, *, step: int) -> None:
        """Take up a run that stands after `step` steps: forget what came later, where that is possible."""
        ...

    def step(self, metrics: StepMetrics) -> None: ...

    def evaluation(self, evaluation: Evaluation, *, step: int) -> None:
        """`step`: the last one before it."""
        ...

    def close(self) -> None:
        """The last call; the only one where a run ended before it could be taken up."""
        ...


class RunMetrics:
    """metrics.jsonl and the sinks that follow it; the face that the loop sees."""

    def __init__(self, log: MetricsLog, sinks: Sequence[MetricsSink] = ()) -> None:
        self._log = log
        self._sinks = sinks

    def resume(self, *, step: int) -> None:
        """Go on after `step`: drop what was written of later steps, and tell each sink what it was not told yet."""
        self._log.resume(step=step)
        for sink in self._sinks:
            sink.resume(step=step)
            last = 0
            for entry in self._log.entries():
                if isinstance(entry, StepMetrics):
                    last = entry.step
                    sink.step(entry)
                else:
                    sink.evaluation(entry, step=last)

    def last_step(self) -> int:
        """The highest step that is written, 0 without any."""
        return self._log.last_step()

    def is_evaluated(self, policy_version: int) -> bool:
        """Whether that policy's evaluation is written."""
        return self._log.is_evaluated(policy_version)

    def step(self, metrics: StepMetrics) -> None:
        """Write a step that has ended."""
        self._log.step(metrics)
        for sink in self._sinks:
            sink.step(metrics)

    def evaluation(self, evaluation: Evaluation) -> None:
        """Write an evaluation of the policy that the last step left."""
        self._log.evaluation(evaluation)
        for sink in self._sinks:
            sink.evaluation(evaluation, step=self._log.last_step())

    def close(self) -> None:
        """Close every sink."""
        for sink in self._sinks:
            sink.close()


def make_sinks(
    names: Sequence[str], folder: Path, *, run_name: str, settings: Mapping[str, Any]
) -> tuple[MetricsSink, ...]:
    """The sinks that `metrics.sinks` names, in the run folder `folder`; `settings` are shown beside the numbers.

    Raises ConfigurationError for an unknown name, or where the extra is not installed.
    """
    kinds: Mapping[str, Callable[[], MetricsSink]] = {
        "tensorboard": lambda: TensorBoardSink(folder, settings=settings),
        "wandb": lambda: WandbSink(folder, run_name=run_name, settings=settings),
    }
    for name in names:
        if name not in kinds:
            raise ConfigurationError(f"metrics.sinks names {name!r}, which is none of {', '.join(kinds)}")
    return tuple(_make(name, kinds[name]) for name in dict.fromkeys(names))


def _make(name: str, kind: Callable[[], MetricsSink]) -> MetricsSink:
    try:
        return kind()
    except ImportError as error:
        raise ConfigurationError(
            f"metrics.sinks names {name}, which is not installed: pip install 'verbatim-rl[{name}]'"
        ) from error


class TensorBoardSink:
    """Event files in `FOLDER/tensorboard`, for `tensorboard --logdir`; written to disk step by step.

    Going on after a step, TensorBoard's own marker makes readers forget what an earlier file has of later steps.
    Raises ImportError where tensorboard is not installed.
    """

    def __init__(self, folder: Path, *, settings: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._open = SummaryWriter
        self._folder = folder / "tensorboard"
        self._settings = settings
        self._told = _ToldFile(folder / "tensorboard.json")
        self._writer: Any = None

    def resume(self, *, step: int) -> None:
        """The marker stands behind what this sink was told for sure, so half a step in a file does no harm."""
        told = self._told.forget(after=step)
        is_new = not self._folder.exists()
        self._writer = self._open(str(self._folder), purge_step=None if is_new else told + 1)
        if is_new:
            self._writer.add_text("settings", f"```\n{json.dumps(self._settings, indent=1, default=str)}\n```", 0)

    def step(self, metrics: StepMetrics) -> None:
        """Scalars at x = step."""
        if self._told.has_step(metrics.step):
            return
        self._write(figures(metrics), metrics.step)
        self._told.step(metrics.step)

    def evaluation(self, evaluation: Evaluation, *, step: int) -> None:
        """Scalars under evaluation/ at x = step. Noted first: the marker could not take half of them back."""
        if self._told.has_evaluation(evaluation.policy_version):
            return
        self._told.evaluation(evaluation.policy_version, step=step)
        self._write(evaluation_figures(evaluation), step)

    def close(self) -> None:
        """The file is whole after every step already."""
        if self._writer is not None:
            self._writer.close()

    def _write(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()


class _ToldFile:
    """What a sink was told, in a file that is whole or as it was before: `{"step": 3, "evaluated": {"0": 0}}` is all
    steps to 3, and the evaluation of policy 0 after step 0."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def has_step(self, step: int) -> bool:
        return bool(step <= self._values()["step"])

    def has_evaluation(self, policy_version: int) -> bool:
        return str(policy_version) in self._values()["evaluated"]

    def step(self, step: int) -> None:
        self._write(step=step)

    def evaluation(self, policy_version: int, *, step: int) -> None:
        self._write(evaluated=self._values()["evaluated"] | {str(policy_version): step})

    def forget(self, *, after: int) -> int:
        """What came after step `after` may be told again; returns the last step that is told."""
        values = self._values()
        step = int(min(values["step"], after))
        kept = {version: at for version, at in values["evaluated"].items() if at <= step}
        self._write(step=step, evaluated=kept)
        return step

    def _values(self) -> dict[str, Any]:
        return json.loads(self._file.read_text()) if self._file.exists() else {"step": 0, "evaluated": {}}

    def _write(self, **changes: Any) -> None:
        write_text(self._file, json.dumps(self._values() | changes))
