"""Faster libraries that may spell texts in ids where they are proven equal to `tokenizers`, the format's own.

One is used only once it has spelled a probe set of the model's own vocabulary as `tokenizers` does (`spellings`), and
only as long as texts that are spelled again in operation come out alike. Texts with a character that the two take for
different things (a few hundred at most, all rare) are left to `tokenizers`. What differs elsewhere, raises or is not
installed is not used, and says why. Each library's API is met here and nowhere else.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from enum import StrEnum
from typing import Protocol

import numpy as np

from gateway.contracts.generation import TokenIds
from gateway.tito.spellings import around, character_groups

Spell = Callable[[str], TokenIds]
"""Text → int32[T] ids, added tokens recognised and none added; raises whatever a library raises."""


class BackendChoice(StrEnum):
    """The setting `tokenizer_backend`: `auto` takes the first faster library that is proven equal."""

    AUTO = "auto"
    TOKENIZERS = "tokenizers"
    FASTOKENS = "fastokens"
    GIGATOKEN = "gigatoken"
    KITOKEN = "kitoken"


class BackendUnfit(Exception):
    """A library cannot serve this tokenizer; the message says why."""


class _OpenBackend(Protocol):
    def __call__(self, tokenizer_json: bytes) -> Spell: ...


def candidates(choice: BackendChoice) -> tuple[BackendChoice, ...]:
    """The libraries to try, the fastest first; none where `tokenizers` itself is wanted."""
    if choice is BackendChoice.AUTO:
        return tuple(OPENERS)
    return () if choice is BackendChoice.TOKENIZERS else (choice,)


def open_backend(choice: BackendChoice, tokenizer_json: bytes) -> Spell:
    """One library with this tokenizer; raises BackendUnfit if it is not installed or cannot read it."""
    try:
        return OPENERS[choice](tokenizer_json)
    except ImportError as error:
        raise BackendUnfit("not installed") from error
    except BaseException as error:
        if not is_of_library(error):
            raise
        raise BackendUnfit(f"cannot read it: {_first_line(error)}") from error


def odd_characters(spell: Spell, reference: Spell, bridge: str) -> str:
    """The characters near which the two differ: libraries have Unicode's letters and spaces of different years.

    bridge: see `find_bridge`.
    """

    def differ(text: str) -> bool:
        return not _same(_outcome(reference, text), _outcome(spell, text))

    groups = (group for group in character_groups() if differ(" x ".join(around(one, bridge) for one in group)))
    return "".join(one for group in groups for one in group if differ(around(one, bridge)))


def first_difference(spell: Spell, reference: Spell, texts: Iterator[str]) -> str | None:
    """Why `spell` is not `reference`, in words with the text; None where all texts come out alike, refusals too."""
    for text in texts:
        expected, found = _outcome(reference, text), _outcome(spell, text)
        if not _same(expected, found):
            return f"{_cut(text)!r} is {_shown(expected)}, not {_shown(found)}"
    return None


def is_of_library(error: BaseException) -> bool:
    """Whether a library may have raised it: they raise what they like, and their panics are no `Exception` at all."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def _same(one: TokenIds | str, other: TokenIds | str) -> bool:
    """What one refuses (a lone surrogate), the other must refuse too; each has its own words for it."""
    if isinstance(one, str) or isinstance(other, str):
        return isinstance(one, str) and isinstance(other, str)
    return np.array_equal(one, other)


def _outcome(spell: Spell, text: str) -> TokenIds | str:
    """Ids, or how the library refused."""
    try:
        return spell(text)
    except BaseException as error:
        if not is_of_library(error):
            raise
        return f"refused ({_first_line(error)})"


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _cut(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "…"


def _shown(outcome: TokenIds | str) -> str:
    return outcome if isinstance(outcome, str) else _cut(str(outcome.tolist()))


def _fastokens(tokenizer_json: bytes) -> Spell:
    """fastokens 0.3: ids of a batch come as bytes of uint32, without an object for each."""
    library = importlib.import_module("fastokens._native")
    encode = library.Tokenizer.from_json_str(tokenizer_json.decode()).encode_batch_flat

    def spell(text: str) -> TokenIds:
        return np.frombuffer(encode([text])[0], dtype=_IDS)

    return spell


def _gigatoken(tokenizer_json: bytes) -> Spell:
    """gigatoken 0.10: byte-level BPE with a pattern that it knows, and BPE with byte fallback; ids are uint32."""
    encode = importlib.import_module("gigatoken").Tokenizer.from_json(tokenizer_json).encode

    def spell(text: str) -> TokenIds:
        ids: TokenIds = encode(text).view(np.int32)
        return ids

    return spell


def _kitoken(tokenizer_json: bytes) -> Spell:
    """kitoken 0.11: `True` for special tokens in the text as well."""
    encode = importlib.import_module("kitoken").Kitoken.from_tokenizers(tokenizer_json).encode

    def spell(text: str) -> TokenIds:
        return np.array(encode(text, True), dtype=np.int32)

    return spell


MAX_CHARACTERS: Mapping[BackendChoice, int] = {BackendChoice.GIGATOKEN: 32 * 2**20}
"""Of text, after which a library is opened anew: gigatoken remembers every word that it has met (some six bytes for
each byte of new words, without bound). fastokens' memory of words stops growing at some 270 MB."""

_IDS = np.dtype("<i4")
OPENERS: Mapping[BackendChoice, _OpenBackend] = {
    BackendChoice.FASTOKENS: _fastokens,
    BackendChoice.GIGATOKEN: _gigatoken,
    BackendChoice.KITOKEN: _kitoken,
}
"""In the order of `auto`: the quickest at short texts first; of two equals, the one whose memory is bounded."""
