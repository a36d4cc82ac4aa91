"""The controlling side of a holder process (`sandbox/holder.py`): start it, send it requests, end it.

Promises: nothing here blocks the event loop (but for the fork of the start, about a millisecond); a request that is
cancelled takes its command with it; a holder that does not answer in time is killed and reported as SandboxLost.
Costs two descriptors per idle sandbox, one more per request under way.
Does not do: isolation and limits, which the drivers bring along as the start command and the control group.
"""

from __future__ import annotations

import asyncio
import errno
import io
import os
import select
import signal
import socket
import struct
import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from gateway.contracts.errors import InvalidRequest, NotFound, SandboxError, SandboxLost, SandboxUnavailable
from gateway.contracts.ports import ExecOutcome, ExecResult, SandboxLimits
from sandbox import holder
from sandbox.limits import check_timeout

GRACE_SECONDS = 5.0
"""How long a holder may answer after a command's deadline; the supervisor needs up to KILL_SECONDS of it."""
FILE_SECONDS = 30.0
"""Deadline of reading or writing one file."""
DESTROY_SECONDS = 20.0
"""How long the kernel may take to free a killed sandbox before that is reported."""
_END_SECONDS = 0.3

_SHELL_SIGNALLED = 128  # A shell's exit code for a command that a signal ended is this plus the signal's number.
_CREDENTIALS = struct.Struct("iII")


class Enclosure(Protocol):
    """What surrounds one sandbox as a whole and outlives its processes: a control group, a folder."""

    def out_of_memory_kills(self) -> int:
        """How many processes were killed so far because the sandbox's memory was used up."""
        ...

    async def remove(self) -> None:
        """Leave nothing of it; all of its processes have ended."""
        ...


class StartedHolder(NamedTuple):
    """A holder that answers: its control socket, the process we started, and the holder's own process descriptor."""

    control: socket.socket
    process: subprocess.Popen[bytes]
    pidfd: int


@dataclass(frozen=True, slots=True)
class HolderCommand:
    """How to start a holder; `argv` gets the control descriptor's number in place of CONTROL.

    It starts in the process group `process_group` (of this session), or in a session of its own if that is None.
    """

    argv: Sequence[str]
    pass_fds: Sequence[int] = ()
    process_group: int | None = None
    CONTROL = "{control}"


async def start_holder(
    command: HolderCommand, *, admit: Callable[[int], None], deadline_seconds: float
) -> StartedHolder:
    """Start a holder and wait until it answers; raises SandboxUnavailable with what its start printed.

    `admit` is called with its process id before it may start any other process, and puts its limits into force.
    Must be called on a thread that lives as long as the sandbox: the kernel ends a sandbox when the thread ends that
    started it (`bwrap --die-with-parent`).
    """
    async with AsyncExitStack() as undo:
        try:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            undo.callback(ours.close)
            ours.setblocking(False)
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
            with _memory_file() as reports:
                with theirs:
                    process = _fork(command, theirs.fileno(), reports.fileno())
                undo.push_async_callback(_kill_starting, process)
                pid = await _hello(ours, deadline_seconds)
                if pid is None:
                    raise SandboxUnavailable(f"a sandbox did not start: {_report(reports.fileno())}")
            admit(pid)
            ours.send(holder.ADMITTED)
            started = StartedHolder(ours, process, os.pidfd_open(pid))
        except OSError as error:
            what = f" ({error.filename})" if error.filename else ""
            raise SandboxUnavailable(f"a sandbox did not start: {error.strerror}{what}") from error
        undo.pop_all()
    return started


def _memory_file() -> io.FileIO:
    return io.FileIO(os.memfd_create("sandbox-start"), "r+")


def _fork(command: HolderCommand, control: int, reports: int) -> subprocess.Popen[bytes]:
    """Blocks for about a millisecond: it must happen on the calling thread (see `start_holder`)."""
    return subprocess.Popen(
        [argument.replace(HolderCommand.CONTROL, str(control)) for argument in command.argv],
        stdin=subprocess.DEVNULL,
        stdout=reports,
        stderr=reports,
        pass_fds=(control, *command.pass_fds),
        start_new_session=command.process_group is None,
        process_group=command.process_group,
        env={"PATH": os.environ.get("PATH", os.defpath)},
    )


