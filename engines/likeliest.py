"""The likeliest tokens at each position, as an engine tells them, checked against the tokens that it sampled.

A row and its sampled token come from one distribution, so that a row of another position shows: the token must have the
same log-prob on both sides, and one that is not in the row must be less likely than all in it. What is fewer than asked
for stays fewer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from operator import attrgetter
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from gateway.contracts.errors import EngineProtocolError
from gateway.contracts.generation import TopLogprob

Row: TypeAlias = Iterable[tuple[int, float | None]] | None
"""(token id, log-prob) of one position in any order; a log-prob that is None is none."""

_TOLERANCE = 1e-3
_MAX_ID = np.iinfo(np.int32).max
_logprob_of = attrgetter("logprob")


def likeliest(
    rows: Sequence[Row], sampled: Sequence[int], logprobs: npt.NDArray[np.float32], *, most: int, named: str
) -> tuple[tuple[TopLogprob, ...], ...]:
    """Each row's `most` likeliest tokens, likeliest first; one row for each of the sampled tokens.

    logprobs: float32[n] of the sampled tokens. named: who answers what, for errors. Raises EngineProtocolError where
    rows and sampled tokens do not belong together.
    """
    if len(rows) != len(sampled):
        raise EngineProtocolError(f"{named}: likeliest tokens of {len(rows)} positions for {len(sampled)} tokens (I2)")
    known = [_known(row, named) for row in rows]
    # As float32, like the sampled tokens' own: the same token must not have two log-probs that differ in a digit.
    values = iter(np.array([logprob for row in known for _, logprob in row], dtype=np.float32).tolist())
    ordered = [
        sorted([TopLogprob(token_id, next(values)) for token_id, _ in row], key=_logprob_of, reverse=True)
        for row in known
    ]
    for row, token_id, logprob in zip(ordered, sampled, logprobs.tolist(), strict=True):
        _check_same_position(row, token_id, logprob, named)
    return tuple(tuple(row[:most]) for row in ordered)


def _known(row: Row, named: str) -> list[tuple[int, float]]:
    known = [(token_id, logprob) for token_id, logprob in row or () if logprob is not None and math.isfinite(logprob)]
    ids = {token_id for token_id, _ in known}
    are_ids = len(ids) == len(known) and set(map(type, ids)) <= {int}
    if not are_ids or (ids and not 0 <= min(ids) <= max(ids) <= _MAX_ID):
        raise EngineProtocolError(f"{named}: likeliest tokens with ids {[token_id for token_id, _ in known]}")
    return known


def _check_same_position(row: Sequence[TopLogprob], token_id: int, logprob: float, named: str) -> None:
    if not row or not math.isfinite(logprob):
        return
    told = dict(row).get(token_id)
    fits = logprob <= row[-1].logprob + _TOLERANCE if told is None else abs(told - logprob) <= _TOLERANCE
    if not fits:
        raise EngineProtocolError(
            f"{named}: likeliest tokens of another position: token {token_id} was sampled with log-prob {logprob:g}, "
            f"among the likeliest it has {told}, and the last of them has {row[-1].logprob:g} (I2)"
        )
