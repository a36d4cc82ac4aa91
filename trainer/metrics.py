"""What a run says of itself, as records (`StepMetrics`, `Evaluation`) and as metrics.jsonl: one JSON object a step, one
`{"evaluation": …}` object an evaluation; no step twice, also on resume.

A step's line is written when the step is over (published). Its numbers are also in the step's checkpoint, so a run that
was killed between the two writes the line when it starts again. Other sinks follow this file (`sinks.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import takewhile
from pathlib import Path
from typing import Any

from gateway.contracts.errors import SchemaMismatch
from trainer.json_lines import JsonLines


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """Numbers of one step; None where a step had nothing to measure. Made by `accounting.step_metrics`.

    policy_version: after the step. `_share`: in [0, 1]. Log-prob figures are in nats a token.

    Rollouts: rollouts, groups, reward_*, response_tokens_* (sampled in one rollout) and turns_mean are of the rollouts
    that entered the step; reward_std is the population's. zero_variance_groups: whose rewards are all equal.
    dropped_rollouts did not enter, dropped_by counts them by `Reason`. staleness: policy versions that trained
    tokens were behind.

    Tokens (I3): tokens_sampled of the rollouts that entered, by the gateway's account, is tokens_trained (labels that a
    loss was computed on) + tokens_left_out (by the gateway's pick or the trainer's masks). tokens_dropped: sampled in
    dropped rollouts. left_out_by and dropped_tokens_by count these tokens by reason.

    Update: updates is their number; loss and grad_norm (before clipping) are their means, learning_rate is the last's.
    clipped_low_share, clipped_high_share: tokens whose ratio was held at that bound; masked_share: tokens that the
    correction took out of the loss; kl_reference: to the reference policy. shares: the objective's other means.

    Rollout against trainer (I10), on the log-probs before the step's first update: kl_* is k3 of rollout‖train,
    extreme_share_* is F(2); `without_replay` is the same batch through the live router. With replay off, and for dense
    models, there is only `without_replay`. rows_*: routing rows, one for each position and routed layer; replayed of
    total, verified of replayed (their ids were used), fallback (to the live router) of total, flipped of compared (the
    live router chose another set of experts than was recorded).

    Costs: seconds by `Phase`; tokens_per_second: trained tokens over the seconds of forwards and updates.
    peak_rss_bytes: of this process since it began; peak_device_bytes: of accelerator memory in this step.
    """

    step: int
    policy_version: int
    rollouts: int
    groups: int
    zero_variance_groups: int
    dropped_rollouts: int
    reward_mean: float | None
    reward_std: float | None
    reward_min: float | None
    reward_max: float | None
    response_tokens_mean: float | None
    response_tokens_max: int | None
    turns_mean: float | None
    staleness_mean: float | None
    staleness_max: int | None
    tokens_sampled: int
    tokens_trained: int
    tokens_left_out: int
    tokens_dropped: int
    updates: int
    loss: float | None
    grad_norm: float | None
    learning_rate: float | None
    entropy: float | None
    clipped_low_share: float | None
    clipped_high_share: float | None
    masked_share: float | None
    kl_reference: float | None
    kl_with_replay: float | None
    kl_without_replay: float | None
    extreme_share_with_replay: float | None
    extreme_share_without_replay: float | None
    rows_total: int
    rows_replayed: int
    rows_verified: int
    rows_fallback: int
    rows_compared: int
    rows_flipped: int
    rows_verified_share: float | None
    rows_fallback_share: float | None
    rows_flipped_share: float | None
    tokens_per_second: float | None
    peak_rss_bytes: int
    peak_device_bytes: int | None
    seconds: Mapping[str, float] = field(default_factory=dict)
    dropped_by: Mapping[str, int] = field(default_factory=dict)
    dropped_tokens_by: Mapping[str, int] = field(default_factory=dict)
    left_out_by: Mapping[str, int] = field(default_factory=dict)
    shares: Mapping[str, float] = field(default_factory=dict)

    @property
    def seconds_total(self) -> float:
        """Of all phases."""
        return sum(self.seconds.values())


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Held-out tasks under one policy. `reward_mean` is over the rollouts that have a reward, None if there is none.

    pass_at_1: share of correct attempts, mean over tasks, with its 95 % bootstrap interval [ci_low, ci_high].
    verdicts: rollouts by kind of right and wrong. truncated_share: of rollouts cut at a limit of tokens or turns.
    """

    policy_version: int
    num_tasks: int
    num_failed: int
    reward_mean: float | None
    tokens_sampled: int
    pass_at_1: float | None = None
    ci_low: float | None = None
    ci_high: float | None = None
    truncated_share: float | None = None
    verdicts: Mapping[str, int] = field(default_factory=dict)