async def _hello(control: socket.socket, deadline_seconds: float) -> int | None:
    """The holder's process id as this process sees it, told by the kernel; None if it ended or is too slow."""
    try:
        async with asyncio.timeout(deadline_seconds):
            await _readable(control.fileno())
    except TimeoutError:
        return None
    message, ancillary, _, _ = control.recvmsg(64, socket.CMSG_SPACE(_CREDENTIALS.size))
    if message != holder.HELLO:
        return None
    control.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 0)
    pid: int = _CREDENTIALS.unpack(ancillary[0][2])[0]
    return pid


def _report(reports: int) -> str:
    """The last line that a failed start printed."""
    lines = os.pread(reports, 4096, max(0, os.fstat(reports).st_size - 4096)).decode(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "it gave no answer")


class HeldSandbox:
    """A sandbox whose commands a holder process runs (`ports.Sandbox`)."""

    def __init__(
        self,
        sandbox_id: str,
        limits: SandboxLimits,
        started: StartedHolder,
        *,
        env: Mapping[str, str],
        enclosure: Enclosure | None,
        on_destroyed: Callable[[], None],
        ends_itself: bool = False,
    ) -> None:
        """`ends_itself`: closing its control socket is enough, and lets the holder clean up (no namespaces do it)."""
        self._id = sandbox_id
        self._limits = limits
        self._control, self._process, self._pidfd = started
        self._env = dict(env)
        self._enclosure = enclosure
        self._on_destroyed = on_destroyed
        self._ends_itself = ends_itself
        self._ending: asyncio.Task[None] | None = None

    @property
    def sandbox_id(self) -> str:
        return self._id

    @property
    def alive(self) -> bool:
        """Whether commands can run: it was not destroyed, and its holder has not ended."""
        return self._ending is None and not select.select([self._pidfd], [], [], 0)[0]

    async def execute(
        self,
        command: str | Sequence[str],
        *,
        timeout_seconds: float,
        stdin: bytes = b"",
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
    ) -> ExecResult:
        """Run a shell line (str, by /bin/sh) or an argument vector; relative `cwd` is below /workspace.

        `env` is added to the sandbox's own small environment. A timeout kills everything that the command started,
        however it detached itself; processes that a command leaves behind otherwise live on. A program that cannot be
        started ends with 127 or 126, as in a shell. Raises SandboxLost if the sandbox is gone.
        """
        check_timeout(timeout_seconds)
        argv = ["/bin/sh", "-c", command] if isinstance(command, str) else list(command)
        variables = [f"{name}={value}" for name, value in {**self._env, **(env or {})}.items()]
        fields = (cwd or ".", _joined(argv, "an argument"), _joined(variables, "a variable"), stdin)
        kills_before = self._enclosure.out_of_memory_kills() if self._enclosure else 0
        reply = await self._request(holder.EXECUTE, timeout_seconds, self._limits.output_bytes, *fields)
        if reply.kind == holder.NOT_STARTED:
            # No process or no memory is left for one more command: its own doing, so it is data.
            return _exited(126, b"", b"sandbox: " + reply.stderr + b"\n", reply.seconds)
        out_of_memory = self._enclosure is not None and self._enclosure.out_of_memory_kills() > kills_before
        outcome, exit_code = _outcome(reply, out_of_memory=out_of_memory)
        return ExecResult(
            outcome, exit_code, reply.stdout, reply.stderr, reply.stdout_total, reply.stderr_total, reply.seconds
        )

    async def write_file(self, path: str, content: bytes) -> None:
        """Write a file, making its folders; raises SandboxError if the disk is full or the place read-only."""
        reply = await self._request(holder.WRITE_FILE, FILE_SECONDS, 0, _named(path), b"", b"", content)
        if reply.kind in (holder.FAILED, holder.NOT_STARTED):
            raise SandboxError(f"sandbox {self._id}: cannot write {path}: {reply.stderr.decode(errors='replace')}")

    async def read_file(self, path: str) -> bytes:
        """A regular file's content; raises NotFound if there is none, SandboxError if it is larger than the disk."""
        most = max(self._limits.disk_bytes, 2**20)
        reply = await self._request(holder.READ_FILE, FILE_SECONDS, most, _named(path), b"", b"", b"")
        if reply.kind == holder.ENDED:
            return reply.stdout
        reason = f"sandbox {self._id}: cannot read {path}: {reply.stderr.decode(errors='replace')}"
        if reply.status in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP):
            raise NotFound(reason)
        raise SandboxError(reason)

    async def destroy(self) -> None:
        """End all of its processes and free its files; repeating it is fine, and a cancelled one goes on by itself."""
        if self._ending is None:
            self._control.close()
            if not self._ends_itself:
                _kill(self._pidfd)
            self._ending = asyncio.create_task(self._end(), name=f"end sandbox {self._id}")
        await asyncio.shield(self._ending)

    async def _end(self) -> None:
        try:
            if self._ends_itself and not await _ended(self._pidfd, 2 * holder.KILL_SECONDS):
                _kill(self._pidfd)
            await _reap(self._process)
            if self._enclosure is not None:
                await self._enclosure.remove()
        finally:
            os.close(self._pidfd)
            self._on_destroyed()

    async def _request(
        self, operation: int, timeout_seconds: float, output_bytes: int, path: str, argv: bytes, env: bytes, body: bytes
    ) -> _Reply:
        if self._ending is not None:
            raise SandboxLost(f"sandbox {self._id} was destroyed")
        name = os.fsencode(path)
        head = holder.REQUEST.pack(
            operation,
            timeout_seconds,
            output_bytes,
            len(name),
            len(argv),
            len(env),
            len(body),
        )
        backup_seconds = timeout_seconds + GRACE_SECONDS
        try:
            async with asyncio.timeout(backup_seconds + GRACE_SECONDS):
                with await self._open_channel(backup_seconds) as channel:
                    return await _exchange(channel, head + name + argv + env + body, most_bytes=2 * output_bytes + 4096)
        except TimeoutError:
            await self.destroy()
            raise SandboxLost(
                f"sandbox {self._id} did not answer within {backup_seconds:.0f} s and was ended"
            ) from None
        except _ChannelClosed:
            return await self._explain_closed_channel(operation)

    async def _open_channel(self, backup_seconds: float) -> socket.socket:
        """A fresh stream to a supervisor; raises SandboxLost, or SandboxUnavailable if no descriptor is free."""
        try:
            ours, theirs = socket.socketpair()
        except OSError as error:
            raise SandboxUnavailable(f"no command can start: {error.strerror} (raise ulimit -n)") from error
        ours.setblocking(False)
        with theirs:
            while True:
                try:
                    socket.send_fds(self._control, [holder.CONTROL.pack(backup_seconds)], [theirs.fileno()])
                    return ours
                except BlockingIOError:
                    await asyncio.sleep(0.001)  # The holder has many requests to take; the caller's deadline holds.
                except OSError as error:
                    ours.close()
                    raise SandboxLost(f"sandbox {self._id} is gone ({error.strerror})") from error
                except BaseException:
                    ours.close()
                    raise

    async def _explain_closed_channel(self, operation: int) -> _Reply:
        """No reply: the whole sandbox is gone, or a command killed its own supervisor."""
        # Channels close a moment before the holder itself has ended.
        if self._ending is not None or await _ended(self._pidfd, _END_SECONDS):
            killed = self._enclosure is not None and self._enclosure.out_of_memory_kills() > 0
            reason = "its memory was used up" if killed else "its first process ended"
            raise SandboxLost(f"sandbox {self._id} is gone: {reason}")
        if operation != holder.EXECUTE:
            raise SandboxError(f"sandbox {self._id}: a file operation was killed from inside")
        return _Reply(holder.ENDED, signal.SIGKILL, 0.0, 0, 0, b"", b"")


