"""The process that holds one sandbox open and runs its commands: a standalone program, standard library only.

It is process 1 of an isolated sandbox, or an ordinary process for the plain driver. The controlling side
(`sandbox/held.py`) speaks to it over an inherited control socket and passes one end of a fresh socket pair for each
request; the holder hands that channel to a *supervisor*, a fork of itself that serves one request at a time and is the
reaper of everything its command starts. So idle sandboxes cost no channel, a command's whole tree can be found and
killed however it detaches, output is cut here at the source, and no process with more rights than the commands
themselves ever enters the sandbox. A supervisor is used again as long as its commands leave nothing in the background.

Promises: commands cannot read, trace or forge what holder and supervisors say (they are not dumpable); process 1 cannot
be killed from inside; a command that kills its own supervisor ends every process of its sandbox, nothing else.
Does not do: limits on the whole sandbox (control groups, the size of file systems); they are set from outside.

    controller ──control: (backup deadline, channel)──▶ holder ──link: channel──▶ supervisor ──spawn──▶ command
        └───────────────── channel: request, reply ─────────────────────────────────┘

A sandbox is ready when this program has started, so it imports C modules where their wrappers would cost milliseconds.
"""
# ruff: noqa: SIM105  (contextlib is one of the wrappers)

from __future__ import annotations

import ctypes
import errno
import os
import resource
import select
import stat
import struct
import sys
import time
from _signal import (  # type: ignore[import-not-found]  # the C half of `signal`, whose other half is enums
    SIGCHLD,
    SIGHUP,
    SIGINT,
    SIGKILL,
    SIGPIPE,
    SIGSTOP,
    SIGTERM,
    SIGXCPU,
    SIGXFSZ,
    set_wakeup_fd,
    signal,
)
from _socket import (
    AF_UNIX,
    CMSG_SPACE,
    MSG_CMSG_CLOEXEC,
    MSG_DONTWAIT,
    SCM_RIGHTS,
    SOCK_SEQPACKET,
    SOL_SOCKET,
    socket,
    socketpair,
)
from _socket import dup as duplicate

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Final

# One request on a channel: operation, timeout in seconds, output limit, then the lengths of path (file, or working
# directory), argv and environment (NUL-separated) and content (file, or standard input).
REQUEST = struct.Struct("<BdQIIIQ")
# One reply: kind, wait status or errno, seconds, total bytes of stdout and stderr, lengths of both as returned.
REPLY = struct.Struct("<BidQQQQ")
# With each channel on the control socket: after how many seconds its supervisor counts as broken.
CONTROL = struct.Struct("<d")

EXECUTE, READ_FILE, WRITE_FILE = 1, 2, 3
ENDED, TIMED_OUT, FAILED, NOT_STARTED = 1, 2, 3, 4

HELLO = b"ready"  # from the holder, when it has started
ADMITTED = b"admitted"  # from the controlling side, when its limits are in force
SANDBOX_HOME = "/workspace"
KILL_SECONDS = 2.0

_IDLE, _LEAVING = b"i", b"l"  # what a supervisor says after a reply: ready for the next request, or not any more
_CHUNK_BYTES = 1 << 16
_DRAIN_CHUNKS = 32  # A pipe holds at most 1 MiB; a background process that goes on writing must not hold up the reply.
_FOREVER = float("inf")
_PR_SET_DUMPABLE, _PR_SET_CHILD_SUBREAPER = 4, 36
_libc = ctypes.CDLL(None, use_errno=True)


def main(argv: Sequence[str]) -> int:
    """Serve until the control socket closes; argv: control descriptor, home, confined, then the values of Limits."""
    control = socket(fileno=int(argv[0]))
    os.set_inheritable(control.fileno(), False)
    if os.getpid() == 1:
        os.closerange(control.fileno() + 1, 256)  # what was open for the making of the sandbox
    os.umask(0o022)
    _protect()
    place = Place(argv[1], confined=argv[2] == "1")
    holder = _Holder(control, place, Limits(*(int(value) for value in argv[3:8])))
    control.send(HELLO)
    _forget_start_streams()
    if control.recv(len(ADMITTED)) == ADMITTED:
        # Not before: what this process forks belongs to its control group from the start.
        holder.serve()
    _kill_all()
    if place.confined:
        place.remove()
    return 0


