"""Single values of engines' answers, read alike whichever engine gave them.

What is unusable is an EngineProtocolError.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from gateway.contracts.errors import EngineProtocolError


def release(version: Any) -> tuple[int, ...]:
    """(0, 5, 23) of "0.5.23.post1"; () where there is none."""
    return tuple(int(number) for number in re.findall(r"\d+", str(version or ""))[:3])


def new_token_ids(fresh: Sequence[int], *, named: str) -> npt.NDArray[np.int32]:
    """int32[n] of the ids that an event brought. named: who answers what."""
    try:
        token_ids = np.array(fresh, dtype=np.int32)
    except OverflowError as error:
        raise EngineProtocolError(f"{named}: token ids out of range") from error
    if len(fresh) and min(fresh) < 0:
        raise EngineProtocolError(f"{named}: token ids out of range")
    return token_ids


def spellings(raw: bytes, read: Callable[[Any], Any], *, engine_id: str) -> list[list[int]]:
    """The token ids of several texts; read: the parsed answer → a list of ids for each text."""
    try:
        return [[int(token_id) for token_id in ids] for ids in read(json.loads(raw))]
    except (KeyError, TypeError, ValueError) as error:
        raise EngineProtocolError(
            f"engine {engine_id}: unreadable token ids ({type(error).__name__}: {error})"
        ) from error
