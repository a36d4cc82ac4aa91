"""The same learning run with replay off, r2 and r3: `verbatim demo`'s calculator, cut into minibatches.

Each seed has one warm-up, which its three modes share: same checkpoint, same tasks, same number of steps. With one
update a step r2 replays what the trainer would choose anyway, so a step is cut into several.

    DIR/seed-1/warm-up/model ──copied──▶ DIR/seed-1/{off,r2,r3}/      each a data folder of `verbatim demo`, which a
                                                                     later call with more steps goes on with
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trainer.demo import DEFAULT_WARMUP_STEPS, DemoRun
from trainer.processes import Children
from trainer.settings import ReplayMode

MODES = tuple(mode.value for mode in ReplayMode)
STEPS = 25
MINIBATCHES = 4
_KEPT = {
    "reward": "reward_mean",
    "kl_with_replay": "kl_with_replay",
    "kl_without_replay": "kl_without_replay",
    "f2_with_replay": "extreme_share_with_replay",
    "f2_without_replay": "extreme_share_without_replay",
    "entropy": "entropy",
    "flipped_share": "rows_flipped_share",
    "verified_share": "rows_verified_share",
    "clipped_low_share": "clipped_low_share",
    "clipped_high_share": "clipped_high_share",
    "grad_norm": "grad_norm",
}
"""Curves in the results, and their names in metrics.jsonl."""


def run_learning(
    folder: Path,
    *,
    mode: str,
    seed: int,
    steps: int,
    warmup_steps: int = DEFAULT_WARMUP_STEPS,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """One run, or what is left of it; its figures. overrides: settings of the trainer, which win over ours."""
    place = folder / f"seed-{seed}" / mode
    if not (place / "warmed-up").exists():
        _share_warm_up(folder / f"seed-{seed}" / "warm-up", place, DemoRun(seed=seed, warmup_steps=warmup_steps))
    settings = [f"replay.mode={mode}", f"batch.minibatches={MINIBATCHES}", *overrides]
    started = time.monotonic()
    words = ["--data", str(place), "--steps", str(steps), *(word for each in settings for word in ("--set", each))]
    with Children(place / "bench-logs") as children:
        children.run("demo", words)
    figures = run_figures(place / "run" / "metrics.jsonl")
    seconds = round(time.monotonic() - started, 1)
    return {
        "mode": mode,
        "warmup_steps": warmup_steps,
        "settings": settings,
        "seconds_of_this_call": seconds,
        **figures,
    }


def run_figures(file: Path) -> dict[str, Any]:
    """Of one metrics.jsonl: held-out reward before and after, curves by step."""
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    evaluations = sorted(
        (line["evaluation"] for line in lines if "evaluation" in line), key=lambda entry: entry["policy_version"]
    )
    steps = [line for line in lines if "step" in line]
    return {
        "steps": len(steps),
        "evaluations": {str(entry["policy_version"]): entry["reward_mean"] for entry in evaluations},
        "held_out_reward_before": evaluations[0]["reward_mean"] if evaluations else None,
        "held_out_reward_after": evaluations[-1]["reward_mean"] if len(evaluations) > 1 else None,
        "curves": {name: [step.get(key) for step in steps] for name, key in _KEPT.items()},
    }


def summary(runs: Mapping[str, Mapping[str, Any]]) -> str:
    """For people: a line a mode, means over its seeds."""
    lines = []
    for mode in MODES:
        mine = [run for run in runs.values() if run["mode"] == mode]
        if mine:
            seeds = ", ".join(str(run["seed"]) for run in mine)
            shown = [f"{name} {_mean(mine, name)}" for name in ("kl_with_replay", "kl_without_replay", "entropy")]
            before, after = (
                _mean_of([run[name] for run in mine]) for name in ("held_out_reward_before", "held_out_reward_after")
            )
            lines.append(
                f"{mode:4} seeds {seeds}: held-out reward {before} → {after}, last steps: {', '.join(shown)}\n"
            )
    return "".join(lines)


def _mean(runs: Sequence[Mapping[str, Any]], curve: str, *, last: int = 5) -> str:
    """Over seeds, of the mean of the last steps."""
    return _mean_of([value for run in runs for value in run["curves"][curve][-last:]])


def _mean_of(values: Sequence[float | None]) -> str:
    present = [value for value in values if value is not None]
    return f"{statistics.mean(present):.4g}" if present else "none"


def _share_warm_up(warm: Path, place: Path, run: DemoRun) -> None:
    """The seed's warm-up, made once, as the data folder of a demo that has not begun to train."""
    if not (warm / "done").exists():
        shutil.rmtree(warm, ignore_errors=True)
        words = ("-m", "trainer.recipes.warmup", str(warm / "model"), str(run.seed), str(run.warmup_steps))
        with Children(warm / "logs") as children:
            for line in children.lines_of("warm-up", words):
                if int(line.split()[0]) % 50 == 0:
                    sys.stderr.write(f"warm-up of seed {run.seed}: {line}\n")
        (warm / "done").touch()
    shutil.copytree(warm / "model", place / "model", dirs_exist_ok=True)
    (place / "demo.json").write_text(json.dumps(asdict(run)) + "\n")
    (place / "warmed-up").touch()
