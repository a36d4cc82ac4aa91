"""The process that holds one sandbox open and runs its commands: a standalone program, standard library only.

It is process 1 of an isolated sandbox, or an ordinary process for the plain driver. The controlling side
(`sandbox/held.py`) speaks to it over an inherited control socket and passes one end of a fresh socket pair for each
request; the holder forks a *supervisor* that serves that channel and is the reaper of everything its command starts.
So idle sandboxes cost no channel, a command's whole tree can be found and killed however it detaches, output is cut
here at the source, and no process with more rights than the commands themselves ever enters the sandbox.

Promises: commands cannot read, trace or forge what holder and supervisor say (they are not dumpable); process 1 cannot
be killed from inside; a command that kills its own supervisor ends every process of its sandbox, nothing else.
Does not do: limits on the whole sandbox (control groups, the size of file systems); they are set from outside.

    controller ──control: (backup deadline, channel)──▶ holder ──fork──▶ supervisor ──fork, exec──▶ command
        └───────────────── channel: request, reply ──────────────────────────┘
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import select
import signal
import socket
import stat
import struct
import sys
import time
from contextlib import suppress
from typing import NamedTuple, NoReturn

# One request on a channel: operation, timeout and CPU seconds, output limit, then the lengths of
# path (file, or working directory), argv and environment (NUL-separated) and content (file, or standard input).
REQUEST = struct.Struct("<BddQIIIQ")
# One reply: kind, wait status or errno, seconds, total bytes of stdout and stderr, lengths of both as returned.
REPLY = struct.Struct("<BidQQQQ")
CONTROL = struct.Struct("<d")

EXECUTE, READ_FILE, WRITE_FILE = 1, 2, 3
ENDED, TIMED_OUT, FAILED = 1, 2, 3

HELLO = b"ready"
SANDBOX_HOME = "/workspace"
KILL_SECONDS = 2.0

_CHUNK_BYTES = 1 << 16
_DRAIN_CHUNKS = 32  # A pipe holds at most 1 MiB; a background process that goes on writing must not hold up the reply.
_PR_SET_DUMPABLE, _PR_SET_CHILD_SUBREAPER = 4, 36
_libc = ctypes.CDLL(None, use_errno=True)


class HolderLimits(NamedTuple):
    """What each command's process is started with; 0 means no limit of that kind."""

    num_processes: int
    address_space_bytes: int
    file_bytes: int
    niceness: int


class Place(NamedTuple):
    """Where files lie: `home` is what the sandbox's users know as /workspace; `confined` refuses paths outside it."""

    home: str
    confined: bool

    def resolve(self, path: str) -> str:
        """The path to open for a path that the caller named; raises PermissionError outside a confined home."""
        if path == SANDBOX_HOME or path.startswith(SANDBOX_HOME + "/"):
            path = path[len(SANDBOX_HOME) :].lstrip("/")
        resolved = os.path.join(self.home, path)
        if self.confined:
            resolved = os.path.realpath(resolved)
            if resolved != self.home and not resolved.startswith(self.home + "/"):
                raise PermissionError(errno.EACCES, "outside of the sandbox's folder", path)
        return resolved


class Request(NamedTuple):
    """One request, decoded."""

    operation: int
    timeout_seconds: float
    cpu_seconds: float
    output_bytes: int
    path: str
    argv: list[str]
    env: dict[str, str]
    content: bytes


