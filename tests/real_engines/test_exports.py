"""What the trainer exports is what real engines serve: log-probs of the policy in training against theirs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks.replaying.checkpoints import MoeShape, make_moe
from benchmarks.replaying.conversations import Talk, converse, serving
from benchmarks.replaying.parity import SGLANG, TOLERANCE, VLLM_RAW, RealEngine, real_engine
from gateway.contracts.rollouts import FinishedRollout
from tests.train_samples import random_samples, scored_batches
from trainer.algorithms.policy_objective import PolicyObjective
from trainer.algorithms.settings import LossSettings
from trainer.backends.hf import HFBackend
from trainer.backends.settings import LoraSettings, ModelSettings, OptimizerSettings
from trainer.data.assemble import assemble
from trainer.data.packing import SampleWeights, pack
from trainer.settings import ReplayMode

pytestmark = [pytest.mark.real_engine, pytest.mark.timeout(600)]


def make_backend(model: Path, lora_rank: int) -> HFBackend:
    return HFBackend(
        ModelSettings(model),
        OptimizerSettings(learning_rate=2e-2),
        replay=ReplayMode.R3,
        seed=1,
        lora=LoraSettings(rank=lora_rank),
    )


def largest_gap(backend: HFBackend, rollouts: Sequence[FinishedRollout]) -> float:
    """Of train and rollout log-probs under replay, in nats."""
    samples = [sample for rollout in rollouts for sample in assemble(rollout, backend.routed)]
    batches = pack(samples, [SampleWeights(0.0, 0.0)] * len(samples), tokens_per_microbatch=1024)
    measured = backend.measure(batches, replay=True)
    return float((measured.logprobs - measured.rollout_logprobs).abs().max())


@pytest.mark.parametrize(("engine", "lora_rank"), [(VLLM_RAW, 0), (SGLANG, 4)], ids=["vllm-full", "sglang-adapters"])
async def test_an_engine_serves_the_exported_policy_as_it_was_trained(
    engine: RealEngine, lora_rank: int, tmp_path: Path
) -> None:
    """Names, dtypes and merged adapters are right where another program reads them."""
    source = make_moe(tmp_path / "source", "qwen3_moe", seed=1, shape=MoeShape())
    backend = make_backend(source, lora_rank)
    for seed in range(3):
        samples = random_samples((40, 30, 20), seed=seed, routed=backend.routed)
        backend.update(scored_batches(samples), PolicyObjective(LossSettings(correction="off")))
    exported = tmp_path / "exported"
    exported.mkdir()
    backend.export(exported)
    with (
        real_engine(engine, exported, tmp_path) as url,
        serving(exported, f"{engine.kind}={url}", tmp_path) as gateway,
    ):
        heard = await converse(gateway, Talk("exports", seed=1, groups=2, group_size=2))
    assert largest_gap(backend, heard.rollouts) <= TOLERANCE
    assert largest_gap(make_backend(source, 0), heard.rollouts) > 100 * TOLERANCE, "training has changed the policy"
