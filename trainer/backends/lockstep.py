"""Lockstep: which rank runs which micro-batch, when all ranks must run the same number of them at the same time.

A round is one micro-batch on every rank, and lasts as long as its longest; so a round holds micro-batches of about one
size. Ranks without one in the last round run a padding micro-batch, which weighs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence


def deal(sizes: Sequence[int], num_ranks: int) -> tuple[tuple[int | None, ...], ...]:
    """For each rank, the micro-batches it runs, round by round, as indices into `sizes` (None: padding).

    Deterministic. Within a round the largest goes to the rank that has the fewest tokens so far.

    >>> deal([5, 9, 4], num_ranks=2)
    ((1, None), (0, 2))
    """
    rounds: list[list[int | None]] = [[] for _ in range(num_ranks)]
    load = [0] * num_ranks
    largest_first = sorted(range(len(sizes)), key=lambda index: -sizes[index])
    for start in range(0, len(largest_first), num_ranks):
        members: list[int | None] = list(largest_first[start : start + num_ranks])
        members += [None] * (num_ranks - len(members))
        lightest_first = sorted(range(num_ranks), key=lambda rank: load[rank])
        for rank, member in zip(lightest_first, members, strict=True):
            rounds[rank].append(member)
            load[rank] += 0 if member is None else sizes[member]
    return tuple(tuple(members) for members in rounds)