class HeadTail:
    """The first and last bytes of a stream within `limit` bytes, and how many bytes there were.

    >>> cut = HeadTail(8)
    >>> cut.add(b"0123456789")
    >>> cut.render(), cut.total
    (b'01236789', 10)
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._head = bytearray()
        self._tail = bytearray()
        self.total = 0

    def add(self, chunk: bytes) -> None:
        """Take the next bytes of the stream."""
        self.total += len(chunk)
        room = self._limit - len(self._head)
        if room > 0:
            self._head += chunk[:room]
            chunk = chunk[room:]
        if chunk:
            self._tail += chunk
            if len(self._tail) > self._limit:
                del self._tail[: len(self._tail) - self._limit]

    def render(self) -> bytes:
        """All bytes if they fit, else head, a line that says how much is missing (where there is room), and tail."""
        if self.total <= self._limit:
            return bytes(self._head)
        note = b"\n[... %d bytes cut ...]\n" % (self.total - self._limit)
        if len(note) > self._limit // 2:
            note = b""
        kept = self._limit - len(note)
        tail_bytes = kept // 2
        # `_tail` holds what came after `_head`, so the stream's last bytes may begin inside `_head`.
        last = bytes(self._head[len(self._tail) :] + self._tail) if len(self._tail) < tail_bytes else bytes(self._tail)
        return bytes(self._head[: kept - tail_bytes]) + note + (last[-tail_bytes:] if tail_bytes else b"")


def main(argv: list[str]) -> int:
    """Serve until the control socket closes; argv: control descriptor, home, confined, then HolderLimits' fields."""
    control = socket.socket(fileno=int(argv[0]))
    place = Place(argv[1], argv[2] == "1")
    limits = HolderLimits(*(int(value) for value in argv[3:7]))
    os.set_inheritable(control.fileno(), False)
    if os.getpid() == 1:
        os.closerange(control.fileno() + 1, 256)  # what was open for the making of the sandbox
    os.umask(0o022)
    _protect()
    wake = _wake_on_children()
    control.send(HELLO)
    if os.getpid() == 1:
        _forget_standard_error()
    _serve(control, wake, place, limits)
    _end_everything(place)
    return 0


def _serve(control: socket.socket, wake: int, place: Place, limits: HolderLimits) -> None:
    """Fork a supervisor for each channel that arrives; returns when the controlling side is gone."""
    supervisors: dict[int, float] = {}  # process id → the moment when it must have ended its command
    poller = select.poll()
    poller.register(control, select.POLLIN)
    poller.register(wake, select.POLLIN)
    while True:
        wait = min(supervisors.values(), default=None)
        poller.poll(None if wait is None else max(0.0, wait - time.monotonic()) * 1000 + 1)
        arrived = _accept(control)
        if arrived is _GONE:
            return
        if arrived is not None:
            backup_seconds, channel = arrived
            supervisor = _fork_supervisor(control, wake, channel, place, limits)
            if supervisor is not None:
                supervisors[supervisor] = time.monotonic() + backup_seconds
        broken = _reap_supervisors(wake, supervisors)
        now = time.monotonic()
        overdue = [pid for pid, moment in supervisors.items() if moment <= now and not _forgive(pid, supervisors)]
        if broken or overdue:
            # A command killed or stopped its supervisor: its processes can no longer be told from others.
            _kill_all()


_GONE = (0.0, -1)


def _accept(control: socket.socket) -> tuple[float, int] | None:
    """The next (backup seconds, channel) if one waits; `_GONE` when the controlling side has closed."""
    try:
        message, ancillary, _, _ = control.recvmsg(
            64, socket.CMSG_SPACE(4), socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
        )
    except BlockingIOError:
        return None
    except ConnectionError:
        return _GONE
    if not message:
        return _GONE
    if not ancillary:
        return None  # No descriptor was free for the channel; its other end reads as closed.
    return CONTROL.unpack(message)[0], struct.unpack("i", ancillary[0][2][:4])[0]


def _fork_supervisor(
    control: socket.socket, wake: int, channel: int, place: Place, limits: HolderLimits
) -> int | None:
    """Start the process that serves one channel; None (and a reply that says so) if there is no room for it."""
    try:
        pid = os.fork()
    except OSError as error:
        with socket.socket(fileno=channel) as refused:
            _reply(refused, FAILED, error.errno or errno.EAGAIN, 0.0, b"", b"no process or memory left in the sandbox")
        return None
    if pid:
        os.close(channel)
        return pid
    status = 1
    try:
        control.close()
        os.close(wake)
        _supervise(socket.socket(fileno=channel), place, limits)
        status = 0
    finally:
        os._exit(status)


