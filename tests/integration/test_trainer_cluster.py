"""Ranks as Ray actors: a backend like any other, until a rank dies."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

from gateway.contracts.errors import ConfigurationError, NonFiniteLoss, TrainingError
from tests.rank_processes import made_batches, one_process, scored_batches
from trainer.algorithms.objective import LiveTokens, Objective, TokenTerms, TrainedTokens
from trainer.algorithms.policy_objective import PolicyObjective
from trainer.algorithms.settings import LossSettings
from trainer.backends.hf import HFBackend
from trainer.backends.protocol import Policy
from trainer.backends.ranks import PolicySettings
from trainer.backends.settings import LoraSettings, ModelSettings, OptimizerSettings, ParallelSettings
from trainer.cluster import ClusterBackend
from trainer.settings import ReplayMode

PPO: Objective = PolicyObjective(LossSettings())
BATCHES = made_batches(num_samples=9, tokens=30)


class Broken:
    """An objective whose loss is no number."""

    needs_reference = False
    needs_entropy_gradient = False

    def __call__(self, live: LiveTokens, tokens: TrainedTokens) -> TokenTerms:
        return TokenTerms(live.logprobs * float("nan"))


def settings_of(model: Path, *, ranks: int) -> PolicySettings:
    return PolicySettings(
        model=ModelSettings(model, device="cpu"),
        optimizer=OptimizerSettings(learning_rate=1e-3),
        parallel=ParallelSettings(ranks, expert_parallel=2),
        replay=ReplayMode.R3,
        seed=0,
        lora=LoraSettings(),
        num_updates=4,
        needs_reference=True,
    )


def ray_processes() -> list[psutil.Process]:
    """Of this test's Ray, those that end by themselves a moment after it left out."""
    mine = psutil.Process().children(recursive=True)
    return [process for process in mine if process.status() != psutil.STATUS_ZOMBIE and "ray" in process.name()]


@pytest.fixture(scope="module")
def cluster(tiny_model: Path) -> Iterator[ClusterBackend]:
    """Two ranks, each with half of every layer's experts; Ray takes its time to start."""
    backend = ClusterBackend(settings_of(tiny_model, ranks=2))
    yield backend
    backend.close()


@pytest.fixture(scope="module")
def single(tiny_model: Path) -> HFBackend:
    return one_process(settings_of(tiny_model, ranks=2))


def test_what_ranks_measure_comes_back_in_the_order_of_the_batches(cluster: ClusterBackend, single: HFBackend) -> None:
    """I10: verification counts are those of one process."""
    for replay in (True, False):
        measured, expected = cluster.measure(BATCHES, replay=replay), single.measure(BATCHES, replay=replay)
        assert torch.allclose(measured.logprobs, expected.logprobs, atol=5e-6, rtol=0.0)
        assert torch.allclose(measured.entropy, expected.entropy, atol=5e-6, rtol=0.0)
        assert torch.equal(measured.rollout_logprobs, expected.rollout_logprobs)
        assert measured.routing == expected.routing
    assert (cluster.routed, cluster.packs_samples) == (single.routed, single.packs_samples)


def test_the_reference_policy_is_measured_by_all_ranks(cluster: ClusterBackend, single: HFBackend) -> None:
    measured = cluster.measure(BATCHES, replay=False, policy=Policy.REFERENCE)
    expected = single.measure(BATCHES, replay=False, policy=Policy.REFERENCE)
    assert torch.allclose(measured.logprobs, expected.logprobs, atol=5e-6, rtol=0.0)


def test_rows_that_ranks_record_are_those_of_one_process(cluster: ClusterBackend, single: HFBackend) -> None:
    recorded, measured = cluster.record(BATCHES)
    expected, _expected_measured = single.record(BATCHES)
    for mine, theirs in zip(recorded, expected, strict=True):
        assert mine.layout.routing is not None
        assert theirs.layout.routing is not None
        for layer in range(4):
            assert (mine.layout.routing.layer(layer).ids == theirs.layout.routing.layer(layer).ids).all()
    replayed = cluster.measure(recorded, replay=True)
    assert torch.allclose(replayed.logprobs, measured.logprobs, atol=1e-6, rtol=0.0)