class Limits:
    """What each command's processes are started with; 0 means no limit of that kind."""

    def __init__(
        self, num_processes: int, address_space_bytes: int, file_bytes: int, cpu_seconds: int, niceness: int
    ) -> None:
        self.cpu_seconds: Final = cpu_seconds
        self._niceness = niceness
        self._values = (
            # 1 and not 0: a core pattern that is a program of the host ignores 0.
            (resource.RLIMIT_CORE, 1, 1),
            (resource.RLIMIT_NOFILE, 1024, 1024),
            # The second step kills what ignores the first one.
            (resource.RLIMIT_CPU, cpu_seconds, cpu_seconds + 1),
            (resource.RLIMIT_FSIZE, file_bytes, file_bytes),
            (resource.RLIMIT_NPROC, num_processes, num_processes),
            (resource.RLIMIT_AS, address_space_bytes, address_space_bytes),
        )

    def apply(self) -> None:
        """To this process and its later children, for good."""
        for kind, soft, hard in self._values:
            if hard:
                most = resource.getrlimit(kind)[1]
                if most != resource.RLIM_INFINITY:
                    soft, hard = min(soft, most), min(hard, most)
                resource.setrlimit(kind, (soft, hard))
        if self._niceness:
            os.nice(self._niceness)


class Place:
    """Where files lie: `home` is what the sandbox's users know as /workspace; `confined` refuses paths outside it."""

    def __init__(self, home: str, *, confined: bool) -> None:
        self.home: Final = home
        self.confined: Final = confined

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

    def remove(self) -> None:
        """Delete the home with all that is in it (the plain driver's folder)."""
        import shutil  # only here: others start faster without it

        shutil.rmtree(self.home, ignore_errors=True)


class Request:
    """One request, decoded from its channel; raises ConnectionError if the caller gives up before its end."""

    def __init__(self, channel: socket) -> None:
        head = REQUEST.unpack(_receive(channel, REQUEST.size))
        self.operation, self.timeout_seconds, self.output_bytes, *lengths = head
        path, argv, env = (bytes(_receive(channel, length)) for length in lengths[:3])
        self.content = _receive(channel, lengths[3])
        self.path = os.fsdecode(path)
        self.argv = os.fsdecode(argv).split("\0")
        variables = (entry.partition("=") for entry in os.fsdecode(env).split("\0") if entry)
        self.env = {name: value for name, _, value in variables}


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
        """All bytes if they fit, else head, a line that says so (where there is room for it), and tail."""
        if self.total <= self._limit:
            return bytes(self._head)
        note = b"\n[... cut here, %d bytes in all ...]\n" % self.total
        note = b"" if len(note) > self._limit // 2 else note
        tail_bytes = (self._limit - len(note)) // 2
        # `_tail` holds what came after `_head`, so the stream's last bytes may begin inside `_head`.
        last = self._head[len(self._tail) :] + self._tail
        return bytes(self._head[: self._limit - len(note) - tail_bytes] + note + last[len(last) - tail_bytes :])


# --- the holder: hands channels to supervisors -----------------------------------------------------------------------


class _Supervisor:
    """The holder's view of one supervisor; `deadline` is when it must have replied (infinity: it need not)."""

    def __init__(self, pid: int, link: socket) -> None:
        self.pid = pid
        self.link = link
        self.deadline = _FOREVER
        self.leaving = False


