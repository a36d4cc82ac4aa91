"""Rollouts → StepBatch: choose, compare within groups, cut into minibatches; what is left out is counted by reason."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from gateway.contracts.errors import IntegrityError, TrainingError
from gateway.contracts.rollouts import FinishedRollout
from trainer.algorithms.advantages import Estimator, has_zero_variance
from trainer.algorithms.aggregation import Aggregation
from trainer.data.minibatches import Minibatch, Scored, cut_minibatches
from trainer.data.selection import Fit, Reason, select
from trainer.data.settings import BatchSettings, Unfit
from trainer.data.source import group_of
from trainer.replay.validate import RoutedLayers


@dataclass(frozen=True, slots=True, eq=False)
class StepBatch:
    """One step's samples by optimiser step, and the account of every sampled token (I3, checked at construction).

    rollouts, groups: that are in. tokens_sampled: by them; = tokens_trained + tokens_left_out, which left_out_by counts
    by reason. dropped_by: rollouts that are not in, by reason; dropped_tokens_by: the tokens sampled in those.
    zero_variance_groups: groups whose rewards are all equal, dropped or in (then they have advantage 0 by most
    estimators: their tokens count as trained, and teach nothing). staleness_mean, staleness_max: over trained tokens,
    in policy versions. rewards, response_tokens (sampled), turns: of each rollout that is in, in their order.
    """

    minibatches: tuple[Minibatch, ...]
    rollouts: int
    groups: int
    zero_variance_groups: int
    dropped_by: Mapping[str, int]
    dropped_tokens_by: Mapping[str, int]
    left_out_by: Mapping[str, int]
    tokens_sampled: int
    tokens_trained: int
    staleness_mean: float | None
    staleness_max: int | None
    rewards: tuple[float, ...]
    response_tokens: tuple[int, ...]
    turns: tuple[int, ...]

    def __post_init__(self) -> None:
        in_minibatches = sum(sample.layout.num_trained for part in self.minibatches for sample in part.samples)
        if not self.tokens_sampled == self.tokens_trained + self.tokens_left_out or in_minibatches != (
            self.tokens_trained
        ):
            raise IntegrityError(
                f"{self.tokens_sampled} tokens sampled, {self.tokens_trained} trained ({in_minibatches} in minibatches)"
                f" and {self.tokens_left_out} left out (I3)"
            )

    @property
    def dropped_rollouts(self) -> int:
        """For whatever reason."""
        return sum(self.dropped_by.values())

    @property
    def tokens_dropped(self) -> int:
        """Sampled in rollouts that are not in."""
        return sum(self.dropped_tokens_by.values())

    @property
    def tokens_left_out(self) -> int:
        """Sampled in rollouts that are in, and not trained, for whatever reason."""
        return sum(self.left_out_by.values())


def step_batch(
    rollouts: Sequence[FinishedRollout],
    *,
    routed: RoutedLayers | None,
    policy_version: int,
    settings: BatchSettings,
    estimator: Estimator,
    aggregate: Aggregation,
    seed: int,
    step: int,
) -> StepBatch:
    """The batch of step `step` (counted from 0) for the trainer's `policy_version`; the order of rollouts is kept.

    routed: whose recorded rows are replayed; None leaves recorded rows aside (replay off or r2, or a dense model).
    seed and step decide how groups are spread over minibatches, nothing else.
    """
    dropped: list[tuple[FinishedRollout, Reason]] = []
    kept: list[Fit] = []
    for rollout in rollouts:
        fit = select(rollout, routed=routed, policy_version=policy_version, settings=settings)
        if isinstance(fit, Fit):
            kept.append(fit)
        else:
            dropped.append((rollout, fit))
    flat = _flat_groups(kept)
    if settings.zero_variance is Unfit.DROP:
        dropped += [(fit.rollout, Reason.ZERO_VARIANCE) for fit in kept if group_of(fit.rollout) in flat]
        kept = [fit for fit in kept if group_of(fit.rollout) not in flat]
    scored = _scored(kept, estimator)
    staleness = policy_version - _trained_versions(kept)
    dropped_by, dropped_tokens_by = Counter[str](), Counter[str]()
    for rollout, reason in dropped:
        dropped_by[reason.value] += 1
        dropped_tokens_by[reason.value] += rollout.num_sampled_tokens
    return StepBatch(
        minibatches=cut_minibatches(scored, settings.minibatches, aggregate, seed=seed, step=step),
        rollouts=len(kept),
        groups=len({rollout.group for rollout in scored}),
        zero_variance_groups=len(flat),
        dropped_by=dict(sorted(dropped_by.items())),
        dropped_tokens_by=dict(sorted(dropped_tokens_by.items())),
        left_out_by=dict(sorted(sum((Counter(fit.left_out) for fit in kept), Counter[str]()).items())),
        tokens_sampled=sum(fit.rollout.num_sampled_tokens for fit in kept),
        tokens_trained=sum(fit.num_trained for fit in kept),
        staleness_mean=float(staleness.mean()) if len(staleness) else None,
        staleness_max=int(staleness.max()) if len(staleness) else None,
        rewards=tuple(_reward(fit) for fit in kept),
        response_tokens=tuple(fit.rollout.num_sampled_tokens for fit in kept),
        turns=tuple(_num_turns(fit.rollout) for fit in kept),
    )


def _flat_groups(kept: Sequence[Fit]) -> set[str]:
    """Names of the groups whose rewards are all equal."""
    rewards: defaultdict[str, list[float]] = defaultdict(list)
    for fit in kept:
        rewards[group_of(fit.rollout)].append(_reward(fit))
    return {group for group, values in rewards.items() if has_zero_variance(torch.tensor(values))}


def _scored(kept: Sequence[Fit], estimator: Estimator) -> list[Scored]:
    if not kept:
        return []
    index = {group: i for i, group in enumerate(dict.fromkeys(group_of(fit.rollout) for fit in kept))}
    groups = [index[group_of(fit.rollout)] for fit in kept]
    rewards_R = torch.tensor([_reward(fit) for fit in kept], dtype=torch.float32)
    advantages_R = estimator(rewards_R, torch.tensor(groups, dtype=torch.int64))
    if advantages_R.shape != rewards_R.shape or not bool(advantages_R.isfinite().all()):
        raise TrainingError(
            f"the advantage estimator gave {list(advantages_R.shape)} values for {len(kept)} rewards, or some that are "
            f"not finite: {advantages_R.tolist()} for rewards {rewards_R.tolist()}"
        )
    return [Scored(*values) for values in zip(kept, advantages_R.tolist(), groups, strict=True)]


def _reward(fit: Fit) -> float:
    reward = fit.rollout.finish.reward
    if reward is None:
        raise TrainingError(f"session {fit.rollout.session.session_id} has no reward and was selected all the same")
    return reward


def _trained_versions(kept: Sequence[Fit]) -> npt.NDArray[np.int64]:
    """The version of each trained token."""
    layouts = [sample.layout for fit in kept for sample in fit.samples]
    versions = [layout.policy_version[layout.trained] for layout in layouts]
    return np.concatenate([np.empty(0, np.int64), *versions])


def _num_turns(rollout: FinishedRollout) -> int:
    return len({turn.turn_id for segment in rollout.segments for turn in segment.turns})