class _Reply(NamedTuple):
    """One reply of a supervisor; `status` is a wait status, or an errno where kind is FAILED."""

    kind: int
    status: int
    seconds: float
    stdout_total: int
    stderr_total: int
    stdout: bytes
    stderr: bytes


class _ChannelClosed(Exception):
    """A supervisor ended without a reply; explained by HeldSandbox, never seen outside of this module."""


async def _exchange(channel: socket.socket, request: bytes, *, most_bytes: int) -> _Reply:
    """Send one request and read its reply; raises _ChannelClosed."""
    loop = asyncio.get_running_loop()
    try:
        await loop.sock_sendall(channel, request)
        *figures, stdout_bytes, stderr_bytes = holder.REPLY.unpack(await _receive(channel, holder.REPLY.size))
        if stdout_bytes + stderr_bytes > most_bytes:
            raise SandboxError(
                f"a sandbox announced {stdout_bytes + stderr_bytes} bytes where {most_bytes} are allowed"
            )
        body = await _receive(channel, stdout_bytes + stderr_bytes)
    except ConnectionError as error:
        raise _ChannelClosed from error
    kind, status, seconds, stdout_total, stderr_total = figures
    return _Reply(
        kind, status, seconds, stdout_total, stderr_total, bytes(body[:stdout_bytes]), bytes(body[stdout_bytes:])
    )


