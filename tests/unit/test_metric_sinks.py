"""One suite for every place that a run's numbers go to: metrics.jsonl, TensorBoard, Weights & Biases (offline)."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gateway.contracts.errors import ConfigurationError, SchemaMismatch
from tests.run_records import EVALUATION, METRICS
from trainer.metrics import Evaluation, MetricsLog, evaluation_figures, figures
from trainer.sinks import RunMetrics, make_sinks
from trainer.wandb_sink import read_history


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As on a machine without an account."""
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))


Rows = list[tuple[int, dict[str, float]]]
"""x and the numbers there, in the order told."""


def jsonl_rows(folder: Path) -> Rows:
    rows: Rows = []
    for entry in MetricsLog(folder / "metrics.jsonl").entries():
        is_evaluation = isinstance(entry, Evaluation)
        step = (rows[-1][0] if rows else 0) if is_evaluation else entry.step
        rows.append((step, evaluation_figures(entry) if is_evaluation else figures(entry)))
    return rows


def tensorboard_rows(folder: Path) -> Rows:
    """By TensorBoard's own reader, which obeys the markers."""
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    rows: dict[tuple[int, bool], dict[str, float]] = {}
    for tag in events.Tags()["scalars"]:
        for event in events.Scalars(tag):
            row = rows.setdefault((event.step, tag.startswith("evaluation/")), {})
            assert tag not in row, f"{tag} at {event.step} twice"
            row[tag] = event.value
    return [(step, row) for (step, _), row in sorted(rows.items())]


def wandb_rows(folder: Path) -> Rows:
    """All offline files of the run, in the order in which they were begun."""
    files = sorted((folder / "wandb").glob("offline-run-*/run-*.wandb"), key=lambda file: file.stat().st_mtime_ns)
    assert len({file.name for file in files}) <= 1, "one run id"
    rows = [{k: v for k, v in row.items() if k[0] != "_"} for file in files for row in read_history(file)]
    return [(int(row.pop("step")), row) for row in rows if row]


@dataclass(frozen=True, slots=True)
class Place:
    """A sink and how a person would read it back."""

    names: tuple[str, ...]
    read: Any

    def open(self, folder: Path, *, step: int) -> RunMetrics:
        sinks = make_sinks(self.names, folder, run_name="a-run", settings={"run": {"steps": 3}, "file": folder})
        metrics = RunMetrics(MetricsLog(folder / "metrics.jsonl"), sinks)
        metrics.resume(step=step)
        return metrics


PLACES = {
    "jsonl": Place((), jsonl_rows),
    "tensorboard": Place(("tensorboard",), tensorboard_rows),
    "wandb": Place(("wandb",), wandb_rows),
}


@pytest.fixture(params=PLACES.values(), ids=PLACES.keys())
def place(request: pytest.FixtureRequest) -> Place:
    return request.param  # type: ignore[no-any-return]


def steps_of(rows: Rows) -> list[int]:
    return [x for x, row in rows if "loss" in row]


def test_every_number_of_a_step_and_an_evaluation_is_there_under_its_name(place: Place, tmp_path: Path) -> None:
    metrics = place.open(tmp_path, step=0)
    metrics.evaluation(EVALUATION)
    metrics.step(METRICS)
    metrics.close()
    rows = place.read(tmp_path)
    assert [x for x, _ in rows] == [0, 1]
    assert rows[0][1] == pytest.approx(evaluation_figures(EVALUATION), rel=1e-6)
    assert rows[1][1] == pytest.approx(figures(METRICS), rel=1e-6)
    assert {"reward/mean", "rows/verified_share", "seconds/publish", "dropped_by/stale", "loss"} <= set(rows[1][1])
    assert not {"kl/reference", "peak/device_bytes", "step"} & set(rows[1][1]), "not measured, or the x itself"


def test_a_run_that_goes_on_writes_no_step_and_no_evaluation_twice(place: Place, tmp_path: Path) -> None:
    metrics = place.open(tmp_path, step=0)
    metrics.evaluation(EVALUATION)
    metrics.step(METRICS)
    metrics.close()
    metrics = place.open(tmp_path, step=1)
    metrics.step(replace(METRICS, step=2, loss=0.5))
    metrics.close()
    metrics = place.open(tmp_path, step=2)
    metrics.step(replace(METRICS, step=3))
    metrics.evaluation(replace(EVALUATION, policy_version=3))
    metrics.close()
    rows = place.read(tmp_path)
    assert steps_of(rows) == [1, 2, 3]
    assert [x for x, row in rows if "evaluation/num_tasks" in row] == [0, 3]
    assert next(row["loss"] for x, row in rows if x == 2) == 0.5


def test_a_step_that_only_the_file_got_before_a_kill_is_told_at_the_next_start(place: Place, tmp_path: Path) -> None:
    place.open(tmp_path, step=0).close()
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.step(METRICS)
    log.evaluation(replace(EVALUATION, policy_version=1))
    place.open(tmp_path, step=1).close()
    rows = place.read(tmp_path)
    assert [(x, "loss" in row) for x, row in rows] == [(1, True), (1, False)]


