"""Rollout → Fit: whether it trains in this step, which of its tokens, and what of it was left out, by reason (I3).

Nothing is left out silently: a rollout is fit, or dropped for one reason; a token of a fit rollout is trained, or left
out for one reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from gateway.contracts.records import Outcome
from gateway.contracts.rollouts import FinishedRollout
from trainer.data.assemble import TrainSample, assemble
from trainer.data.layout import TokenLayout, head
from trainer.data.settings import BatchSettings, Unfit
from trainer.replay.validate import RoutedLayers

_WITHOUT_LESSON = frozenset({Outcome.FAILED, Outcome.ABANDONED})


class Reason(StrEnum):
    """Why a rollout does not train, or some of its tokens do not; the first that holds is counted.

    OUTCOME: it failed or was abandoned. NO_REWARD: none could be computed, which is not a reward of zero. INCOMPLETE:
    its record is not whole. TRUNCATED: it ran out of tokens or turns. OVERLONG: behind `max_tokens` of its sample.
    STALE: sampled by weights too old, or newer than the trainer's (another history). ROUTING: too many of a sample's
    routing rows are missing or invalid. ZERO_VARIANCE: all rewards of its group are equal.
    """

    OUTCOME = "outcome"
    NO_REWARD = "no_reward"
    INCOMPLETE = "incomplete"
    TRUNCATED = "truncated"
    OVERLONG = "overlong"
    STALE = "stale"
    ROUTING = "routing"
    ZERO_VARIANCE = "zero_variance"


@dataclass(frozen=True, slots=True, eq=False)
class Fit:
    """A rollout that is in the step, and what of it trains.

    samples: those with tokens that train. left_out: tokens by reason, those that a pick left out too.
    """

    rollout: FinishedRollout
    samples: tuple[TrainSample, ...]
    left_out: Mapping[str, int]

    @property
    def num_trained(self) -> int:
        """Tokens that train."""
        return sum(sample.layout.num_trained for sample in self.samples)


def select(
    rollout: FinishedRollout, *, routed: RoutedLayers | None, policy_version: int, settings: BatchSettings
) -> Fit | Reason:
    """What of one rollout trains at `policy_version`, or why nothing does.

    A truncated rollout that is masked is fit without samples: its reward still counts in its group. One of which age or
    length leaves nothing is dropped, and so is one that has a sample with too many unusable routing rows. A sample that
    is over its length by context alone is cut whatever the policy: nothing that trains is lost.
    """
    reason = _unfit(rollout, settings)
    if reason is not None:
        return reason
    left_out = Counter(rollout.pick.left_out_tokens)
    samples = assemble(rollout, routed)
    for reason, policy, trim in (
        (Reason.OVERLONG, settings.overlong, _within(settings.max_tokens)),
        (Reason.STALE, settings.stale, _fresh(policy_version, settings.max_staleness)),
    ):
        trimmed = tuple(replace(sample, layout=trim(sample.layout)) for sample in samples)
        num_lost = _num_trained(samples) - _num_trained(trimmed)
        samples = tuple(sample for sample in trimmed if sample.layout.num_trained)
        if num_lost and (policy is Unfit.DROP or not samples):
            return reason
        left_out[reason.value] += num_lost
    if routed is not None and any(_unusable_share(s.layout, routed) > settings.max_fallback_share for s in samples):
        return Reason.ROUTING
    if rollout.finish.outcome == Outcome.TRUNCATED and settings.truncated is Unfit.MASK:
        left_out[Reason.TRUNCATED.value] += _num_trained(samples)
        samples = ()
    return Fit(rollout, samples, +left_out)


def _unfit(rollout: FinishedRollout, settings: BatchSettings) -> Reason | None:
    if rollout.finish.outcome in _WITHOUT_LESSON:
        return Reason.OUTCOME
    if rollout.finish.reward is None:
        return Reason.NO_REWARD
    if not (rollout.session.complete or settings.train_incomplete):
        return Reason.INCOMPLETE
    if rollout.finish.outcome == Outcome.TRUNCATED and settings.truncated is Unfit.DROP:
        return Reason.TRUNCATED
    return None


def _within(max_tokens: int) -> Callable[[TokenLayout], TokenLayout]:
    """Cuts a sample to its first `max_tokens` tokens: they have one input position less. 0 cuts nothing."""
    if not max_tokens:
        return lambda layout: layout
    return lambda layout: head(layout, min(max_tokens - 1, layout.num_positions))


def _fresh(policy_version: int, max_staleness: int) -> Callable[[TokenLayout], TokenLayout]:
    """Takes the loss from tokens that are too old or of another history; they stay as context."""

    def trim(layout: TokenLayout) -> TokenLayout:
        staleness = policy_version - layout.policy_version
        is_fresh: npt.NDArray[np.bool_] = (staleness >= 0) & (staleness <= max_staleness)
        return replace(layout, trained=layout.trained & is_fresh)

    return trim


def _num_trained(samples: tuple[TrainSample, ...]) -> int:
    return sum(sample.layout.num_trained for sample in samples)


def _unusable_share(layout: TokenLayout, routed: RoutedLayers) -> float:
    """Of the (position, layer) pairs of a sample whose routing would be replayed: those for which there is no row."""
    if layout.routing is None:
        return 0.0
    return 1.0 - layout.routing.num_valid(routed.layers) / (layout.num_positions * len(routed.layers))
