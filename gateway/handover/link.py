"""Two gateway processes while both run: each tells the other what operators change, and hears how it went."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from itertools import count

from gateway.contracts.errors import VerbatimError
from gateway.handover.channel import Channel, Message
from gateway.replicas.operations import Change, Follower


class Link:
    """A `Neighbour` over a channel; `run` reads it, so a link that does not run hears no answers."""

    def __init__(self, channel: Channel, operations: Follower, *, pid: int) -> None:
        self.pid = pid
        self._channel = channel
        self._operations = operations
        self._numbers = count()
        self._asked: dict[int, asyncio.Future[str | None]] = {}
        self._changes: set[asyncio.Task[None]] = set()
        self._is_gone = False

    async def ask(self, change: Change) -> str | None:
        """Have a change made there too; returns what went wrong, None also where the process is gone."""
        if self._is_gone:
            return None
        number, answer = next(self._numbers), asyncio.get_running_loop().create_future()
        self._asked[number] = answer
        try:
            if not await self._channel.send("change", number=number, name=change.name, arguments=change.arguments):
                return None
            error = await answer
        finally:
            del self._asked[number]
        return None if error is None else f"process {self.pid}: {error}"

    async def run(self, take: Callable[[Message], Awaitable[None]]) -> None:
        """Make the other's changes, and give every other message to `take`, until the other process is gone."""
        self._operations.neighbours.add(self)
        try:
            while (message := await self._channel.receive()) is not None:
                match message.type:
                    case "change":
                        task = asyncio.create_task(self._make(message))
                        self._changes.add(task)
                        task.add_done_callback(self._changes.discard)
                    case "changed":
                        self._hear(message)
                    case _:
                        await take(message)
        finally:
            self._is_gone = True
            self._operations.neighbours.discard(self)
            for task in self._changes:
                task.cancel()
            for answer in self._asked.values():
                if not answer.done():
                    answer.set_result(None)

    async def _make(self, message: Message) -> None:
        error: str | None = None
        try:
            change = Change(message.fields["name"], message.fields["arguments"])
            await self._operations.follow(change, told_by=self)
        except VerbatimError as failure:
            error = failure.message
        await self._channel.send("changed", number=message.fields["number"], error=error)

    def _hear(self, message: Message) -> None:
        answer = self._asked.get(message.fields["number"])
        if answer is not None and not answer.done():
            answer.set_result(message.fields["error"])
