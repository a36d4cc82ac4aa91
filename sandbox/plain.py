"""Sandboxes that isolate nothing: plain processes with resource limits in a folder of their own.

For machines where namespaces are not permitted, and only by explicit choice: commands run as this user and can read,
change and reach whatever this user can. Promised are the same commands, files, outcomes, deadlines and output limits as
elsewhere, that no process and no folder stays behind, and limits per process on memory, file size and CPU time.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import shutil
import sys
import tempfile
from pathlib import Path

from gateway.contracts.ports import SandboxLimits, SandboxSpec
from sandbox import holder
from sandbox.held import HeldSandbox, HolderCommand, start_holder
from sandbox.limits import check_spec
from sandbox.register import Register, furnish

START_SECONDS = 30.0

_log = logging.getLogger(__name__)


class PlainProcessDriver:
    """Makes sandboxes that are folders and plain processes (`ports.SandboxDriver`); says so once, loudly."""

    def __init__(self) -> None:
        self._register: Register[HeldSandbox] = Register()
        _log.warning(
            "NO ISOLATION: sandbox commands run as plain processes of this user, with its files and its network; "
            "choose the driver 'local' for real sandboxes"
        )

    def limits_in_force(self) -> str:
        """What bounds memory and processes here, for people."""
        return "resource limits per process, no isolation"

    async def create(self, spec: SandboxSpec) -> HeldSandbox:
        """A folder with a holder; `network` cannot be honoured. File operations are confined to the folder, which is
        /workspace for them; commands are not confined and find it as their working directory and HOME.

        Raises SandboxUnavailable if no process starts, ConfigurationError for limits that no sandbox can have.
        """
        check_spec(spec)
        return await self._register.obtain(spec.key, lambda: self._make(spec))

    async def aclose(self) -> None:
        """Destroy every sandbox of this driver."""
        await self._register.destroy_all()

    async def _make(self, spec: SandboxSpec) -> HeldSandbox:
        folder = await asyncio.to_thread(_Folder)
        try:
            tasks = await asyncio.to_thread(_tasks_of_this_user)
            command = HolderCommand(_holder_argv(folder.path, spec.limits, tasks))
            started = await start_holder(command, admit=_no_group, deadline_seconds=START_SECONDS)
        except BaseException:
            await asyncio.shield(folder.remove())
            raise
        sandbox = HeldSandbox(
            spec.key,
            spec.limits,
            started,
            env=_environment(folder.path),
            enclosure=folder,
            on_destroyed=lambda: self._register.forget(spec.key),
            ends_itself=True,
        )
        return await furnish(sandbox, spec.files)


class _Folder:
    """The home of one sandbox (`held.Enclosure`); its holder removes it too, should this process be killed."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="verbatim-sandbox-")).resolve()

    def out_of_memory_kills(self) -> int:
        return 0

    async def remove(self) -> None:
        await asyncio.to_thread(shutil.rmtree, self.path, ignore_errors=True)


def _holder_argv(folder: Path, limits: SandboxLimits, tasks_of_user: int) -> list[str]:
    bounds = (
        # The kernel counts all tasks of a user here (and none of root's), so the limit is on top of what there is.
        tasks_of_user + limits.num_processes + 2,
        limits.memory_bytes,
        limits.disk_bytes,
        math.ceil(limits.cpu_seconds_per_command),
        0,
    )
    program = [sys.executable, "-I", "-S", holder.__file__, HolderCommand.CONTROL]
    return [*program, str(folder), "1", *(str(value) for value in bounds)]


def _no_group(pid: int) -> None:
    """Nothing bounds a plain sandbox as a whole."""


def _environment(folder: Path) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}:{os.environ.get('PATH', os.defpath)}"
    return {"HOME": str(folder), "LANG": "C.UTF-8", "PATH": path, "TMPDIR": str(folder)}


def _tasks_of_this_user() -> int:
    """Threads of all processes that belong to this user."""
    tasks = 0
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                if process.stat().st_uid == os.getuid():
                    tasks += len(os.listdir(process / "task"))
            except OSError:
                continue  # It ended meanwhile.
    return tasks
