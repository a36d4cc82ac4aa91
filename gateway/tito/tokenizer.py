"""The model's tokenizer as the gateway uses it: text to ids, ids to text, ids to bytes.

Reads tokenizer.json with the `tokenizers` library; needs no transformers. It never adds a token of its own (BOS comes
from the chat template). Everything here is about one text at a time; what a conversation becomes is `prompt`'s matter.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import cached_property
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from gateway.contracts.errors import ConfigurationError, IdentityMismatch
from gateway.contracts.fingerprints import in_order_of_ids, tokenizer_sha256
from gateway.contracts.generation import JsonValue, TokenIds
from gateway.tito.backends import (
    MAX_CHARACTERS,
    BackendChoice,
    BackendUnfit,
    Spell,
    candidates,
    first_difference,
    is_of_library,
    odd_characters,
    open_backend,
)
from gateway.tito.model_files import read_eos_entries, read_special_tokens
from gateway.tito.spellings import find_bridge, spelling_texts

_log = logging.getLogger(__name__)

_CHECKED_FIRST = 16
_CHECKED_EVERY = 64
_MAX_CHECKS = 16
"""Waiting at once."""

_NUM_PROBE_WORDS = 20_000
_MAX_ODD_CHARACTERS = 512
_MARKUP = re.compile(r"[<>\[\]|｜]")


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A token that is recognised in text before all else; `special` ones are control tokens, not language."""

    token_id: int
    text: str
    special: bool


@dataclass(frozen=True, slots=True)
class FoundBackend:
    """What came of a proof. reasons: why faster libraries are not taken, by name; odd_characters: those that the one
    that is taken reads otherwise."""

    name: str
    reasons: Mapping[str, str] = field(default_factory=dict)
    odd_characters: str = ""


@dataclass(frozen=True, slots=True)
class Backend:
    """The library that spells texts in ids. reasons: why faster ones do not, by name.

    num_odd_characters: those whose texts are left to `tokenizers`. num_checked: texts that were spelled again by it.
    num_alarms: libraries given up because of one.
    """

    name: str
    reasons: Mapping[str, str] = field(default_factory=dict)
    num_odd_characters: int = 0
    num_checked: int = 0
    num_alarms: int = 0


class _ByteStyle(Enum):
    BYTE_LEVEL = "byte_level"
    BYTE_FALLBACK = "byte_fallback"
    OTHER = "other"


class _TokenBytes(dict[int, bytes | None]):
    """Token id → its bytes, spelled when first asked for."""

    def __init__(self, spell: Callable[[int], bytes | None]) -> None:
        super().__init__()
        self._spell = spell

    def __missing__(self, token_id: int) -> bytes | None:
        self[token_id] = spelled = self._spell(int(token_id))
        return spelled


