"""The turn tree of one session, rebuilt from its TurnRecords; it adds nothing that the records do not say.

Two trees share their ground. Turns hang on the turns whose tokens they extend; every node holds its own delta only
(I3), and tokens of a path are joined when asked for. Messages hang on the messages that stand before them in some
recorded conversation, each stored once, so that a request finds its place in one walk along its own messages.
"""

from __future__ import annotations

import itertools
import operator
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import msgspec
import numpy as np

from gateway.contracts.errors import LedgerCorrupt
from gateway.contracts.generation import JsonValue, TokenIds
from gateway.contracts.records import RootContext, TurnRecord, conversation
from gateway.sessions.messages import (
    NO_CALLS,
    CallPositions,
    MessageKey,
    calls_behind,
    is_surely,
    message_key,
    root_digest,
)


class RecordedMessage(msgspec.Struct, eq=False):
    """A message at its place: after just these other messages, in one or several recorded conversations.

    message: None at the start of all conversations. calls_before, calls: those that hold before and behind it.
    turn_ids: of those whose conversation, reply included, ends with it. Not the turns themselves, which refer to their
    messages: what a session holds is to go with it, and not when the collector looks for cycles. next: what was
    recorded right after it: nothing, one message alone (the rule), or by core digest one, or a tuple of those that
    differ in what the core leaves out.
    Its key is made when asked for: nobody asks where conversations only grow.
    """

    message: JsonValue
    calls_before: CallPositions
    calls: CallPositions
    turn_ids: tuple[str, ...] = ()
    next: RecordedMessage | dict[bytes, RecordedMessage | tuple[RecordedMessage, ...]] | None = None
    _key: MessageKey | None = None

    @property
    def key(self) -> MessageKey:
        """What of it counts."""
        if self._key is None:
            self._key = message_key(self.message, self.calls_before)
        return self._key

    def following(self, core: bytes) -> Sequence[RecordedMessage]:
        """Messages recorded right after this one that have this core."""
        known = self.next
        if isinstance(known, RecordedMessage):
            return (known,) if known.key.core == core else ()
        found = () if known is None else known.get(core, ())
        return found if isinstance(found, tuple) else (found,)

    def extended(self, message: JsonValue) -> RecordedMessage:
        """This message followed by another one: what is recorded already, or a new branch."""
        if isinstance(self.next, RecordedMessage):
            if is_surely(message, self.next.message):
                return self.next
            self.next = {self.next.key.core: self.next}
        new = RecordedMessage(message, self.calls, calls_behind(message, self.calls))
        if self.next is None:
            self.next = new
            return new
        found = self.following(new.key.core)
        for known in found:
            if known.key == new.key:
                return known
        self.next[new.key.core] = (*found, new) if found else new
        return new


class MissingRows(NamedTuple):
    """Routing rows at the end of a path that no turn of it holds: from index `first` on, the last token's included,
    which has none before it is an input. policy_versions: of the turns that should have held the others."""

    first: int
    policy_versions: frozenset[int]


NO_ROWS = MissingRows(0, frozenset())
_NO_INDICES: frozenset[int] = frozenset()


