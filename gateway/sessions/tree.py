"""The turn tree of one session, rebuilt from its TurnRecords; it adds nothing that the records do not say.

Every node holds its own delta only (I3); tokens of a path are joined when asked for.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from gateway.contracts.errors import LedgerCorrupt
from gateway.contracts.generation import JsonValue, TokenIds
from gateway.contracts.records import RootContext, TurnRecord
from gateway.sessions.messages import CallPositions, ChainHash, MessageKey, message_keys, root_digest


@dataclass(frozen=True, slots=True, eq=False)
class Node:
    """One recorded turn in the tree.

    keys: of its added messages and its reply. chain: rolling hash of all messages up to its reply. num_messages,
    num_tokens: of the whole path. calls: ids of the tool calls in its reply.
    """

    record: TurnRecord
    parent: Node | None
    root: RootContext
    root_digest: bytes
    keys: tuple[MessageKey, ...]
    chain: ChainHash
    calls: CallPositions
    num_messages: int
    num_tokens: int

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
        return [message for node in self.path() for message in (*node.record.added_messages, node.record.reply)]

    def message_keys(self) -> list[MessageKey]:
        """Keys of `messages()`."""
        return [key for node in self.path() for key in node.keys]


class TurnTree:
    """All turns of one session."""

    def __init__(self, records: Iterable[TurnRecord] = ()) -> None:
        self._nodes: dict[str, Node] = {}
        self._by_core: defaultdict[bytes, list[Node]] = defaultdict(list)
        self._delivered: dict[str, float] = {}
        self._next_index = 0
        for record in records:
            self.add(record)

    def __len__(self) -> int:
        return len(self._nodes)

    def __getitem__(self, turn_id: str) -> Node:
        return self._nodes[turn_id]

    @property
    def records(self) -> Sequence[TurnRecord]:
        """All turns, in the order in which they were added."""
        return [node.record for node in self._nodes.values()]

    def take_index(self) -> int:
        """The next turn's index; each call gives another one."""
        index = self._next_index
        self._next_index += 1
        return index

    def add(self, record: TurnRecord) -> Node:
        """Hang a turn into the tree; raises LedgerCorrupt if its parent is not there."""
        parent_id = record.attachment.parent_id
        if parent_id is not None and parent_id not in self._nodes:
            raise LedgerCorrupt(f"session {record.session_id} turn {record.index}: its parent {parent_id} is missing")
        parent = None if parent_id is None else self._nodes[parent_id]
        node = _node(record, parent)
        self._nodes[record.turn_id] = node
        self._by_core[node.chain.core].append(node)
        self._next_index = max(self._next_index, record.index + 1)
        if record.delivered_at is not None:
            self.mark_delivered(record.turn_id, record.delivered_at)
        return node

    def mark_delivered(self, turn_id: str, delivered_at: float) -> None:
        """Remember when a reply left."""
        self._delivered[turn_id] = delivered_at

    def delivered_at(self, turn_id: str) -> float | None:
        """When a reply left, None if it did not yet."""
        return self._delivered.get(turn_id)

    def with_core(self, core: bytes) -> Sequence[Node]:
        """Turns whose conversation, reply included, has this core hash."""
        return self._by_core.get(core, ())


def _node(record: TurnRecord, parent: Node | None) -> Node:
    keys, calls = message_keys((*record.added_messages, record.reply), calls={} if parent is None else parent.calls)
    chain = ChainHash() if parent is None else parent.chain
    for key in keys:
        chain = chain.extend(key)
    root = record.root if parent is None else parent.root
    if root is None:
        raise LedgerCorrupt(f"session {record.session_id} turn {record.index}: a root without its context")
    num_own_tokens = len(record.prompt_token_ids) + len(record.output_token_ids)
    return Node(
        record=record,
        parent=parent,
        root=root,
        root_digest=root_digest(root) if parent is None else parent.root_digest,
        keys=keys,
        chain=chain,
        calls=calls,
        num_messages=len(keys) + (0 if parent is None else parent.num_messages),
        num_tokens=num_own_tokens + (0 if parent is None else parent.num_tokens),
    )
