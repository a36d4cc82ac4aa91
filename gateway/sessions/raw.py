"""Raw prompts, ids or a text without messages, in the turn tree: they attach by tokens, never by messages (I1).

    ids  ──▶ the deepest turn whose whole recorded path they begin with ──▶ what follows is added
    text ──▶ the same by the paths' decoded text: recorded ids stay, only what follows is encoded

A prompt that begins with no recorded path opens a new segment; none is refused but for ids that the model does not
have. Chats and raw prompts share the tree: a raw prompt may extend a chat's turn, but no chat finds a raw turn.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple, TypeAlias

import numpy as np

from gateway.contracts.errors import InvalidRequest
from gateway.contracts.generation import JsonValue, TokenIds
from gateway.contracts.records import MatchTier, SegmentReason, TurnRecord
from gateway.sessions.attach import RAW, Place
from gateway.sessions.tree import Node, TurnTree
from gateway.tito.tokenizer import ChatTokenizer
from gateway.wire.request import RawPrompt

_CONTEXT_TOKENS = 8
"""Decoded before what a turn adds, for decoders that look back; no character has more tokens."""

FIELDS_WITH_IDS = frozenset(("stop_token_ids", "logit_bias"))
"""Of sampling; `check_sampling_ids` looks at them."""

_HALF_CHARACTER = "\ufffd"


@dataclass(frozen=True, slots=True, eq=False)
class RawPlace:
    """Where a raw prompt stands, and what of it is not recorded yet: int32[A], or a text that is to be encoded."""

    place: Place
    added: TokenIds | str

    def added_ids(self, tokenizer: ChatTokenizer) -> TokenIds:
        """int32[A]; encodes a text, so that a long one is better not encoded on the event loop."""
        if not isinstance(self.added, str):
            return self.added
        return tokenizer.encode(self.added) if self.place.parent is None else tokenizer.encode_after(self.added)

    def message(self, tokenizer: ChatTokenizer) -> dict[str, JsonValue]:
        """What the record says was added, for people: the tokens are the truth."""
        if isinstance(self.added, str):
            return {"role": "prompt", "content": self.added}
        text = _text_after(_last_ids(self.place.parent), self.added, tokenizer)
        return {"role": "prompt", "content": tokenizer.decode(self.added) if text is None else text}


def attach_raw(tree: TurnTree, paths: TokenPaths, prompt: RawPrompt, tokenizer: ChatTokenizer) -> RawPlace:
    """Find the deepest turn that the prompt extends, in one pass over the prompt."""
    added: TokenIds | str
    if prompt.token_ids is not None:
        found = paths.by_ids(prompt.token_ids)
        added = prompt.token_ids if found is None else prompt.token_ids[found.num_tokens :]
    else:
        text = _as_read(prompt, tokenizer)
        found, added = paths.by_text(text, tokenizer)
    if found is not None:
        return RawPlace(Place(found, found, 0, MatchTier.EXACT, None), added)
    reason = SegmentReason.NO_MATCH if len(tree) else SegmentReason.FIRST
    return RawPlace(Place(None, None, 0, MatchTier.NONE, reason), added)


def check_ids(token_ids: TokenIds, *, vocab_size: int) -> None:
    """Raise InvalidRequest for ids that the model does not have: one of them kills some engines."""
    outside = np.flatnonzero((token_ids < 0) | (token_ids >= vocab_size))
    if len(outside):
        at = int(outside[0])
        raise InvalidRequest(
            f"the prompt's token id {int(token_ids[at])} (at index {at}) is out of vocabulary: "
            f"ids are in [0, {vocab_size})"
        )
    if not len(token_ids):
        raise InvalidRequest("the prompt is empty: it needs at least one token")


def check_sampling_ids(sampling: Mapping[str, JsonValue], *, vocab_size: int) -> None:
    """Raise InvalidRequest for ids among the sampling fields that the model does not have: they kill engines too."""
    for name in ("stop_token_ids", "logit_bias"):
        if name not in sampling:
            continue
        outside = next((token_id for token_id in map(int, sampling[name]) if not 0 <= token_id < vocab_size), None)
        if outside is not None:
            raise InvalidRequest(f"{name}: token id {outside} is out of vocabulary: ids are in [0, {vocab_size})")


class TokenPaths:
    """The recorded paths of one session's tree, found by their beginning.

    Learnt from the tree when first asked, and then kept up: a session without raw prompts pays nothing.
    """

    def __init__(self, tree: TurnTree) -> None:
        self._tree = tree
        self._ids = _Paths(tree)
        self._texts = _Paths(tree)

    def by_ids(self, token_ids: TokenIds) -> Node | None:
        """The deepest turn whose whole path int32[P] ids begin with."""
        deepest = self._deepest(self._ids.beginning(token_ids.tobytes(), _id_bytes))
        return None if deepest is None else deepest.node

    def by_text(self, text: str, tokenizer: ChatTokenizer) -> tuple[Node | None, str]:
        """The deepest turn with whose path, decoded, a text begins, and the rest of the text."""
        content = text.encode()
        deepest = self._deepest(self._texts.beginning(content, lambda node: _text_bytes(node, tokenizer)))
        return (None, text) if deepest is None else (deepest.node, content[deepest.num_bytes :].decode())

    def _deepest(self, ends: Iterator[_End]) -> _End | None:
        """Between equal paths the latest delivery, then the latest turn."""

        def preference(end: _End) -> tuple[int, float, int]:
            delivered_at = self._tree.delivered_at(end.node.record.turn_id) or 0.0
            return (end.num_bytes, delivered_at, end.node.record.index)

        return max((end for end in ends if len(end.node.record.output_token_ids)), key=preference, default=None)


class _Spelled(NamedTuple):
    """What a turn adds to its parent's path, or, with `whole`, its whole path."""

    content: bytes
    whole: bool