def _reap_supervisors(wake: int, supervisors: dict[int, float]) -> bool:
    """Collect ended children; True if a supervisor did not end by itself."""
    with suppress(BlockingIOError):
        os.read(wake, 4096)
    broken = False
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return broken
        if pid == 0:
            return broken
        broken |= supervisors.pop(pid, None) is not None and status != 0


def _forgive(pid: int, supervisors: dict[int, float]) -> bool:
    """A supervisor that has replied lives on for its command's background processes; such a one is not overdue.

    It says so by its process group: it becomes a group leader then (`_linger`), which its command cannot do for it.
    """
    try:
        lingering = os.getpgid(pid) == pid
    except ProcessLookupError:
        return True
    if lingering:
        supervisors[pid] = float("inf")
    return lingering


def _kill_all() -> None:
    """End every process of the sandbox except this one."""
    if os.getpid() == 1:
        with suppress(ProcessLookupError):
            os.kill(-1, signal.SIGKILL)  # of this process's own process-id namespace, in one step
    else:
        _kill_tree()


def _end_everything(place: Place) -> None:
    """Last act: nothing of the sandbox remains, also when the controlling process was killed."""
    _kill_all()
    if place.confined:
        import shutil  # only here, where no isolation is: other holders start quickly

        shutil.rmtree(place.home, ignore_errors=True)


# --- the supervisor ---------------------------------------------------------------------------------------------------


def _supervise(channel: socket.socket, place: Place, limits: HolderLimits) -> None:
    """Serve one request on its own channel."""
    _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    wake = _wake_on_children()
    request = _receive(channel)
    try:
        if request.operation == EXECUTE:
            _Command(channel, wake, request, place, limits).run()
        elif request.operation == READ_FILE:
            content = _read_file(place.resolve(request.path), request.output_bytes)
            _reply(channel, ENDED, 0, 0.0, content, b"")
        else:
            _write_file(place.resolve(request.path), request.content)
            _reply(channel, ENDED, 0, 0.0, b"", b"")
    except OSError as error:
        _reply(channel, FAILED, error.errno or errno.EIO, 0.0, b"", (error.strerror or str(error)).encode())


class _Command:
    """One command from its start to its reply, and its background processes until they end."""

    def __init__(
        self, channel: socket.socket, wake: int, request: Request, place: Place, limits: HolderLimits
    ) -> None:
        self._channel = channel
        self._wake = wake
        self._request = request
        self._started = time.monotonic()
        self._status: int | None = None
        self._poller = select.poll()
        self._poller.register(wake, select.POLLIN)
        self._poller.register(channel, select.POLLIN)
        self._pid, self._stdin, out, err = _start(channel, request, place, limits)
        self._out, self._err = HeadTail(request.output_bytes), HeadTail(request.output_bytes)
        self._outputs = {out: self._out, err: self._err}
        for descriptor in self._outputs:
            self._poller.register(descriptor, select.POLLIN)
        self._unwritten = memoryview(request.content)
        if self._stdin is not None:
            self._poller.register(self._stdin, select.POLLOUT)

    def run(self) -> None:
        """Wait for the end or the deadline, reply, then keep reaping what stays in the background."""
        deadline = self._started + self._request.timeout_seconds
        while self._status is None and (left := deadline - time.monotonic()) > 0:
            self._turn(left)
        kind = ENDED if self._status is not None else TIMED_OUT
        if kind == TIMED_OUT and not _kill_tree():
            os._exit(1)  # The holder then ends every process in one step.
        self._drain()
        _reply_output(self._channel, kind, self._status or 0, time.monotonic() - self._started, self._out, self._err)
        self._linger()

    def _turn(self, seconds: float) -> None:
        for descriptor, event in self._poller.poll(seconds * 1000 + 1):
            if descriptor == self._wake:
                self._reap()
            elif descriptor == self._channel.fileno():
                # The caller is gone (it gave up, or died): nobody wants this command any more.
                os._exit(0 if _kill_tree() else 1)
            elif descriptor == self._stdin:
                self._feed(event)
            else:
                self._take(descriptor)

    def _reap(self) -> bool:
        """Collect ended processes; False when there are none left at all."""
        with suppress(BlockingIOError):
            os.read(self._wake, 4096)
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return False
            if pid == 0:
                return True
            if pid == self._pid:
                self._status = status

    def _feed(self, event: int) -> None:
        assert self._stdin is not None
        try:
            if event & select.POLLOUT:
                self._unwritten = self._unwritten[os.write(self._stdin, self._unwritten[:_CHUNK_BYTES]) :]
        except BrokenPipeError:
            self._unwritten = self._unwritten[:0]
        if event & select.POLLERR or not self._unwritten:
            self._poller.unregister(self._stdin)
            os.close(self._stdin)
            self._stdin = None

    def _take(self, descriptor: int) -> bool:
        """Read one chunk; False when none is waiting."""
        try:
            chunk = os.read(descriptor, _CHUNK_BYTES)
        except BlockingIOError:
            return False
        self._outputs[descriptor].add(chunk)
        if not chunk:
            self._poller.unregister(descriptor)
            os.close(descriptor)
            del self._outputs[descriptor]
        return bool(chunk)

    def _drain(self) -> None:
        for descriptor in list(self._outputs):
            for _ in range(_DRAIN_CHUNKS):
                if not self._take(descriptor):
                    break

    def _linger(self) -> None:
        """Stay the reaper of background processes and drop what they print, so that they do not die of a closed pipe."""
        self._poller.unregister(self._channel)
        self._channel.close()
        os.setpgid(0, 0)  # Tells the holder that this command has had its reply (`_forgive`).
        for descriptor in self._outputs:
            self._outputs[descriptor] = HeadTail(0)
        while self._reap():
            self._turn(3600.0)


