"""Rollouts with advantages → Minibatch: what each optimiser step of a training step works on.

Whole groups go to one minibatch, as their advantages are relative to each other; weights have the minibatch's own
denominators, over whole rollouts (all segments of one together).
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from gateway.contracts.errors import TrainingError
from trainer.algorithms.aggregation import Aggregation
from trainer.data.assemble import TrainSample
from trainer.data.packing import SampleWeights
from trainer.data.selection import Fit


@dataclass(frozen=True, slots=True, eq=False)
class Minibatch:
    """What one optimiser step trains on: samples, and what each counts with."""

    samples: tuple[TrainSample, ...]
    weights: tuple[SampleWeights, ...]


class Scored(NamedTuple):
    """A rollout, its advantage and the index of its group."""

    fit: Fit
    advantage: float
    group: int


def cut_minibatches(
    scored: Sequence[Scored], number: int, aggregate: Aggregation, *, seed: int, step: int
) -> tuple[Minibatch, ...]:
    """At most `number` minibatches of about equally many trained tokens, one of all rollouts in the given order.

    With several, `seed` and `step` decide which groups go together and which minibatch comes first; the same numbers
    give the same cut. Fewer where fewer groups have a token to train; rollouts without one are in none.
    """
    members: defaultdict[int, list[int]] = defaultdict(list)
    for i, rollout in enumerate(scored):
        if rollout.fit.num_trained:
            members[rollout.group].append(i)
    bins = _balanced(
        {group: sum(scored[i].fit.num_trained for i in indices) for group, indices in members.items()},
        min(number, len(members)),
        random.Random(f"{seed}:{step}"),
    )
    return tuple(
        _minibatch([scored[i] for i in sorted(i for group in groups for i in members[group])], aggregate)
        for groups in bins
    )


def _balanced(tokens_of_group: dict[int, int], number: int, randomness: random.Random) -> list[list[int]]:
    """Largest group first, each to the bin with the least; ties and the order of bins are up to `randomness`."""
    groups = list(tokens_of_group)
    if number <= 1:
        return [groups] if groups else []
    randomness.shuffle(groups)
    bins: list[list[int]] = [[] for _ in range(number)]
    load = [0] * number
    for group in sorted(groups, key=lambda group: -tokens_of_group[group]):
        lightest = min(range(number), key=lambda b: (load[b], len(bins[b])))
        bins[lightest].append(group)
        load[lightest] += tokens_of_group[group]
    randomness.shuffle(bins)
    return bins


def _minibatch(scored: Sequence[Scored], aggregate: Aggregation) -> Minibatch:
    weights = aggregate([rollout.fit.num_trained for rollout in scored])
    if len(weights) != len(scored):
        raise TrainingError(f"the aggregation gave {len(weights)} weights for {len(scored)} rollouts")
    return Minibatch(
        samples=tuple(sample for rollout in scored for sample in rollout.fit.samples),
        weights=tuple(
            SampleWeights(rollout.advantage, weight)
            for rollout, weight in zip(scored, weights, strict=True)
            for _ in rollout.fit.samples
        ),
    )