_Spelling: TypeAlias = Callable[[Node], _Spelled]


class _End(NamedTuple):
    """A turn, and how long its path is."""

    node: Node
    num_bytes: int


class _Paths:
    """Paths as bytes, by length and digest: found in one pass over a content, however many paths there are."""

    def __init__(self, tree: TurnTree) -> None:
        self._tree = tree
        self._num_known = 0
        self._digests: dict[str, tuple[hashlib._Hash, int]] = {}
        self._nodes: dict[int, dict[bytes, tuple[Node, ...]]] = {}

    def beginning(self, content: bytes, spelling: _Spelling) -> Iterator[_End]:
        """Turns whose whole path the content begins with, the shortest first."""
        for node in islice(self._tree, self._num_known, None):
            self._add(node, spelling(node))
        digest, done, view = hashlib.sha256(), 0, memoryview(content)
        for length in sorted(self._nodes):
            if length > len(content):
                return
            digest.update(view[done:length])
            done = length
            for node in self._nodes[length].get(digest.digest(), ()):
                yield _End(node, length)

    def _add(self, node: Node, spelled: _Spelled) -> None:
        digest, length = hashlib.sha256(), 0
        if node.parent is not None and not spelled.whole:
            known, length = self._digests[node.parent.record.turn_id]
            digest = known.copy()
        digest.update(spelled.content)
        length += len(spelled.content)
        self._digests[node.record.turn_id] = (digest, length)
        same_length = self._nodes.setdefault(length, {})
        same_length[digest.digest()] = (*same_length.get(digest.digest(), ()), node)
        self._num_known += 1


def _id_bytes(node: Node) -> _Spelled:
    return _Spelled(_own_ids(node.record).tobytes(), whole=False)


def _text_bytes(node: Node, tokenizer: ChatTokenizer) -> _Spelled:
    """A turn's own text, a raw prompt's as it was sent; the whole path's where a part begins inside a character."""
    record, before = node.record, _last_ids(node.parent)
    asked = _text_after(before, record.prompt_token_ids, tokenizer)
    said = _text_after(np.concatenate([before, record.prompt_token_ids]), record.output_token_ids, tokenizer)
    if asked is None or said is None:
        return _Spelled(tokenizer.decode(node.token_ids()).encode(), whole=True)
    if record.meta.get("certified_by") == RAW and record.added_messages:
        asked = record.added_messages[0]["content"]  # some tokenizers decode other spaces than they have read
    return _Spelled((asked + said).encode(), whole=False)


def _text_after(before: TokenIds, ids: TokenIds, tokenizer: ChatTokenizer) -> str | None:
    """What ids decode to behind others; None where these end inside a character, which may become another one."""
    before = before[-_CONTEXT_TOKENS:]
    text_before, text = tokenizer.decode(before), tokenizer.decode(np.concatenate([before, ids]))
    if text_before.endswith(_HALF_CHARACTER) or not text.startswith(text_before):
        return None
    return text[len(text_before) :]


def _last_ids(node: Node | None) -> TokenIds:
    """Up to _CONTEXT_TOKENS ids with which a path ends."""
    ids = np.zeros(0, dtype=np.int32)
    while node is not None and len(ids) < _CONTEXT_TOKENS:
        ids = np.concatenate([_own_ids(node.record)[-_CONTEXT_TOKENS:], ids])
        node = node.parent
    return ids[-_CONTEXT_TOKENS:]


def _own_ids(record: TurnRecord) -> TokenIds:
    return np.concatenate([record.prompt_token_ids, record.output_token_ids])


def _as_read(prompt: RawPrompt, tokenizer: ChatTokenizer) -> str:
    """A text with what the tokenizer itself puts before texts, unless it stands there already."""
    text = prompt.text or ""
    opening = tokenizer.opening if prompt.adds_special_tokens else ""
    return text if text.startswith(opening) else opening + text