def _start(
    channel: socket.socket, request: Request, place: Place, limits: HolderLimits
) -> tuple[int, int | None, int, int]:
    """Fork the command; returns its process id and our ends of stdin (None: nothing to send), stdout and stderr."""
    stdin_read, stdin_write = os.pipe() if request.content else (os.open(os.devnull, os.O_RDONLY), None)
    out_read, out_write = os.pipe()
    err_read, err_write = os.pipe()
    pid = os.fork()
    if pid == 0:
        _become_command(channel, request, place, limits, (stdin_read, out_write, err_write))
    for descriptor in (stdin_read, out_write, err_write):
        os.close(descriptor)
    for descriptor in (out_read, err_read) if stdin_write is None else (out_read, err_read, stdin_write):
        os.set_blocking(descriptor, False)
    return pid, stdin_write, out_read, err_read


def _become_command(
    channel: socket.socket, request: Request, place: Place, limits: HolderLimits, streams: tuple[int, int, int]
) -> NoReturn:
    """In the forked child: limits, working directory, then the program; a failure is told as a shell tells it."""
    code = 126
    try:
        channel.close()
        os.setsid()
        for target, source in enumerate(streams):
            os.dup2(source, target)
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGINT, signal.SIGPIPE, signal.SIGXFSZ, signal.SIGCHLD, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        _libc.prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0)  # else /proc/self belongs to root and the next line is refused
        with suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:
            score.write("1000")  # When memory ends, a command is killed and never the holder.
        _apply_limits(limits, request.cpu_seconds)
        os.chdir(place.resolve(request.path))
        os.execvpe(request.argv[0], request.argv, request.env)
    except OSError as error:
        name = error.filename if isinstance(error.filename, str) else request.argv[0]
        os.write(2, f"sandbox: {name}: {error.strerror}\n".encode(errors="surrogateescape"))
        code = 127 if error.errno == errno.ENOENT else 126
    finally:
        os._exit(code)


def _apply_limits(limits: HolderLimits, cpu_seconds: float) -> None:
    wanted = [
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 1024),
        (resource.RLIMIT_CPU, max(1, round(cpu_seconds))),
        (resource.RLIMIT_FSIZE, limits.file_bytes),
    ]
    if limits.num_processes:
        wanted.append((resource.RLIMIT_NPROC, limits.num_processes))
    if limits.address_space_bytes:
        wanted.append((resource.RLIMIT_AS, limits.address_space_bytes))
    for kind, value in wanted:
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        # The CPU limit's second step kills what ignores the first one.
        resource.setrlimit(kind, (value, value + 1 if kind == resource.RLIMIT_CPU and value != hard else value))
    if limits.niceness:
        os.nice(limits.niceness)


