"""Control groups: memory, process and CPU limits on a sandbox as a whole, where this process may make such groups.

Finds at run time what the machine has: version 1 (one hierarchy per controller, also beside an empty version 2), or
version 2 (own group or the nearest ancestor that may delegate). Each driver has one parent group, each sandbox one
group below it, so that all sandboxes of a driver together have the CPU weight of one ordinary process.
Does not do: limits without control groups (see `HolderLimits`), and removal after this process was killed (see keeper).
"""

from __future__ import annotations

import asyncio
import itertools
import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from gateway.contracts.errors import SandboxError
from gateway.contracts.ports import SandboxLimits

RESERVED_PROCESSES = 16
"""Room above `num_processes` for the holder and its supervisors, so that a full sandbox still answers."""
REMOVE_SECONDS = 5.0

_NEEDED = ("memory", "pids")
_WELCOME = ("cpu",)
_numbers = itertools.count()


class GroupTree:
    """The parent group of one driver: one folder per hierarchy (version 2 has one hierarchy)."""

    def __init__(self, version: int, folders: Mapping[str, Path]) -> None:
        self._version = version
        self._folders = dict(folders)

    @property
    def folders(self) -> Sequence[Path]:
        """The driver's folders; empty ones may be removed by whoever outlives this process."""
        return tuple(dict.fromkeys(self._folders.values()))

    def describe(self) -> str:
        """The version and the controllers in force, for people."""
        return f"control groups version {self._version} ({', '.join(self._folders)})"

    def create(self, limits: SandboxLimits) -> SandboxGroup:
        """A group with these limits; raises SandboxError if the kernel refuses them."""
        name = str(next(_numbers))
        group = SandboxGroup(self._version, {kind: folder / name for kind, folder in self._folders.items()})
        try:
            group.make(limits)
        except OSError as error:
            group.remove_now()
            raise SandboxError(f"cannot make control group {error.filename}: {error.strerror}") from error
        return group

    def close(self) -> None:
        """Remove the driver's own folders; groups of sandboxes must be gone."""
        for folder in self.folders:
            with suppress(OSError):  # The keeper tries again until a dying sandbox has left its group.
                folder.rmdir()


class SandboxGroup:
    """The limits of one sandbox (`held.Enclosure`)."""

    def __init__(self, version: int, folders: Mapping[str, Path]) -> None:
        self._version = version
        self._folders = folders
        self._events = folders["memory"] / ("memory.oom_control" if version == 1 else "memory.events")

    def make(self, limits: SandboxLimits) -> None:
        """Create the folders and write the limits; raises OSError."""
        for folder in dict.fromkeys(self._folders.values()):
            folder.mkdir()
        memory, pids = self._folders["memory"], self._folders["pids"]
        (pids / "pids.max").write_text(str(limits.num_processes + RESERVED_PROCESSES))
        if self._version == 1:
            (memory / "memory.limit_in_bytes").write_text(str(limits.memory_bytes))
            with suppress(OSError):  # Only kernels that account swap have it.
                (memory / "memory.memsw.limit_in_bytes").write_text(str(limits.memory_bytes))
        else:
            (memory / "memory.max").write_text(str(limits.memory_bytes))
            with suppress(OSError):
                (memory / "memory.swap.max").write_text("0")

    def add(self, pid: int) -> None:
        """Move a process into the group; its later children follow."""
        for folder in dict.fromkeys(self._folders.values()):
            (folder / "cgroup.procs").write_text(str(pid))

    def out_of_memory_kills(self) -> int:
        """Processes of the group that the kernel killed for memory so far (0 on kernels that do not count them)."""
        with suppress(FileNotFoundError):
            for line in self._events.read_text().splitlines():
                name, _, value = line.partition(" ")
                if name == "oom_kill":
                    return int(value)
        return 0

    def remove_now(self) -> bool:
        """Try to remove the folders; False while processes are still leaving them."""
        for folder in dict.fromkeys(self._folders.values()):
            try:
                folder.rmdir()
            except FileNotFoundError:
                continue
            except OSError:
                return False
        return True

    async def remove(self) -> None:
        """Remove the folders; raises SandboxError if they stay occupied."""
        deadline = time.monotonic() + REMOVE_SECONDS
        while not self.remove_now():
            if time.monotonic() > deadline:
                raise SandboxError(f"control group {self._folders['memory']} stays occupied; see its cgroup.procs")
            await asyncio.sleep(0.002)


def open_tree() -> GroupTree | None:
    """The driver's parent group on this machine, tried with a real process; None where groups cannot be used."""
    name = f"verbatim-{os.getpid()}-{time.monotonic_ns():x}"
    own = _own_groups()
    for version, folders in (*_first_version(own), *_second_version(own)):
        tree = _try_tree(version, {kind: folder / name for kind, folder in folders.items()})
        if tree is not None:
            return tree
    return None


def _own_groups() -> dict[str, Path]:
    """Controller (or "" for version 2) → the folder of this process's own group."""
    inside = {}
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, kinds, path = line.split(":", 2)
        for kind in kinds.split(","):
            inside[kind] = path
    own = {}
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        root, mount_point = before.split()[3:5]
        filesystem, _, options = after.split(" ", 2)
        kinds_here = [""] if filesystem == "cgroup2" else options.split(",") if filesystem == "cgroup" else []
        for kind in kinds_here:
            if kind in inside and (root == "/" or (inside[kind] + "/").startswith(root + "/")):
                own[kind] = Path(mount_point) / os.path.relpath(inside[kind], root)
    return own


def _first_version(own: Mapping[str, Path]) -> list[tuple[int, dict[str, Path]]]:
    if any(kind not in own for kind in _NEEDED):
        return []
    return [(1, {kind: own[kind] for kind in (*_NEEDED, *_WELCOME) if kind in own})]


def _second_version(own: Mapping[str, Path]) -> list[tuple[int, dict[str, Path]]]:
    """Own group first: it can delegate if it is the root group; else an ancestor, if we may write there."""
    if "" not in own:
        return []
    candidates = []
    for folder in (own[""], *own[""].parents):
        try:
            available = (folder / "cgroup.controllers").read_text().split()
        except OSError:
            break
        if set(_NEEDED) <= set(available):
            candidates.append((2, {kind: folder for kind in (*_NEEDED, *_WELCOME) if kind in available}))
    return candidates


def _try_tree(version: int, folders: dict[str, Path]) -> GroupTree | None:
    """Make the parent's folders and move one process into a group below; None (and nothing left) if that fails."""
    tree = GroupTree(version, folders)
    try:
        for folder in tree.folders:
            if version == 2:
                _delegate(folder.parent, folders)
            folder.mkdir()
            if version == 2:
                _delegate(folder, folders)
        group = tree.create(SandboxLimits())
        with subprocess.Popen(["/bin/sh", "-c", "read _"], stdin=subprocess.PIPE) as trial:
            try:
                group.add(trial.pid)
            finally:
                assert trial.stdin is not None
                trial.stdin.close()
                trial.wait()
                _remove_soon(group)
    except (OSError, SandboxError):
        tree.close()
        return None
    return tree


def _delegate(folder: Path, kinds: Mapping[str, Path]) -> None:
    """Let groups below `folder` use the controllers; raises OSError where it may not or holds processes itself."""
    switch = folder / "cgroup.subtree_control"
    if missing := set(kinds) - set(switch.read_text().split()):
        switch.write_text(" ".join(f"+{kind}" for kind in sorted(missing)))


def _remove_soon(group: SandboxGroup) -> None:
    for _ in range(200):
        if group.remove_now():
            return
        time.sleep(0.002)
