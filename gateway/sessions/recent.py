"""What of a session's latest calls stays in memory, so that the next one costs what it adds and not its whole history.

Nothing here is the truth: the tree and the ledger are. Whatever is forgotten is read, walked or joined again.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict

import numpy as np

from gateway.contracts.generation import TokenIds
from gateway.sessions.attach import KnownWays
from gateway.sessions.tree import Node
from gateway.wire.known_texts import KnownTexts


class Recent:
    """Of one session. texts: of its requests; ways: where they led in its tree."""

    __slots__ = ("__weakref__", "_path", "texts", "ways")

    def __init__(self) -> None:
        self.texts = KnownTexts()
        self.ways = KnownWays()
        self._path: tuple[Node, TokenIds] | None = None

    @property
    def num_bytes(self) -> int:
        """About what it takes."""
        return self.texts.num_bytes + (0 if self._path is None else self._path[1].nbytes)

    def token_ids(self, node: Node) -> TokenIds:
        """int32[num_tokens]: everything recorded on the path to a node (I1); read it only."""
        known = self._path
        if known is not None and known[0] is node:
            return known[1]
        before = known[1] if known is not None and known[0] is node.parent else None
        own = (node.record.prompt_token_ids, node.record.output_token_ids)
        joined = node.token_ids() if before is None else np.concatenate([before, *own])
        self._path = (node, joined)
        return joined

    def clear(self) -> None:
        """Forget all."""
        self.texts.clear()
        self.ways.clear()
        self._path = None


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
