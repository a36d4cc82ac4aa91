"""A connection between two gateway processes: whole messages in order, with descriptors (SCM_RIGHTS).

Messages are JSON objects with a `type`, over a Unix socket that keeps their borders (SEQPACKET). Descriptors that
arrive belong to the receiver, and are not inherited by its children.
"""

from __future__ import annotations

import array
import asyncio
import json
import os
import socket
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from gateway.contracts.errors import HandoverFailed
from gateway.contracts.generation import JsonValue

MAX_DESCRIPTORS = 200
"""In one message; the kernel's own limit is 253."""

_MAX_BYTES = 2**17
_CREDENTIALS = struct.Struct("3i")
_GONE = (ConnectionError, BrokenPipeError)


class Peer(NamedTuple):
    """The process at the other end, as the kernel knows it."""

    pid: int
    uid: int


@dataclass(frozen=True, slots=True)
class Message:
    """type: what it is. fields: the whole object. descriptors: the receiver's own, to be closed by it."""

    type: str
    fields: dict[str, JsonValue]
    descriptors: tuple[int, ...] = ()

    def close(self) -> None:
        """Close the descriptors, where nobody takes them."""
        for descriptor in self.descriptors:
            os.close(descriptor)


class Channel:
    """One end; one task reads, any number write."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._connection = connection
        self._writing = asyncio.Lock()

    @property
    def peer(self) -> Peer:
        """Who is at the other end."""
        size = _CREDENTIALS.size
        credentials = self._connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
        pid, uid, _ = _CREDENTIALS.unpack(credentials)
        return Peer(pid, uid)

    async def send(self, kind: str, descriptors: Sequence[int] = (), **fields: JsonValue) -> bool:
        """Send a message; the descriptors stay the caller's. False if the other end is gone."""
        data = json.dumps({"type": kind, **fields}).encode()
        if len(data) > _MAX_BYTES:
            raise HandoverFailed(f"a message of {len(data)} bytes ({kind}) is too long for the control socket")
        async with self._writing:
            while self._connection.fileno() >= 0:
                try:
                    self._connection.sendmsg([data], _rights(descriptors))
                except BlockingIOError:
                    await self._until(writable=True)
                except _GONE:
                    return False
                else:
                    return True
        return False  # closed here

    async def receive(self, *, timeout_seconds: float | None = None) -> Message | None:
        """The next message, None if the other end is gone; raises TimeoutError, HandoverFailed for what is none."""
        async with asyncio.timeout(timeout_seconds):
            while True:
                try:
                    data, descriptors, flags, _ = socket.recv_fds(
                        self._connection, _MAX_BYTES, MAX_DESCRIPTORS, socket.MSG_CMSG_CLOEXEC
                    )
                except BlockingIOError:
                    await self._until(writable=False)
                except _GONE:
                    return None
                else:
                    break
        if not data:
            return None
        return _message(data, tuple(descriptors), is_cut=bool(flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC)))

    def close(self) -> None:
        """The other end is told by the end of its messages; repeating it is fine."""
        self._connection.close()

    async def _until(self, *, writable: bool) -> None:
        loop, descriptor = asyncio.get_running_loop(), self._connection.fileno()
        ready: asyncio.Future[None] = loop.create_future()
        begin: Callable[..., Any] = loop.add_writer if writable else loop.add_reader
        begin(descriptor, _resolve, ready)
        try:
            await ready
        finally:
            (loop.remove_writer if writable else loop.remove_reader)(descriptor)


def _resolve(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)


def _rights(descriptors: Sequence[int]) -> list[tuple[int, int, array.array[int]]]:
    if not descriptors:
        return []
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]


def _message(data: bytes, descriptors: tuple[int, ...], *, is_cut: bool) -> Message:
    try:
        fields = json.loads(data)
    except ValueError:
        fields = None
    if is_cut or not isinstance(fields, dict) or not isinstance(fields.get("type"), str):
        Message("", {}, descriptors).close()
        raise HandoverFailed("what came over the control socket is no message of a gateway")
    return Message(fields["type"], fields, descriptors)
