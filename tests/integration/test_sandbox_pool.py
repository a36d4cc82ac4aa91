"""The pool of sandboxes, over the scripted driver where only order matters and over real processes where they do."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gateway.contracts.errors import ConfigurationError, Conflict, SandboxLost, SandboxUnavailable
from gateway.contracts.ports import Sandbox, SandboxDriver, SandboxSpec
from sandbox.plain import PlainProcessDriver
from sandbox.pool import SandboxPool
from sandbox.scripted import ScriptedSandboxDriver, exited


@pytest.fixture
async def scripted() -> AsyncIterator[ScriptedSandboxDriver]:
    driver = ScriptedSandboxDriver(lambda command: exited(stdout=command.stdin))
    yield driver
    await driver.aclose()


class CountingDriver:
    """A driver that records how many creations were under way at once, and refuses some."""

    def __init__(self, driver: SandboxDriver, *, refuse: int = 0) -> None:
        self._driver = driver
        self._refuse = refuse
        self._under_way = 0
        self.most_under_way = 0
        self.keys: list[str] = []

    async def create(self, spec: SandboxSpec) -> Sandbox:
        self._under_way += 1
        self.most_under_way = max(self.most_under_way, self._under_way)
        self.keys.append(spec.key)
        try:
            await asyncio.sleep(0.01)
            if self._refuse > 0:
                self._refuse -= 1
                raise SandboxUnavailable("no room")
            return await self._driver.create(spec)
        finally:
            self._under_way -= 1

    async def aclose(self) -> None:
        await self._driver.aclose()


async def test_no_more_than_size_are_taken_and_waiting_is_in_order(scripted: ScriptedSandboxDriver) -> None:
    driver = CountingDriver(scripted)
    pool = SandboxPool(driver, size=3, starting=2)
    taken, most, order = 0, 0, []

    async def use(number: int) -> None:
        nonlocal taken, most
        async with pool.take(SandboxSpec(f"r{number:02}")):
            taken += 1
            most = max(most, taken)
            order.append(number)
            await asyncio.sleep(0.05)
            taken -= 1

    await asyncio.gather(*(use(number) for number in range(20)))
    await pool.aclose()
    assert most == 3
    assert driver.most_under_way == 2
    assert driver.keys == sorted(driver.keys)
    assert sorted(order) == list(range(20))


async def test_sandbox_is_destroyed_after_use_also_when_its_user_fails(scripted: ScriptedSandboxDriver) -> None:
    pool = SandboxPool(scripted, size=1)
    with pytest.raises(ZeroDivisionError):
        async with pool.take(SandboxSpec("a")) as sandbox:
            _ = 1 / 0
    with pytest.raises(SandboxLost):
        await sandbox.execute("cat", timeout_seconds=1)
    async with pool.take(SandboxSpec("a")) as another:
        assert another is not sandbox
    await pool.aclose()


async def test_cancelled_waiter_gives_its_place_to_the_next(scripted: ScriptedSandboxDriver) -> None:
    pool = SandboxPool(scripted, size=1)
    reached = []

    async def use(name: str) -> None:
        async with pool.take(SandboxSpec(name)):
            reached.append(name)

    async with pool.take(SandboxSpec("first")):
        waiting = [asyncio.create_task(use(name)) for name in ("second", "third")]
        await asyncio.sleep(0)
        waiting[0].cancel()
        await asyncio.sleep(0)
    await asyncio.wait_for(waiting[1], 5)
    assert waiting[0].cancelled()
    assert reached == ["third"]
    await pool.aclose()


async def test_key_that_is_taken_is_refused(scripted: ScriptedSandboxDriver) -> None:
    pool = SandboxPool(scripted, size=2)
    async with pool.take(SandboxSpec("a")):
        with pytest.raises(Conflict, match="'a'"):
            async with pool.take(SandboxSpec("a")):
                pass
    await pool.aclose()


async def test_warm_sandboxes_are_used_once_with_the_files_of_their_taker(scripted: ScriptedSandboxDriver) -> None:
    driver = CountingDriver(scripted)
    pool = SandboxPool(driver, size=2, warm=2)
    seen = set()
    for number in range(6):
        async with pool.take(SandboxSpec(f"r{number}", files={"note": b"mine"})) as sandbox:
            assert await sandbox.read_file("note") == b"mine"
            assert sandbox.sandbox_id not in seen
            seen.add(sandbox.sandbox_id)
            await asyncio.sleep(0.05)
    await pool.aclose()
    assert [name for name in seen if name.startswith("warm-")]
    with pytest.raises(SandboxUnavailable, match="closed"):
        async with pool.take(SandboxSpec("late")):
            pass


async def test_failure_to_start_surfaces_and_does_not_cost_a_place(
    scripted: ScriptedSandboxDriver, caplog: pytest.LogCaptureFixture
) -> None:
    pool = SandboxPool(CountingDriver(scripted, refuse=2), size=1, warm=1)
    with pytest.raises(SandboxUnavailable, match="no room"):
        async with pool.take(SandboxSpec("a")):
            pass
    async with asyncio.timeout(5):
        for name in "bcd":
            async with pool.take(SandboxSpec(name)) as sandbox:
                assert (await sandbox.execute("cat", timeout_seconds=1, stdin=name.encode())).stdout == name.encode()
    await pool.aclose()
    assert "ahead of need" in caplog.text


def test_pool_without_room_is_refused(scripted: ScriptedSandboxDriver) -> None:
    with pytest.raises(ConfigurationError):
        SandboxPool(scripted, size=0)


async def test_sandbox_lost_in_use_reaches_its_user_and_frees_the_place() -> None:
    driver = PlainProcessDriver()
    pool = SandboxPool(driver, size=1)

    async def use() -> None:
        async with pool.take(SandboxSpec("a")) as sandbox:
            await sandbox.execute("sleep 63.5 >/dev/null 2>&1 &", timeout_seconds=10)
            holder = int((await sandbox.execute("ps -o ppid= -p $PPID", timeout_seconds=10)).stdout)
            os.kill(holder, signal.SIGKILL)
            await sandbox.execute("true", timeout_seconds=10)

    with pytest.raises(SandboxLost):
        await use()
    assert await ended("^sleep 63.5")
    async with pool.take(SandboxSpec("b")) as sandbox:
        assert (await sandbox.execute("echo well", timeout_seconds=10)).stdout == b"well\n"
    await pool.aclose()
    await driver.aclose()


async def test_plain_processes_are_a_choice_with_a_loud_warning(caplog: pytest.LogCaptureFixture) -> None:
    driver = PlainProcessDriver()
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "NO ISOLATION" in caplog.text
    await driver.aclose()


async def test_plain_sandbox_confines_file_operations_and_leaves_no_folder(tmp_path: Path) -> None:
    driver = PlainProcessDriver()
    sandbox = await driver.create(SandboxSpec("a"))
    home = Path((await sandbox.execute("pwd", timeout_seconds=10)).stdout.decode().strip())
    await sandbox.execute(["ln", "-s", str(tmp_path), "way-out"], timeout_seconds=10)
    for path in (str(tmp_path / "x"), "../x", "way-out/x"):
        with pytest.raises(Exception, match="outside"):
            await sandbox.write_file(path, b"x")
    assert list(tmp_path.iterdir()) == []
    await sandbox.execute("sleep 61.5 & setsid sleep 61.5 &", timeout_seconds=10)
    await driver.aclose()
    assert not home.exists()
    assert await ended("^sleep 61.5")


async def test_plain_sandbox_ends_with_its_killed_owner() -> None:
    program = """
import asyncio
from gateway.contracts.ports import SandboxSpec
from sandbox.plain import PlainProcessDriver
async def main():
    sandbox = await PlainProcessDriver().create(SandboxSpec("a"))
    home = (await sandbox.execute("setsid sleep 62.5 >/dev/null 2>&1 & pwd", timeout_seconds=10)).stdout
    print(home.decode(), end="", flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""
    home = Path(await asyncio.to_thread(_run_until_first_line_and_kill, program))
    for _ in range(100):
        if not home.exists():
            break
        await asyncio.sleep(0.05)
    assert not home.exists()
    assert await ended("^sleep 62.5")


async def ended(pattern: str) -> bool:
    """Whether no process of this machine has such a command line (any more)."""
    for _ in range(100):
        found = await asyncio.create_subprocess_exec("pgrep", "-f", pattern, stdout=subprocess.DEVNULL)
        if await found.wait() != 0:
            return True
        await asyncio.sleep(0.02)
    return False


def _run_until_first_line_and_kill(program: str) -> str:
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=root
    ) as owner:
        assert owner.stdout is not None
        line = owner.stdout.readline().decode().strip()
        owner.kill()
        owner.communicate()
    return line
