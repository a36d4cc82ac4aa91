"""`verbatim bench growth`: what 12,000 and 1,000,000 rollouts at once need, from measured costs; checked by simulation.

The arithmetic says how many of each thing are busy, and which of them runs out first. The simulation plays the same
rollouts through workers, group commits and engines event by event, and shows whether turns then wait.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from benchmarks.growing.measured import read_measured
from benchmarks.growing.paper import NODE, STEPS, Need, Workload, needs
from benchmarks.growing.simulation import Queues, simulate
from benchmarks.results_file import merge

RESULTS = Path(__file__).parent / "results"
_MOST_ADDED_SECONDS = 0.1
"""99 of 100 turns must not wait longer at the gateway."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Its flags."""
    shown = Workload()
    parser.add_argument("--turn-seconds", type=float, default=shown.turn_seconds, help="an engine's time for a turn")
    parser.add_argument("--tool-seconds", type=float, default=shown.tool_seconds, help="between two turns of a rollout")
    parser.add_argument(
        "--turn-tokens", type=int, default=shown.turn_tokens, help="added by a turn, sampled and others"
    )
    parser.add_argument("--fsync-ms", type=float, default=5.0, help="of the disks that are assumed (5)")
    parser.add_argument("--seconds", type=float, default=120.0, help="how long the simulated time is (120)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS / "growth.json", metavar="FILE")


def run(arguments: argparse.Namespace) -> int:
    """1 where the simulation contradicts the arithmetic."""
    arguments.command_line = shlex.join(["verbatim", "bench", *sys.argv[sys.argv.index("growth") :]])
    measured = read_measured(RESULTS)
    work = Workload(
        turn_seconds=arguments.turn_seconds, tool_seconds=arguments.tool_seconds, turn_tokens=arguments.turn_tokens
    )
    steps: list[dict[str, Any]] = []
    sound = True
    for rollouts in STEPS:
        found = needs(rollouts, work, measured, NODE)
        queues = Queues(
            workers=NODE.cores,
            cpu_seconds=measured.turn_seconds_of(work),
            fsync_seconds=arguments.fsync_ms / 1e3,
        )
        played = simulate(rollouts // found.nodes, work, queues, seconds=arguments.seconds, seed=arguments.seed)
        sound &= played.added_p99_seconds <= _MOST_ADDED_SECONDS and abs(played.busy - found.worker_load) < 0.05
        steps.append({"rollouts": rollouts, "paper": found.figures(), "one_gateway_simulated": played.figures()})
        _tell(found)
        sys.stdout.write(f"  simulated, one gateway: {json.dumps(played.figures())}\n")
    unit = {"million_turns": measured.million_turns(work), "trillion_tokens": measured.trillion_tokens(work)}
    sys.stdout.write(json.dumps(unit, indent=1) + "\n")
    figures = {
        "workload": work.figures(),
        "measured": measured.figures(),
        "gateway": NODE.figures(),
        "unit_costs": unit,
        "steps": steps,
    }
    merge(arguments.output, "growth", "default", figures, command=arguments.command_line, packages=("verbatim-rl",))
    return 0 if sound else 1


def _tell(found: Need) -> None:
    sys.stdout.write(f"{found.rollouts:,} rollouts: {found.nodes} gateways; {found.bottleneck} runs out first\n")
    for name, share in found.shares.items():
        sys.stdout.write(f"  {name}: {share:.2f} gateways' worth\n")