def test_a_run_that_ends_before_it_began_closes_its_sinks(place: Place, tmp_path: Path) -> None:
    """What ended it (a damaged checkpoint, an engine that takes no weights) is the error to be seen."""
    sinks = make_sinks(place.names, tmp_path, run_name="a-run", settings={})
    RunMetrics(MetricsLog(tmp_path / "metrics.jsonl"), sinks).close()


def test_a_run_that_goes_back_to_an_older_checkpoint_has_each_step_once(place: Place, tmp_path: Path) -> None:
    """As after a damaged newest checkpoint: step 3 happens again."""
    metrics = place.open(tmp_path, step=0)
    for step in (1, 2, 3):
        metrics.step(replace(METRICS, step=step))
    metrics.evaluation(replace(EVALUATION, policy_version=3))
    metrics.close()
    metrics = place.open(tmp_path, step=2)
    assert metrics.last_step() == 2
    assert not metrics.is_evaluated(3)
    metrics.step(replace(METRICS, step=3))
    metrics.evaluation(replace(EVALUATION, policy_version=3))
    metrics.step(replace(METRICS, step=4))
    metrics.close()
    rows = place.read(tmp_path)
    assert steps_of(rows) == [1, 2, 3, 4]
    assert [x for x, row in rows if "evaluation/num_tasks" in row] == [3]


_DOOMED = """
import os, sys
from dataclasses import replace
from pathlib import Path
from tests.run_records import METRICS
from trainer.metrics import MetricsLog
from trainer.sinks import RunMetrics, make_sinks
folder = Path(sys.argv[1])
metrics = RunMetrics(MetricsLog(folder / "metrics.jsonl"),
                     make_sinks(sys.argv[2:], folder, run_name="doomed", settings={}))
metrics.resume(step=0)
for step in (1, 2):
    metrics.step(replace(METRICS, step=step))
os.kill(os.getpid(), 9)
"""


def test_steps_before_a_sigkill_are_there_and_the_run_goes_on(place: Place, tmp_path: Path) -> None:
    # wandb's own process serves all children of this test run, too: a trainer of its own has one of its own.
    environment = {name: value for name, value in os.environ.items() if "WANDB_SERVICE" not in name}
    command = [sys.executable, "-c", _DOOMED, str(tmp_path), *place.names]
    assert subprocess.run(command, check=False, timeout=60, env=environment).returncode == -9
    metrics = place.open(tmp_path, step=2)
    metrics.step(replace(METRICS, step=3))
    metrics.close()
    assert steps_of(place.read(tmp_path)) == [1, 2, 3]


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lives=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), min_size=1, max_size=5))
def test_tensorboard_has_each_step_once_whatever_the_lives_of_a_run(
    tmp_path_factory: pytest.TempPathFactory, lives: list[tuple[int, int]]
) -> None:
    """A life makes some steps, and the next one begins some steps before its end."""
    folder, at = tmp_path_factory.mktemp("lives"), 0
    for made, lost in lives:
        metrics = PLACES["tensorboard"].open(folder, step=at)
        for step in range(at + 1, at + made + 1):
            metrics.step(replace(METRICS, step=step))
        metrics.close()
        at = max(at + made - lost, 0)
    metrics = PLACES["tensorboard"].open(folder, step=at)
    metrics.step(replace(METRICS, step=at + 1))
    metrics.close()
    assert steps_of(tensorboard_rows(folder)) == steps_of(jsonl_rows(folder)) == list(range(1, at + 2))


@pytest.mark.parametrize(("name", "module"), [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")])
def test_a_missing_package_is_one_line_that_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # which is how Python itself marks what cannot be imported
    with pytest.raises(ConfigurationError, match=rf"pip install 'verbatim-rl\[{name}\]'") as raised:
        make_sinks([name], tmp_path, run_name="r", settings={})
    assert "\n" not in raised.value.message


def test_an_unknown_sink_is_named_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="'mlflow', which is none of tensorboard, wandb"):
        make_sinks(["mlflow"], tmp_path, run_name="r", settings={})


@pytest.mark.parametrize(("mode", "says"), [("online", "WANDB_API_KEY"), ("onlin", "WANDB_MODE is 'onlin'")])
def test_wandb_never_asks_for_a_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, mode: str, says: str) -> None:
    monkeypatch.setenv("WANDB_MODE", mode)
    (sink,) = make_sinks(["wandb"], tmp_path, run_name="r", settings={})
    with pytest.raises(ConfigurationError, match=says):
        sink.resume(step=0)


def test_metrics_of_another_version_are_refused_with_the_file_named(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "reward": 0.5}\n')
    with pytest.raises(SchemaMismatch, match=str(file)):
        list(MetricsLog(file).entries())


def test_settings_stand_beside_the_numbers(tmp_path: Path) -> None:
    for name in ("tensorboard", "wandb"):
        PLACES[name].open(tmp_path, step=0).close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (text,) = events.Tensors("settings/text_summary")
    assert '"steps": 3' in text.tensor_proto.string_val[0].decode()
    (file,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    assert b'{"steps":3}' in file.read_bytes().replace(b" ", b"")
