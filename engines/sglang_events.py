"""One event of SGLang's `/generate` stream out of JSON, for what it adds to those before it.

A short event is parsed in one call. One that says many tokens again must not cost what was sent before: of its arrays
only the new end is parsed, the rest is compared as bytes or passed over, and what we do not know stays text, which is
parsed when the answer is over.

    event ─▶ find what is known of each array ─▶ cut it out ─▶ parse the rest ─▶ as many items as are new? ─▶ keep
               └─ nowhere, or not so many: parse the arrays as a whole, and note where they end ◀─┘
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeAlias

import msgspec

Fields: TypeAlias = dict[str, Any]
"""An object's values; bytes are JSON that was not parsed."""

_WORTH_CUTTING = 48
"""Fewer tokens are parsed again as soon as they are cut out."""

_SHORT_BYTES = 2**14
"""What is parsed as a whole: in more than that, something may be long that nobody here reads."""

OUTPUT_IDS = "output_ids"
LOGPROBS = "output_token_logprobs"
TOP_LOGPROBS = "output_top_logprobs"
READ_AT_END = ("prompt_tokens", "weight_version", "weight_versions", "num_retractions", "cached_tokens")
_READ = frozenset(
    (OUTPUT_IDS, LOGPROBS, TOP_LOGPROBS, *READ_AT_END, "completion_tokens", "error", "finish_reason", "routed_experts")
)

_value = msgspec.json.Decoder().decode
_texts = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_NO_TEXT = msgspec.Raw()


class _MetaTexts(msgspec.Struct):
    """The arrays of `meta_info` as they are spelled."""

    output_token_logprobs: msgspec.Raw = _NO_TEXT
    output_top_logprobs: msgspec.Raw = _NO_TEXT


class _Texts(msgspec.Struct):
    """Those of an event."""

    output_ids: msgspec.Raw
    meta_info: _MetaTexts


_arrays_of = msgspec.json.Decoder(_Texts).decode


class EventParser:
    """The events of one stream, one after the other; which tokens are new is for who reads them to tell.

    with_top_logprobs: whether the likeliest tokens are read. worth_cutting: so many tokens again.
    """

    __slots__ = ("_arrays", "_tells_all", "_with_top_logprobs", "_worth_cutting")

    def __init__(self, *, with_top_logprobs: bool, worth_cutting: int = _WORTH_CUTTING) -> None:
        self._with_top_logprobs = with_top_logprobs
        self._worth_cutting = max(1, worth_cutting)
        self._tells_all = True
        """Whether events say all tokens again; taken for granted until one of many tokens does not."""
        self._arrays: tuple[_Growing, ...] = ()
        """Of a stream that has become long; most never do."""

    def parse(self, data: bytes, num_seen: int) -> Fields:
        """An event, whose arrays hold the items behind the `num_seen` that are known at least, and perhaps all.

        Raises msgspec.DecodeError for what is no JSON, and as reading anything but an object may.
        """
        if num_seen < self._worth_cutting or not self._tells_all:
            return _event(data)
        return self._end(data, num_seen) or self._whole(data)

    def _end(self, data: bytes, num_seen: int) -> Fields | None:
        """An event without what was said before; None where that cannot be told apart."""
        parts = [array.known_part(data) for array in self._arrays]
        if not parts or parts[0] is None:
            return None
        short = _without([part for part in parts if part is not None], data)
        with suppress(msgspec.DecodeError, LookupError, TypeError):
            event, texts = _event(short), _arrays_of(short)
            meta = event["meta_info"]
            number = meta["completion_tokens"] - num_seen
            items = (event[OUTPUT_IDS], meta.get(LOGPROBS), meta.get(TOP_LOGPROBS))
            for array, part, left in zip(self._arrays, parts, items, strict=False):
                if part is not None and (len(left) != number or short.count(array.key) != 1):
                    return None
            self._keep(parts, texts)
            return event
        return None

    def _keep(self, parts: Sequence[tuple[int, int] | None], texts: _Texts) -> None:
        told = (texts.output_ids, texts.meta_info.output_token_logprobs, texts.meta_info.output_top_logprobs)
        for array, part, text in zip(self._arrays, parts, told, strict=False):
            if part is not None:
                array.keep(part[0], bytes(text))

    def _whole(self, data: bytes) -> Fields:
        """An event out of which nothing can be cut; out of the next one it may."""
        event = _event(data)
        if "error" in event:
            return event
        texts = _arrays_of(data)
        self._tells_all = len(event[OUTPUT_IDS]) == event["meta_info"]["completion_tokens"]
        told = [(LOGPROBS, texts.meta_info.output_token_logprobs)]
        if self._with_top_logprobs:
            told.append((TOP_LOGPROBS, texts.meta_info.output_top_logprobs))
        self._arrays = (_GrowingIds(bytes(texts.output_ids)), *(_Growing(name, bytes(text)) for name, text in told))
        return event


