"""The trainer's log-probs under replay against those of the real SGLang 0.5.23, from chat request to measurement.

Conversations run through a real gateway; what the feed hands out is assembled, packed and measured by the trainer.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.replaying.checkpoints import WIDE, make_moe
from benchmarks.replaying.conversations import Talk, converse, serving
from benchmarks.replaying.corruption import examine
from benchmarks.replaying.gap import LEAST_TIMES
from benchmarks.replaying.parity import SERVED_FAMILIES, SGLANG, real_engine, run_parity
from benchmarks.replaying.scoring import Scorer

pytestmark = [pytest.mark.real_engine, pytest.mark.timeout(600)]


@pytest.mark.parametrize("family", SERVED_FAMILIES["sglang"])
def test_replayed_log_probs_equal_the_engines(family: str, tmp_path: Path) -> None:
    """I1, I2, I10: three turns at three temperatures, cached prefixes, edited histories: equal within 1e-4."""
    outcome = run_parity(SGLANG, family, tmp_path, seed=1)
    gap = outcome.comparison.replay
    assert outcome.segments > outcome.rollouts == 12
    assert outcome.cached_tokens > 1000
    assert gap.tokens == 12 * 3 * 40
    assert gap.rows == gap.replayed == gap.verified > 0
    assert gap.max_difference <= 1e-4


async def test_replay_narrows_the_gap_of_a_bfloat16_engine_and_harmed_rows_widen_it(tmp_path: Path) -> None:
    """I9, I10: at least three times less KL with replay; every corruption is found by validation, or shows in KL."""
    model = make_moe(tmp_path / "model", "qwen3_moe", seed=2, shape=WIDE)
    with (
        real_engine(SGLANG, model, tmp_path, "--dtype", "bfloat16") as url,
        serving(model, f"sglang={url}", tmp_path) as gateway,
    ):
        heard = await converse(gateway, Talk("gap", seed=2, groups=4, group_size=4))
    scorer = Scorer(model)
    comparison = scorer.compare(heard.rollouts)
    assert comparison.times_less_kl >= LEAST_TIMES
    assert comparison.replay.f1_2 <= comparison.live.f1_2
    unseen = [each.name for each in examine(scorer, heard.rollouts, seed=2) if not each.holds]
    assert not unseen
