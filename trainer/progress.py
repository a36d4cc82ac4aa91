"""What a person sees of a run while it goes: bars on a terminal, plain lines elsewhere; always on standard error.

Every phase of a step is named while it lasts, so that nobody wonders whether a run hangs: on a terminal as a bar with
its time, elsewhere as a line whenever one has lasted for another half minute.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from trainer.metrics import Evaluation, StepMetrics
from trainer.phases import Phase
from trainer.settings import TrainSettings

_REMINDER_SECONDS = 30.0
_DOING = {
    Phase.ROLLOUT: "rollouts",
    Phase.ASSEMBLE: "checking and packing rollouts",
    Phase.MEASURE: "measuring log-probs",
    Phase.REFERENCE: "measuring the reference policy",
    Phase.UPDATE: "training",
    Phase.CHECKPOINT: "writing the checkpoint",
    Phase.PUBLISH: "publishing weights",
}
_EVALUATING = "held-out rollouts"


class Progress(Protocol):
    """Told of everything that takes long; may be told from any thread."""

    def phase(self, phase: Phase) -> None: ...

    def rollouts(self, ended: int, wanted: int) -> None: ...

    def microbatches(self, done: int, total: int) -> None: ...

    def step(self, metrics: StepMetrics) -> None: ...

    def evaluation(self, evaluation: Evaluation) -> None: ...


@contextmanager
def make_progress(settings: TrainSettings) -> Iterator[Progress]:
    """The display that fits standard error."""
    if not sys.stderr.isatty():
        with PlainProgress(settings.run.steps) as plain:
            yield plain
        return
    with Bars(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
    ) as bars:
        yield TerminalProgress(bars, settings.run.steps)


class PlainProgress:
    """A line a step and an evaluation, and one for each further `reminder_seconds` that a phase lasts; the latter from
    a thread that lives while the object is entered."""

    def __init__(self, num_steps: int, *, reminder_seconds: float = _REMINDER_SECONDS) -> None:
        self._num_steps = num_steps
        self._reminder_seconds = reminder_seconds
        self._doing = ""
        self._count = ""
        self._began = self._reminded = time.monotonic()
        self._ended = threading.Event()
        self._watch = threading.Thread(target=self._remind, name="progress", daemon=True)

    def __enter__(self) -> PlainProgress:
        self._watch.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._ended.set()
        self._watch.join()

    def phase(self, phase: Phase) -> None:
        """Another phase begins."""
        self._begin(_DOING[phase])

    def rollouts(self, ended: int, wanted: int) -> None:
        """Of the rollouts under way: a step's, or between steps an evaluation's."""
        if not self._doing:
            self._begin(_EVALUATING)
        self._count = f", {ended} of {wanted}"

    def microbatches(self, done: int, total: int) -> None:
        """Of the forwards or updates under way."""
        self._count = f", micro-batch {done} of {total}"

    def step(self, metrics: StepMetrics) -> None:
        """The step's line."""
        self._doing = ""
        self._write(step_line(metrics, self._num_steps))

    def evaluation(self, evaluation: Evaluation) -> None:
        """The evaluation's line."""
        self._doing = ""
        self._write(evaluation_line(evaluation))

    def _begin(self, doing: str) -> None:
        self._doing, self._count = doing, ""
        self._began = self._reminded = time.monotonic()

    def _remind(self) -> None:
        while not self._ended.wait(self._reminder_seconds / 4):
            now = time.monotonic()
            if self._doing and now - self._reminded >= self._reminder_seconds:
                self._reminded = now
                self._write(f"  {self._doing}{self._count}, for {now - self._began:.0f} s")

    def _write(self, line: str) -> None:
        sys.stderr.write(line + "\n")
        sys.stderr.flush()


class TerminalProgress:
    """Two bars, steps and the phase under way, with a line above them for each step."""

    def __init__(self, bars: Bars, num_steps: int) -> None:
        self._bars = bars
        self._num_steps = num_steps
        self._steps = bars.add_task("steps", total=num_steps)
        self._phase = bars.add_task("starting", total=None)
        self._in_step = False

    def phase(self, phase: Phase) -> None:
        """The second bar begins anew."""
        self._in_step = True
        self._begin(_DOING[phase])

    def rollouts(self, ended: int, wanted: int) -> None:
        """How far the second bar is; between steps it is an evaluation's."""
        if not self._in_step:
            self._in_step = True
            self._begin(_EVALUATING)
        self._bars.update(self._phase, completed=ended, total=wanted)

    def microbatches(self, done: int, total: int) -> None:
        """How far the second bar is."""
        self._bars.update(self._phase, completed=done, total=total)

    def step(self, metrics: StepMetrics) -> None:
        """The step's line above the bars."""
        self._in_step = False
        self._bars.update(self._steps, completed=metrics.step)
        self._bars.console.print(step_line(metrics, self._num_steps), highlight=False)

    def evaluation(self, evaluation: Evaluation) -> None:
        """The evaluation's line above the bars."""
        self._in_step = False
        self._bars.console.print(evaluation_line(evaluation), highlight=False)

    def _begin(self, doing: str) -> None:
        # A task that is reset would keep its total.
        self._bars.remove_task(self._phase)
        self._phase = self._bars.add_task(doing, total=None)


def step_line(metrics: StepMetrics, num_steps: int) -> str:
    """One step in one line."""
    dropped = "".join(f"  {reason} {count}" for reason, count in metrics.dropped_by.items())
    return (
        f"step {metrics.step}/{num_steps}  policy {metrics.policy_version}  reward {_figure(metrics.reward_mean)}"
        f"  tokens {metrics.tokens_trained}/{metrics.tokens_sampled}"
        f"  rows verified {metrics.rows_verified}/{metrics.rows_replayed}"
        f"  kl {_figure(metrics.kl_with_replay)} (live router {_figure(metrics.kl_without_replay)})"
        f"  {metrics.seconds_total:.1f} s{dropped and '  dropped' + dropped}"
    )


def evaluation_line(evaluation: Evaluation) -> str:
    """One evaluation in one line."""
    line = (
        f"policy {evaluation.policy_version}  held-out reward {_figure(evaluation.reward_mean)} "
        f"on {evaluation.num_tasks} tasks"
    )
    if evaluation.num_failed:
        line += f" ({evaluation.num_failed} attempts have no score: see their sessions' outcomes)"
    if evaluation.pass_at_1 is None:
        return line
    interval = "" if evaluation.ci_low is None else f" [{_figure(evaluation.ci_low)}, {_figure(evaluation.ci_high)}]"
    return f"{line}  correct {_figure(evaluation.pass_at_1)}{interval}"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
