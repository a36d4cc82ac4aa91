"""`verbatim bench tokens`: random agents against the gateway, every sampled token accounted for.

Prints its seed; a failing history is named by its own, and `--seed N --histories 1` plays it again.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import platform
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.cost import Cost, measure_costs
from benchmarks.histories import Judged, run_histories
from benchmarks.served import run_served_histories
from benchmarks.workshop import all_choices, open_workshop

RESULTS = Path(__file__).parent / "results" / "tokens.json"
_PACKAGES = ("verbatim-rl", "tokenizers", "jinja2", "numpy")
_SHOWN_PER_RULE = 3
_SERVED_AT_ONCE = 20
_MOST_TOKENISATION = 3.0
"""Of a long conversation turn by turn, in full tokenisations of its final text."""


@dataclass(slots=True)
class Tally:
    """Sums over a run; `examples`: by rule, the first failing histories."""

    counts: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    histories: int = 0
    failed_histories: int = 0
    seconds: float = 0.0

    def add(self, judged: Judged) -> None:
        """One more history."""
        self.histories += 1
        self.failed_histories += bool(judged.failures)
        self.counts += judged.counts
        for failure in judged.failures:
            self.failures[failure.rule] += 1
            shown = self.examples.setdefault(failure.rule, [])
            if len(shown) < _SHOWN_PER_RULE:
                shown.append({"seed": judged.seed, "model": judged.choice.name, "detail": failure.detail[:2000]})


def configure(parser: argparse.ArgumentParser) -> None:
    """The flags of `verbatim bench tokens`."""
    parser.add_argument("--histories", type=int, default=10_000, help="how many (10000)")
    parser.add_argument("--seed", type=int, help="of the first history; the others follow (random)")
    parser.add_argument(
        "--model", metavar="FAMILY[-VOCABULARY]", default="", help="only the histories of models whose name begins so"
    )
    parser.add_argument("--served", type=int, default=200, help="how many more over HTTP, with a killed gateway (200)")
    parser.add_argument("--skip-cost", action="store_true", help="do not measure what prompt building costs")
    parser.add_argument("--only-cost", action="store_true", help="measure that alone, and keep the other figures")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="FILE", help="where the figures go")


def run(arguments: argparse.Namespace) -> int:
    """Run; 0 if nothing failed."""
    if arguments.only_cost:
        return _run_costs(arguments.output)
    # Conversations whose messages a template hides are what this run is full of; they are counted, not told one by one.
    logging.getLogger("gateway.sessions.turns").setLevel(logging.ERROR)
    seed = random.SystemRandom().randrange(1 << 31) if arguments.seed is None else arguments.seed
    wanted = [choice for choice in all_choices() if choice.name.startswith(arguments.model)]
    sys.stdout.write(f"seed {seed}: {arguments.histories} histories, of them those of {len(wanted)} models\n")
    seeds = range(seed, seed + arguments.histories)
    tally = asyncio.run(run_many(seeds, model=arguments.model, on_progress=_show_progress))
    sys.stdout.write(report(tally))
    served = asyncio.run(run_many_served(range(seed, seed + arguments.served), model=arguments.model))
    sys.stdout.write(f"over HTTP, each gateway killed and started again half-way: {_line(served)}{_failures(served)}")
    costs = [] if arguments.skip_cost else measure_costs()
    sys.stdout.write("".join(map(_cost_line, costs)))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    content = figures(tally, seed) | {"over_http": results(served), "costs": [cost.figures() for cost in costs]}
    arguments.output.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    too_slow = any(map(_is_slow, costs))
    return 1 if tally.failures or served.failures or too_slow else 0


def _run_costs(output: Path) -> int:
    """Measure what prompt building costs, and put it in place of the costs in the results file."""
    costs = measure_costs()
    sys.stdout.write("".join(map(_cost_line, costs)))
    known = json.loads(output.read_text()) if output.is_file() else {}
    content = known | {"costs": [cost.figures() for cost in costs]}
    output.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    return int(any(map(_is_slow, costs)))


async def run_many(
    seeds: Sequence[int],
    *,
    model: str = "",
    num_gateways: int = 1,
    on_progress: Callable[[Tally], None] | None = None,
) -> Tally:
    """Judge the history of each seed, or those of the models whose name begins so; `on_progress` hears of every one.

    num_gateways: that share the ledger, each request going to any of them."""
    choices = all_choices()
    wanted = [seed for seed in seeds if choices[seed % len(choices)].name.startswith(model)]
    tally = Tally()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="verbatim-bench-") as folder:
        async with open_workshop(Path(folder), num_gateways=num_gateways) as workshop:
            async for judged in run_histories(workshop, choices, wanted, num_gateways=num_gateways):
                tally.add(judged)
                tally.seconds = time.monotonic() - began
                if on_progress is not None:
                    on_progress(tally)
            tally.counts += workshop.audits()
    return tally


async def run_many_served(seeds: Sequence[int], *, model: str = "") -> Tally:
    """The same over HTTP; models take turns, some histories each."""
    choices = all_choices()
    tally = Tally()
    began = time.monotonic()
    for start in range(0, len(seeds), _SERVED_AT_ONCE):
        batch = seeds[start : start + _SERVED_AT_ONCE]
        choice = choices[batch[0] // _SERVED_AT_ONCE % len(choices)]
        if choice.name.startswith(model):
            for judged in await run_served_histories(choice, batch):
                tally.add(judged)
    tally.seconds = time.monotonic() - began
    return tally


def report(tally: Tally) -> str:
    """For people: counts, then failures with their seeds."""
    lines = [f"{count:>12,}  {name}\n" for name, count in sorted(tally.counts.items())]
    return "".join([*lines, _line(tally), _failures(tally)])


def results(tally: Tally) -> dict[str, Any]:
    """Of one way of running, for the results file."""
    return {
        "histories": tally.histories,
        "failed_histories": tally.failed_histories,
        "seconds": round(tally.seconds, 1),
        "counts": dict(sorted(tally.counts.items())),
        "failures": dict(tally.failures),
        "examples": tally.examples,
    }


def figures(tally: Tally, seed: int) -> dict[str, Any]:
    """For the results file."""
    return {
        "seed": seed,
        **results(tally),
        "versions": {name: version(name) for name in _PACKAGES} | {"python": platform.python_version()},
        "machine": {"cores": os.cpu_count(), "processor": platform.machine(), "system": platform.system()},
    }


def _failures(tally: Tally) -> str:
    lines: list[str] = []
    for rule, count in tally.failures.most_common():
        lines.append(f"FAILED {count} times: {rule}\n")
        lines += [f"    --seed {e['seed']} ({e['model']}): {e['detail'][:400]}\n" for e in tally.examples[rule]]
    return "".join(lines)


def _cost_line(cost: Cost) -> str:
    slow = "TOO SLOW " if _is_slow(cost) else ""
    paths = ", ".join(f"{count} {name}" for name, count in cost.certified_by.items())
    turns, marked, long = (
        ", ".join(f"{microseconds:.0f} at {num:,}" for num, microseconds in by_history.items())
        for by_history in (cost.turn_microseconds, cost.marked_microseconds, cost.long_microseconds)
    )
    rendered = f"; if it says what the template looks for {long}" if long else ""
    first = ", ".join(f"{microseconds:.0f} {path}" for path, microseconds in cost.first_microseconds.items())
    return (
        f"{slow}{cost.model}: {cost.num_turns} turns, {cost.num_tokens} tokens ({paths}; {cost.backend}): tokenisation "
        f"{cost.encode_seconds * 1e3:.0f} ms = {cost.encode_ratio:.2f} full ones, prompt building "
        f"{cost.build_seconds * 1e3:.0f} ms, replies {cost.parse_seconds * 1e3:.0f} ms, upkeep "
        f"{cost.upkeep_seconds * 1e3:.0f} ms, together {cost.total_ratio:.2f} full ones; microseconds a turn by tokens "
        f"of history: {turns}; if it shows a control token {marked}{rendered}; of a first prompt of "
        f"{cost.num_first_tokens}: {first}\n"
    )


def _is_slow(cost: Cost) -> bool:
    """A conversation costs three tokenisations of its text at most, a turn with a short path no history at all."""
    has_short_path = any(path.startswith("shape") for path in cost.certified_by)
    return cost.total_ratio > _MOST_TOKENISATION or (has_short_path and cost.history_ratio > _MOST_TOKENISATION)


def _show_progress(tally: Tally) -> None:
    if tally.histories % 500 == 0:
        sys.stdout.write(_line(tally))
        sys.stdout.flush()


def _line(tally: Tally) -> str:
    turns = tally.counts["turns"]
    return (
        f"{tally.histories} histories, {turns} turns, {tally.counts['sampled tokens']} sampled tokens in "
        f"{tally.seconds:.0f} s ({turns / max(tally.seconds, 1e-9):.0f} turns/s); {tally.failed_histories} failed\n"
    )