async def _receive(channel: socket.socket, count: int) -> memoryview:
    loop = asyncio.get_running_loop()
    received = memoryview(bytearray(count))
    position = 0
    while position < count:
        read = await loop.sock_recv_into(channel, received[position:])
        if read == 0:
            raise _ChannelClosed
        position += read
    return received


def _outcome(reply: _Reply, *, out_of_memory: bool) -> tuple[ExecOutcome, int | None]:
    """What a wait status means; a shell passes its command's signal on as an exit code above 128."""
    if reply.kind == holder.TIMED_OUT:
        return ExecOutcome.TIMEOUT, None
    code = os.waitstatus_to_exitcode(reply.status)
    killed_by = -code if code < 0 else code - _SHELL_SIGNALLED
    if out_of_memory and killed_by == signal.SIGKILL:
        return ExecOutcome.OUT_OF_MEMORY, None
    if killed_by == signal.SIGXCPU:
        return ExecOutcome.TIMEOUT, None
    return (ExecOutcome.SIGNALLED, None) if code < 0 else (ExecOutcome.EXITED, code)


def _exited(code: int, stdout: bytes, stderr: bytes, seconds: float) -> ExecResult:
    return ExecResult(ExecOutcome.EXITED, code, stdout, stderr, len(stdout), len(stderr), seconds)


def _joined(words: Sequence[str], what: str) -> bytes:
    """NUL-separated words; raises InvalidRequest where that would be ambiguous."""
    if any("\0" in word for word in words):
        raise InvalidRequest(f"{what} of a command holds a NUL byte")
    if not words and what == "an argument":
        raise InvalidRequest("a command needs at least a program")
    return os.fsencode("\0".join(words))


def _named(path: str) -> str:
    if not path or "\0" in path:
        raise InvalidRequest(f"{path!r} names no file")
    return path


def _kill(pidfd: int) -> None:
    with suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)


async def _kill_starting(process: subprocess.Popen[bytes]) -> None:
    """End a start half-way, with what it has started: bwrap's second process would wait for ever for the first."""

    async def end() -> None:
        process.send_signal(signal.SIGSTOP)
        for _ in range(round(DESTROY_SECONDS * 1000)):
            if process.poll() is not None or _has_stopped(process.pid):
                break  # Only now it can start no other.
            await asyncio.sleep(0.001)
        if process.poll() is None:
            for pid in (*holder.descendants(process.pid), process.pid):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        await _reap(process)

    await asyncio.shield(asyncio.create_task(end(), name=f"end start of process {process.pid}"))


def _has_stopped(child: int) -> bool:
    return os.waitid(os.P_PID, child, os.WSTOPPED | os.WNOHANG | os.WNOWAIT) is not None


async def _reap(process: subprocess.Popen[bytes]) -> None:
    """Wait for a child of ours without a thread; kill it, and report, if it does not end by itself."""
    if process.poll() is not None:
        return
    pidfd = os.pidfd_open(process.pid)
    try:
        if not await _ended(pidfd, DESTROY_SECONDS):
            process.kill()
            if not await _ended(pidfd, DESTROY_SECONDS):
                raise SandboxError(f"process {process.pid} of a sandbox does not end; see ps -p {process.pid}")
    finally:
        os.close(pidfd)
    process.wait()  # It has ended, so this returns at once.


async def _ended(pidfd: int, seconds: float) -> bool:
    """Whether a process ends within so many seconds."""
    # A descriptor of its own: an event loop watches one for one waiter only, and several commands may be waiting.
    own = os.dup(pidfd)
    try:
        async with asyncio.timeout(seconds):
            await _readable(own)
    except TimeoutError:
        return False
    finally:
        os.close(own)
    return True


async def _readable(descriptor: int) -> None:
    """Wait until a descriptor can be read (a process descriptor: until the process has ended)."""
    loop = asyncio.get_running_loop()
    arrived: asyncio.Future[None] = loop.create_future()

    def arrive() -> None:
        if not arrived.done():
            arrived.set_result(None)

    loop.add_reader(descriptor, arrive)
    try:
        await arrived
    finally:
        loop.remove_reader(descriptor)
