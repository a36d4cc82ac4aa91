"""From an engine that filters to the trainer: log-probs are measured again as what the engine says that they are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engines.launch import EngineProcess
from engines.sglang import SglangEngine
from engines.vllm import VllmEngine
from gateway.contracts.generation import (
    GenerateChunk,
    GenerateEnd,
    GenerateRequest,
    LogprobKind,
    SamplingParams,
    kind_under,
)
from gateway.contracts.samples import Segment, TurnSpan
from tests.tagged_rollouts import tagged_rollout
from trainer.backends.hf import HFBackend
from trainer.backends.settings import ModelSettings, OptimizerSettings
from trainer.data.assemble import assemble
from trainer.data.packing import SampleWeights, pack
from trainer.settings import ReplayMode

PROMPT = np.arange(10, 30, dtype=np.int32)
NUM_OUTPUT = 40


async def sampled_segment(engine: SglangEngine | VllmEngine, sampling: SamplingParams) -> Segment:
    """One turn as the gateway records it."""
    kind = kind_under((await engine.identity()).logprob_kind, sampling)
    items = [item async for item in engine.generate(GenerateRequest("request-kept-set", PROMPT, sampling, 0))]
    chunks = [item for item in items if isinstance(item, GenerateChunk)]
    (end,) = (item for item in items if isinstance(item, GenerateEnd))
    tokens = np.concatenate([PROMPT, *(chunk.token_ids for chunk in chunks)]).astype(np.int32)
    mask = np.arange(len(tokens)) >= len(PROMPT)
    assert end.routed_experts is not None
    span = TurnSpan(
        "t", 0, len(PROMPT), len(tokens), True, "length", sampling.temperature, sampling.top_p, sampling.top_k
    )
    return Segment(
        segment_id="seg",
        turns=(span,),
        token_ids=tokens,
        loss_mask=mask,
        rollout_logprobs=np.concatenate([np.full(len(PROMPT), np.nan), *(c.logprobs for c in chunks)]).astype(
            np.float32
        ),
        policy_version=np.where(mask, 0, -1).astype(np.int32),
        routed_experts=end.routed_experts.ids,
        routed_valid=np.ones(len(tokens) - 1, dtype=np.bool_),
        logprob_kind=kind,
    )


@pytest.mark.parametrize("client", [SglangEngine, VllmEngine], ids=["sglang", "vllm"])
@pytest.mark.parametrize(
    "filters", [{"top_p": 0.7}, {"top_k": 4}, {"top_p": 0.8, "top_k": 10}, {}], ids=["top-p", "top-k", "both", "none"]
)
async def test_the_trainer_measures_the_log_probs_of_a_filtering_engine(
    client: type[SglangEngine] | type[VllmEngine],
    filters: dict[str, float],
    engine_process: EngineProcess,
    tiny_model: Path,
) -> None:
    """I2, I10: vLLM's processed_logprobs are of the kept set, SGLang's of the whole vocabulary, both scaled."""
    sampling = SamplingParams(max_new_tokens=NUM_OUTPUT, temperature=0.7, ignore_eos=True, **filters)  # type: ignore[arg-type]
    engine = client(engine_process.url, engine_id="e0", routing=None, policy_version_of=lambda label: 0)
    try:
        segment = await sampled_segment(engine, sampling)
    finally:
        await engine.aclose()
    filtered = client is VllmEngine and bool(filters)
    assert segment.logprob_kind is (LogprobKind.KEPT_SET if filtered else LogprobKind.TEMPERATURE_SCALED)
    backend = HFBackend(ModelSettings(tiny_model), OptimizerSettings(), replay=ReplayMode.R3, seed=0)

    def gap(one: Segment) -> float:
        (sample,) = assemble(tagged_rollout(one), backend.routed)
        measured = backend.measure(pack([sample], [SampleWeights(1.0, 1.0)], tokens_per_microbatch=1), replay=True)
        return float((measured.logprobs - measured.rollout_logprobs).abs().max())

    assert gap(segment) < 1e-4
    if filters:
        other = LogprobKind.TEMPERATURE_SCALED if filtered else LogprobKind.KEPT_SET
        assert gap(replace(segment, logprob_kind=other)) > 0.1
