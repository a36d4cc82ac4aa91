"""A chat request that begins with the text of an earlier one of its session: only what it adds is read.

    earlier   {"model": …, "messages": [m1, m2          ], "tools": …}
    now       {"model": …, "messages": [m1, m2, r2, m3  ], "tools": …}
              ╰────── head, as before ───────╯╰─ new ──╯╰─ tail, as before ╯

An agent sends its whole history with every call, and a history of 100,000 tokens takes longer to read than all the rest
of a turn. JSON says by its grammar that head + new + tail is the earlier request with more messages, if `new` alone
reads as the rest of a list; so nothing is guessed, and what does not fit is read as a whole.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import msgspec

from gateway.contracts.generation import JsonValue
from gateway.wire.request import TurnRequest

_MOST = 4
"""Texts a session: an agent and its sub-agents take turns."""

_SPACE = b" \t\r\n"
_values = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


class KnownText(msgspec.Struct, frozen=True, eq=False):
    """A request as it came. head: its body up to the end of its last message; tail: from the end of its messages on.
    hashed: sha256 of the head."""

    head: bytes
    tail: bytes
    hashed: hashlib._Hash
    request: TurnRequest

    def added_by(self, body: bytes) -> bytes | None:
        """What a longer request has between head and tail, None if it is another request, or no longer than this."""
        if not body.startswith(self.head) or not body.endswith(self.tail):
            return None
        return body[len(self.head) : -len(self.tail)] or None


class KnownTexts:
    """The latest requests of one session, of a conversation each."""

    __slots__ = ("_known",)

    def __init__(self) -> None:
        self._known: Sequence[KnownText] = ()

    @property
    def num_bytes(self) -> int:
        """Of the texts that are kept."""
        num_bytes = 0
        for known in self._known:
            num_bytes += len(known.head) + len(known.tail)
        return num_bytes

    def find(self, body: bytes) -> tuple[KnownText, bytes] | None:
        """The text that a body adds most to, and what it adds."""
        found = None
        for known in self._known:
            if found is None or len(known.head) > len(found[0].head):
                added = known.added_by(body)
                found = found if added is None else (known, added)
        return found

    def keep(self, new: KnownText, instead_of: KnownText | None) -> None:
        """Remember a request; the one that it goes on from is not needed any more, unless the agent forks."""
        if len(self._known) <= 1 and instead_of in self._known:  # the rule
            self._known = (new,)
            return
        others = [known for known in self._known if known is not instead_of]
        self._known = [*others[-_MOST + 1 :], new]

    def clear(self) -> None:
        """Forget all."""
        self._known = ()


def known_text(body: bytes, fields: Mapping[str, JsonValue], request: TurnRequest) -> KnownText | None:
    """Of a request that was read as a whole; None where its messages are found nowhere for sure."""
    if request.has_media or not request.messages:
        return None
    try:
        raw = bytes(_values(body)["messages"])
    except msgspec.DecodeError:  # halves of surrogate pairs, which were mended
        return None
    start = body.find(raw)
    # The same text may stand at another place before: without it the messages must be gone.
    rest = _values(body[:start] + b"0" + body[start + len(raw) :])
    if bytes(rest.get("messages", b"")) != b"0" or len(rest) != len(fields):
        return None
    head = body[: start + len(raw[:-1].rstrip(_SPACE))]
    return KnownText(head, body[start + len(raw) - 1 :], hashlib.sha256(head), request)


def longer_text(known: KnownText, body: bytes, added: bytes, messages: tuple[JsonValue, ...]) -> KnownText:
    """Of a request that adds `messages`, as they are read, to a known one."""
    stripped, earlier = added.rstrip(_SPACE), known.request
    num_head = len(known.head) + len(stripped)
    head = body[:num_head]
    hashed = known.hashed.copy()
    hashed.update(stripped)
    whole = hashed.copy()
    whole.update(body[num_head:])
    request = msgspec.structs.replace(
        earlier, messages=earlier.messages + messages, digest=whole.hexdigest(), num_bytes=len(body)
    )
    return KnownText(head, known.tail, hashed, request)
