"""The replay benchmark's own parts with the embedded engine: what they call exact is exact, and what is wrong shows."""

from __future__ import annotations

from pathlib import Path

from benchmarks.replaying.checkpoints import MoeShape, make_moe
from benchmarks.replaying.conversations import Talk, converse, embedded_engine, serving
from benchmarks.replaying.corruption import examine
from benchmarks.replaying.parity import TEMPERATURES, TOLERANCE
from benchmarks.replaying.scoring import Scorer

SHAPE = MoeShape(num_layers=4, num_experts=16, top_k=4, scale=0.12)


async def test_rollouts_measure_as_they_were_sampled_and_harmed_routing_shows(tmp_path: Path) -> None:
    """I1, I2, I9, I10: log-probs within 1e-4 over turns, temperatures and edited histories; every corruption of rows is
    found by validation, or raises KL tenfold."""
    model = make_moe(tmp_path / "model", "qwen3_moe", seed=1, shape=SHAPE)
    heard = {}
    for dtype in ("float32", "bfloat16"):
        place = tmp_path / dtype
        with (
            embedded_engine(model, place, "--dtype", dtype) as engine,
            serving(model, f"sglang={engine}", place) as gateway,
        ):
            heard[dtype] = await converse(gateway, Talk(dtype, seed=1, groups=2, max_tokens=24, sampling=TEMPERATURES))
    scorer = Scorer(model)
    gap = scorer.gap(heard["float32"].rollouts, replay=True)
    assert heard["float32"].num_segments > len(heard["float32"].rollouts)
    assert gap.tokens == 2 * 4 * 3 * 24
    assert gap.rows == gap.verified > 0
    assert gap.max_difference <= TOLERANCE
    examined = examine(scorer, heard["bfloat16"].rollouts, seed=1)
    assert not [each.line() for each in examined if not each.holds]
