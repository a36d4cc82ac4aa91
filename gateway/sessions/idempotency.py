"""Retries that need no header (design 4): what a request like an earlier one is to be answered with.

    the earlier one's client      its turn                 the request
    has gone                      runs                     joins it
    has gone                      is on disk               is given that reply
    has gone                      was cut, or failed       goes on from the tokens that it has
    is still there                in any state             is a new sample
    got its reply                                          is a new sample

A request may say that it is a retry (`Idempotency-Key`, or `x-stainless-retry-count` above 0): a key names its turn in
every state, also a delivered one; a count the only undelivered one like it, although its client seems to be there. Who
has gone is known to one process; a turn that no living process knows of has lost its client with its gateway. Where
several gateways share a ledger, one that recorded a turn notes its delivery at once: that is waited for, briefly.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import msgspec

from gateway.contracts.errors import Conflict
from gateway.contracts.generation import FinishReason, JsonValue
from gateway.contracts.records import TurnRecord
from gateway.sessions.tree import Node, TurnTree


class CallChoice(msgspec.Struct, frozen=True):
    """One choice of what a request asks for. endpoint: its path without the session. digest: sha256 hex of its body."""

    endpoint: str
    digest: str
    choice: int

    def facts(self, retry: RetryHint) -> dict[str, JsonValue]:
        """What of it is kept in the record beside the digest (meta "call")."""
        return {"endpoint": self.endpoint, "choice": self.choice, "idempotency_key": retry.key}


@dataclass(frozen=True, slots=True)
class RetryHint:
    """What a request says of itself. key: its Idempotency-Key. says_retry: its client has asked the same before."""

    key: str | None = None
    says_retry: bool = False


NO_HINT = RetryHint()


class OpenTurn(Protocol):
    """A turn under way, as far as retries go."""

    @property
    def turn_id(self) -> str: ...

    @property
    def call(self) -> CallChoice: ...

    @property
    def retry(self) -> RetryHint: ...


T = TypeVar("T", bound=OpenTurn)


class SessionCalls(Generic[T]):
    """The turns of one session by the calls that asked for them, and which of them somebody waits for."""

    __slots__ = ("_keyed", "_num_known", "_own", "_recorded", "_replaced", "_running", "_tree", "_waited_for")

    # Lists where few are asked for, and seldom: a set takes 216 bytes of every session, before anything is in it.

    def __init__(self, tree: TurnTree) -> None:
        self._tree = tree
        self._num_known = 0
        self._recorded: dict[CallChoice, tuple[Node, ...]] = {}
        self._keyed: dict[tuple[str, int], tuple[Node, ...]] = {}
        self._running: dict[str, T] = {}
        self._waited_for: list[str] = []
        self._replaced: list[str] = []
        self._own: list[str] = []

    def attend(self, turn: T) -> None:
        """Somebody waits for the reply of a turn that runs."""
        turn_id = turn.turn_id
        self._running[turn_id] = turn
        self._own.append(turn_id)
        if turn_id not in self._waited_for:
            self._waited_for.append(turn_id)

    def leave(self, turn_id: str) -> None:
        """Nobody does any more, or the reply was delivered."""
        if turn_id in self._waited_for:
            self._waited_for.remove(turn_id)

    @property
    def running(self) -> Collection[T]:
        """Turns that run."""
        return self._running.values()

    def end(self, turn_id: str) -> None:
        """A turn does not run any more; who waits for its reply still does."""
        self._running.pop(turn_id, None)

    @property
    def is_anyone_waiting(self) -> bool:
        """Whether somebody waits for a reply, be it recorded already."""
        return bool(self._waited_for)

    def is_own(self, turn_id: str) -> bool:
        """Whether a turn was answered by this process, which then knows of its client."""
        return turn_id in self._own

    def take(self, call: CallChoice, retry: RetryHint) -> T | Node | None:
        """The turn that answers a request, which is now waited for; None: it is a new one.

        Raises Conflict for a key that named another body before.
        """
        self._learn()
        found = self._keyed_turn(call, retry.key) if retry.key is not None else self._left_turn(call)
        if found is None and retry.says_retry and retry.key is None:
            found = self._only_turn(call)
        if found is not None and (turn_id := _turn_id(found)) not in self._waited_for:
            self._waited_for.append(turn_id)
        return found

    def is_waited_for(self, call: CallChoice) -> bool:
        """Whether somebody waits for a running turn of the same call, as far as is known."""
        if not self._running:
            return False
        return any(turn.call == call and turn.turn_id in self._waited_for for turn in self._running.values())

    def _left_turn(self, call: CallChoice) -> T | Node | None:
        """Of those whose client has gone the oldest: every retry takes another one."""
        if self._running:
            for turn in self._running.values():
                if turn.call == call and turn.turn_id not in self._waited_for:
                    return turn
        if call in self._recorded:
            for node in self._recorded[call]:
                if self._is_open(node) and node.record.turn_id not in self._waited_for:
                    return node
        return None

    def _only_turn(self, call: CallChoice) -> T | Node | None:
        """Of several alike nobody can say whose retry it is."""
        running = [turn for turn in self._running.values() if turn.call == call]
        ended = [node for node in self._recorded.get(call, ()) if node.record.turn_id not in self._running]
        alike: list[T | Node] = [*running, *filter(self._is_open, ended)]
        return alike[0] if len(alike) == 1 else None

    def _keyed_turn(self, call: CallChoice, key: str) -> T | Node | None:
        running = [turn for turn in self._running.values() if turn.retry.key == key]
        recorded = self._keyed.get((key, call.choice), ())
        for digest in [turn.call.digest for turn in running] + [node.record.request_digest for node in recorded]:
            if digest != call.digest:
                raise Conflict(f"Idempotency-Key {key!r} came with another body before; a new request needs a new key")
        for turn in running:
            if turn.call == call:
                return turn
        return next((node for node in reversed(recorded) if not self._is_continued(node)), None)

    def _is_open(self, node: Node) -> bool:
        return self._tree.delivered_at(node.record.turn_id) is None and not self._tree.goes_on(node)

    def _is_continued(self, node: Node) -> bool:
        return node.record.turn_id in self._replaced

    def _learn(self) -> None:
        """Recorded turns that came since; what was recorded by others counts too."""
        for node in self._tree.since(self._num_known):
            self._num_known += 1
            record = node.record
            asked = record.meta.get("call")
            if asked is None or not len(record.output_token_ids):
                continue
            call = CallChoice(asked["endpoint"], record.request_digest, asked["choice"])
            self._recorded[call] = (*self._recorded[call], node) if call in self._recorded else (node,)
            if (key := asked["idempotency_key"]) is not None:
                self._keyed[key, call.choice] = (*self._keyed.get((key, call.choice), ()), node)
            if record.attachment.continues and record.attachment.parent_id is not None:
                self._replaced.append(record.attachment.parent_id)


def is_whole(record: TurnRecord) -> bool:
    """Whether a turn's reply is one, and not what was there when it broke off."""
    return record.finish.reason is not FinishReason.ABORT and record.meta.get("error") is None


def can_go_on(record: TurnRecord) -> bool:
    """Whether there is something left to sample of a reply that broke off."""
    sampling, last = record.sampling, int(record.output_token_ids[-1])
    return sampling["max_new_tokens"] > len(record.output_token_ids) and last not in sampling["stop_token_ids"]


def _turn_id(found: OpenTurn | Node) -> str:
    return found.record.turn_id if isinstance(found, Node) else found.turn_id
