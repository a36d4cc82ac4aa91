"""Checkpoints and metrics across kills: whole or absent, every step once."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gateway.contracts.errors import ConfigurationError, IntegrityError, SchemaMismatch, TrainingError
from gateway.contracts.settings import load_settings, settings_toml
from tests.run_records import EVALUATION, METRICS
from tests.small_disk import fill, small_disk
from trainer.algorithms.settings import OldPolicy
from trainer.checkpoint import CheckpointStore, RunState, check_same_run
from trainer.durable import write_folder
from trainer.metrics import MetricsLog
from trainer.settings import ReplayMode, TrainSettings

STATE = RunState("run", 7, 1, 1, ("lease-1",), ("s1", "s2"), METRICS)


def test_a_checkpoint_reads_back_as_it_was_written(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints", keep=2)
    assert store.latest() is None
    folder = store.save(STATE, lambda partial: (partial / "backend.pt").write_bytes(b"weights") and None)
    assert store.latest() == (STATE, folder)
    assert (folder / "backend.pt").read_bytes() == b"weights"


def test_a_checkpoint_that_does_not_fit_the_disk_leaves_the_one_before_and_no_rest(tmp_path: Path) -> None:
    """On a real file system that is full, with torch's own writer; with room again the same call works."""
    weights = {"w": torch.zeros(2**18)}
    with small_disk(4 * 2**20) as disk:
        store = CheckpointStore(disk.folder / "checkpoints", keep=2)
        store.save(STATE, lambda partial: torch.save(weights, partial / "backend.pt"))
        fill(disk.folder / "other", leave_bytes=2**19)
        with pytest.raises(TrainingError, match=r"step 2 cannot be written .* make room") as raised:
            store.save(replace(STATE, step=2), lambda partial: torch.save(weights, partial / "backend.pt"))
        assert "\n" not in raised.value.message
        assert [path.name for path in (disk.folder / "checkpoints").iterdir()] == ["step-000001"]
        latest = store.latest()
        assert latest is not None
        assert latest[0] == STATE
        (disk.folder / "other").unlink()
        store.save(replace(STATE, step=2), lambda partial: torch.save(weights, partial / "backend.pt"))
        assert sorted(path.name for path in (disk.folder / "checkpoints").iterdir()) == ["step-000001", "step-000002"]


def _truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def _flip(file: Path) -> None:
    body = bytearray(file.read_bytes())
    body[len(body) // 2] ^= 1
    file.write_bytes(body)


@pytest.mark.parametrize(
    ("name", "harm", "says"),
    [
        ("shards/backend.pt", _truncate, "shards/backend.pt has 2999 bytes, 3000 were written"),
        ("shards/backend.pt", _flip, "other bytes than were written"),
        ("shards/backend.pt", Path.unlink, "shards/backend.pt is missing"),
        ("state.json", _truncate, "state.json cannot be read"),
        ("state.json", Path.unlink, "state.json cannot be read"),
        ("state.json", lambda file: file.write_text("{}"), "state.json cannot be read"),
    ],
)
def test_a_damaged_checkpoint_is_refused_and_the_line_says_what_to_do(
    tmp_path: Path, name: str, harm: Callable[[Path], object], says: str
) -> None:
    """Never skipped silently: what it consumed is acknowledged."""
    store = CheckpointStore(tmp_path, keep=2)

    def write(partial: Path) -> None:
        (partial / "shards").mkdir()
        (partial / "shards" / "backend.pt").write_bytes(b"abc" * 1000)

    store.save(STATE, write)
    folder = store.save(replace(STATE, step=2), write)
    harm(folder / name)
    with pytest.raises(IntegrityError, match=says) as raised:
        store.latest()
    assert "move it away, and the run goes on after step-000001" in raised.value.message
    assert "\n" not in raised.value.message
    folder.rename(tmp_path / "damaged")
    latest = store.latest()
    assert latest is not None
    assert latest[0] == STATE


def test_only_the_newest_checkpoints_are_kept_by_number_not_by_name(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    for step in (999_998, 999_999, 1_000_000):
        store.save(replace(STATE, step=step), lambda partial: None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-1000000", "step-999999"]
    latest = store.latest()
    assert latest is not None
    assert latest[0].step == 1_000_000


def test_milestones_stay_beside_the_newest_checkpoints(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2, keep_every=4)
    for step in range(1, 12):
        store.save(replace(STATE, step=step), lambda partial: None)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-{step:06d}" for step in (4, 8, 10, 11)]


def test_a_folder_written_again_is_replaced_whole(tmp_path: Path) -> None:
    write_folder(tmp_path / "policy", lambda partial: (partial / "old").write_text("x") and None)
    write_folder(tmp_path / "policy", lambda partial: (partial / "new").write_text("y") and None)
    assert [path.name for path in (tmp_path / "policy").iterdir()] == ["new"]


def test_a_checkpoint_of_another_format_or_run_is_refused(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    folder = store.save(STATE, lambda partial: None)
    with pytest.raises(ConfigurationError, match=r"run\.dir"):
        check_same_run(STATE, run_name="run", seed=8, where=folder)
    values = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(values | {"checkpoint_version": 99}))
    with pytest.raises(SchemaMismatch, match="99"):
        store.latest()


def test_metrics_of_steps_after_the_checkpoint_and_torn_lines_go_on_resume(tmp_path: Path) -> None:
    """A step is in the file once, whenever the trainer was killed."""
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.evaluation(EVALUATION)
    for step in (1, 2, 3):
        log.step(replace(METRICS, step=step))
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 4, "rew')
    log.resume(step=2)
    assert log.last_step() == 2
    assert log.is_evaluated(0)
    assert not log.is_evaluated(2)
    assert not list(tmp_path.glob(".*"))
    log.step(replace(METRICS, step=3))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line.get("step") for line in lines] == [None, 1, 2, 3]


def test_settings_read_from_toml_and_print_as_toml_that_reads_the_same(tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text(
        '[run]\ndir = "runs/x"\nname = "x"\nsteps = 3\n[model]\npath = "m"\n[rollouts]\nrecipe = "calculator"\n'
        '[replay]\nmode = "off"\n[loss]\nold_policy = "rollout"\n'
    )
    settings = load_settings(TrainSettings, file=file, overrides=["optimizer.learning_rate=0.5", "run.steps=4"])
    assert settings.replay.mode is ReplayMode.OFF
    assert settings.loss.old_policy is OldPolicy.ROLLOUT
    assert (settings.optimizer.learning_rate, settings.run.steps) == (0.5, 4)
    (tmp_path / "printed.toml").write_text(settings_toml(settings))
    assert load_settings(TrainSettings, file=tmp_path / "printed.toml") == settings


@pytest.mark.parametrize("override", ["run.steps=0", "loss.clip_low=2.0", "optimizer.learnin_rate=1.0"])
def test_impossible_settings_are_configuration_errors(tmp_path: Path, override: str) -> None:
    required = ["run.dir=x", "run.name=x", "run.steps=1", "model.path=m", "rollouts.recipe=calculator"]
    with pytest.raises(ConfigurationError):
        load_settings(TrainSettings, file=None, overrides=[*required, override])
