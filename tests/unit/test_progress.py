"""What a person sees of a run while it goes."""

from __future__ import annotations

import io
import time
from dataclasses import replace

import pytest
from rich.console import Console
from rich.progress import Progress as Bars
from rich.progress import TextColumn

from tests.packed_batches import a_batch
from tests.run_records import EVALUATION, METRICS
from tests.waiting import until
from trainer.backends.hf import HFBackend
from trainer.backends.settings import ModelSettings, OptimizerSettings
from trainer.phases import Phase, PhaseClock
from trainer.progress import PlainProgress, TerminalProgress, evaluation_line, step_line
from trainer.settings import ReplayMode


class Told:
    """What was printed so far."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys
        self._text = ""

    @property
    def lines(self) -> list[str]:
        self._text += self._capsys.readouterr().err
        return self._text.splitlines()

    def wait_for(self, beginning: str, *, times: int) -> None:
        until(lambda: sum(line.startswith(beginning) for line in self.lines) >= times)


def test_a_long_phase_is_told_again_and_again_with_how_far_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    told = Told(capsys)
    with PlainProgress(5, reminder_seconds=0.05) as progress:
        clock = PhaseClock(progress.phase)
        with clock.phase(Phase.ROLLOUT):
            progress.rollouts(3, 96)
            told.wait_for("  rollouts, 3 of 96, for ", times=2)
        with clock.phase(Phase.UPDATE):
            progress.microbatches(2, 7)
            told.wait_for("  training, micro-batch 2 of 7, for ", times=2)
        progress.step(METRICS)
        time.sleep(0.1)
        progress.rollouts(7, 9)
        told.wait_for("  held-out rollouts, 7 of 9, for ", times=2)
        progress.evaluation(EVALUATION)
        time.sleep(0.1)
    lines = told.lines
    after = lines[lines.index(step_line(METRICS, 5)) + 1 :]
    assert all(line.startswith("  held-out rollouts, 7 of 9, for ") for line in after[:-1])
    assert len(after) >= 3
    assert lines[-1] == evaluation_line(EVALUATION), "between steps there is nothing to remind of"


def test_a_quick_step_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with PlainProgress(5) as progress:
        for phase in Phase:
            progress.phase(phase)
        progress.step(METRICS)
        progress.evaluation(EVALUATION)
    assert capsys.readouterr().err.splitlines() == [step_line(METRICS, 5), evaluation_line(EVALUATION)]


@pytest.mark.parametrize("phase", Phase)
def test_a_terminal_names_the_phase_under_way(phase: Phase) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with Bars(TextColumn("{task.description} {task.completed}/{task.total}"), console=console) as bars:
        progress = TerminalProgress(bars, 5)
        progress.rollouts(4, 8)
        progress.phase(phase)
        (_, under_way) = bars.tasks
        assert under_way.description not in ("", "starting")
        assert (under_way.completed, under_way.total) == (0, None)
        progress.microbatches(1, 3)
        assert (under_way.completed, under_way.total) == (1, 3)
        progress.step(METRICS)
        assert bars.tasks[0].completed == 1
        progress.rollouts(2, 9)
        assert bars.tasks[1].description == "held-out rollouts"
        assert (bars.tasks[1].completed, bars.tasks[1].total) == (2, 9)


def test_a_backend_tells_each_micro_batch_of_each_pass(tiny_model: object) -> None:
    told: list[tuple[int, int]] = []
    backend = HFBackend(
        ModelSettings(tiny_model, device="cpu"),  # type: ignore[arg-type]  # a path
        OptimizerSettings(),
        replay=ReplayMode.R3,
        seed=0,
        on_microbatch=lambda done, total: told.append((done, total)),
    )
    backend.measure([a_batch((4,)), a_batch((5,))], replay=True)
    assert told == [(1, 2), (2, 2)]


def test_lines_say_what_matters() -> None:
    line = step_line(METRICS, 5)
    for part in ("step 1/5", "policy 1", "reward 0.5", "tokens 10/12", "rows verified 20/20", "kl 0.0001", "stale 2"):
        assert part in line
    assert "dropped" not in step_line(replace(METRICS, dropped_by={}), 5)
    assert "correct 0.4 [0.2, 0.6]" in evaluation_line(EVALUATION)
    assert "correct" not in evaluation_line(replace(EVALUATION, pass_at_1=None))
    assert "3 attempts have no score" in evaluation_line(replace(EVALUATION, num_failed=3))
    assert "no score" not in evaluation_line(replace(EVALUATION, num_failed=0))
