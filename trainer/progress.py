"""What a person sees of a run while it goes: a bar on a terminal, plain lines elsewhere; always on standard error."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from trainer.metrics import Evaluation, StepMetrics
from trainer.settings import TrainSettings


class Progress(Protocol):
    """Told of everything that takes long."""

    def rollouts(self, ended: int, wanted: int) -> None: ...

    def step(self, metrics: StepMetrics) -> None: ...

    def evaluation(self, evaluation: Evaluation) -> None: ...


@contextmanager
def make_progress(settings: TrainSettings) -> Iterator[Progress]:
    """The display that fits standard error."""
    if not sys.stderr.isatty():
        yield PlainProgress(settings.run.steps)
        return
    with Bars(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
    ) as bars:
        yield _TerminalProgress(bars, settings.run.steps)


class PlainProgress:
    """A line a step and an evaluation."""

    def __init__(self, num_steps: int) -> None:
        self._num_steps = num_steps

    def rollouts(self, ended: int, wanted: int) -> None:
        """Too many for lines."""

    def step(self, metrics: StepMetrics) -> None:
        """The step's line."""
        sys.stderr.write(step_line(metrics, self._num_steps) + "\n")
        sys.stderr.flush()

    def evaluation(self, evaluation: Evaluation) -> None:
        """The evaluation's line."""
        sys.stderr.write(evaluation_line(evaluation) + "\n")
        sys.stderr.flush()


class _TerminalProgress:
    """Two bars, steps and rollouts, with a line above them for each step."""

    def __init__(self, bars: Bars, num_steps: int) -> None:
        self._bars = bars
        self._num_steps = num_steps
        self._steps = bars.add_task("steps", total=num_steps)
        self._rollouts = bars.add_task("rollouts", total=None)

    def rollouts(self, ended: int, wanted: int) -> None:
        self._bars.update(self._rollouts, completed=ended, total=wanted)

    def step(self, metrics: StepMetrics) -> None:
        self._bars.update(self._steps, completed=metrics.step)
        self._bars.console.print(step_line(metrics, self._num_steps), highlight=False)

    def evaluation(self, evaluation: Evaluation) -> None:
        self._bars.console.print(evaluation_line(evaluation), highlight=False)


def step_line(metrics: StepMetrics, num_steps: int) -> str:
    """One step in one line."""
    seconds = metrics.seconds_rollout + metrics.seconds_train + metrics.seconds_publish
    return (
        f"step {metrics.step}/{num_steps}  policy {metrics.policy_version}  reward {_figure(metrics.reward_mean)}"
        f"  tokens {metrics.tokens_trained}/{metrics.tokens_sampled}"
        f"  rows verified {metrics.rows_verified}/{metrics.rows_replayed}"
        f"  kl {_figure(metrics.kl_with_replay)} (live router {_figure(metrics.kl_without_replay)})  {seconds:.1f} s"
    )


def evaluation_line(evaluation: Evaluation) -> str:
    """One evaluation in one line."""
    return (
        f"policy {evaluation.policy_version}  held-out reward {_figure(evaluation.reward_mean)} "
        f"on {evaluation.num_tasks} tasks"
    )


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
