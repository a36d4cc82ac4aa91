"""Rollouts → StepBatch: which rollouts a step trains on (each exclusion counted), their advantages, their samples."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import torch

from gateway.contracts.records import Outcome
from gateway.contracts.rollouts import FinishedRollout
from trainer.algorithms.advantages import dr_grpo, grpo, has_zero_variance
from trainer.algorithms.aggregation import token_weights
from trainer.data.assemble import TrainSample, assemble
from trainer.data.packing import SampleWeights
from trainer.data.source import group_of
from trainer.replay.validate import RoutedLayers

_WITHOUT_LESSON = frozenset({Outcome.FAILED, Outcome.ABANDONED})


class DropReason(StrEnum):
    """Why a rollout does not train; the first that holds is counted."""

    NO_REWARD = "no_reward"
    OUTCOME = "outcome"
    INCOMPLETE = "incomplete"
    STALE = "stale"


@dataclass(frozen=True, slots=True, eq=False)
class Minibatch:
    """What one optimiser step trains on: samples, and what each counts with."""

    samples: tuple[TrainSample, ...]
    weights: tuple[SampleWeights, ...]


@dataclass(frozen=True, slots=True, eq=False)
class StepBatch:
    """One step's samples by optimiser step; a rollout's segments share its advantage and stay together.

    tokens_sampled = tokens picked for training + tokens_left_out, of the rollouts that are in; tokens_dropped are those
    sampled in rollouts that are not, dropped_by counts these by reason. staleness_mean and staleness_max are over the
    picked tokens, in policy versions. rewards, response_tokens (sampled) and turns: of each rollout that is in.
    Groups whose rewards are all equal stay in with advantage 0: their tokens count as trained, and teach nothing.
    """

    minibatches: tuple[Minibatch, ...]
    rollouts: int
    groups: int
    zero_variance_groups: int
    dropped_by: Mapping[str, int]
    tokens_sampled: int
    tokens_left_out: int
    tokens_dropped: int
    staleness_mean: float | None
    staleness_max: int | None
    rewards: tuple[float, ...]
    response_tokens: tuple[int, ...]
    turns: tuple[int, ...]

    @property
    def dropped_rollouts(self) -> int:
        """For whatever reason."""
        return sum(self.dropped_by.values())


def step_batch(
    rollouts: Sequence[FinishedRollout],
    *,
    routed: RoutedLayers | None,
    policy_version: int,
    max_staleness: int,
    normalize: bool = True,
    train_incomplete: bool = False,
) -> StepBatch:
    """Choose, score and assemble; the order of rollouts is kept.

    Left out by policy: a rollout without reward (which is not a reward of zero), one that failed or was abandoned, one
    whose record is not complete (unless `train_incomplete`), and one with a token older than `max_staleness` versions
    (or newer than the trainer: sampled from another history).
    """
    reasons = [
        _drop_reason(rollout, policy_version, max_staleness, train_incomplete=train_incomplete) for rollout in rollouts
    ]
    kept = [rollout for rollout, reason in zip(rollouts, reasons, strict=True) if reason is None]
    advantage_of, zero_variance_groups, groups = _advantages(kept, normalize=normalize)
    samples = [(sample, advantage_of[i]) for i, rollout in enumerate(kept) for sample in assemble(rollout, routed)]
    tokens_sampled = sum(rollout.num_sampled_tokens for rollout in kept)
    staleness = np.concatenate([np.empty(0), *(policy_version - _trained_versions(rollout) for rollout in kept)])
    return StepBatch(
        minibatches=(_minibatch(samples),) if samples else (),
        rollouts=len(kept),
        groups=groups,
        zero_variance_groups=zero_variance_groups,
        dropped_by=dict(sorted(Counter(reason.value for reason in reasons if reason is not None).items())),
        tokens_sampled=tokens_sampled,
        tokens_left_out=sum(rollout.pick.num_left_out_tokens for rollout in kept),
        tokens_dropped=sum(rollout.num_sampled_tokens for rollout in rollouts) - tokens_sampled,
        staleness_mean=float(staleness.mean()) if len(staleness) else None,
        staleness_max=int(staleness.max()) if len(staleness) else None,
        rewards=tuple(rollout.finish.reward for rollout in kept if rollout.finish.reward is not None),
        response_tokens=tuple(rollout.num_sampled_tokens for rollout in kept),
        turns=tuple(_num_turns(rollout) for rollout in kept),
    )


def _num_turns(rollout: FinishedRollout) -> int:
    """Turns of all segments; a prefix that segments share counts once."""
    return len({turn.turn_id for segment in rollout.segments for turn in segment.turns})


def _minibatch(samples: Sequence[tuple[TrainSample, float]]) -> Minibatch:
    num_trained = [sample.layout.num_trained for sample, _ in samples]
    weights = token_weights(num_trained)
    return Minibatch(
        samples=tuple(sample for sample, _ in samples),
        weights=tuple(SampleWeights(advantage, w) for (_, advantage), w in zip(samples, weights, strict=True)),
    )


def _drop_reason(
    rollout: FinishedRollout, policy_version: int, max_staleness: int, *, train_incomplete: bool
) -> DropReason | None:
    if rollout.finish.outcome in _WITHOUT_LESSON:
        return DropReason.OUTCOME
    if rollout.finish.reward is None:
        return DropReason.NO_REWARD
    if not (rollout.session.complete or train_incomplete):
        return DropReason.INCOMPLETE
    staleness = policy_version - _trained_versions(rollout)
    is_fresh = ((staleness >= 0) & (staleness <= max_staleness)).all()
    return None if is_fresh else DropReason.STALE


def _trained_versions(rollout: FinishedRollout) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """int64: the version of each trained token."""
    versions = [segment.policy_version[segment.loss_mask] for segment in rollout.segments]
    return np.concatenate([np.empty(0, np.int64), *versions])


def _advantages(rollouts: Sequence[FinishedRollout], *, normalize: bool) -> tuple[dict[int, float], int, int]:
    """Advantage by index in `rollouts`, how many groups have equal rewards, and how many groups there are."""
    members: defaultdict[str, list[int]] = defaultdict(list)
    for i, rollout in enumerate(rollouts):
        members[group_of(rollout)].append(i)
    advantage_of: dict[int, float] = {}
    zero_variance_groups = 0
    for indices in members.values():
        rewards_G = torch.tensor([rollouts[i].finish.reward for i in indices], dtype=torch.float32)
        zero_variance_groups += has_zero_variance(rewards_G)
        estimate = grpo if normalize else dr_grpo
        advantage_of |= dict(zip(indices, estimate(rewards_G, torch.zeros(len(indices))).tolist(), strict=True))
    return advantage_of, zero_variance_groups, len(members)
