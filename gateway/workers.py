"""`serve --workers N`: a supervisor that forks N gateways onto one port and one ledger (see `handover/README.md`).

Forked, not started anew: what was imported is shared by all of them, settings and keys need no way to travel, and a
worker that died is back within a fraction of a second. The supervisor forks only while its event loop stands still and
before it has any thread; the child leaves that loop alone and makes its own.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack, closing, suppress
from functools import partial
from typing import Any, NamedTuple, NoReturn

import uvloop

from gateway.background import background
from gateway.child_process import end_with_parent
from gateway.contracts.errors import ConfigurationError, VerbatimError
from gateway.contracts.generation import JsonValue
from gateway.engine_kinds import EngineMaker
from gateway.handover.channel import Channel
from gateway.handover.control import Place, remove_control
from gateway.handover.crew import Crew, CrewSettings
from gateway.handover.marks import ChangeMarks, WorkerMarks
from gateway.handover.predecessor import Predecessor
from gateway.handover.server import GatewayServer, Stop
from gateway.handover.shares import Share, Shares
from gateway.handover.succession import Succession
from gateway.handover.worker import Duties, Membership
from gateway.listening import announce, listening_socket, server_config
from gateway.memory import settle_memory
from gateway.parts import Gateway, build_app, open_gateway
from gateway.routes.access import Access
from gateway.settings import GatewaySettings, of_one_worker

_log = logging.getLogger(__name__)

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_STANDARD_DESCRIPTORS = 3


class _Place(NamedTuple):
    """What a worker gets by being forked. channel: to its supervisor."""

    channel: Channel
    share: Share
    marks: WorkerMarks


def supervise(
    settings: GatewaySettings,
    operator_digests: Sequence[str],
    kinds: Mapping[str, EngineMaker],
    *,
    replace_running: bool,
) -> None:
    """Serve with workers until SIGTERM or SIGINT, or until replaced; raises VerbatimError for what a worker cannot do
    at the start."""
    if settings.model is None:
        raise ConfigurationError("the gateway needs a model folder (tokenizer and chat template): give --model PATH")
    shares, marks = Shares(settings.workers), ChangeMarks(settings.workers)
    supervisor = os.getpid()
    settle_memory()  # and no collection writes to the pages that workers share
    with asyncio.Runner() as runner:
        forks: asyncio.Queue[tuple[Crew, int]] = asyncio.Queue()
        gateway = runner.get_loop().create_task(_oversee(settings, shares, forks, replace_running=replace_running))
        while (fork := runner.run(_next_fork(forks, gateway))) is not None:
            crew, number = fork
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            pid = os.fork()
            if pid == 0:
                _become_worker(theirs, supervisor)
                keep_to_core(number, settings.workers)
                place = _Place(Channel(theirs), shares.enter(number), marks.of(number))
                _end(_run_worker(settings, operator_digests, kinds, place))
            theirs.close()
            runner.run(_enrol(crew, number, pid, ours))
        gateway.result()


async def _next_fork(forks: asyncio.Queue[tuple[Crew, int]], gateway: asyncio.Task[None]) -> tuple[Crew, int] | None:
    """Which worker has to be forked, as soon as one has; None when the gateway has ended."""
    waiting = asyncio.create_task(forks.get())
    try:
        await asyncio.wait({waiting, gateway}, return_when=asyncio.FIRST_COMPLETED)
        return None if gateway.done() else waiting.result()
    finally:
        waiting.cancel()


async def _enrol(crew: Crew, number: int, pid: int, connection: socket.socket) -> None:
    crew.enrol(number, pid, connection)


async def _oversee(
    settings: GatewaySettings, shares: Shares, forks: asyncio.Queue[tuple[Crew, int]], *, replace_running: bool
) -> None:
    """The supervisor's part of a gateway's life."""
    loop = asyncio.get_running_loop()
    told_to_stop = asyncio.Event()
    async with AsyncExitStack() as stack:
        predecessor = await Predecessor.find(settings.control_path) if replace_running else None
        if predecessor is not None:
            stack.callback(predecessor.close)
            predecessor.check_address(settings.host, settings.port)
        succession = stack.enter_context(closing(Succession()))
        crew = Crew(_crew_settings(settings), shares, predecessor)
        for number in _SIGNALS:
            loop.add_signal_handler(number, _told, crew, told_to_stop)
            stack.callback(loop.remove_signal_handler, number)
        loop.add_signal_handler(signal.SIGCHLD, crew.reap)
        stack.callback(loop.remove_signal_handler, signal.SIGCHLD)
        stack.push_async_callback(crew.close)

        async def ask_for_forks() -> None:
            while True:
                forks.put_nowait((crew, await crew.worker_due()))

        await stack.enter_async_context(background(ask_for_forks()))
        if not await _unless(told_to_stop, crew.start()):
            return
        await stack.enter_async_context(background(crew.follow_old_one()))
        announce(crew.place.listener)
        if not await _unless(told_to_stop, succession.run(crew)):
            if not succession.is_under_way:  # else the name is the successor's
                remove_control(settings.control_path)
            await crew.stop()
            if predecessor is not None:
                await predecessor.stop(timeout_seconds=settings.drain_seconds)


def _told(crew: Crew, told_to_stop: asyncio.Event) -> None:
    """A signal: the second one makes short work of what still runs."""
    if told_to_stop.is_set():
        crew.pass_on(signal.SIGINT)
    told_to_stop.set()


async def _unless(stopped: asyncio.Event, work: Any) -> bool:
    """Whether some work came to its end before the process was told to stop; raises what it raised."""
    doing, stopping = asyncio.ensure_future(work), asyncio.create_task(stopped.wait())
    try:
        await asyncio.wait({doing, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if doing.done():
            doing.result()
            return True
        return False
    finally:
        for task in (doing, stopping):
            task.cancel()
        await asyncio.gather(doing, stopping, return_exceptions=True)


def _crew_settings(settings: GatewaySettings) -> CrewSettings:
    return CrewSettings(
        num_workers=settings.workers,
        data=None if settings.ledger else settings.data,
        control=settings.control_path,
        drain_seconds=settings.drain_seconds,
        replaced_drain_seconds=settings.replaced_drain_seconds,
        listen=partial(listening_socket, settings),
    )


# ---- in a worker's process ----


def _become_worker(connection: socket.socket, supervisor: int) -> None:
    """Let go of everything that is the supervisor's, and end with it."""
    gc.freeze()  # its sockets and its loop are never cleaned up here: their descriptors are closed below
    signal.set_wakeup_fd(-1)
    for number in (*_SIGNALS, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    for name in os.listdir("/proc/self/fd"):
        descriptor = int(name)
        if descriptor >= _STANDARD_DESCRIPTORS and descriptor != connection.fileno():
            with suppress(OSError):
                os.close(descriptor)
    # As one process: what kills the supervisor kills the gateway, and nothing keeps the port and the folder.
    end_with_parent(supervisor)


def keep_to_core(number: int, num_workers: int) -> None:
    """Where there are as many workers as this process may use cores, each keeps to one of its own.

    Its threads then do not hand the interpreter's lock from core to core, and engine and agents beside it find their
    caches where they left them. Fewer workers leave the choice to the system, for there is room beside them; more would
    not come out even.
    """
    cores = sorted(os.sched_getaffinity(0))
    if num_workers == len(cores):
        os.sched_setaffinity(0, {cores[number]})


def _end(exit_code: int) -> NoReturn:
    """Without the supervisor's clean-up, which is on this process's stack too."""
    sys.stdout.flush()
    sys.stderr.flush()
    logging.shutdown()
    os._exit(exit_code)


def _run_worker(
    settings: GatewaySettings,
    operator_digests: Sequence[str],
    kinds: Mapping[str, EngineMaker],
    place: _Place,
) -> int:
    """A worker's whole life; its exit code."""
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_work(of_one_worker(settings), operator_digests, kinds, place))
    except BaseException:  # noqa: BLE001  # nothing of this process may go on in the supervisor's frames below
        _log.exception("a worker has failed")
        return 1


