"""The supervisor of `serve --workers`: it owns the place, starts workers, and carries what they tell each other.

    supervisor   listening socket · control socket · the ledger's lock · engines and pause as last told
      ├── worker 0   a whole gateway on the shared ledger; leads: chores, operators' changes
      ├── worker 1   a whole gateway
      └── …

It serves no request and holds nothing that a worker's death could take along. A worker that dies, or does not answer
for a minute and is killed, is started anew, and another one leads. For whoever takes over from this gateway, or from
whom it takes over, it stands for all workers (`Estate`).
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gateway.contracts.errors import (
    ConfigurationError,
    EngineUnavailable,
    HandoverFailed,
    NotFound,
    ProcessFailed,
    VerbatimError,
)
from gateway.contracts.generation import JsonValue
from gateway.handover.channel import Channel, Message
from gateway.handover.control import Place, bound_control
from gateway.handover.estate import send_connections
from gateway.handover.link import Link
from gateway.handover.predecessor import Predecessor
from gateway.handover.questions import Questions, error_of
from gateway.handover.server import LAST_SECONDS
from gateway.handover.shares import Shares
from gateway.handover.state import NO_STATE, LiveState
from gateway.ledger.sqlite import hold_folder, name_holder
from gateway.replicas.operations import Change, Neighbour
from gateway.replicas.pause import Pause
from gateway.replicas.sources import EngineSource

_log = logging.getLogger(__name__)

_PING_SECONDS = 5.0
_HUNG_SECONDS = 60.0
"""Without an answer, after which a worker is killed."""
_FIRST_DELAY_SECONDS = 0.05
_LONGEST_DELAY_SECONDS = 10.0
_STEADY_SECONDS = 60.0
"""After which a worker's death is no longer one of a series: delays before new ones double within a series."""
_GRACE_SECONDS = 5.0
"""Beyond draining, for workers to settle what they have and to close the ledger."""


@dataclass(frozen=True, slots=True)
class CrewSettings:
    """data: the folder of an embedded ledger, None where no lock has to be held. control: the control socket's path.
    drain_seconds, replaced_drain_seconds: as in `GatewaySettings`. listen: binds the listening socket."""

    num_workers: int
    data: Path | None
    control: Path
    drain_seconds: float
    replaced_drain_seconds: float
    listen: Callable[[], socket.socket]


@dataclass(eq=False, slots=True)
class _Worker:
    """One process. has_ledger: it may write. ended: its exit status."""

    number: int
    pid: int
    channel: Channel
    started_at: float
    ended: asyncio.Future[int]
    questions: Questions = field(init=False)
    link: Link = field(init=False)
    has_ledger: bool = False
    serves: bool = False


class _Relay:
    """`Follower` for the supervisor: it makes no change itself, knows the state that changes lead to, and passes on."""

    def __init__(self) -> None:
        self.neighbours: set[Neighbour] = set()
        self._state: LiveState | None = None

    @property
    def is_known(self) -> bool:
        """Whether a worker has said how things stand."""
        return self._state is not None

    @property
    def state(self) -> LiveState:
        """As it is now; a pause whose time is up has ended by itself."""
        state = self._state or NO_STATE
        if state.paused is not None and state.paused.is_over(time.time()):
            return replace(state, paused=None)
        return state

    def learn(self, state: LiveState) -> None:
        """How things stand."""
        self._state = state

    async def follow(self, change: Change, *, told_by: Neighbour) -> None:
        """Note a change, and tell the others; raises HandoverFailed with what went wrong there."""
        self._note(change)
        answers = await asyncio.gather(*(each.ask(change) for each in self.neighbours if each is not told_by))
        if errors := [answer for answer in answers if answer is not None]:
            raise HandoverFailed("; ".join(errors))

    def _note(self, change: Change) -> None:
        state, arguments = self.state, change.arguments
        match change.name:
            case "add_engine":
                source = EngineSource(arguments["engine_id"], arguments["kind"], arguments["url"])
                others = tuple(engine for engine in state.engines if engine.engine_id != source.engine_id)
                self._state = replace(state, engines=(*others, source))
            case "remove_engine":
                left = tuple(engine for engine in state.engines if engine.engine_id != arguments["engine_id"])
                self._state = replace(state, engines=left)
            case "pause":
                self._state = replace(state, paused=Pause.from_json(arguments))
            case "resume":
                self._state = replace(state, paused=None)