def _kill_tree() -> bool:
    """Kill all descendants of this process and reap them; False if some are left after KILL_SECONDS.

    They are stopped first, so that a fork bomb does not outrun the killing. Whatever detached itself was adopted by
    this process, so that the tree is complete.
    """
    deadline = time.monotonic() + KILL_SECONDS
    stopped: set[int] = set()
    while new := _descendants(os.getpid()) - stopped:
        for pid in new:
            _signal(pid, signal.SIGSTOP)
        stopped |= new
        if time.monotonic() > deadline:
            break
    while left := _descendants(os.getpid()):
        for pid in left:
            _signal(pid, signal.SIGKILL)
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if time.monotonic() > deadline:
            return False
        time.sleep(0.001)
    return True


def _descendants(root: int) -> set[int]:
    """Process ids below `root`, from /proc."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:
                # pid (name) state ppid …; the name may hold blanks and brackets.
                parent = int(file.read().rpartition(b")")[2].split()[1])
                children.setdefault(parent, []).append(int(name))
    found: set[int] = set()
    frontier = [root]
    while frontier:
        below = children.get(frontier.pop(), [])
        found.update(below)
        frontier += below
    return found


def _signal(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


# --- files and messages -----------------------------------------------------------------------------------------------


def _read_file(path: str, limit: int) -> bytes:
    # Not blocking: the path may name a FIFO that nobody writes.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise FileNotFoundError(errno.ENOENT, "not a regular file")
        content = file.read(limit + 1)
    if len(content) > limit:
        raise OSError(errno.EFBIG, f"larger than {limit} bytes")
    return content


def _write_file(path: str, content: bytes) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NONBLOCK, 0o644)
    with open(descriptor, "wb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise FileExistsError(errno.EEXIST, "exists and is not a regular file")
        file.write(content)


def _receive(channel: socket.socket) -> Request:
    operation, timeout, cpu, output_bytes, *lengths = REQUEST.unpack(_receive_exactly(channel, REQUEST.size))
    path, argv, env, content = (_receive_exactly(channel, length) for length in lengths)
    variables = (entry.partition("=") for entry in os.fsdecode(env).split("\0") if entry)
    return Request(
        operation,
        timeout,
        cpu,
        output_bytes,
        os.fsdecode(path),
        os.fsdecode(argv).split("\0"),
        {name: value for name, _, value in variables},
        content,
    )


def _receive_exactly(channel: socket.socket, count: int) -> bytes:
    parts = bytearray()
    while len(parts) < count:
        part = channel.recv(min(count - len(parts), 1 << 20))
        if not part:
            os._exit(0)  # The caller gave up before it had said what to do.
        parts += part
    return bytes(parts)


def _reply_output(
    channel: socket.socket, kind: int, status: int, seconds: float, out: HeadTail, err: HeadTail
) -> None:
    stdout, stderr = out.render(), err.render()
    _send(channel, REPLY.pack(kind, status, seconds, out.total, err.total, len(stdout), len(stderr)) + stdout + stderr)


def _reply(channel: socket.socket, kind: int, status: int, seconds: float, stdout: bytes, stderr: bytes) -> None:
    sizes = (len(stdout), len(stderr))
    _send(channel, REPLY.pack(kind, status, seconds, *sizes, *sizes) + stdout + stderr)


def _send(channel: socket.socket, message: bytes) -> None:
    with suppress(ConnectionError):  # The caller may be gone; then nobody is there to be told.
        channel.sendall(message)


# --- process set-up ---------------------------------------------------------------------------------------------------


def _protect() -> None:
    """Keep commands, which run as the same user, from reading, tracing or interrupting this process."""
    _libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def _wake_on_children() -> int:
    """A descriptor that becomes readable when a child ends."""
    read, write = os.pipe()
    os.set_blocking(read, False)
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    return read


def _forget_standard_error() -> None:
    """It was for reports of a failed start; keeping it would hold a file of the host open."""
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    os.close(null)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
