"""The living sandboxes of one driver by key: creation is idempotent per key, and the driver's end is theirs."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Generic, Protocol, TypeVar

from gateway.contracts.ports import Sandbox


class Mortal(Sandbox, Protocol):
    """A sandbox that knows whether it can still run commands."""

    @property
    def alive(self) -> bool: ...


AnySandbox = TypeVar("AnySandbox", bound=Sandbox)
MortalSandbox = TypeVar("MortalSandbox", bound=Mortal)


class Register(Generic[MortalSandbox]):
    """Key → living sandbox, for drivers; belongs to one event loop."""

    def __init__(self) -> None:
        self._living: dict[str, MortalSandbox] = {}
        self._making: dict[str, asyncio.Event] = {}

    async def obtain(self, key: str, make: Callable[[], Awaitable[MortalSandbox]]) -> MortalSandbox:
        """The living sandbox of this key, else a new one; callers that ask at the same time get the same one."""
        while True:
            if key in self._making:
                await self._making[key].wait()
            elif key in self._living and self._living[key].alive:
                return self._living[key]
            elif key in self._living:
                await self._living[key].destroy()
                self._living.pop(key, None)
            else:
                break
        made = self._making[key] = asyncio.Event()
        try:
            sandbox = self._living[key] = await make()
            return sandbox
        finally:
            del self._making[key]
            made.set()

    def forget(self, key: str) -> None:
        """A sandbox of this key has ended."""
        self._living.pop(key, None)

    async def destroy_all(self) -> None:
        """Destroy all, also those that are being made now; raises the errors of those that could not be ended."""
        while self._living or self._making:
            for made in list(self._making.values()):
                await made.wait()
            sandboxes = list(self._living.values())
            self._living.clear()
            async with asyncio.TaskGroup() as group:
                for sandbox in sandboxes:
                    group.create_task(sandbox.destroy())


async def furnish(sandbox: AnySandbox, files: Mapping[str, bytes]) -> AnySandbox:
    """Write a new sandbox's first files; destroys it if that fails."""
    try:
        for path, content in files.items():
            await sandbox.write_file(path, content)
    except BaseException:
        await sandbox.destroy()
        raise
    return sandbox