class _Holder:
    """Takes channels from the control socket and finds a supervisor for each."""

    def __init__(self, control: socket, place: Place, limits: Limits) -> None:
        self._control = control
        self._place = place
        self._limits = limits
        self._wake = _wake_on_children()
        self._supervisors: dict[int, _Supervisor] = {}
        self._idle: list[_Supervisor] = []
        self._poller = select.poll()
        self._poller.register(control, select.POLLIN)
        self._poller.register(self._wake, select.POLLIN)

    def serve(self) -> None:
        """Returns when the controlling side is gone."""
        self._idle.append(self._fork_supervisor())  # The first command need not wait for it.
        while True:
            deadline = min((supervisor.deadline for supervisor in self._supervisors.values()), default=_FOREVER)
            self._poller.poll(None if deadline == _FOREVER else max(0.0, deadline - time.monotonic()) * 1000 + 1)
            for supervisor in list(self._supervisors.values()):
                self._hear(supervisor)
            if not self._take_channel():
                return
            broken = self._reap()
            now = time.monotonic()
            if broken or any(supervisor.deadline <= now for supervisor in self._supervisors.values()):
                # A command killed or stopped its supervisor: its processes can no longer be told from others.
                _kill_all()

    def _take_channel(self) -> bool:
        """Pass a waiting channel on; False when the controlling side has closed."""
        try:
            message, ancillary, _, _ = self._control.recvmsg(64, CMSG_SPACE(4), MSG_DONTWAIT | MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return True
        except ConnectionError:
            return False
        if not message:
            return False
        if ancillary:  # else no descriptor was free for the channel, and its other end reads as closed
            (channel,) = struct.unpack("i", ancillary[0][2][:4])
            self._assign(channel, CONTROL.unpack(message)[0])
            os.close(channel)
        return True

    def _assign(self, channel: int, backup_seconds: float) -> None:
        while True:
            try:
                supervisor = self._idle.pop() if self._idle else self._fork_supervisor()
            except OSError as error:
                refused = socket(fileno=duplicate(channel))
                _reply(refused, NOT_STARTED, error.errno or 0, b"", b"no process or memory is left in this sandbox")
                refused.close()
                return
            try:
                supervisor.link.sendmsg([b"c"], [(SOL_SOCKET, SCM_RIGHTS, struct.pack("i", channel))])
            except OSError:
                continue  # It was killed while it was idle.
            supervisor.deadline = time.monotonic() + backup_seconds
            return

    def _fork_supervisor(self) -> _Supervisor:
        ours, theirs = socketpair(AF_UNIX, SOCK_SEQPACKET)
        pid = os.fork()
        if pid:
            theirs.close()
            supervisor = self._supervisors[pid] = _Supervisor(pid, ours)
            self._poller.register(ours, select.POLLIN)
            return supervisor
        status = 1
        try:
            ours.close()
            self._control.close()
            for other in self._supervisors.values():
                other.link.close()
            os.close(self._wake)
            _serve_as_supervisor(theirs, self._place, self._limits)
            status = 0
        finally:
            os._exit(status)

    def _hear(self, supervisor: _Supervisor) -> None:
        """Whether a supervisor is idle again, or leaves after a reply."""
        try:
            word = supervisor.link.recv(1, MSG_DONTWAIT)
        except OSError:
            return
        if word == _IDLE:
            supervisor.deadline = _FOREVER
            self._idle.append(supervisor)
        elif word == _LEAVING:
            supervisor.deadline = _FOREVER
            supervisor.leaving = True

    def _reap(self) -> bool:
        """Collect ended children; True if a supervisor ended before its reply."""
        broken = False
        for pid, _ in _ended_children(self._wake):
            supervisor = self._supervisors.pop(pid, None)
            if supervisor is not None:
                self._hear(supervisor)  # its last word may still wait
                broken |= supervisor.deadline != _FOREVER
                self._poller.unregister(supervisor.link)
                supervisor.link.close()
                if supervisor in self._idle:
                    self._idle.remove(supervisor)
        return broken


# --- the supervisor: serves one request at a time --------------------------------------------------------------------


def _serve_as_supervisor(link: socket, place: Place, limits: Limits) -> None:
    """Serve requests until one leaves processes behind, until much CPU time is used, or until the holder is gone."""
    _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    # Handlers, unlike ignored signals, are not inherited by commands; and the CPU limit warns before it kills.
    for number in (SIGINT, SIGTERM, SIGHUP, SIGXCPU):
        signal(number, _ignore)
    limits.apply()
    wake = _wake_on_children()
    while True:
        message, ancillary, _, _ = link.recvmsg(1, CMSG_SPACE(4), MSG_CMSG_CLOEXEC)
        if not message:
            return
        if not ancillary:
            raise OSError(errno.EMFILE, "no descriptor for a channel")
        channel = socket(fileno=struct.unpack("i", ancillary[0][2][:4])[0])
        command = _serve_request(channel, link, wake, place)
        channel.close()
        # This process's own CPU time counts towards the limit that its commands inherit.
        tired = time.process_time() > limits.cpu_seconds / 4
        if tired or (command is not None and command.reap()):
            link.send(_LEAVING)
            if command is not None:
                command.linger()
            return
        link.send(_IDLE)


def _serve_request(channel: socket, link: socket, wake: int, place: Place) -> _Command | None:
    """Do what one channel asks for and reply; returns the command, if it was one that started."""
    try:
        request = Request(channel)
        if request.operation == EXECUTE:
            return _run_command(channel, link, wake, request, place)
        if request.operation == READ_FILE:
            _reply(channel, ENDED, 0, _read_file(place.resolve(request.path), request.output_bytes), b"")
        else:
            _write_file(place.resolve(request.path), request.content)
            _reply(channel, ENDED, 0, b"", b"")
    except ConnectionError:
        return None
    except OSError as error:
        _reply(channel, FAILED, error.errno or errno.EIO, b"", (error.strerror or str(error)).encode())
    return None


def _run_command(channel: socket, link: socket, wake: int, request: Request, place: Place) -> _Command | None:
    """Start the command and run it to its reply; what cannot be started is told as a shell tells it."""
    try:
        command = _Command(channel, link, wake, request, place)
    except OSError as error:
        name = error.filename if isinstance(error.filename, str) else request.argv[0]
        text = f"sandbox: {name}: {error.strerror}\n".encode(errors="surrogateescape")
        code = 127 if error.errno == errno.ENOENT else 126
        _reply(channel, ENDED, code << 8, b"", text)
        return None
    command.run()
    return command


class _Command:
    """One command from its start to its reply, and its background processes until they end."""

    def __init__(self, channel: socket, link: socket, wake: int, request: Request, place: Place) -> None:
        """Starts it; raises OSError with the path that is missing or not executable.

        `link` to the holder is silent while a command runs, so that what can be read from it is its end.
        """
        self._started = time.monotonic()
        self._channel = channel
        self._wake = wake
        self._timeout_seconds = request.timeout_seconds
        self._status: int | None = None
        self._abandoned = False
        self._pid, self._stdin, out, err = _spawn(request, place)
        self._out, self._err = HeadTail(request.output_bytes), HeadTail(request.output_bytes)
        self._outputs = {out: self._out, err: self._err}
        self._unwritten = memoryview(request.content)
        self._poller = select.poll()
        for descriptor in (wake, channel.fileno(), link.fileno(), out, err):
            self._poller.register(descriptor, select.POLLIN)
        if self._stdin is not None:
            self._poller.register(self._stdin, select.POLLOUT)

    def run(self) -> None:
        """Wait for the end or the deadline, and reply; a tree that cannot be killed ends this supervisor as broken."""
        deadline = self._started + self._timeout_seconds
        while self._status is None and not self._abandoned and (left := deadline - time.monotonic()) > 0:
            self._turn(left)
        timed_out = self._status is None
        if timed_out and not _kill_tree():
            os._exit(1)
        self._poller.unregister(self._channel.fileno())
        if self._abandoned:
            return
        self._drain()
        seconds = time.monotonic() - self._started
        stdout, stderr = self._out.render(), self._err.render()
        head = REPLY.pack(
            TIMED_OUT if timed_out else ENDED,
            self._status or 0,
            seconds,
            self._out.total,
            self._err.total,
            len(stdout),
            len(stderr),
        )
        _send(self._channel, head, stdout, stderr)

    def reap(self) -> bool:
        """Collect ended processes; False when none of the command's processes is left (pipes are closed then)."""
        left = False
        for pid, status in _ended_children(self._wake):
            if pid == self._pid:
                self._status = status
        try:
            left = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
        except ChildProcessError:
            self._close_pipes()
        return left

    def linger(self) -> None:
        """Stay the reaper of background processes, and drop what they print: a closed pipe would end them."""
        for descriptor in self._outputs:
            self._outputs[descriptor] = HeadTail(0)
        while self.reap() and not self._abandoned:
            self._turn(3600.0)
        if self._abandoned:
            _kill_tree()

    def _turn(self, seconds: float) -> None:
        for descriptor, event in self._poller.poll(seconds * 1000 + 1):
            if descriptor == self._wake:
                self._note_end()
            elif descriptor == self._stdin:
                self._feed(event)
            elif descriptor in self._outputs:
                self._take(descriptor)
            else:
                self._abandoned = True  # The caller gave up, or the holder was killed: nobody wants this any more.

    def _note_end(self) -> None:
        for pid, status in _ended_children(self._wake):
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

    def _close_pipes(self) -> None:
        for descriptor in (*self._outputs, *(() if self._stdin is None else (self._stdin,))):
            os.close(descriptor)
        self._outputs, self._stdin = {}, None


def _spawn(request: Request, place: Place) -> tuple[int, int | None, int, int]:
    """Start the program (by vfork, which costs a fraction of a fork) in a session of its own.

    Returns its process id and our ends of stdin (None: nothing to send), stdout and stderr; raises OSError.
    """
    folder = place.resolve(request.path)
    os.chdir(folder)
    program = _find(request.argv[0], request.env.get("PATH", os.defpath))
    opened: list[int] = []
    try:
        if request.content:
            opened += os.pipe()
        else:
            opened += (os.open(os.devnull, os.O_RDONLY), -1)
        opened += os.pipe()
        opened += os.pipe()
        stdin_read, stdin_write, out_read, out_write, err_read, err_write = opened
        pid = os.posix_spawn(
            program,
            request.argv,
            request.env,
            file_actions=[
                (os.POSIX_SPAWN_DUP2, stdin_read, 0),
                (os.POSIX_SPAWN_DUP2, out_write, 1),
                (os.POSIX_SPAWN_DUP2, err_write, 2),
            ],
            setsid=True,
            setsigdef=[SIGPIPE, SIGXFSZ],  # which Python ignores
        )
    except OSError as error:
        for descriptor in opened:
            if descriptor >= 0:
                os.close(descriptor)
        raise OSError(error.errno, error.strerror, request.argv[0]) from error
    for descriptor in (stdin_read, out_write, err_write):
        os.close(descriptor)
    for descriptor in (out_read, err_read, stdin_write):
        if descriptor >= 0:
            os.set_blocking(descriptor, False)
    _prefer_as_victim(pid)
    return pid, (stdin_write if stdin_write >= 0 else None), out_read, err_read


def _find(name: str, search: str) -> str:
    """The program that `name` means, as execvp(3) finds it; raises FileNotFoundError."""
    if "/" in name:
        return name
    for folder in search.split(":"):
        path = os.path.join(folder or ".", name)
        if os.access(path, os.X_OK) and not os.path.isdir(path):
            return path
    raise FileNotFoundError(errno.ENOENT, "command not found", name)


def _prefer_as_victim(pid: int) -> None:
    """When the sandbox's memory ends, the kernel shall kill a command and not the holder."""
    try:
        descriptor = os.open(f"/proc/{pid}/oom_score_adj", os.O_WRONLY)
    except OSError:
        return  # It has ended already, or is a program that may not be read: then its size decides.
    try:
        os.write(descriptor, b"1000")
    except OSError:
        pass
    finally:
        os.close(descriptor)


# --- ending processes -------------------------------------------------------------------------------------------------


def _kill_all() -> None:
    """End every process of the sandbox except this one."""
    if os.getpid() == 1:
        try:
            os.kill(-1, SIGKILL)  # in this process's own process-id namespace, in one step
        except ProcessLookupError:
            pass
    else:
        _kill_tree()


def _kill_tree() -> bool:
    """Kill all descendants of this process and reap them; False if some are left after KILL_SECONDS.

    They are stopped first, so that a fork bomb does not outrun the killing. Whatever detached itself was adopted by
    this process, so that the tree is complete.
    """
    deadline = time.monotonic() + KILL_SECONDS
    stopped: set[int] = set()
    while (new := descendants(os.getpid()) - stopped) and time.monotonic() < deadline:
        for pid in new:
            _send_signal(pid, SIGSTOP)
        stopped |= new
    while left := descendants(os.getpid()):
        for pid in left:
            _send_signal(pid, SIGKILL)
        _reap_all()
        if time.monotonic() > deadline:
            return False
        time.sleep(0.001)
    return True


def _reap_all() -> None:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return


def descendants(root: int) -> set[int]:
    """Process ids below `root`, from /proc."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as file:
                    # pid (name) state ppid …; the name may hold blanks and brackets.
                    parent = int(file.read().rpartition(b")")[2].split()[1])
            except OSError:
                continue
            children.setdefault(parent, []).append(int(name))
    found: set[int] = set()
    frontier = [root]
    while frontier:
        below = children.get(frontier.pop(), [])
        found.update(below)
        frontier += below
    return found


def _send_signal(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def _ended_children(wake: int) -> list[tuple[int, int]]:
    """Process id and wait status of children that have ended, and an empty wake pipe."""
    try:
        os.read(wake, 4096)
    except BlockingIOError:
        pass
    ended: list[tuple[int, int]] = []
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return ended
        if pid == 0:
            return ended
        ended.append((pid, status))


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


def _write_file(path: str, content: bytearray) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NONBLOCK, 0o644)
    with open(descriptor, "wb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise FileExistsError(errno.EEXIST, "exists and is not a regular file")
        file.write(content)


def _receive(channel: socket, count: int) -> bytearray:
    parts = bytearray()
    while len(parts) < count:
        part = channel.recv(min(count - len(parts), 1 << 20))
        if not part:
            raise ConnectionError("the caller gave up")
        parts += part
    return parts


def _reply(channel: socket, kind: int, status: int, stdout: bytes, stderr: bytes) -> None:
    sizes = (len(stdout), len(stderr))
    _send(channel, REPLY.pack(kind, status, 0.0, *sizes, *sizes), stdout, stderr)


def _send(channel: socket, *messages: bytes) -> None:
    try:
        for message in messages:
            channel.sendall(message)
    except ConnectionError:
        return  # The caller is gone; nobody is there to be told.


# --- process set-up ---------------------------------------------------------------------------------------------------


def _protect() -> None:
    """Keep commands, which run as the same user, from reading, tracing or interrupting this process and its forks."""
    _libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    for number in (SIGINT, SIGTERM, SIGHUP):
        signal(number, _ignore)


def _ignore(number: int, frame: object) -> None:
    """A signal that must not end this process."""


def _wake_on_children() -> int:
    """A descriptor that becomes readable when a child ends."""
    read, write = os.pipe()
    os.set_blocking(read, False)
    os.set_blocking(write, False)
    set_wakeup_fd(write, warn_on_full_buffer=False)
    signal(SIGCHLD, _ignore)
    return read


def _forget_start_streams() -> None:
    """They were for reports of a failed start; keeping them would hold a file of the host open."""
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    os.close(null)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