def test_a_step_is_refused_by_all_ranks_or_made_by_all_and_resumes_bit_for_bit(
    cluster: ClusterBackend, single: HFBackend, tmp_path: Path
) -> None:
    before = cluster.measure(BATCHES, replay=True).logprobs
    with pytest.raises(NonFiniteLoss, match="the step was not made"):
        cluster.update(scored_batches(BATCHES), Broken())
    assert torch.equal(cluster.measure(BATCHES, replay=True).logprobs, before)

    cluster.save(tmp_path)
    update, expected = cluster.update(scored_batches(BATCHES), PPO), single.update(scored_batches(BATCHES), PPO)
    assert update.loss == pytest.approx(expected.loss, abs=1e-6)
    assert update.grad_norm == pytest.approx(expected.grad_norm, rel=1e-5)
    assert torch.allclose(update.measured.logprobs, expected.measured.logprobs, atol=5e-6, rtol=0.0)
    cluster.load(tmp_path)
    again = cluster.update(scored_batches(BATCHES), PPO)
    assert (again.loss, again.grad_norm) == (update.loss, update.grad_norm)

    cluster.export(tmp_path / "policy")
    policy = one_process(settings_of(tmp_path / "policy", ranks=2)).measure(BATCHES, replay=True)
    assert torch.allclose(policy.logprobs, cluster.measure(BATCHES, replay=True).logprobs, atol=5e-6, rtol=0.0)


def test_a_step_without_a_token_is_an_error_that_ranks_survive(cluster: ClusterBackend) -> None:
    (first, *_rest) = BATCHES
    nothing = replace(first, layout=replace(first.layout, trained=first.layout.trained & False))
    with pytest.raises(TrainingError, match="no token"):
        cluster.update(scored_batches((nothing,)), PPO)
    assert len(cluster.measure(BATCHES, replay=True).logprobs)


def test_a_rank_that_dies_ends_the_step_and_is_named(cluster: ClusterBackend) -> None:
    """The last of those that share ranks: there are none after it, and no process of Ray is left."""
    victim = next(process for process in ray_processes() if "RankActor" in " ".join(process.cmdline()))
    os.kill(victim.pid, signal.SIGKILL)
    started = time.monotonic()
    with pytest.raises(TrainingError, match=r"rank [01] of 2 (died|failed)"):
        cluster.update(scored_batches(BATCHES), PPO)
    assert time.monotonic() - started < 60
    with pytest.raises(TrainingError, match="have ended"):
        cluster.measure(BATCHES, replay=True)
    deadline = time.monotonic() + 20
    while ray_processes() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert [process.cmdline() for process in ray_processes()] == []


@pytest.mark.slow
def test_four_ranks_make_the_step_of_one_process(tiny_model: Path) -> None:
    settings = settings_of(tiny_model, ranks=4)
    backend, expected = ClusterBackend(settings), one_process(settings).update(scored_batches(BATCHES), PPO)
    try:
        update = backend.update(scored_batches(BATCHES), PPO)
    finally:
        backend.close()
    assert update.loss == pytest.approx(expected.loss, abs=1e-6)
    assert update.grad_norm == pytest.approx(expected.grad_norm, rel=1e-5)


def test_a_cluster_that_is_not_there_is_a_configuration_error(tiny_model: Path) -> None:
    settings = settings_of(tiny_model, ranks=2)
    settings = replace(settings, parallel=replace(settings.parallel, address="127.0.0.1:1"))
    with pytest.raises(ConfigurationError, match=r"parallel\.address 127\.0\.0\.1:1"):
        ClusterBackend(settings)
