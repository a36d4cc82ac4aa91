"""The contract of `ports.SandboxDriver`, run against every implementation: isolated, plain and scripted."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import pytest

from gateway.contracts.errors import ConfigurationError, InvalidRequest, NotFound, SandboxLost, SandboxUnavailable
from gateway.contracts.ports import ExecOutcome, ExecResult, SandboxDriver, SandboxLimits, SandboxSpec
from sandbox.drivers import make_driver
from sandbox.local.driver import LocalDriver
from sandbox.scripted import ScriptedCommand, ScriptedSandboxDriver, exited

FLOOD = "head -c 1000000 /dev/zero | tr '\\0' x; echo the end"


def answer(command: ScriptedCommand) -> ExecResult:
    """What the few command lines of this suite do, for the scripted driver."""
    match command.command:
        case "echo kept > note" | "mkdir -p deep; echo kept > deep/note":
            folder = "deep/" if "deep" in str(command.command) else ""
            command.files[f"/workspace/{folder}note"] = b"kept\n"
            return exited()
        case "cat note":
            content = command.files.get(f"{command.cwd}/note")
            return exited(1, stderr=b"cat: note: No such file") if content is None else exited(stdout=content)
        case "cat":
            return exited(stdout=command.stdin)
        case ["cat", "-"]:
            return exited(stdout=command.stdin)
        case "echo out; echo err >&2; exit 3":
            return exited(3, b"out\n", b"err\n")
        case "kill -9 $$":
            return ExecResult(ExecOutcome.SIGNALLED, None, b"", b"", 0, 0, 0.0)
        case "echo $COLOUR":
            return exited(stdout=command.env.get("COLOUR", "").encode() + b"\n")
        case "echo early; sleep 30":
            return exited(stdout=b"early\n", seconds=30.0)
        case "no-such-program":
            return exited(127, stderr=b"not found")
        case _ if command.command == FLOOD:
            return exited(stdout=b"x" * 1_000_000 + b"the end\n")
    raise AssertionError(f"no answer for {command.command!r}")


@pytest.fixture(params=["local", "subprocess", "scripted"])
async def driver(request: pytest.FixtureRequest) -> AsyncIterator[SandboxDriver]:
    made = ScriptedSandboxDriver(answer) if request.param == "scripted" else make_driver(request.param)
    if isinstance(made, LocalDriver):
        try:
            made.check()
        except SandboxUnavailable as error:
            pytest.skip(str(error))
    yield made
    await made.aclose()


async def test_exit_code_and_both_outputs_come_back(driver: SandboxDriver) -> None:
    sandbox = await driver.create(SandboxSpec("a"))
    result = await sandbox.execute("echo out; echo err >&2; exit 3", timeout_seconds=10)
    assert (result.outcome, result.exit_code) == (ExecOutcome.EXITED, 3)
    assert (result.stdout, result.stderr) == (b"out\n", b"err\n")
    assert (result.stdout_total_bytes, result.stderr_total_bytes) == (4, 4)


async def test_files_persist_across_commands_and_not_across_sandboxes(driver: SandboxDriver) -> None:
    first, second = await driver.create(SandboxSpec("a")), await driver.create(SandboxSpec("b"))
    await first.execute("echo kept > note", timeout_seconds=10)
    assert (await first.execute("cat note", timeout_seconds=10)).stdout == b"kept\n"
    assert (await second.execute("cat note", timeout_seconds=10)).exit_code == 1


async def test_standard_input_environment_and_working_directory_reach_the_command(driver: SandboxDriver) -> None:
    sandbox = await driver.create(SandboxSpec("a"))
    text = b"line\n" * 100_000
    limits_hold_half = (await sandbox.execute("cat", timeout_seconds=20, stdin=text)).stdout_total_bytes
    assert limits_hold_half == len(text)
    assert (await sandbox.execute(["cat", "-"], timeout_seconds=10, stdin=b"vector")).stdout == b"vector"
    assert (await sandbox.execute("echo $COLOUR", timeout_seconds=10, env={"COLOUR": "blue"})).stdout == b"blue\n"
    await sandbox.execute("mkdir -p deep; echo kept > deep/note", timeout_seconds=10)
    assert (await sandbox.execute("cat note", timeout_seconds=10, cwd="deep")).stdout == b"kept\n"


async def test_deadline_ends_the_command_and_keeps_what_it_had_printed(driver: SandboxDriver) -> None:
    sandbox = await driver.create(SandboxSpec("a"))
    started = time.monotonic()
    result = await sandbox.execute("echo early; sleep 30", timeout_seconds=0.4)
    assert (result.outcome, result.exit_code, result.stdout) == (ExecOutcome.TIMEOUT, None, b"early\n")
    assert time.monotonic() - started < 10
    assert (await sandbox.execute("cat", timeout_seconds=10, stdin=b"usable")).stdout == b"usable"


async def test_death_by_signal_is_an_outcome_without_exit_code(driver: SandboxDriver) -> None:
    sandbox = await driver.create(SandboxSpec("a"))
    result = await sandbox.execute("kill -9 $$", timeout_seconds=10)
    assert (result.outcome, result.exit_code) == (ExecOutcome.SIGNALLED, None)


async def test_missing_program_is_data_and_not_an_error(driver: SandboxDriver) -> None:
    sandbox = await driver.create(SandboxSpec("a"))
    result = await sandbox.execute("no-such-program", timeout_seconds=10)
    assert (result.outcome, result.exit_code) == (ExecOutcome.EXITED, 127)


async def test_long_output_is_cut_in_the_middle_and_counted(driver: SandboxDriver) -> None:
    sandbox = await driver.create(SandboxSpec("a", limits=SandboxLimits(output_bytes=1000)))
    result = await sandbox.execute(FLOOD, timeout_seconds=20)
    assert len(result.stdout) == 1000
    assert result.stdout_total_bytes == 1_000_008
    assert result.stdout.startswith(b"xxx")
    assert result.stdout.endswith(b"xthe end\n")
    assert b"1000008 bytes in all" in result.stdout


async def test_files_are_there_when_the_sandbox_is_handed_out(driver: SandboxDriver) -> None:
    sandbox = await driver.create(SandboxSpec("a", files={"note": b"kept\n", "/workspace/deep/er": bytes(range(256))}))
    assert (await sandbox.execute("cat note", timeout_seconds=10)).stdout == b"kept\n"
    assert await sandbox.read_file("deep/er") == bytes(range(256))


async def test_written_files_read_back_and_missing_ones_are_not_found(driver: SandboxDriver) -> None:
    sandbox = await driver.create(SandboxSpec("a"))
    content = bytes(range(256)) * 8192  # 2 MiB, more than any pipe holds
    await sandbox.write_file("folder/file", content)
    assert await sandbox.read_file("/workspace/folder/file") == content
    await sandbox.write_file("folder/file", b"")
    assert await sandbox.read_file("folder/file") == b""
    with pytest.raises(NotFound):
        await sandbox.read_file("folder/other")


async def test_creation_is_idempotent_while_the_sandbox_lives(driver: SandboxDriver) -> None:
    first, same = await asyncio.gather(driver.create(SandboxSpec("a")), driver.create(SandboxSpec("a")))
    assert first is same
    await first.destroy()
    later = await driver.create(SandboxSpec("a"))
    assert later is not first
    assert (await later.execute("cat", timeout_seconds=10, stdin=b"new")).stdout == b"new"


async def test_destroyed_sandbox_is_lost_and_destroying_again_is_fine(driver: SandboxDriver) -> None:
    sandbox = await driver.create(SandboxSpec("a"))
    await sandbox.destroy()
    await sandbox.destroy()
    with pytest.raises(SandboxLost):
        await sandbox.execute("cat", timeout_seconds=10)
    with pytest.raises(SandboxLost):
        await sandbox.write_file("note", b"")
    with pytest.raises(SandboxLost):
        await sandbox.read_file("note")


async def test_closing_the_driver_destroys_every_sandbox(driver: SandboxDriver) -> None:
    sandboxes = [await driver.create(SandboxSpec(name)) for name in "abc"]
    await driver.aclose()
    for sandbox in sandboxes:
        with pytest.raises(SandboxLost):
            await sandbox.execute("cat", timeout_seconds=10)


async def test_commands_of_one_sandbox_run_side_by_side(driver: SandboxDriver) -> None:
    sandbox = await driver.create(SandboxSpec("a"))
    results = await asyncio.gather(
        *(sandbox.execute("cat", timeout_seconds=20, stdin=str(number).encode()) for number in range(12))
    )
    assert [result.stdout for result in results] == [str(number).encode() for number in range(12)]


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf")])
async def test_deadline_must_be_a_time(driver: SandboxDriver, seconds: float) -> None:
    sandbox = await driver.create(SandboxSpec("a"))
    with pytest.raises(InvalidRequest, match="timeout_seconds"):
        await sandbox.execute("cat", timeout_seconds=seconds)


async def test_impossible_limits_are_refused_by_name(driver: SandboxDriver) -> None:
    with pytest.raises(ConfigurationError, match="memory_bytes"):
        await driver.create(SandboxSpec("a", limits=SandboxLimits(memory_bytes=1)))
    with pytest.raises(ConfigurationError, match="key"):
        await driver.create(SandboxSpec(""))


def test_unknown_driver_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigurationError, match="did you mean 'local'"):
        make_driver("locale")
