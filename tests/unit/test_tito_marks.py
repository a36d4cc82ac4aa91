"""Marks that are put into texts to find them again: characters that the text has not."""

from __future__ import annotations

import itertools

import pytest

from gateway.tito.lookalikes import absent_characters

RANGES = ("\U0010e000", "\U0010d000", "\U000fe000", "\U000f8000")


@pytest.mark.parametrize("text", ["", "plain", "ünï – code", "emoji 😀", "halves \ud83d and \ude00", "\ud83d\ude00"])
def test_a_text_without_private_characters_gets_the_first_range(text: str) -> None:
    marks = absent_characters(text, 3)
    assert marks == "\U0010e000\U0010e001\U0010e002"


@pytest.mark.parametrize("around", ["", "plain", "ünï – code", "emoji 😀", "a half \ud83d"])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_range_that_a_text_has_something_of_is_not_taken(around: str, place: int) -> None:
    text = around
    for taken, free in itertools.pairwise(RANGES):
        text = f"{around}{text}{chr(ord(taken) + place)}{around}"
        marks = absent_characters(text, 3)
        assert marks is not None
        assert marks[0] == free
        assert not set(marks) & set(text)


def test_a_text_with_something_of_every_range_gets_no_marks() -> None:
    assert absent_characters("".join(RANGES), 3) is None
