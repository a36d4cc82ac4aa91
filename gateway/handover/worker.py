"""A worker's view of its gateway: how it gets its place from the supervisor, and what it asks of the other workers.

    join     hello   ──▶   ◀── state            engines and pause as they are; whether an old gateway still serves
    hold     take    ──▶   ◀── given            listener and the ledger's lock; alone if nobody has the ledger open
    opened   opened  ──▶                        the next worker may open it
    enter    ready   ──▶   ◀── leaving          the state as of now; changes follow from here on
    run      serving ──▶   ◀──▶                 changes (`link`), questions (`questions`), connections, what to do

The messages are those of a hand-over (`predecessor`), because that is what the start of a worker is. One worker leads:
it does the chores and makes operators' changes; the others ask it through the supervisor.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

from gateway.contracts.errors import EngineUnavailable, HandoverFailed, NotFound, VerbatimError
from gateway.contracts.generation import JsonValue
from gateway.handover.channel import Channel, Message
from gateway.handover.estate import OwnEstate, emptied
from gateway.handover.link import Link
from gateway.handover.marks import WorkerMarks
from gateway.handover.predecessor import Holding
from gateway.handover.questions import Answer, Questions, error_json
from gateway.handover.state import LiveState
from gateway.replicas.operations import Change

_log = logging.getLogger(__name__)

_SETTLE_SECONDS = 10.0
"""For another worker to record the turns of a session that is finished."""
_LOOK_SECONDS = 2.0
"""For another worker to say what it counts."""
_EPOCH = 2**48
"""More than all changes of a session."""
_TELL_SECONDS = 0.01
"""Within which finishes are told together."""

Answers: TypeAlias = Mapping[str, Callable[[Mapping[str, JsonValue]], Awaitable[Answer]]]
"""What a worker answers to the questions of others, by their names."""


@dataclass(frozen=True, slots=True, eq=False)
class Duties:
    """What a worker does for the others. look_again: a rollout has entered the feed elsewhere."""

    answers: Answers
    look_again: Callable[[], None]


class Membership:
    """`Origin`, `Leader` and `Siblings` of one worker; make it with `join`."""

    def __init__(self, channel: Channel, first: Message, marks: WorkerMarks) -> None:
        """Use `join`."""
        self._marks = marks
        self._epoch = 0
        self.state = LiveState.from_json(first.fields["state"])
        self.serves = bool(first.fields["serves"])
        self.are_all = False
        self._channel = channel
        self._questions = Questions(channel, self._answer)
        self._listener: socket.socket | None = None
        self._duties: Duties | None = None
        self._estate: OwnEstate | None = None
        self._given: list[int] = []
        self._leaving: asyncio.Task[None] | None = None
        self._telling: asyncio.TimerHandle | None = None
        self._sending: set[asyncio.Task[Any]] = set()

    @classmethod
    async def join(cls, channel: Channel, marks: WorkerMarks) -> Membership:
        """Of a process that its supervisor has just forked; raises HandoverFailed if that is gone."""
        return cls(channel, await _ask(channel, "hello"), marks)

    async def fail(self, error: VerbatimError, *, exit_code: int) -> None:
        """Tell the supervisor why this process ends."""
        await self._channel.send("failed", error=error_json(error), exit_code=exit_code)

    # ---- getting the place ----

    async def hold(self) -> Holding | None:
        """As `Origin` says; waits until it is this worker's turn."""
        given = await _ask(self._channel, "take")
        listener, *lock = given.descriptors
        self.are_all = bool(lock) and not self.serves
        self._listener = socket.socket(fileno=listener)
        return Holding(lock[0] if lock else None, is_alone=bool(given.fields["alone"]))

    async def opened(self) -> None:
        """As `Origin` says."""
        await self._channel.send("opened")

    async def enter(self) -> socket.socket:
        """The listening socket; `state` is that of now, and what changes from here on is told."""
        self.state = LiveState.from_json((await _ask(self._channel, "ready")).fields["state"])
        assert self._listener is not None
        return self._listener

    async def run(self, estate: OwnEstate, duties: Duties) -> None:
        """Serve, and do what the supervisor says, until that is gone; then this process ends too."""
        self._estate, self._duties = estate, duties
        estate.operations.leader = self
        await self._channel.send("serving", state=estate.state().to_json())
        try:
            await Link(self._channel, estate.operations, pid=os.getppid()).run(self._take)
        finally:
            self._questions.end()
            estate.end()

    def close(self) -> None:
        """The supervisor learns by it that nothing more is written."""
        self._channel.close()

    async def _take(self, message: Message) -> None:
        estate, duties = self._estate, self._duties
        assert estate is not None
        assert duties is not None
        if self._questions.take(message):
            return
        match message.type:
            case "lead":
                estate.operations.leader = None
                estate.chores.start()
            case "connections":
                for descriptor in message.descriptors:
                    await estate.adopt(descriptor)
            case "old_one_gone":
                self.serves = False
                self.are_all = estate.lock is not None
            case "finished":
                duties.look_again()
            case "leave":
                self._leaving = asyncio.create_task(self._leave(estate))
            case "stay":
                await self._stay(estate)
            case "cut":
                estate.cut(EngineUnavailable(message.fields["reason"]))

    async def _leave(self, estate: OwnEstate) -> None:
        """Give connections to the gateway that took over, and end with the last reply."""
        estate.leave(self._given.append)
        await emptied(estate, self._channel, self._given)
        estate.end()

    async def _stay(self, estate: OwnEstate) -> None:
        self.are_all = estate.lock is not None and not self.serves
        self._epoch += _EPOCH  # whatever is known of a session, the other gateway may have changed it
        if self._leaving is not None:
            self._leaving.cancel()
            self._leaving = None
        await estate.server.stay()
        estate.presence.start()
        if estate.operations.leader is None:
            estate.chores.start()
        given, self._given[:] = list(self._given), []
        for descriptor in given:
            await estate.adopt(descriptor)

    # ---- what others ask ----

    async def _answer(self, name: str, fields: Mapping[str, JsonValue]) -> Answer:
        estate, duties = self._estate, self._duties
        assert estate is not None
        assert duties is not None
        match name:
            case "ping":
                return {"num_running": estate.num_running}
            case "perform":
                return await estate.operations.perform(Change(fields["name"], fields["arguments"]))
            case "stop_accepting":
                self.are_all = False  # the gateway that takes over writes too
                await estate.stop_accepting()
                return {}
        if name not in duties.answers:
            raise NotFound(f"no worker answers {name!r}")
        return await duties.answers[name](fields)

    # ---- what it asks ----

    async def perform(self, change: Change) -> dict[str, Any]:
        """As `Leader` says; raises EngineUnavailable where the leading worker died meanwhile."""
        try:
            return await self._questions.ask("perform", **asdict(change))
        except HandoverFailed as error:
            raise EngineUnavailable(f"{error.message}; ask again") from error

    async def settle(self, session_id: str) -> None:
        """As `Siblings` says."""
        await self._ask_others("settle", _SETTLE_SECONDS, session_id=session_id)

    async def is_used(self, session_id: str) -> bool:
        """As `Siblings` says."""
        answers = await self._ask_others("is_used", _LOOK_SECONDS, session_id=session_id)
        return any(answer["is_used"] for answer in answers)

    async def figures(self, *, with_counts: bool = False) -> Sequence[Mapping[str, JsonValue]]:
        """As `Siblings` says."""
        return await self._ask_others("figures", _LOOK_SECONDS, with_counts=with_counts)

    def begin_change(self, session_id: str) -> None:
        """As `Siblings` says."""
        self._marks.begin(session_id)

    def end_change(self, session_id: str) -> None:
        """As `Siblings` says."""
        self._marks.end(session_id)

    def changes(self, session_id: str) -> int | None:
        """As `Siblings` says."""
        if not self.are_all:
            return None
        changes = self._marks.changes(session_id)
        return None if changes is None else self._epoch + changes

    def rollout_finished(self) -> None:
        """As `Siblings` says; a moment later, because many may finish at once."""
        if self._telling is None:
            self._telling = asyncio.get_running_loop().call_later(_TELL_SECONDS, self._tell_finished)

    def _tell_finished(self) -> None:
        self._telling = None
        task = asyncio.create_task(self._channel.send("finished"))
        self._sending.add(task)
        task.add_done_callback(self._sending.discard)

    async def _ask_others(self, question: str, seconds: float, **fields: JsonValue) -> list[dict[str, JsonValue]]:
        """The answers of those that gave one in time."""
        try:
            answer = await self._questions.ask("others", question=question, seconds=seconds, fields=fields)
        except HandoverFailed:
            return []
        return list(answer["answers"])


async def _ask(channel: Channel, question: str) -> Message:
    """The supervisor's answer; it may have to wait for other workers, and takes no longer than the gateway's start."""
    answer = await channel.receive() if await channel.send(question) else None
    if answer is None:
        raise HandoverFailed("the supervisor of this worker has ended")
    return answer
