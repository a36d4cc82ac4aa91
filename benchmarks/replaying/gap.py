"""How far an engine is from its trainer, with the engine's routing replayed and without.

Two gaps that real stacks have: the engine computes in bfloat16 and the trainer in float32, and the engine's routers
have other weights than the trainer's (a policy some steps old; here: noise on every router).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.replaying.checkpoints import WIDE, make_moe, perturbed_routers
from benchmarks.replaying.conversations import Talk, converse, embedded_engine, serving
from benchmarks.replaying.scoring import Comparison, Scorer

ROUTER_NOISES = (0.02, 0.1)
"""In standard deviations of a router's weights."""
LEAST_TIMES = 3.0
"""By which replay must lower KL."""

StartEngine = Callable[[Path, Path], AbstractContextManager[str]]
"""(model, folder for logs) → address of an engine that speaks SGLang's protocol, in bfloat16."""


@dataclass(frozen=True, slots=True)
class GapRun:
    """One pair of engine and trainer."""

    name: str
    comparison: Comparison

    @property
    def holds(self) -> bool:
        """Whether replay is worth what it must be."""
        return self.comparison.times_less_kl >= LEAST_TIMES

    def figures(self) -> dict[str, Any]:
        """For the results file."""
        return self.comparison.figures()


def run_gaps(folder: Path, *, seed: int, engines: Sequence[tuple[str, StartEngine]] = ()) -> Iterator[GapRun]:
    """The embedded engine in bfloat16 and with perturbed routers; then `engines`, by name, in bfloat16."""
    model = make_moe(folder / "model", "qwen3_moe", seed=seed, shape=WIDE)
    pairs: list[tuple[str, Path, StartEngine]] = [("bfloat16 embedded engine", model, _embedded("bfloat16"))]
    for noise in ROUTER_NOISES:
        perturbed = perturbed_routers(model, folder / f"perturbed-{noise:g}", noise=noise, seed=seed)
        pairs.append((f"routers off by {noise:g}", perturbed, _embedded("float32")))
    pairs += [(f"bfloat16 {name}", model, start) for name, start in engines]
    scorer = Scorer(model)
    for name, served, start in pairs:
        place = folder / name.replace(" ", "-")
        # The gateway is told of the folder that the engine serves: it refuses an engine of another model.
        with start(served, place) as engine, serving(served, f"sglang={engine}", place) as gateway:
            talk = Talk(name.replace(" ", "-"), seed=seed, groups=8, group_size=8)
            heard = asyncio.run(converse(gateway, talk))
        yield GapRun(name, scorer.compare(heard.rollouts))


def _embedded(dtype: str) -> StartEngine:
    return lambda model, logs: embedded_engine(model, logs, "--dtype", dtype)
