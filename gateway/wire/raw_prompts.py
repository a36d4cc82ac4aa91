"""Prompts without messages, as completions and SGLang's /generate spell them: texts, ids, or lists of either."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import numpy as np

from gateway.contracts.errors import InvalidRequest
from gateway.contracts.generation import JsonValue, TokenIds
from gateway.wire.fields import kind_of
from gateway.wire.request import RawPrompt

MAX_PROMPTS = 1024
"""In one request."""

_MAX_ID = np.iinfo(np.int32).max


def token_ids(value: JsonValue, name: str) -> TokenIds:
    """int32[P]; raises InvalidRequest naming the element that is no token id."""
    if not isinstance(value, list):
        raise InvalidRequest(f"{name}: expected a list of token ids, got {kind_of(value)}")
    if not value:
        raise InvalidRequest(f"{name}: is empty; a prompt needs at least one token")
    if set(map(type, value)) == {int}:  # nearly always, and of an agent that keeps its ids there are many
        with suppress(OverflowError):
            ids = np.array(value, dtype=np.int32)
            if ids.min() >= 0:
                return ids
    raise InvalidRequest(f"{name}{_first_wrong(value)}")


def _first_wrong(value: Sequence[JsonValue]) -> str:
    """Which element is no token id, and why not."""
    i, one = next((i, one) for i, one in enumerate(value) if type(one) is not int or not 0 <= one <= _MAX_ID)
    if type(one) is not int:
        return f"[{i}]: expected a token id, got {kind_of(one)}"
    return f"[{i}]: {one} is out of vocabulary"


def raw_prompts(value: JsonValue, name: str, *, adds_special_tokens: bool) -> tuple[RawPrompt, ...]:
    """The prompts of a field that holds a text, ids, or a list of texts or of lists of ids."""
    if isinstance(value, str):
        return (RawPrompt(text=value, adds_special_tokens=adds_special_tokens),)
    if not isinstance(value, list):
        raise InvalidRequest(f"{name}: expected a text, token ids, or a list of either, got {kind_of(value)}")
    if not value:
        raise InvalidRequest(f"{name}: is empty")
    if not isinstance(value[0], str | list):
        return (RawPrompt(token_ids=token_ids(value, name)),)
    if len(value) > MAX_PROMPTS:
        raise InvalidRequest(f"{name}: at most {MAX_PROMPTS} prompts, got {len(value)}")
    return tuple(
        _element(item, f"{name}[{i}]", adds_special_tokens=adds_special_tokens) for i, item in enumerate(value)
    )


def is_batch(value: JsonValue) -> bool:
    """Whether a prompt's field holds a list of prompts, be it of one."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], str | list)


def _element(item: JsonValue, name: str, *, adds_special_tokens: bool) -> RawPrompt:
    if isinstance(item, str):
        return RawPrompt(text=item, adds_special_tokens=adds_special_tokens)
    return RawPrompt(token_ids=token_ids(item, name))
