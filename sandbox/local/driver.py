"""Isolated sandboxes on this machine: Linux namespaces made by bubblewrap, with a holder as process 1 of each.

Works as root (each sandbox then runs as an unprivileged user number of its own) and as an ordinary user where user
namespaces are permitted. Limits on memory, processes and CPU weight come from control groups where this process may
make them, else from resource limits per process; `limits_in_force` says which. When this process ends, in whatever way,
the kernel ends its sandboxes. The isolation is that of a container: the kernel is shared.

    create ──▶ [nsenter, setpriv (root only)] ──▶ bwrap ──▶ holder (process 1) ◀── HeldSandbox.execute
                                                                └── under a control group before its first command
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from gateway.contracts.errors import SandboxUnavailable
from gateway.contracts.ports import SandboxLimits, SandboxSpec
from sandbox.held import HeldSandbox, HolderCommand, start_holder
from sandbox.limits import check_spec
from sandbox.local import cgroups
from sandbox.local.keeper import MOUNT_POINT, Keeper
from sandbox.local.rootfs import Rootfs
from sandbox.register import Register, furnish

START_SECONDS = 30.0
_OLDEST_BUBBLEWRAP = (0, 8)
_NICENESS_WITHOUT_GROUPS = 5
# User numbers that no login, service or container range uses; each sandbox of a root driver has its own, so that
# limits per user (processes, inotify, pipes) do not reach across sandboxes.
_FIRST_USER, _NUM_USERS = 2_000_000_000, 60_000

_log = logging.getLogger(__name__)
_users = itertools.count(os.getpid() * 256)


@dataclass(frozen=True, slots=True)
class _Ground:
    """What this machine allows, found out once: how bwrap is started, and with which limits."""

    rootfs: Rootfs
    groups: cgroups.GroupTree | None
    keeper: Keeper
    interpreter_source: Path | None
    as_user: Callable[[], Sequence[str]]

    def command(self, argv: Sequence[str], descriptors: Sequence[int]) -> HolderCommand:
        return HolderCommand([*self.as_user(), *argv], descriptors, self.keeper.process_group)

    def describe(self) -> str:
        calls = "filtered system calls" if self.rootfs.filters_calls else "no filter of system calls"
        if self.groups is None:
            return f"resource limits per process (no writable control groups), {calls}"
        return f"{self.groups.describe()}, {calls}"

    def close(self) -> None:
        self.rootfs.close()
        if self.groups is not None:
            self.groups.close()
        self.keeper.close()


class LocalDriver:
    """Makes isolated sandboxes on this machine (`ports.SandboxDriver`)."""

    def __init__(self) -> None:
        self._ground: _Ground | None = None
        self._laying = threading.Lock()
        self._register: Register[HeldSandbox] = Register()

    def check(self) -> None:
        """Try to run the interpreter in a sandbox; raises SandboxUnavailable with what to install or allow."""
        if self._ground is None:
            _lay_ground().close()

    def limits_in_force(self) -> str:
        """What bounds memory and processes here, for people; raises SandboxUnavailable like `check`."""
        if self._ground is not None:
            return self._ground.describe()
        ground = _lay_ground()
        try:
            return ground.describe()
        finally:
            ground.close()

    async def create(self, spec: SandboxSpec) -> HeldSandbox:
        """An isolated sandbox, ready to run commands; the same one while a sandbox of the same key lives.

        Files live in memory: /workspace holds `disk_bytes`, but at most about half of `memory_bytes` (see
        `file_system_sizes`), /tmp and /dev/shm at most 16 MiB each; where control groups are in force all of them count
        towards `memory_bytes`. NONE and LOOPBACK are the same here: an own
        loopback and nothing else. Raises SandboxUnavailable with what to do about it, ConfigurationError for limits
        that no sandbox can have.
        """
        check_spec(spec)
        return await self._register.obtain(spec.key, lambda: self._make(spec))

    async def aclose(self) -> None:
        """Destroy every sandbox of this driver and leave no control group behind."""
        await self._register.destroy_all()
        ground, self._ground = self._ground, None
        if ground is not None:
            await asyncio.to_thread(ground.close)

    async def _make(self, spec: SandboxSpec) -> HeldSandbox:
        ground = await asyncio.to_thread(self._lay_ground_once) if self._ground is None else self._ground
        in_groups = ground.groups is not None
        group = ground.groups.create(spec.limits) if ground.groups is not None else None

        def admit(pid: int) -> None:
            if group is not None:
                group.add(pid)

        try:
            with ground.rootfs.arguments(
                spec.limits,
                interpreter_source=ground.interpreter_source,
                niceness=0 if in_groups else _NICENESS_WITHOUT_GROUPS,
                address_space_bytes=0 if in_groups else spec.limits.memory_bytes,
            ) as (argv, descriptors):
                command = ground.command(argv, descriptors)
                started = await start_holder(command, admit=admit, deadline_seconds=START_SECONDS)
        except BaseException:
            if group is not None:
                await asyncio.shield(group.remove())
            raise
        sandbox = HeldSandbox(
            spec.key,
            spec.limits,
            started,
            env=ground.rootfs.environment,
            enclosure=group,
            on_destroyed=lambda: self._register.forget(spec.key),
        )
        return await furnish(sandbox, spec.files)

    def _lay_ground_once(self) -> _Ground:
        with self._laying:
            if self._ground is None:
                self._ground = _lay_ground()
                _log.info("sandboxes: %s", self._ground.describe())
            return self._ground


def _lay_ground() -> _Ground:
    """Find out what works here by running the interpreter in a sandbox; raises SandboxUnavailable saying what to do."""
    _require_bubblewrap()
    reasons = []
    for prepare in (_as_unprivileged_users, _as_this_user) if os.geteuid() == 0 else (_as_this_user,):
        try:
            ground = prepare()
        except SandboxUnavailable as error:
            reasons.append(error.message)
            continue
        reason = _try(ground)
        if reason is None:
            if reasons:
                _log.warning("sandboxes share root's user number (in a user namespace): %s", reasons[0])
            return ground
        ground.close()
        reasons.append(reason)
    raise SandboxUnavailable(
        f"this machine does not let bubblewrap make sandboxes ({'; '.join(reasons)}); permit user namespaces "
        "(sysctl kernel.unprivileged_userns_clone=1, kernel.apparmor_restrict_unprivileged_userns=0, or a container "
        "with --security-opt seccomp=unconfined), or choose the sandbox driver 'subprocess', which isolates nothing"
    )


def _require_bubblewrap() -> None:
    program = shutil.which("bwrap")
    if program is None:
        raise SandboxUnavailable(
            "bubblewrap is not installed (Debian, Ubuntu: apt-get install bubblewrap; Fedora: dnf install bubblewrap)"
        )
    answer = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=START_SECONDS, check=False)
    numbers = tuple(int(number) for number in re.findall(r"\d+", answer.stdout)[:2])
    if numbers < _OLDEST_BUBBLEWRAP:
        raise SandboxUnavailable(
            f"{program} is version {answer.stdout.strip()!r}; sandboxes need bubblewrap 0.8 or newer"
        )


def _as_this_user() -> _Ground:
    rootfs, groups = Rootfs(), cgroups.open_tree()
    keeper = Keeper(prefix=None, folders=_folders(groups))
    return _Ground(rootfs, groups, keeper, rootfs.interpreter.prefix, as_user=tuple)


def _as_unprivileged_users() -> _Ground:
    """For root: each sandbox runs as a user number of its own, which owns nothing on this machine."""
    for program in ("setpriv", "nsenter", "unshare"):
        if shutil.which(program) is None:
            raise SandboxUnavailable(f"{program} is not installed (package util-linux)")
    rootfs, groups = Rootfs(), cgroups.open_tree()
    prefix = rootfs.interpreter.prefix
    hidden = prefix if prefix is not None and not _everybody_reaches(prefix) else None
    try:
        keeper = Keeper(prefix=hidden, folders=_folders(groups))
    except SandboxUnavailable:
        rootfs.close()
        if groups is not None:
            groups.close()
        raise
    enter = keeper.enter if hidden else []

    def as_user() -> list[str]:
        user = str(_FIRST_USER + next(_users) % _NUM_USERS)
        return [*enter, "setpriv", "--reuid", user, "--regid", user, "--clear-groups", "--"]

    return _Ground(rootfs, groups, keeper, MOUNT_POINT if hidden else prefix, as_user)


def _folders(groups: cgroups.GroupTree | None) -> Sequence[Path]:
    return () if groups is None else groups.folders


def _everybody_reaches(folder: Path) -> bool:
    return all(parent.stat().st_mode & 0o001 for parent in (folder, *folder.parents))


def _try(ground: _Ground) -> str | None:
    """Why the interpreter does not run in a sandbox, or None if it does."""
    limits = SandboxLimits()
    with ground.rootfs.arguments(
        limits, interpreter_source=ground.interpreter_source, niceness=0, address_space_bytes=0
    ) as (argv, descriptors):
        until_interpreter = argv[: argv.index("--") + 2]
        command = ground.command([*until_interpreter, "-I", "-S", "-c", "pass"], descriptors)
        try:
            ended = subprocess.run(
                command.argv,
                pass_fds=command.pass_fds,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=START_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return f"bwrap did not end within {START_SECONDS:.0f} s"
    if ended.returncode == 0:
        return None
    lines = [line for line in ended.stderr.splitlines() if line.strip()]
    return lines[-1].strip() if lines else f"bwrap ended with code {ended.returncode}"
