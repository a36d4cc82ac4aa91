"""Questions between two processes of one gateway: named, answered with JSON values, or with an error.

They travel beside what a `Link` sends, over the same channel: `ask` numbers its question, the other side's answer (or
the error that it raised there) ends the wait, and so does the end of the other process.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from itertools import count
from typing import TypeAlias

from gateway.contracts.errors import HandoverFailed, VerbatimError
from gateway.contracts.generation import JsonValue
from gateway.handover.channel import Channel, Message

_MAX_INLINE_BYTES = 32_768
"""A longer answer travels as a file without a name (a socket takes no message above its buffer)."""

Answer: TypeAlias = dict[str, JsonValue]

AnswerOf: TypeAlias = Callable[[str, Mapping[str, JsonValue]], Awaitable[Answer]]
"""(name of a question, its fields) → the answer; raises VerbatimError, which is raised again where it was asked."""


class Questions:
    """One end; whoever reads the channel gives what is for it to `take`, and says `end` when the other is gone."""

    def __init__(self, channel: Channel, answer: AnswerOf) -> None:
        self._channel = channel
        self._answer = answer
        self._numbers = count()
        self._asked: dict[int, asyncio.Future[Answer]] = {}
        self._answering: set[asyncio.Task[None]] = set()
        self._is_over = False

    async def ask(self, name: str, /, *, timeout_seconds: float | None = None, **fields: JsonValue) -> Answer:
        """The other process's answer.

        Raises HandoverFailed if that is gone, TimeoutError, and the VerbatimError that it raised.
        """
        if self._is_over:
            raise HandoverFailed("the other process has ended")
        number, answer = next(self._numbers), asyncio.get_running_loop().create_future()
        self._asked[number] = answer
        try:
            async with asyncio.timeout(timeout_seconds):
                if not await self._channel.send("ask", number=number, name=name, fields=fields):
                    raise HandoverFailed("the other process has ended")
                found: Answer = await answer
                return found
        finally:
            del self._asked[number]

    def take(self, message: Message) -> bool:
        """Whether a message was a question or an answer."""
        if message.type == "ask":
            task = asyncio.create_task(self._reply(message))
            self._answering.add(task)
            task.add_done_callback(self._answering.discard)
        elif message.type == "answer":
            self._hear(message)
        else:
            return False
        return True

    def end(self) -> None:
        """The other process is gone: nothing is answered any more."""
        self._is_over = True
        for task in self._answering:
            task.cancel()
        for answer in self._asked.values():
            if not answer.done():
                answer.set_exception(HandoverFailed("the other process has ended"))

    async def _reply(self, message: Message) -> None:
        number = message.fields["number"]
        try:
            answer = await self._answer(message.fields["name"], message.fields["fields"])
        except VerbatimError as error:
            await self._channel.send("answer", number=number, error=error_json(error))
            return
        if len(data := json.dumps(answer).encode()) <= _MAX_INLINE_BYTES:
            await self._channel.send("answer", number=number, fields=answer)
            return
        file = os.memfd_create("answer")
        try:
            os.pwrite(file, data, 0)
            await self._channel.send("answer", [file], number=number)
        finally:
            os.close(file)

    def _hear(self, message: Message) -> None:
        waiting = self._asked.get(message.fields["number"])
        if waiting is None or waiting.done():
            message.close()
        elif "error" in message.fields:
            waiting.set_exception(error_of(message.fields["error"]))
        elif message.descriptors:
            with open(message.descriptors[0], "rb") as file:
                waiting.set_result(json.load(file))
        else:
            waiting.set_result(message.fields["fields"])


def error_json(error: VerbatimError) -> dict[str, JsonValue]:
    """An error as it travels: what it says, and the names of its classes, nearest first."""
    return {"message": error.message, "classes": [cls.__name__ for cls in type(error).__mro__ if _is_ours(cls)]}


def error_of(value: Mapping[str, JsonValue]) -> VerbatimError:
    """The error that travelled, as the nearest class that is made of a message alone.

    >>> from gateway.contracts.errors import Conflict
    >>> error_of(error_json(Conflict("there is one")))
    Conflict('there is one')
    """
    for name in value["classes"]:
        cls = _PLAIN.get(name)
        if cls is not None:
            return cls(value["message"])
    return VerbatimError(value["message"])


def _is_ours(cls: type) -> bool:
    return issubclass(cls, VerbatimError)


def _plain(classes: Sequence[type[VerbatimError]]) -> dict[str, type[VerbatimError]]:
    below = {cls.__name__: cls for cls in classes if cls.__init__ is VerbatimError.__init__}
    for cls in classes:
        below |= _plain(cls.__subclasses__())
    return below


_PLAIN = _plain([VerbatimError])
