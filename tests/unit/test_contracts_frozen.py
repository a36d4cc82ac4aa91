"""Dataclasses that are frozen for the type checker alone behave as frozen ones in all else."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest

from gateway.contracts.generation import Finish, FinishReason, GenerateChunk
from gateway.contracts.versions import VersionSpan


def test_equal_values_are_equal_and_have_one_hash() -> None:
    assert len({VersionSpan(0, 3, 1), VersionSpan(0, 3, 1), VersionSpan(0, 3, 2)}) == 2
    assert pickle.loads(pickle.dumps(Finish(FinishReason.STOP, 7))) == Finish(FinishReason.STOP, 7)
    assert replace(VersionSpan(0, 3, 1), stop=4) == VersionSpan(0, 4, 1)


def test_they_take_no_other_fields() -> None:
    with pytest.raises(AttributeError):
        VersionSpan(0, 3, 1).other = 1  # type: ignore[attr-defined]


def test_those_without_equality_are_compared_by_identity() -> None:
    assert GenerateChunk.__eq__ is object.__eq__
    assert GenerateChunk.__hash__ is object.__hash__