class Node(msgspec.Struct, frozen=True, eq=False):
    """One recorded turn in the tree.

    asked, last: its latest message and its reply, at their places among the recorded messages. num_messages,
    num_tokens: of the whole path. missing_rows: what the turn behind it has to ask for; engines lose a turn's rows now
    and then, and give them with the next turn's, as long as its prefix is cached.
    """

    record: TurnRecord
    parent: Node | None
    root: RootContext
    root_digest: bytes
    asked: RecordedMessage
    last: RecordedMessage
    num_messages: int
    num_tokens: int
    missing_rows: MissingRows

    def path(self) -> list[Node]:
        """From the root to this node."""
        nodes: list[Node] = []
        node: Node | None = self
        while node is not None:
            nodes.append(node)
            node = node.parent
        return nodes[::-1]

    def token_ids(self) -> TokenIds:
        """int32[num_tokens]: everything recorded on the path (I1)."""
        parts = [part for node in self.path() for part in (node.record.prompt_token_ids, node.record.output_token_ids)]
        return np.concatenate(parts)

    def messages(self) -> list[JsonValue]:
        """The conversation of the path as recorded, this node's reply included."""
        return conversation([node.record for node in self.path()])

    def reply_nodes(self) -> list[Node]:
        """The turns that sampled its reply: itself, and before it those that it goes on with."""
        nodes, node = [self], self
        while node.record.attachment.continues and node.parent is not None:
            node = node.parent
            nodes.append(node)
        return nodes[::-1]

    def num_reply_tokens(self) -> int:
        """Of its whole reply."""
        if not self.record.attachment.continues:
            return len(self.record.output_token_ids)
        return sum(len(node.record.output_token_ids) for node in self.reply_nodes())


class TurnTree:
    """All turns of one session."""

    __slots__ = (
        "_beyond",
        "_changes",
        "_delivered",
        "_next_index",
        "_nodes",
        "_num_complete",
        "_roots",
        "_went_on",
        "start",
    )

    def __init__(self, records: Iterable[TurnRecord] = ()) -> None:
        self._nodes: dict[str, Node] = {}
        self._roots: dict[bytes, RootContext] = {}
        self._delivered: dict[str, float] = {}
        self._went_on: set[str] | None = None
        self._next_index = 0
        self._num_complete = 0
        self._beyond = _NO_INDICES
        self._changes: list[int] = []
        self.start = RecordedMessage(None, NO_CALLS, NO_CALLS)
        for record in records:
            self.add(record)

    def __len__(self) -> int:
        return len(self._nodes)

    def __getitem__(self, turn_id: str) -> Node:
        return self._nodes[turn_id]

    def __iter__(self) -> Iterator[Node]:
        """All turns, in the order in which they were added."""
        return iter(self._nodes.values())

    def since(self, num_turns: int) -> Sequence[Node]:
        """The turns that were added behind the first `num_turns`, in that order."""
        newest_first = itertools.islice(reversed(self._nodes.values()), len(self._nodes) - num_turns)
        return [*newest_first][::-1]

    @property
    def records(self) -> Sequence[TurnRecord]:
        """The record of each turn, in the order in which they were added."""
        return [node.record for node in self]

    @property
    def num_complete(self) -> int:
        """So many turns are here from the first on, without a gap in their indices."""
        return self._num_complete

    def take_index(self) -> int:
        """The next turn's index; each call gives another one."""
        index = self._next_index
        self._next_index += 1
        return index

    def first_change_since(self, num_turns: int) -> int:
        """The least number of messages after which anything was added with the turns behind the first `num_turns`."""
        return min(self._changes[num_turns:], default=sys.maxsize)

    def add(self, record: TurnRecord) -> Node:
        """Hang a turn into the tree, which may hang there already; raises LedgerCorrupt if its parent is not there."""
        if record.turn_id in self._nodes:
            return self._nodes[record.turn_id]
        parent_id = record.attachment.parent_id
        if parent_id is not None and parent_id not in self._nodes:
            raise LedgerCorrupt(f"session {record.session_id} turn {record.index}: its parent {parent_id} is missing")
        parent = None if parent_id is None else self._nodes[parent_id]
        node = self._node(record, parent)
        node.last.turn_ids = (*node.last.turn_ids, record.turn_id)
        for earlier_id in (parent_id, record.attachment.follows_id):
            if earlier_id is not None:
                if self._went_on is None:
                    self._went_on = set()
                self._went_on.add(earlier_id)
        self._nodes[record.turn_id] = node
        self._count(record.index)
        if record.delivered_at is not None:
            self.mark_delivered(record.turn_id, record.delivered_at)
        return node

    def mark_delivered(self, turn_id: str, delivered_at: float) -> None:
        """Remember when a reply left."""
        self._delivered[turn_id] = delivered_at

    def delivered_at(self, turn_id: str) -> float | None:
        """When a reply left, None if it did not yet."""
        return self._delivered.get(turn_id)

    def goes_on(self, node: Node) -> bool:
        """Whether a later turn goes on from this one, in tokens or as a conversation."""
        return self._went_on is not None and node.record.turn_id in self._went_on

    def _count(self, index: int) -> None:
        if index >= self._next_index:
            self._next_index = index + 1
        if index != self._num_complete:
            self._beyond |= {index}
            return
        self._num_complete += 1
        while self._num_complete in self._beyond:
            self._beyond -= {self._num_complete}
            self._num_complete += 1

    def _node(self, record: TurnRecord, parent: Node | None) -> Node:
        num_tokens = len(record.prompt_token_ids) + len(record.output_token_ids)
        if parent is None:
            asked, num_before, missing_rows = self.start, 0, NO_ROWS
            root, digest = self._root(record)
        else:
            continues = record.attachment.continues
            asked, num_before = parent.asked if continues else parent.last, parent.num_messages - continues
            root, digest, missing_rows = parent.root, parent.root_digest, parent.missing_rows
            num_tokens += parent.num_tokens
        known: list[JsonValue] = []
        num_found = 0
        for message in record.added_messages:
            asked = asked.extended(message)
            if asked.next is not None or asked.turn_ids:  # in some recorded conversation
                num_found += 1
            known.append(asked.message)
        last = asked.extended(record.reply)
        known.append(last.message)
        self._changes.append(num_before + num_found + 1)
        return Node(
            record=_slim(record, known, root, parent),
            parent=parent,
            root=root,
            root_digest=digest,
            asked=asked,
            last=last,
            num_messages=len(known) + num_before,
            num_tokens=num_tokens,
            missing_rows=_missing_rows(record, missing_rows, num_tokens),
        )

    def _root(self, record: TurnRecord) -> tuple[RootContext, bytes]:
        if record.root is None:
            raise LedgerCorrupt(f"session {record.session_id} turn {record.index}: a root without its context")
        digest = self.digest_of(record.root)
        return self._roots.setdefault(digest, record.root), digest

    def digest_of(self, root: RootContext) -> bytes:
        """Its `root_digest`, known where it is made of the very objects of a recorded root."""
        for digest, known in self._roots.items():
            if known.tools is root.tools and known.template_arguments is root.template_arguments:
                return digest
        return root_digest(root)