def figures(metrics: StepMetrics) -> dict[str, float]:
    """A step's numbers by name, those that were measured; mappings one level down: `seconds/rollout`.

    Fields that share their first word stand together: `rows_verified` is `rows/verified`.
    """
    values = _flat(asdict(metrics))
    del values["step"]
    return {_GROUPED.get(name, name): value for name, value in values.items()}


def evaluation_figures(evaluation: Evaluation) -> dict[str, float]:
    """An evaluation's numbers, under evaluation/."""
    return {f"evaluation/{name}": value for name, value in _flat(asdict(evaluation)).items()}


def token_mean(steps: Sequence[StepMetrics], name: str) -> float | None:
    """Mean of a field over the trained tokens of the steps that measured it; None if none did."""
    measured = [(getattr(step, name), step.tokens_trained) for step in steps if getattr(step, name) is not None]
    tokens = sum(weight for _, weight in measured)
    return sum(value * weight for value, weight in measured) / tokens if tokens else None


def _flat(values: Mapping[str, Any]) -> dict[str, float]:
    flat: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}/{inner}": number for inner, number in _flat(value).items()}
        elif value is not None:
            flat[name] = float(value)
    return flat


_FIRST_WORDS = Counter(f.name.partition("_")[0] for f in fields(StepMetrics))
_GROUPED = {
    f.name: f.name.replace("_", "/", 1) if _FIRST_WORDS[f.name.partition("_")[0]] > 1 and "_" in f.name else f.name
    for f in fields(StepMetrics)
}


class MetricsLog:
    """The file; every line is on disk when its method returns."""

    def __init__(self, file: Path) -> None:
        self._lines = JsonLines(file)

    def resume(self, *, step: int) -> None:
        """Drop a torn last line, and all from the first line after `step` on, whose checkpoint the run goes on from."""
        self._lines.replace(takewhile(lambda line: line.get("step", 0) <= step, self._lines.read()))

    def entries(self) -> Iterator[StepMetrics | Evaluation]:
        """All of the file, in order; raises SchemaMismatch where it is of another version of this program."""
        for line in self._lines.read():
            try:
                yield Evaluation(**line["evaluation"]) if "evaluation" in line else StepMetrics(**line)
            except TypeError as error:
                raise SchemaMismatch(
                    f"{self._lines.file} was written by another version of this program: {error}"
                ) from error

    def last_step(self) -> int:
        """The highest step that has a line, 0 without any."""
        return max((line["step"] for line in self._lines.read() if "step" in line), default=0)

    def is_evaluated(self, policy_version: int) -> bool:
        """Whether that policy's evaluation is in the file."""
        versions = (line.get("evaluation", {}).get("policy_version") for line in self._lines.read())
        return policy_version in versions

    def step(self, metrics: StepMetrics) -> None:
        """Append a step's line."""
        self._lines.append(asdict(metrics))

    def evaluation(self, evaluation: Evaluation) -> None:
        """Append an evaluation's line."""
        self._lines.append({"evaluation": asdict(evaluation)})