def _event(data: bytes) -> Fields:
    """An event parsed; a long one as far as it is read."""
    event: Fields
    if len(data) <= _SHORT_BYTES:
        event = _value(data)
        return event
    top = _texts(data)
    event = _with_values(top)
    if "meta_info" in top:
        event["meta_info"] = _with_values(_texts(top["meta_info"]))
    return event


class _Growing:
    """An array that a stream says from its start with every event: where it stands, and how far it is known.

    told: all of it, as an event spells it.
    """

    __slots__ = ("_at", "_stop", "key")

    def __init__(self, name: str, told: bytes) -> None:
        self.key = b'"%b":[' % name.encode()
        self._at = 0
        """Not before here it begins in the next event: in the last one it began here, and events grow."""
        self._stop = len(told) - 1
        """Where it ended, from its bracket on; there a cumulative one goes on."""

    def known_part(self, data: bytes) -> tuple[int, int] | None:
        """Where in an event the part of it stands that was there before; None where that cannot be told.

        No quotation mark is in it, so no other field begins there; where the rest is JSON, has the array's name once,
        and the array holds just the new items, it was cut out of the array.
        """
        first = data.find(self.key, self._at) + len(self.key)
        end = first + self._stop - 1
        if first < len(self.key) or end <= first or not self._is_known(data, first, end):
            return None
        match data[end : end + 1]:
            case b",":
                return first, end + 1
            case b"]":
                return first, end
        return None

    def _is_known(self, data: bytes, first: int, end: int) -> bool:
        return data.find(b'"', first, end) < 0

    def keep(self, first: int, left: bytes) -> None:
        """What was left is what is new: it was cut where it should be, from `first` on."""
        self._at = first - len(self.key)
        if len(left) > len(b"[]"):
            self._add(left)

    def _add(self, told: bytes) -> None:
        self._stop += len(told) - 1  # its brackets are not added, a comma is


class _GrowingIds(_Growing):
    """The output ids, which an event must say as they were said before (I2)."""

    __slots__ = ("_known",)

    def __init__(self, told: bytes) -> None:
        super().__init__(OUTPUT_IDS, told)
        self._known = bytearray(told[:-1])

    def _is_known(self, data: bytes, first: int, end: int) -> bool:
        return data.startswith(self._known, first - 1)

    def _add(self, told: bytes) -> None:
        super()._add(told)
        self._known += b","
        self._known += told[1:-1]


def _without(parts: Sequence[tuple[int, int]], data: bytes) -> bytes:
    """Data without some parts of it, none of which overlap."""
    kept, behind = [], 0
    for start, stop in sorted(parts):
        kept.append(data[behind:start])
        behind = stop
    kept.append(data[behind:])
    return b"".join(kept)


def _with_values(texts: Mapping[str, msgspec.Raw]) -> Fields:
    """What is read of an object parsed, and the rest as bytes of its own: a part of an event would keep all of it."""
    return {name: _value(text) if name in _READ else bytes(text) for name, text in texts.items()}