class Crew:
    """The workers together; `Estate` of the gateway that they are."""

    def __init__(self, settings: CrewSettings, shares: Shares, predecessor: Predecessor | None) -> None:
        self.lock: int | None = None
        self.operations = _Relay()
        self._settings = settings
        self._shares = shares
        self._predecessor = predecessor
        self._listener: socket.socket | None = None
        self._control: socket.socket | None = None
        self._workers: dict[int, _Worker] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._due: asyncio.Queue[int] = asyncio.Queue()
        self._door = asyncio.Lock()
        self._num_ready = 0
        self._may_serve = asyncio.Event()
        self._all_serve: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._leader: _Worker | None = None
        self._num_deaths = 0
        self._is_ending = False
        self._give: Callable[[int], None] | None = None
        self.ended = asyncio.Event()
        if predecessor is not None:
            self.operations.learn(predecessor.state)

    # ---- starting ----

    async def start(self) -> None:
        """Until every worker serves; raises what the first one that failed said, VerbatimError."""
        if self._predecessor is None:
            self._settle_here()
        for number in range(self._settings.num_workers):
            self._due.put_nowait(number)
        await self._all_serve
        if self._control is None:
            self._control = bound_control(self._settings.control)
        self._spawn(self._watch_for_hung())
        self._appoint()

    async def worker_due(self) -> int:
        """The number of the next worker to be forked, which the caller does, and then says `enrol`."""
        return await self._due.get()

    def enrol(self, number: int, pid: int, connection: socket.socket) -> None:
        """A worker was forked; `connection` leads to it."""
        ended = asyncio.get_running_loop().create_future()
        worker = _Worker(number, pid, Channel(connection), time.monotonic(), ended)

        async def answer(name: str, fields: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
            return await self._answer(worker, name, fields)

        worker.questions = Questions(worker.channel, answer)
        worker.link = Link(worker.channel, self.operations, pid=pid)
        self._workers[number] = worker
        self._spawn(self._attend(worker))
        self.reap()

    async def follow_old_one(self) -> None:
        """Serve beside the gateway that this one replaced, until that is gone; raises HandoverFailed if it goes on."""
        if self._predecessor is None:
            return
        await self._predecessor.run(self.operations, self.adopt)
        for worker in self._workers.values():
            await worker.channel.send("old_one_gone")

    def reap(self) -> None:
        """Learn which workers have ended (SIGCHLD)."""
        for worker in self._workers.values():
            if not worker.ended.done():
                pid, status = os.waitpid(worker.pid, os.WNOHANG)
                if pid:
                    worker.ended.set_result(os.waitstatus_to_exitcode(status))

    async def _attend(self, worker: _Worker) -> None:
        try:
            await self._bring_in(worker)
        finally:
            worker.questions.end()
            worker.channel.close()
            status = await worker.ended
            self._lost(worker, status)

    async def _bring_in(self, worker: _Worker) -> None:
        """Give a worker its place (see `worker`), then carry its messages until it has ended."""
        channel = worker.channel
        if not await self._hear(worker):
            return
        await channel.send("state", state=self.operations.state.to_json(), serves=self._old_one_serves)
        if not await self._hear(worker):
            return
        async with self._door:
            await self._take_place()
            alone = not (self._old_one_serves or any(each.has_ledger for each in self._workers.values()))
            await channel.send("given", self._given(), alone=alone)
            worker.has_ledger = True
            if not await self._hear(worker):
                return
        if self.lock is not None:
            name_holder(self.lock)
        if not await self._hear(worker):
            return
        await self._old_one_leaves()
        await channel.send("leaving", state=self.operations.state.to_json())
        # Nothing was awaited between reading the state and this: the worker hears of every change since.
        await worker.link.run(lambda message: self._take(worker, message))

    async def _hear(self, worker: _Worker) -> bool:
        """Whether a worker goes on with its start."""
        message = await worker.channel.receive()
        if message is not None and message.type == "failed":
            self._fail(worker, error_of(message.fields["error"]), is_wrong=message.fields["exit_code"] == 2)
            return False
        return message is not None

    def _fail(self, worker: _Worker, error: VerbatimError, *, is_wrong: bool) -> None:
        if self._all_serve.done():
            _log.error("worker %d (process %d) cannot start: %s", worker.number, worker.pid, error.message)
        elif is_wrong and not isinstance(error, ConfigurationError):
            self._all_serve.set_exception(ConfigurationError(error.message))
        else:
            self._all_serve.set_exception(error)

    @property
    def _old_one_serves(self) -> bool:
        return self._predecessor is not None and not self._predecessor.is_gone

    def _settle_here(self) -> None:
        """Nobody has the place: take it."""
        self._listener = self._settings.listen()
        self.lock = None if self._settings.data is None else hold_folder(self._settings.data)

    async def _take_place(self) -> None:
        if self._listener is not None:
            return
        given = None if self._predecessor is None else await self._predecessor.take()
        if given is None:  # it died while the workers got ready
            self._settle_here()
        else:
            self._listener, self._control, self.lock = given.listener, given.control, given.lock

    async def _old_one_leaves(self) -> None:
        """Once all workers are ready; its last state is where they begin."""
        self._num_ready += 1
        if self._num_ready == self._settings.num_workers:
            if self._old_one_serves:
                assert self._predecessor is not None
                await self._predecessor.leave()
                self.operations.learn(self._predecessor.state)
            self._may_serve.set()
        await self._may_serve.wait()

    def _given(self) -> list[int]:
        assert self._listener is not None
        return [self._listener.fileno()] if self.lock is None else [self._listener.fileno(), self.lock]

    # ---- while they run ----

    async def _take(self, worker: _Worker, message: Message) -> None:
        if worker.questions.take(message):
            return
        match message.type:
            case "serving":
                self._begins(worker, LiveState.from_json(message.fields["state"]))
            case "finished":
                for other in self._others(worker):
                    await other.channel.send("finished")
            case "connections":
                for descriptor in message.descriptors:
                    if self._give is None:
                        await self.adopt(descriptor)
                    else:
                        self._give(descriptor)

    def _begins(self, worker: _Worker, state: LiveState) -> None:
        worker.serves = True
        if not any(each.serves for each in self._others(worker)):
            self.operations.learn(state)  # its own engines are among them
        if self._all_serve.done():
            _log.warning("worker %d (process %d) serves", worker.number, worker.pid)
            self._appoint()
        elif sum(each.serves for each in self._workers.values()) == self._settings.num_workers:
            self._all_serve.set_result(None)

    def _others(self, worker: _Worker) -> list[_Worker]:
        return [each for each in self._workers.values() if each is not worker and each.serves]

    def _appoint(self) -> None:
        """One leads; the next one when it has died."""
        if self._leader is None and not self._is_ending:
            self._leader = next((each for each in self._workers.values() if each.serves), None)
            if self._leader is not None:
                self._spawn(_told(self._leader.channel, "lead"))

    async def _answer(self, worker: _Worker, name: str, fields: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
        match name:
            case "perform":
                if self._leader is None:
                    raise EngineUnavailable("no worker leads at the moment; ask again")
                return await self._leader.questions.ask("perform", **fields)
            case "others":
                return {"answers": await self._ask_others(worker, **fields)}
        raise NotFound(f"the supervisor does not answer {name!r}")

    async def _ask_others(
        self, worker: _Worker, *, question: str, seconds: float, fields: Mapping[str, JsonValue]
    ) -> list[JsonValue]:
        asked = self._others(worker)
        asking = (each.questions.ask(question, timeout_seconds=seconds, **fields) for each in asked)
        answers = await asyncio.gather(*asking, return_exceptions=True)
        for other, answer in zip(asked, answers, strict=True):
            if isinstance(answer, TimeoutError):
                _log.warning("worker %d does not answer %r within %g s", other.number, question, seconds)
            elif isinstance(answer, BaseException) and not isinstance(answer, VerbatimError):
                raise answer
        return [answer for answer in answers if not isinstance(answer, BaseException)]

    async def _watch_for_hung(self) -> None:
        """A process that answers nothing keeps its connections, and pauses wait for it: it is killed."""
        while True:
            await asyncio.sleep(_PING_SECONDS)
            await asyncio.gather(*(self._ping(worker) for worker in self._workers.values() if worker.serves))

    async def _ping(self, worker: _Worker) -> None:
        try:
            await worker.questions.ask("ping", timeout_seconds=_HUNG_SECONDS)
        except HandoverFailed:  # it has ended
            return
        except TimeoutError:
            _log.error("worker %d (process %d) hangs and is killed", worker.number, worker.pid)
            self._signal(worker, signal.SIGKILL)

    # ---- ending ----

    def _lost(self, worker: _Worker, status: int) -> None:
        self._shares.leave(worker.number)
        del self._workers[worker.number]
        if self._leader is worker:
            self._leader = None
            self._appoint()
        if self._is_ending:
            if not self._workers:
                self.ended.set()
            return
        how = f"signal {-status}" if status < 0 else f"exit status {status}"
        if not self._all_serve.done():
            message = f"worker {worker.number} (process {worker.pid}) ended before it was ready ({how})"
            self._all_serve.set_exception(ProcessFailed(message))
        elif self._all_serve.exception() is None:
            self._start_again(worker, how)

    def _start_again(self, worker: _Worker, how: str) -> None:
        """Soon; later, where one dies after another."""
        if time.monotonic() - worker.started_at > _STEADY_SECONDS:
            self._num_deaths = 0
        delay = min(_LONGEST_DELAY_SECONDS, _FIRST_DELAY_SECONDS * 2**self._num_deaths)
        self._num_deaths += 1
        _log.error(
            "worker %d (process %d) has ended (%s); started again in %g s", worker.number, worker.pid, how, delay
        )
        asyncio.get_running_loop().call_later(delay, self._due_again, worker.number)

    def _due_again(self, number: int) -> None:
        if not self._is_ending:
            self._due.put_nowait(number)

    async def stop(self, number: int = signal.SIGTERM) -> None:
        """Have all workers drain and end; those that take too long are killed."""
        self._is_ending = True
        if self._listener is not None:
            self._listener.close()
        if not self._workers:
            return
        self.pass_on(number)
        try:
            async with asyncio.timeout(self._settings.drain_seconds + LAST_SECONDS + _GRACE_SECONDS):
                await self.ended.wait()
        except TimeoutError:
            _log.error("%d workers do not end and are killed", len(self._workers))
            self.pass_on(signal.SIGKILL)
            await self.ended.wait()

    def pass_on(self, number: int) -> None:
        """A signal for every worker."""
        for worker in self._workers.values():
            self._signal(worker, number)

    def _signal(self, worker: _Worker, number: int) -> None:
        if not worker.ended.done():
            with suppress(ProcessLookupError):
                os.kill(worker.pid, number)

    async def close(self) -> None:
        """Nothing of this gateway is left."""
        self._is_ending = True
        self.pass_on(signal.SIGKILL)
        while self._workers:
            await asyncio.wait([worker.ended for worker in self._workers.values()])
            await asyncio.sleep(0)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for each in (self._listener, self._control):
            if each is not None:
                each.close()
        if self.lock is not None:
            os.close(self.lock)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._part)

    def _part(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("a worker could not be attended to", exc_info=error)

    # ---- Estate ----

    @property
    def place(self) -> Place:
        """The sockets that travel."""
        assert self._listener is not None
        assert self._control is not None
        return Place(self._listener, self._control)

    @property
    def drain_seconds(self) -> float:
        """How long replies may run after a successor serves."""
        return self._settings.replaced_drain_seconds

    @property
    def num_running(self) -> int:
        """Workers, of which each may have turns."""
        return len(self._workers)

    @property
    def is_busy(self) -> bool:
        """Whether a worker is left, or the gateway that this one replaced."""
        return bool(self._workers) or self._old_one_serves

    def state(self) -> LiveState:
        """As it is now."""
        return self.operations.state

    def share(self, is_under_way: bool) -> None:
        """Workers share the ledger anyway."""

    async def stop_accepting(self) -> None:
        """As `Estate` says."""
        serving = [worker for worker in self._workers.values() if worker.serves]
        for each in serving:
            with suppress(HandoverFailed):
                await each.questions.ask("stop_accepting", timeout_seconds=_GRACE_SECONDS)

    async def stay(self) -> None:
        """As `Estate` says; workers that have left are started again."""
        self._is_ending, self._give = False, None
        self.ended.clear()
        for number in range(self._settings.num_workers):
            if number in self._workers:
                await self._workers[number].channel.send("stay")
            else:
                self._due.put_nowait(number)
        self._appoint()

    def leave(self, give: Callable[[int], None]) -> None:
        """As `Estate` says; a worker that has nothing left ends."""
        self._is_ending, self._give = True, give
        for worker in self._workers.values():
            self._spawn(_told(worker.channel, "leave"))

    async def deliveries_noted(self) -> None:
        """Workers see to it before they give a connection."""

    async def adopt(self, descriptor: int) -> None:
        """Have the worker with the fewest connections serve it."""
        serving = {worker.number: worker for worker in self._workers.values() if worker.serves}
        with suppress(ValueError):
            least = self._shares.least()
            if least in serving:
                await send_connections(serving[least].channel, [descriptor])
                return
        if serving:
            await send_connections(next(iter(serving.values())).channel, [descriptor])
        else:
            os.close(descriptor)

    def cut(self, reason: EngineUnavailable) -> None:
        """As `Estate` says."""
        for worker in self._workers.values():
            self._spawn(_told(worker.channel, "cut", reason=reason.message))

    def end(self) -> None:
        """Nothing is left to do."""
        self._is_ending = True


async def _told(channel: Channel, what: str, **fields: JsonValue) -> None:
    await channel.send(what, **fields)
