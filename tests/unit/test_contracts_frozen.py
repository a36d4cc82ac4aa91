"""Dataclasses that are frozen for the type checker alone behave as frozen ones in all else."""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pytest

from gateway.contracts.generation import Finish, FinishReason, GenerateChunk
from gateway.contracts.records import TurnRecord
from gateway.contracts.versions import VersionSpan


def test_equal_values_are_equal_and_have_one_hash() -> None:
    assert len({VersionSpan(0, 3, 1), VersionSpan(0, 3, 1), VersionSpan(0, 3, 2)}) == 2
    assert pickle.loads(pickle.dumps(Finish(FinishReason.STOP, 7))) == Finish(FinishReason.STOP, 7)
    assert replace(VersionSpan(0, 3, 1), stop=4) == VersionSpan(0, 4, 1)


def test_they_take_no_other_fields() -> None:
    with pytest.raises(AttributeError):
        VersionSpan(0, 3, 1).other = 1  # type: ignore[attr-defined]


def test_those_without_equality_are_compared_by_identity() -> None:
    assert TurnRecord.__eq__ is object.__eq__
    assert TurnRecord.__hash__ is object.__hash__


def test_structs_without_equality_are_compared_by_identity_too() -> None:
    """Arrays have no one answer to whether they are equal."""
    one, other = (GenerateChunk(np.zeros(2, np.int32), np.zeros(2, np.float32)) for _ in range(2))
    assert one != other
    assert len({one, other, one}) == 2
    with pytest.raises(AttributeError):
        one.token_ids = other.token_ids  # type: ignore[misc]
