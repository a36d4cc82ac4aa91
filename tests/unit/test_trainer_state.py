"""Checkpoints and metrics across kills: whole or absent, every step once."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from gateway.contracts.errors import ConfigurationError, SchemaMismatch
from gateway.contracts.settings import load_settings, settings_toml
from trainer.checkpoint import CheckpointStore, RunState, check_same_run, write_folder
from trainer.metrics import Evaluation, MetricsLog, StepMetrics
from trainer.settings import OldPolicy, ReplayMode, TrainSettings

METRICS = StepMetrics(
    step=1,
    policy_version=1,
    reward_mean=0.5,
    tokens_sampled=10,
    tokens_trained=10,
    tokens_left_out=0,
    tokens_dropped=0,
    rollouts=4,
    groups=2,
    zero_variance_groups=0,
    dropped_rollouts=0,
    rows_total=20,
    rows_replayed=20,
    rows_verified=20,
    rows_fallback=0,
    kl_with_replay=1e-4,
    kl_without_replay=1e-3,
    extreme_share_with_replay=0.0,
    extreme_share_without_replay=0.01,
    loss=0.1,
    grad_norm=1.0,
    clipped_share=0.0,
    entropy=1.5,
    staleness_mean=0.0,
    seconds_rollout=1.0,
    seconds_train=1.0,
    seconds_publish=0.5,
    peak_rss_bytes=1,
)
STATE = RunState("run", 7, 1, 1, ("lease-1",), ("s1", "s2"), METRICS)


def test_a_checkpoint_reads_back_as_it_was_written(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints", keep=2)
    assert store.latest() is None
    folder = store.save(STATE, lambda partial: (partial / "backend.pt").write_bytes(b"weights") and None)
    assert store.latest() == (STATE, folder)
    assert (folder / "backend.pt").read_bytes() == b"weights"


def test_a_checkpoint_that_failed_half_way_is_not_there(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    store.save(STATE, lambda partial: None)

    def disk_full(partial: Path) -> None:
        (partial / "backend.pt").write_bytes(b"half")
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        store.save(replace(STATE, step=2), disk_full)
    latest = store.latest()
    assert latest is not None
    assert latest[0].step == 1
    store.save(replace(STATE, step=2), lambda partial: None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000001", "step-000002"]


def test_only_the_newest_checkpoints_are_kept_by_number_not_by_name(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    for step in (999_998, 999_999, 1_000_000):
        store.save(replace(STATE, step=step), lambda partial: None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-1000000", "step-999999"]
    latest = store.latest()
    assert latest is not None
    assert latest[0].step == 1_000_000


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
    log.evaluation(Evaluation(0, 5, 0, 0.4, 100))
    for step in (1, 2, 3):
        log.step(replace(METRICS, step=step))
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 4, "rew')
    log.resume(step=2)
    assert log.last_step() == 2
    assert log.is_evaluated(0)
    assert not log.is_evaluated(2)
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