class ChatTokenizer:
    """A tokenizer.json with its end tokens.

    vocab_size counts added tokens. eos_token_ids: of generation_config.json, config.json and the tokenizer, in that
    order. Added tokens are numbered in the order of the ids that the file gives them, in whatever order they stand.
    bytes_by_id: `token_bytes` of every id, for those who ask for many.
    """

    def __init__(
        self, tokenizer_json: bytes, *, eos_token_ids: Iterable[int] = (), eos_token: str | None = None
    ) -> None:
        self.json = tokenizer_json
        description = _described(tokenizer_json)  # a tenth of a second for 150,000 words: parsed once, and not kept
        self._tokenizer = _plain_tokenizer(description, tokenizer_json)
        self._decoder: Mapping[str, JsonValue] = description.get("decoder") or {}
        model = description["model"]
        self._unknown_word: str | None = model.get("unk_token")
        self._unknown_id: int | None = model.get("unk_id")
        self.vocab_size: int = self._tokenizer.get_vocab_size(with_added_tokens=True)
        self.added_tokens: Mapping[int, AddedToken] = {
            token_id: AddedToken(token_id, token.content, token.special)
            for token_id, token in self._tokenizer.get_added_tokens_decoder().items()
        }
        own_eos = self._tokenizer.token_to_id(eos_token) if eos_token is not None else None
        known = dict.fromkeys([*eos_token_ids, *([own_eos] if own_eos is not None else [])])
        self.bytes_by_id: Mapping[int, bytes | None] = _TokenBytes(self._spelled_bytes)
        self.backend = Backend(BackendChoice.TOKENIZERS.value)
        self._spell: Spell | None = None
        self._is_asked = False
        self._num_spelled = 0
        self._num_characters = 0
        self._max_characters = sys.maxsize
        self._odd = re.compile("(?!)")
        self._to_check: deque[tuple[str, TokenIds]] = deque(maxlen=_MAX_CHECKS)
        self.eos_token_ids: tuple[int, ...] = tuple(token_id for token_id in known if 0 <= token_id < self.vocab_size)

    @classmethod
    def load(cls, model_path: Path) -> ChatTokenizer:
        """Read a model folder; raises ConfigurationError if the folder or its tokenizer.json is missing or broken."""
        if not model_path.is_dir():
            raise ConfigurationError(f"{model_path}: no such model folder")
        file = model_path / "tokenizer.json"
        try:
            content = file.read_bytes()
        except FileNotFoundError as error:
            raise ConfigurationError(
                f"{file}: no such file; the gateway needs the model's tokenizer.json and chat template"
            ) from error
        except OSError as error:
            raise ConfigurationError(f"{file}: cannot be read ({error.strerror})") from error
        try:
            return cls(
                content,
                eos_token_ids=read_eos_entries(model_path),
                eos_token=read_special_tokens(model_path).get("eos_token"),
            )
        except IdentityMismatch as error:
            raise ConfigurationError(f"{file}: {error.message}") from error

    def encode(self, text: str) -> TokenIds:
        """int32[T] ids of `text` from the start of a string; added tokens are recognised, none is added."""
        spell = self._spell
        if spell is None:
            self._is_asked = True
            return self.encode_surely(text)
        if not text.isascii() and self._odd.search(text) is not None:
            return self.encode_surely(text)
        try:
            ids = spell(text)
        except BaseException as error:
            if not is_of_library(error):
                raise
            ids = self.encode_surely(text)  # which refuses what is no text in its own words
            self._distrust(f"it refused {text[:60]!r}: {error}")
            return ids
        self._num_spelled += 1
        self._num_characters += len(text)
        if self._num_spelled <= _CHECKED_FIRST or self._num_spelled % _CHECKED_EVERY == 0:
            self._to_check.append((text, ids))
        return ids

    def prove_backend(self, choice: BackendChoice) -> None:
        """Spell with a faster library from now on, if one spells the probe set as `tokenizers` does; a second of work.

        Not for the event loop. Whatever comes of it is in `backend`. It leaves some 30 MB behind (`tito.proof`).
        """
        self.use_backend(self.find_backend(choice))
        if self._is_expected:
            self._open()

    def use_backend(self, found: FoundBackend) -> None:
        """Spell with what was found; `backend` says so. It is opened once it is asked for, by `check_backend`: it takes
        20 MB at least, which a gateway that nobody uses need not have."""
        odd, name = found.odd_characters, BackendChoice(found.name)
        if name is not BackendChoice.TOKENIZERS:
            self._max_characters = MAX_CHARACTERS.get(name, sys.maxsize)
            self._odd = re.compile(f"[{re.escape(odd)}]" if odd else "(?!)")
            self._is_asked = False
        self.backend = Backend(name.value, found.reasons, num_odd_characters=len(odd))

    def find_backend(self, choice: BackendChoice) -> FoundBackend:
        """The first library that spells the probe set as `tokenizers` does, or that itself."""
        reasons: dict[str, str] = {}
        wanted = candidates(choice)
        words = self._probe_words() if wanted else []
        added = [token.text for token in self.added_tokens.values()]
        for candidate in wanted:
            try:
                spell = open_backend(candidate, self.json)
            except BackendUnfit as error:
                reasons[candidate.value] = str(error)
                continue
            odd = odd_characters(spell, self.encode_surely, find_bridge(words))
            if len(odd) > _MAX_ODD_CHARACTERS:
                reasons[candidate.value] = f"{len(odd)} characters are something else to it"
                continue
            pattern = re.compile(f"[{re.escape(odd)}]" if odd else "(?!)")
            texts = (text for text in spelling_texts(words, added) if pattern.search(text) is None)
            difference = first_difference(spell, self.encode_surely, texts)
            if difference is None:
                return FoundBackend(candidate.value, reasons, odd)
            reasons[candidate.value] = difference
        return FoundBackend(BackendChoice.TOKENIZERS.value, reasons)

    @property
    def checks_due(self) -> bool:
        """Whether `check_backend` has something to do."""
        return bool(self._to_check) or self._must_open

    def check_backend(self) -> bool:
        """Have `tokenizers` spell again one sample of what the faster library spelled; a difference ends its use.

        Whether there was one. Not for the event loop: libraries take a moment to open.
        """
        if self._must_open:
            self._open()
        if not self._to_check:
            return False
        text, ids = self._to_check.popleft()
        if not np.array_equal(self.encode_surely(text), ids):
            self._distrust(f"it spelled {text[:60]!r} otherwise")
        self.backend = replace(self.backend, num_checked=self.backend.num_checked + 1)
        return True

    def _open(self) -> None:
        try:
            self._spell = open_backend(BackendChoice(self.backend.name), self.json)
        except BackendUnfit as error:
            self._distrust(str(error))
            return
        self._num_characters = 0
        _log.info("texts are spelled in ids by %s, which spells as tokenizers does", self.backend.name)

    @property
    def _is_expected(self) -> bool:
        """Whether a faster library is chosen and not open yet."""
        return self._spell is None and self.backend.name != BackendChoice.TOKENIZERS

    @property
    def _must_open(self) -> bool:
        """Whether the faster library is expected and asked for, or has spelled so much that its memory must go."""
        if self._spell is None:
            return self._is_asked and self._is_expected
        return self._num_characters > self._max_characters

    def encode_surely(self, text: str) -> TokenIds:
        """As `encode`, by `tokenizers` itself, whatever library serves: slow, for what is kept."""
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int32)

    def _distrust(self, why: str) -> None:
        """I1 holds all the same: what was sent is what is recorded."""
        self._spell = None
        self._to_check.clear()
        known = self.backend
        self.backend = replace(
            known,
            name=BackendChoice.TOKENIZERS.value,
            reasons={**known.reasons, known.name: why},
            num_alarms=known.num_alarms + 1,
        )
        _log.error("%s does not spell texts as tokenizers does and is not used any more: %s", known.name, why)

    def _probe_words(self) -> list[str]:
        """Words from everywhere in the vocabulary, without halves of characters."""
        step = max(1, self.vocab_size // _NUM_PROBE_WORDS)
        ids = (token_id for token_id in range(0, self.vocab_size, step) if token_id not in self.added_tokens)
        return [text for token_id in ids if (text := self.decode([token_id])) and "\ufffd" not in text]

    def encode_plain(self, text: str) -> TokenIds:
        """int32[T] ids of `text` in which nothing is a control token: what looks like one stays text.

        What a vocabulary has no word for at all is its unknown token, as in all text.
        """
        return self._plain_ids(text)

    def encode_after(self, text: str, *, plain: bool = False) -> TokenIds:
        """int32[T] ids of `text` that continues earlier text: without the prefix space that SentencePiece-style
        tokenizers put at the start of a string. `plain` as in `encode_plain`."""
        encode = self._plain_ids if plain else self.encode
        if not self._adds_prefix:
            return encode(text)
        newline, ids = encode("\n"), encode("\n" + text)
        return ids[len(newline) :] if np.array_equal(ids[: len(newline)], newline) else encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, special tokens kept; bytes that are no character come out as U+FFFD."""
        plain = ids.tolist() if isinstance(ids, np.ndarray) else [int(token_id) for token_id in ids]
        return str(self._tokenizer.decode(plain, skip_special_tokens=False))

    def token_text(self, token_id: int) -> str:
        """How the vocabulary spells one token (an added token: its text); "" for an id that it does not have."""
        text = self._tokenizer.id_to_token(token_id) if token_id >= 0 else None
        return text if text is not None else ""

    def token_id(self, text: str) -> int | None:
        """The id of the one added token spelled `text`, else None."""
        return self.ids_of_added.get(text)

    def token_bytes(self, token_id: int) -> bytes | None:
        """The bytes that a token stands for inside a text; None where the decoder does not work by bytes."""
        return self.bytes_by_id[token_id]

    @cached_property
    def works_by_bytes(self) -> bool:
        """Whether every token stands for bytes of its own, whatever stands beside it."""
        return self._byte_style is not _ByteStyle.OTHER

    @cached_property
    def fingerprint(self) -> str:
        """See `gateway.contracts.fingerprints`: the same for every spelling of the same tokenizer."""
        return tokenizer_sha256(json.loads(self.json))

    @cached_property
    def opening(self) -> str:
        """The text of the tokens that the tokenizer's own post-processor puts before a text (BOS), "" for none."""
        with_opening = self._tokenizer.encode("a", add_special_tokens=True).ids
        without = self._tokenizer.encode("a", add_special_tokens=False).ids
        starts = range(len(with_opening) - len(without) + 1)
        at = next((start for start in starts if with_opening[start : start + len(without)] == without), 0)
        return self.decode(with_opening[:at])

    @cached_property
    def _without_added(self) -> Tokenizer:
        description = _described(self.json) | {"added_tokens": []}
        return _plain_tokenizer(description, json.dumps(description).encode())

    @cached_property
    def ids_of_added(self) -> Mapping[str, int]:
        """Text of an added token → its id."""
        return {token.text: token.token_id for token in self.added_tokens.values()}

    @cached_property
    def _adds_prefix(self) -> bool:
        alone, after = self.encode("a"), self.encode("\na")
        return not np.array_equal(after[-len(alone) :], alone)

    @cached_property
    def _byte_style(self) -> _ByteStyle:
        kinds = {part.get("type") for part in self._decoder.get("decoders", [self._decoder])}
        if "ByteLevel" in kinds:
            return _ByteStyle.BYTE_LEVEL
        return _ByteStyle.BYTE_FALLBACK if kinds & {"ByteFallback", "Metaspace"} else _ByteStyle.OTHER

    def _spelled_bytes(self, token_id: int) -> bytes | None:
        added = self.added_tokens.get(token_id)
        if added is not None:
            return added.text.encode()
        if self._byte_style is _ByteStyle.OTHER:
            return None
        text = self.token_text(token_id)
        if self._byte_style is _ByteStyle.BYTE_LEVEL:
            return _byte_level_bytes(text)
        if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            return bytes.fromhex(text[3:5])
        return text.replace("▁", " ").encode()

    def _plain_ids(self, text: str) -> TokenIds:
        ids = self._ids_without_added(text)
        if not self._control_ids.intersection(ids):
            return np.array(ids, dtype=np.int32)
        # Unigram vocabularies hold control tokens as ordinary pieces; single characters have another spelling.
        pieces = [token_id for character in text for token_id in self._ids_without_added(character)]
        return np.array([token_id for token_id in pieces if token_id not in self._control_ids], dtype=np.int32)

    def _ids_without_added(self, text: str) -> list[int]:
        ids: list[int] = self._without_added.encode(text, add_special_tokens=False).ids
        return ids

    @cached_property
    def _control_ids(self) -> frozenset[int]:
        """Added tokens that are no language: special ones and markup, but not the word for the unknown."""
        word = self._unknown_word
        unknown = self._tokenizer.token_to_id(word) if word else self._unknown_id
        added = self.added_tokens.values()
        control = (token.token_id for token in added if token.special or _MARKUP.search(token.text))
        return frozenset(control) - {unknown}


def _described(tokenizer_json: bytes) -> dict[str, JsonValue]:
    """The parsed file; raises IdentityMismatch for what describes no tokenizer."""
    try:
        description: JsonValue = json.loads(tokenizer_json)
        if not isinstance(description, dict) or not isinstance(description.get("model"), dict):
            raise ValueError("it describes no model")
    except ValueError as error:
        raise IdentityMismatch(f"not a tokenizer description: {error}") from error
    return description


def _plain_tokenizer(description: Mapping[str, JsonValue], tokenizer_json: bytes) -> Tokenizer:
    """Raises IdentityMismatch for what the library cannot read (it raises bare `Exception`, for broken JSON too)."""
    try:
        ordered = in_order_of_ids(description)
    except (ValueError, KeyError, TypeError) as error:
        raise IdentityMismatch(f"not a tokenizer description: {error}") from error
    try:
        unchanged = ordered["added_tokens"] == (description.get("added_tokens") or [])
        tokenizer = Tokenizer.from_buffer(tokenizer_json if unchanged else json.dumps(ordered).encode())
    except Exception as error:  # the library's binding raises nothing narrower
        raise IdentityMismatch(f"not a tokenizer description: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _printable_bytes() -> dict[str, int]:
    """GPT-2's byte alphabet: bytes that print stand for themselves, the others for characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _printable_bytes()


def _byte_level_bytes(text: str) -> bytes:
    try:
        return bytes([_BYTE_OF_CHARACTER[character] for character in text])
    except KeyError:  # a token outside the alphabet stands for its own text, as the library's decoder has it
        return text.encode()
