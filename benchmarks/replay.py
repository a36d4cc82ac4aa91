"""`verbatim bench replay`: what routing replay is worth, that it is exact, and what it costs.

Parts: parity, gap, corruption, invariance, cost, learning. Without names all of them but `learning`, which takes hours
and can be run in pieces (`verbatim bench replay learning --mode r3 --seed 1 --steps 25`); its runs join in the results.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shlex
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "replay.json"
LEARNING_DATA = Path("runs") / "bench-replay"
_FAMILY = "qwen3_moe"


@dataclass(frozen=True, slots=True)
class Place:
    """Of one measurement: a folder for all that it makes, its seed, where its figures go, and what was asked for."""

    folder: Path
    seed: int
    output: Path
    arguments: argparse.Namespace

    def keep(self, part: str, name: str, figures: Mapping[str, Any], *flags: str) -> None:
        """Into the results file."""
        from benchmarks.results_file import merge

        command = shlex.join(["verbatim", "bench", "replay", part, "--seed", str(self.seed), *flags])
        merge(self.output, part, name, {"seed": self.seed, **figures}, command=command)


def configure(parser: argparse.ArgumentParser) -> None:
    """The flags of `verbatim bench replay`."""
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (all but learning)")
    parser.add_argument("--seed", type=int, default=1, help="of weights, agents and tasks (1)")
    parser.add_argument("--data", type=Path, metavar="DIR", help="where models, ledgers and logs stay (else deleted)")
    parser.add_argument(
        "--engine", action="append", metavar="NAME", help="parity and gap: sglang, vllm (those that are installed)"
    )
    parser.add_argument(
        "--family", action="append", metavar="NAME", help=f"parity: architecture, repeatable ({_FAMILY})"
    )
    parser.add_argument("--mode", action="append", metavar="NAME", help="learning: off, r2, r3 (all)")
    parser.add_argument("--steps", type=int, metavar="N", help="learning: training steps (25)")
    parser.add_argument("--warmup-steps", type=int, metavar="N", help="learning: supervised steps before (550)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="A.B=C", help="learning: a setting of the trainer"
    )
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="FILE", help="where the figures go")


def run(arguments: argparse.Namespace) -> int:
    """Run and report; 1 if a part missed its target."""
    from gateway.contracts.errors import ConfigurationError

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import torch

    torch.set_num_threads(1)
    parts = arguments.parts or [name for name in PARTS if name != "learning"]
    unknown = sorted(set(parts) - set(PARTS))
    if unknown:
        raise ConfigurationError(f"there is no part {unknown[0]!r}; there are {', '.join(PARTS)}")
    missed = []
    for name in parts:
        _tell(f"{name}, seed {arguments.seed}\n")
        with tempfile.TemporaryDirectory(prefix=f"verbatim-replay-{name}-") as scratch:
            folder = Path(scratch) if arguments.data is None else arguments.data / name
            place = Place(folder, arguments.seed, arguments.output, arguments)
            if not PARTS[name](place):
                missed.append(name)
    _tell("all targets met\n" if not missed else f"MISSED: {', '.join(missed)}\n")
    return 1 if missed else 0


def _parity(place: Place) -> bool:
    """(a) Real engines in float32: replayed log-probs equal theirs within 1e-4."""
    from benchmarks.replaying.parity import ENGINES, installed, run_parity

    wanted = place.arguments.engine or [kind for kind in ("sglang", "vllm") if installed(kind)]
    families = place.arguments.family or [_FAMILY]
    holds = bool(wanted)
    for engine in (engine for engine in ENGINES.values() if engine.kind in wanted):
        for family in families:
            folder = place.folder / f"{engine.name.replace(' ', '-')}-{family}"
            outcome = run_parity(engine, family, folder, seed=place.seed)
            _tell(outcome.line())
            flags = ["--engine", engine.kind, "--family", family]
            place.keep("parity", f"{engine.name} {family}", outcome.figures() | {"holds": outcome.holds}, *flags)
            holds &= outcome.holds
    if not wanted:
        _tell("no real engine is installed: tests/real_engines/install.sh sglang, … vllm\n")
    return holds


def _gap(place: Place) -> bool:
    """(b) A gap that real stacks have, with replay and without: at least three times less KL."""
    from benchmarks.replaying.gap import run_gaps
    from benchmarks.replaying.parity import SGLANG, installed, real_engine

    engines = []
    if "sglang" in (place.arguments.engine or ["sglang"]) and installed("sglang"):
        engines = [("sglang", lambda model, folder: real_engine(SGLANG, model, folder, "--dtype", "bfloat16"))]
    holds = True
    for outcome in run_gaps(place.folder, seed=place.seed, engines=engines):
        _tell(outcome.comparison.lines(outcome.name))
        place.keep("gap", outcome.name, outcome.figures() | {"holds": outcome.holds})
        holds &= outcome.holds
    return holds


def _corruption(place: Place) -> bool:
    """Recorded rows harmed on purpose: each kind is caught or shown."""
    from benchmarks.replaying.checkpoints import WIDE, make_moe
    from benchmarks.replaying.conversations import Talk, converse, embedded_engine, serving
    from benchmarks.replaying.corruption import examine
    from benchmarks.replaying.scoring import Scorer

    model = make_moe(place.folder / "model", _FAMILY, seed=place.seed, shape=WIDE)
    with (
        embedded_engine(model, place.folder, "--dtype", "bfloat16") as engine,
        serving(model, f"sglang={engine}", place.folder) as gateway,
    ):
        heard = asyncio.run(converse(gateway, Talk("corruption", seed=place.seed)))
    examined = examine(Scorer(model), heard.rollouts, seed=place.seed)
    for each in examined:
        _tell(each.line())
        place.keep("corruption", each.name, each.figures())
    return all(each.holds for each in examined)


def _invariance(place: Place) -> bool:
    """(d) One step, cut into micro-batches and ranks in many ways."""
    from benchmarks.replaying.invariance import run_cuts

    holds = True
    for cut in run_cuts(place.folder, seed=place.seed):
        _tell(cut.line())
        place.keep("invariance", cut.name, cut.figures() | {"holds": cut.holds})
        holds &= cut.holds
    return holds


def _cost(place: Place) -> bool:
    """(e) What replay adds to a step and to a router call, what experts take, and how fast a step is."""
    from benchmarks.replaying.cost import measure_costs

    holds = True
    for cost in measure_costs(place.folder, seed=place.seed):
        _tell(cost.line())
        place.keep("cost", cost.name, cost.figures())
        holds &= cost.holds
    return holds


def _learning(place: Place) -> bool:
    """(c) The calculator run with replay off, r2 and r3. It has no target of its own: its figures are compared."""
    from benchmarks.replaying.learning import MODES, STEPS, run_learning, summary
    from benchmarks.results_file import entries
    from trainer.demo import DEFAULT_WARMUP_STEPS

    arguments = place.arguments
    steps, warmup_steps = arguments.steps or STEPS, arguments.warmup_steps or DEFAULT_WARMUP_STEPS
    folder = (arguments.data or LEARNING_DATA).absolute()
    flags = ["--steps", str(steps), "--warmup-steps", str(warmup_steps)]
    flags += [word for setting in arguments.set for word in ("--set", setting)]
    for mode in arguments.mode or MODES:
        figures = run_learning(
            folder, mode=mode, seed=place.seed, steps=steps, warmup_steps=warmup_steps, overrides=arguments.set
        )
        place.keep("learning", f"{mode} seed {place.seed}", figures, "--mode", mode, *flags)
    _tell(summary(entries(place.output, "learning")))
    return True


PARTS: Mapping[str, Callable[[Place], bool]] = {
    "parity": _parity,
    "gap": _gap,
    "corruption": _corruption,
    "invariance": _invariance,
    "cost": _cost,
    "learning": _learning,
}
"""Each says whether its targets were met."""


def _tell(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
