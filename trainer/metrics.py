"""metrics.jsonl: one JSON object a step, one `{"evaluation": …}` object an evaluation; no step twice, also on resume.

A step's line is written when the step is over (published). Its numbers are also in the step's checkpoint, so a run that
was killed between the two writes the line when it starts again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """Numbers of one step; None where a step had nothing to measure.

    policy_version: after the step. tokens_sampled: sampled tokens of the rollouts that entered the step, by the
    gateway's account; tokens_trained: labels that the loss was computed on; tokens_left_out: by the gateway's pick (the
    two add up to the first, I3); tokens_dropped: sampled in dropped rollouts; dropped_by: how many
    of these for which `DropReason`. rows_*: routing rows, one a position
    (I10). kl_*: k3 of rollout‖train in nats per sampled token before the update; extreme_share_*: F(2) of the same
    tokens; `without_replay` is the same batch through the live router.
    """

    step: int
    policy_version: int
    reward_mean: float | None
    tokens_sampled: int
    tokens_trained: int
    tokens_left_out: int
    tokens_dropped: int
    rollouts: int
    groups: int
    zero_variance_groups: int
    dropped_rollouts: int
    rows_total: int
    rows_replayed: int
    rows_verified: int
    rows_fallback: int
    kl_with_replay: float | None
    kl_without_replay: float | None
    extreme_share_with_replay: float | None
    extreme_share_without_replay: float | None
    loss: float | None
    grad_norm: float | None
    clipped_share: float | None
    entropy: float | None
    staleness_mean: float | None
    seconds_rollout: float
    seconds_train: float
    seconds_publish: float
    peak_rss_bytes: int
    dropped_by: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Held-out tasks under one policy. `reward_mean` is over the tasks that have a reward, None if there is none."""

    policy_version: int
    num_tasks: int
    num_failed: int
    reward_mean: float | None
    tokens_sampled: int


class MetricsLog:
    """The file; every line is on disk when its method returns."""

    def __init__(self, file: Path) -> None:
        self._file = file
        file.parent.mkdir(parents=True, exist_ok=True)

    def resume(self, *, step: int) -> None:
        """Drop a torn last line, and lines of steps after `step`: that step's checkpoint is where the run goes on."""
        if not self._file.exists():
            return
        kept = [line for line in self._lines() if line.get("step", 0) <= step]
        partial = self._file.with_name(f".partial-{self._file.name}")
        _write_synced(partial, "".join(json.dumps(line) + "\n" for line in kept), mode="w")
        partial.replace(self._file)

    def last_step(self) -> int:
        """The highest step that has a line, 0 without any."""
        return max((line["step"] for line in self._lines() if "step" in line), default=0)

    def is_evaluated(self, policy_version: int) -> bool:
        """Whether that policy's evaluation is in the file."""
        return any(line.get("evaluation", {}).get("policy_version") == policy_version for line in self._lines())

    def step(self, metrics: StepMetrics) -> None:
        """Append a step's line."""
        _write_synced(self._file, json.dumps(asdict(metrics)) + "\n", mode="a")

    def evaluation(self, evaluation: Evaluation) -> None:
        """Append an evaluation's line."""
        _write_synced(self._file, json.dumps({"evaluation": asdict(evaluation)}) + "\n", mode="a")

    def _lines(self) -> list[dict[str, Any]]:
        if not self._file.exists():
            return []
        whole, _, _torn = self._file.read_text().rpartition("\n")
        return [json.loads(line) for line in whole.splitlines()]


def _write_synced(file: Path, text: str, *, mode: str) -> None:
    with file.open(mode) as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
