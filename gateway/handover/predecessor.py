"""The new process's side of a hand-over: it asks the gateway that serves for its place.

    find     hello ──▶            ◀── state (or refused)       nothing is taken yet; now get everything ready
    take     take  ──▶            ◀── given + descriptors      listener, control socket, the ledger's lock
    enter    ready ──▶            ◀── leaving + state          from here on the old one accepts nothing
    serves   serving ──▶          ◀── connections …            as they become idle; both tell each other changes
                                  ◀── (end)                    its last reply has ended

An end before `leaving` means that the old one died (it says `withdrawn` when it goes on): then this one goes on alone.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from gateway.contracts.errors import ConfigurationError, HandoverFailed
from gateway.contracts.generation import JsonValue
from gateway.handover.channel import Channel, Message
from gateway.handover.control import PROTOCOL, connect
from gateway.handover.link import Link
from gateway.handover.state import LiveState
from gateway.replicas.operations import Follower

ANSWER_SECONDS = 10.0
"""How long the other process may take for an answer that needs no work."""


class Address(NamedTuple):
    """Where a gateway listens."""

    host: str
    port: int


@dataclass(frozen=True, slots=True)
class Given:
    """What the old process passed on. lock: the descriptor that holds the ledger's folder; None where none does."""

    listener: socket.socket
    control: socket.socket
    lock: int | None


class Holding(NamedTuple):
    """How the folder of an embedded ledger is held. lock: its descriptor, None where nothing has to be held. is_alone:
    no other process has the ledger open."""

    lock: int | None
    is_alone: bool


class Origin(Protocol):
    """The process that a new one gets its place from: the gateway that it replaces, or its own supervisor."""

    state: LiveState
    serves: bool
    """Whether another gateway serves meanwhile: then nothing is taken before all is ready."""

    async def hold(self) -> Holding | None:
        """Open the ledger from now on; None if that process has died, whose folder is free then."""
        ...

    async def opened(self) -> None:
        """It is open."""
        ...


class Predecessor:
    """The gateway that serves, until it is gone; make it with `find`."""

    serves = True

    def __init__(self, channel: Channel, pid: int, address: Address, state: LiveState) -> None:
        self.pid = pid
        self.address = address
        self.state = state
        self.given: Given | None = None
        self._channel = channel
        self._gone = asyncio.Event()

    @classmethod
    async def find(cls, path: Path) -> Predecessor | None:
        """The gateway that answers at the control socket `path`, None if there is none; nothing is taken from it.

        Raises HandoverFailed if it hangs, refuses, or is not ours.
        """
        channel = connect(path)
        if channel is None:
            return None
        try:
            answer = await _ask(channel, "hello", protocol=PROTOCOL, pid=os.getpid())
            if answer is None:
                channel.close()
                return None
            fields = answer.fields
            return cls(channel, fields["pid"], Address(*fields["address"]), LiveState.from_json(fields["state"]))
        except BaseException:
            channel.close()
            raise

    def check_address(self, host: str, port: int) -> None:
        """Raise ConfigurationError if another address is wanted than the one that can be had; port 0 wants any."""
        if port not in (0, self.address.port) or not _is_same_host(host, self.address.host):
            raise ConfigurationError(
                f"the gateway that serves (process {self.pid}) listens on {self.address.host}:{self.address.port}, "
                f"not on {host}:{port}: --replace takes over the same address"
            )

    async def take(self) -> Given | None:
        """The descriptors; from now on both may write to the ledger. None if the old process has died."""
        answer = await _ask(self._channel, "take")
        if answer is None:
            self._gone.set()
            return None
        listener, control, *lock = answer.descriptors
        self.given = Given(socket.socket(fileno=listener), socket.socket(fileno=control), lock[0] if lock else None)
        return self.given

    async def hold(self) -> Holding | None:
        """As `Origin` says."""
        given = await self.take()
        return None if given is None else Holding(given.lock, is_alone=False)

    async def opened(self) -> None:
        """That process hears of it when this one is ready."""

    async def leave(self) -> None:
        """Have the old process accept nothing more; `state` is its last then."""
        answer = await _ask(self._channel, "ready")
        if answer is None:
            self._gone.set()
        else:
            self.state = LiveState.from_json(answer.fields["state"])

    async def run(self, operations: Follower, adopt: Callable[[int], Awaitable[None]]) -> None:
        """Say that this process serves, and take over connections until the old one is gone.

        Raises HandoverFailed if that one goes on by itself, because this process took too long.
        """

        async def take(message: Message) -> None:
            if message.type == "withdrawn":
                raise HandoverFailed(f"the gateway (process {self.pid}) waited too long for this one and goes on")
            for descriptor in message.descriptors:
                await adopt(descriptor)

        try:
            if not self._gone.is_set() and await self._channel.send("serving"):
                await Link(self._channel, operations, pid=self.pid).run(take)
        finally:
            self._gone.set()

    @property
    def is_gone(self) -> bool:
        """Whether its last reply has ended, or it has died."""
        return self._gone.is_set()

    async def stop(self, *, timeout_seconds: float) -> None:
        """This process stops, and so shall the old one with what it still runs; waits for that (`run` has to run)."""
        await self._channel.send("stop")
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_seconds):
                await self._gone.wait()

    def close(self) -> None:
        """Let go; before `leave` the old process then goes on as if nothing had been."""
        self._channel.close()


async def _ask(channel: Channel, question: str, **fields: JsonValue) -> Message | None:
    """The answer, None if the other process has died; raises HandoverFailed if it refuses, or does not answer."""
    server = f"the gateway that serves (process {channel.peer.pid})"
    try:
        sent = await channel.send(question, **fields)
        answer = await channel.receive(timeout_seconds=ANSWER_SECONDS) if sent else None
    except TimeoutError as error:
        raise HandoverFailed(
            f"{server} hangs: no answer to {question!r} within {ANSWER_SECONDS:g} s; nothing was taken from it"
        ) from error
    if answer is not None and answer.type in ("refused", "withdrawn"):
        raise HandoverFailed(answer.fields.get("reason") or f"{server} goes on by itself")
    return answer


def _is_same_host(wanted: str, served: str) -> bool:
    return wanted == served or {wanted, served} == {"localhost", "127.0.0.1"}
