"""What a sandbox sees: the arguments of `bwrap(1)` that build its file system, namespaces and environment.

Inside: /usr and the folders beside it that hold programs (read-only), the running interpreter (read-only, at
/opt/python unless it lies in /usr), a synthetic /etc, own /proc and /dev, and three file systems in memory with a size:
/workspace (home and working directory), /tmp and /dev/shm. Nothing else of the host: no /home, /root, /var, /etc, /sys,
no network but an own loopback, no user but one, no capability, no way to get one.
"""

from __future__ import annotations

import importlib.util
import marshal
import math
import os
import sys
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from gateway.contracts.ports import SandboxLimits
from sandbox import holder
from sandbox.limits import file_system_sizes
from sandbox.local.seccomp import filter_program

USER_ID = 1000
_INTERPRETER = "/opt/python"
_HOLDER = "/run/holder.pyc"
_PROGRAM_FOLDERS = ("/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
_ETC = {
    "/etc/passwd": f"sandbox:x:{USER_ID}:{USER_ID}:sandbox:{holder.SANDBOX_HOME}:/bin/sh\n",
    "/etc/group": f"sandbox:x:{USER_ID}:\n",
    "/etc/hosts": "127.0.0.1 localhost sandbox\n::1 localhost\n",
    "/etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files\n",
}


class Interpreter(NamedTuple):
    """The Python of this process as a sandbox sees it; `prefix` is None where it is a part of /usr."""

    prefix: Path | None
    program: str

    @classmethod
    def running(cls) -> Interpreter:
        """The base interpreter (not the virtual environment) that runs this process."""
        prefix = Path(sys.base_prefix).resolve()
        program = f"bin/python{sys.version_info.major}.{sys.version_info.minor}"
        if prefix.is_relative_to("/usr"):
            return cls(None, str(prefix / program))
        return cls(prefix, f"{_INTERPRETER}/{program}")

    def folders(self) -> Sequence[str]:
        """The parts of the prefix that a sandbox needs: no more of a home folder than these is shown."""
        return [] if self.prefix is None else [name for name in ("bin", "lib") if (self.prefix / name).is_dir()]


def environment(interpreter: Interpreter) -> Mapping[str, str]:
    """The whole environment of a sandbox's commands."""
    own = Path(interpreter.program).parent
    env = {
        "HOME": holder.SANDBOX_HOME,
        "LANG": "C.UTF-8",
        "PATH": f"{own}:/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin",
        "TMPDIR": "/tmp",
        "USER": "sandbox",
    }
    if interpreter.prefix is not None and sysconfig.get_config_var("Py_ENABLE_SHARED"):
        env["LD_LIBRARY_PATH"] = f"{_INTERPRETER}/lib"
    return env


class Rootfs:
    """The files that each sandbox is given, prepared once per driver (in memory, not in a folder)."""

    def __init__(self) -> None:
        self.interpreter = Interpreter.running()
        self.environment = environment(self.interpreter)
        contents = {path: text.encode() for path, text in _ETC.items()} | {_HOLDER: _compiled_holder()}
        self._files = {path: _in_memory(content) for path, content in contents.items()}
        program = filter_program()
        self._filter = None if program is None else _in_memory(program)

    @property
    def filters_calls(self) -> bool:
        """Whether system calls are filtered on this architecture."""
        return self._filter is not None

    @contextmanager
    def arguments(
        self, limits: SandboxLimits, *, interpreter_source: Path | None, niceness: int, address_space_bytes: int
    ) -> Iterator[tuple[list[str], list[int]]]:
        """The bwrap command that starts a holder, and the descriptors that it reads; both live as long as the context.

        `interpreter_source`: where the interpreter's prefix is found by the user who runs bwrap.
        """
        with ExitStack() as opened:
            descriptors: list[int] = []

            def reopen(memory: int) -> str:
                # A descriptor with a position of its own, as sandboxes start at the same time.
                descriptor = os.open(f"/proc/self/fd/{memory}", os.O_RDONLY)
                opened.callback(os.close, descriptor)
                descriptors.append(descriptor)
                return str(descriptor)

            argv = ["bwrap", *_namespaces(), *_programs(), *self._interpreter(interpreter_source)]
            for path, memory in self._files.items():
                argv += ["--perms", "0444", "--file", reopen(memory), path]
            argv += _file_systems(limits)
            if self._filter is not None:
                argv += ["--seccomp", reopen(self._filter)]
            for name, value in self.environment.items():
                argv += ["--setenv", name, value]
            argv += ["--", self.interpreter.program, "-I", "-S", _HOLDER]
            argv += ["{control}", holder.SANDBOX_HOME, "0"]
            # Beside the commands' processes the holder and one supervisor belong to the same user.
            cpu_seconds = math.ceil(limits.cpu_seconds_per_command)
            bounds = (limits.num_processes + 2, address_space_bytes, limits.disk_bytes, cpu_seconds, niceness)
            yield [*argv, *(str(value) for value in bounds)], descriptors

    def close(self) -> None:
        """Free the prepared files."""
        for memory in (*self._files.values(), *(() if self._filter is None else (self._filter,))):
            os.close(memory)
        self._files, self._filter = {}, None

    def _interpreter(self, source: Path | None) -> list[str]:
        argv: list[str] = []
        if source is not None:
            for name in self.interpreter.folders():
                argv += ["--ro-bind", str(source / name), f"{_INTERPRETER}/{name}"]
        return argv


def _namespaces() -> list[str]:
    return [
        *("--unshare-all", "--unshare-user", "--disable-userns"),
        *("--uid", str(USER_ID), "--gid", str(USER_ID), "--hostname", "sandbox"),
        *("--die-with-parent", "--new-session", "--as-pid-1", "--clearenv", "--cap-drop", "ALL"),
    ]


def _programs() -> list[str]:
    argv = ["--ro-bind", "/usr", "/usr"]
    for folder in _PROGRAM_FOLDERS:
        if os.path.islink(folder):
            argv += ["--symlink", os.readlink(folder), folder]
        else:
            argv += ["--ro-bind-try", folder, folder]
    # Where `awk` and the like point to, and where shared libraries are found: nothing private.
    for path in ("/etc/alternatives", "/etc/ld.so.cache"):
        argv += ["--ro-bind-try", path, path]
    return argv


def _file_systems(limits: SandboxLimits) -> list[str]:
    sizes = file_system_sizes(limits)
    small = str(sizes.temporary_bytes)
    return [
        *("--proc", "/proc", "--dev", "/dev"),
        *("--size", small, "--tmpfs", "/dev/shm", "--remount-ro", "/dev"),
        *("--perms", "1777", "--size", small, "--tmpfs", "/tmp"),
        *("--dir", "/var", "--symlink", "/tmp", "/var/tmp"),
        *("--size", str(sizes.home_bytes), "--tmpfs", holder.SANDBOX_HOME),
        *("--chdir", holder.SANDBOX_HOME),
        *("--remount-ro", "/"),
    ]


def _compiled_holder() -> bytes:
    """The holder as a .pyc file, so that no sandbox compiles it again."""
    source = Path(holder.__file__).read_text(encoding="utf-8")
    code = compile(source, "holder.py", "exec", dont_inherit=True, optimize=2)
    return importlib.util.MAGIC_NUMBER + bytes(12) + marshal.dumps(code)


def _in_memory(content: bytes) -> int:
    memory = os.memfd_create("sandbox-file")
    view = memoryview(content)
    while view:
        view = view[os.write(memory, view) :]
    return memory