async def _work(
    settings: GatewaySettings,
    operator_digests: Sequence[str],
    kinds: Mapping[str, EngineMaker],
    place: _Place,
) -> int:
    async with AsyncExitStack() as stack:
        member = await Membership.join(place.channel, place.marks)
        stack.callback(member.close)  # last: then the supervisor knows that nothing is written any more
        try:
            gateway = await stack.enter_async_context(open_gateway(settings, kinds, member, member))
            listener = stack.enter_context(closing(await member.enter()))
            await gateway.inherit(member.state)
        except VerbatimError as error:
            exit_code = 2 if isinstance(error, ConfigurationError) else 1
            await member.fail(error, exit_code=exit_code)
            return exit_code
        access = Access(operator_digests, on_refused=gateway.metrics.observe_refusal)
        stop = Stop(settings.drain_seconds, begin=gateway.begin_to_stop, cut=gateway.cut)
        server = GatewayServer(server_config(settings, build_app(gateway, access)), listener, stop, place.share)
        async with background(_belong(gateway, member, server, listener)):
            await server.serve()
            await gateway.chores.stop()
            await gateway.presence.stop()
    return 0


async def _belong(gateway: Gateway, member: Membership, server: GatewayServer, listener: socket.socket) -> None:
    """Do what the supervisor and the other workers ask for."""
    await server.accepts.wait()
    settle_memory()
    gateway.presence.start()
    place = Place(listener, listener)  # it gives none: the supervisor does
    estate = gateway.estate(server, place, None)
    await member.run(estate, Duties(_answers(gateway), gateway.lease_queue.look_again))


def _answers(gateway: Gateway) -> Any:
    async def figures(fields: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
        return gateway.figures(with_counts=fields["with_counts"])

    async def settle(fields: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
        await gateway.registry.settle(fields["session_id"])
        return {}

    async def is_used(fields: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
        return {"is_used": gateway.registry.is_used(fields["session_id"])}

    return {"figures": figures, "settle": settle, "is_used": is_used}
