"""What of a session's latest calls stays in memory, so that the next one costs what it adds and not its whole history.

Nothing here is the truth: the tree and the ledger are. Whatever is forgotten is read, walked or joined again.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict

import numpy as np
import orjson

from gateway.contracts.generation import TokenIds, WrittenIds
from gateway.sessions.attach import KnownWays
from gateway.sessions.tree import Node
from gateway.wire.known_texts import KnownTexts

_LONG_PROMPT = 4096
"""Tokens from which on it is cheaper to keep a prompt's JSON than to write it again."""


class Recent:
    """Of one session. texts: of its requests; ways: where they led in its tree."""

    __slots__ = ("__weakref__", "_path", "_written", "texts", "ways")

    def __init__(self) -> None:
        self.texts = KnownTexts()
        self.ways = KnownWays()
        self._path: tuple[Node, tuple[TokenIds, ...]] | None = None
        self._written: WrittenIds | None = None

    @property
    def num_bytes(self) -> int:
        """About what it takes."""
        num_bytes = self.texts.num_bytes
        if self._path is not None:
            for piece in self._path[1]:
                num_bytes += piece.nbytes
        if self._written is not None:
            num_bytes += len(self._written.text)
        return num_bytes

    def token_ids(self, node: Node) -> tuple[TokenIds, ...]:
        """Pieces int32[n] of everything recorded on the path to a node (I1), in order; read them only."""
        known = self._path
        if known is not None and known[0] is node:
            return known[1]
        pieces: tuple[TokenIds, ...] = (node.token_ids(),)
        self._path = (node, pieces)
        return pieces

    def keep(self, node: Node, prompt_token_ids: TokenIds) -> None:
        """A turn was recorded whose whole prompt was int32[P]; the next one most likely goes on from it."""
        self._path = (node, (prompt_token_ids, node.record.output_token_ids))

    def write(self, extends: Node | None, added: TokenIds, prompt_token_ids: TokenIds) -> WrittenIds | None:
        """The JSON of a long prompt int32[P], None of a short one. It is what `extends` recorded, if anything, and then
        `added`."""
        if len(prompt_token_ids) < _LONG_PROMPT:
            return None
        text = self._longer(extends, added) or _json(prompt_token_ids)
        self._written = WrittenIds(prompt_token_ids, text)
        return self._written

    def _longer(self, node: Node | None, added: TokenIds) -> bytes:
        """The JSON of what a node recorded, and of `added`; b"" where its prompt is not the one that was written."""
        earlier, path = self._written, self._path
        if earlier is None or path is None or path[0] is not node or path[1][0] is not earlier.ids:
            return b""
        news = (_json(ids)[1:-1] for ids in (*path[1][1:], added) if len(ids))
        return b"".join((memoryview(earlier.text)[:-1], *(b"," + new for new in news), b"]"))

    def clear(self) -> None:
        """Forget all."""
        self.texts.clear()
        self.ways.clear()
        self._path = None
        if self._written is not None:
            self._written.forget()
            self._written = None


def _json(ids: TokenIds) -> bytes:
    return orjson.dumps(np.ascontiguousarray(ids), option=orjson.OPT_SERIALIZE_NUMPY)


class RecentBudget:
    """Bounds what all sessions together keep: those that were not used for longest forget first."""

    def __init__(self, num_bytes: int) -> None:
        self._left = num_bytes
        self._sizes: OrderedDict[weakref.ref[Recent], int] = OrderedDict()

    def note(self, recent: Recent) -> None:
        """A session was used; it may keep more than before."""
        size, known = recent.num_bytes, weakref.ref(recent, self._gone)
        self._left += self._sizes.pop(known, 0) - size
        self._sizes[known] = size
        while self._left < 0:
            oldest, freed = self._sizes.popitem(last=False)
            self._left += freed
            if (forgetful := oldest()) is not None:
                forgetful.clear()

    def _gone(self, known: weakref.ref[Recent]) -> None:
        self._left += self._sizes.pop(known, 0)
