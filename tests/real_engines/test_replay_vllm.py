"""The trainer's log-probs under replay against those of the real vLLM 0.30.0, from chat request to measurement."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.replaying.parity import VLLM_PROCESSED, VLLM_RAW, RealEngine, run_parity

pytestmark = [pytest.mark.real_engine, pytest.mark.timeout(600)]


@pytest.mark.parametrize(
    ("engine", "family"),
    [(VLLM_PROCESSED, "qwen3_moe"), *((VLLM_RAW, family) for family in ("qwen3_moe", "mixtral", "glm4_moe"))],
    ids=lambda value: value.name if isinstance(value, RealEngine) else value,
)
def test_replayed_log_probs_equal_the_engines(engine: RealEngine, family: str, tmp_path: Path) -> None:
    """I1, I2, I9, I10: three turns at three temperatures, edited histories: equal within 1e-4; rows that vLLM left out
    are not replayed, all others are and were used."""
    outcome = run_parity(engine, family, tmp_path, seed=1)
    gap = outcome.comparison.replay
    assert outcome.segments > outcome.rollouts == 12
    assert gap.tokens == 12 * 3 * 40
    assert gap.replayed == gap.verified > 0
    assert gap.max_difference <= 1e-4