def _missing_rows(record: TurnRecord, before: MissingRows, num_tokens: int) -> MissingRows:
    """Behind a turn, `before`: behind its parent."""
    holds_some = record.experts_stop > record.experts_start
    versions = frozenset[int]() if holds_some else before.policy_versions
    if record.experts_stop < num_tokens - 1:
        for span in record.version_spans:
            if span.policy_version not in versions:
                versions |= {span.policy_version}
    first = record.experts_stop if holds_some else before.first
    return before if (first, versions) == before else MissingRows(first, versions)


def _slim(record: TurnRecord, messages: Sequence[JsonValue], root: RootContext, parent: Node | None) -> TurnRecord:
    """The record with what the session holds already: one copy of equal messages and tools, no borrowed memory."""
    others: dict[str, Any] = {}
    if messages[-1] is not record.reply:
        others["reply"] = messages[-1]
    if record.root is not None and record.root is not root:
        others["root"] = root
    if parent is not None and record.sampling is not (known := parent.record.sampling) and record.sampling == known:
        others["sampling"] = known
    for name, array in (
        ("prompt_token_ids", record.prompt_token_ids),
        ("output_token_ids", record.output_token_ids),
        ("output_logprobs", record.output_logprobs),
    ):
        base = array.base
        if isinstance(base, np.ndarray) and base.nbytes > array.nbytes:  # a view keeps all of its base alive
            others[name] = array.copy()
    if not all(map(operator.is_, messages, record.added_messages)):
        others["added_messages"] = tuple(messages[:-1])
    return replace(record, **others) if others else record
