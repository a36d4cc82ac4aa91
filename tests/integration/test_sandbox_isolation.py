"""What an isolated sandbox must not be able to do, tried from inside with a shell and with raw system calls."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gateway.contracts.errors import NotFound, SandboxError, SandboxLost, SandboxUnavailable
from gateway.contracts.ports import ExecOutcome, ExecResult, Sandbox, SandboxLimits, SandboxSpec
from sandbox.local.driver import LocalDriver

MIB = 2**20


@pytest.fixture
async def driver() -> AsyncIterator[LocalDriver]:
    made = LocalDriver()
    try:
        made.check()
    except SandboxUnavailable as error:
        pytest.skip(str(error))
    yield made
    await made.aclose()


@pytest.fixture
async def sandbox(driver: LocalDriver) -> Sandbox:
    return await driver.create(SandboxSpec("a"))


async def python(sandbox: Sandbox, program: str, *, timeout_seconds: float = 20) -> ExecResult:
    return await sandbox.execute(["python3", "-I", "-c", program], timeout_seconds=timeout_seconds)


def host_processes(marker: str) -> list[int]:
    """Processes of the host whose command line contains `marker`."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                command = (folder / "cmdline").read_bytes()
            except OSError:
                continue
            if marker.encode() in command:
                found.append(int(folder.name))
    return found


async def eventually_there(marker: str) -> bool:
    for _ in range(500):
        if host_processes(marker):
            return True
        await asyncio.sleep(0.01)
    return False


async def eventually_gone(marker: str, seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while host_processes(marker):
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(0.02)
    return True


async def test_no_folder_of_the_host_is_visible_but_programs(sandbox: Sandbox, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("hidden")
    secret.chmod(0o644)
    names = (await sandbox.execute("ls -A /", timeout_seconds=10)).stdout.decode().split()
    allowed = "bin dev etc lib lib32 lib64 libx32 opt proc run sbin tmp usr var workspace"
    assert set(names) <= set(allowed.split())
    shadow = "/etc/shadow"
    for path in (str(secret), "/root", "/home", shadow, "/etc/ssh", "/var/log", "/sys", f"/proc/1/root{shadow}"):
        result = await sandbox.execute(["cat", path], timeout_seconds=10)
        assert result.exit_code != 0, path
        listed = await sandbox.execute(["ls", path], timeout_seconds=10)
        assert listed.exit_code != 0, path
    assert (await sandbox.execute("ls -A /tmp /var/tmp /run", timeout_seconds=10)).stdout.count(b"holder.pyc") == 1


async def test_environment_of_the_host_is_not_inherited(driver: LocalDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VERY_SECRET_KEY", "s3cr3t")
    sandbox = await driver.create(SandboxSpec("a"))
    seen = await sandbox.execute("env; cat /proc/*/environ 2>/dev/null", timeout_seconds=10)
    assert b"s3cr3t" not in seen.stdout
    names = {line.partition(b"=")[0] for line in (await sandbox.execute("env", timeout_seconds=10)).stdout.splitlines()}
    assert names <= {b"HOME", b"LANG", b"PATH", b"TMPDIR", b"USER", b"PWD", b"LD_LIBRARY_PATH"}


async def test_no_network_but_an_own_loopback(sandbox: Sandbox) -> None:
    with socket.create_server(("127.0.0.1", 0)) as host_server, socket.socket(socket.AF_UNIX) as abstract:
        abstract.bind("\0verbatim-test-abstract")
        abstract.listen()
        program = f"""
import socket
def attempt(family, address):
    try:
        with socket.socket(family) as s:
            s.settimeout(2); s.connect(address)
        return "open"
    except OSError as error:
        return error.__class__.__name__
print(attempt(socket.AF_INET, ("127.0.0.1", {host_server.getsockname()[1]})))
print(attempt(socket.AF_INET, ("192.0.2.1", 80)))
print(attempt(socket.AF_INET6, ("2001:db8::1", 80)))
print(attempt(socket.AF_UNIX, "\\0verbatim-test-abstract"))
with socket.create_server(("127.0.0.1", 0)) as own:
    print(attempt(socket.AF_INET, own.getsockname()))
for family in (socket.AF_VSOCK, socket.AF_PACKET, socket.AF_ALG):
    try:
        socket.socket(family, socket.SOCK_RAW if family == socket.AF_PACKET else socket.SOCK_STREAM); print("made")
    except OSError as error:
        print("refused")
"""
        told = (await python(sandbox, program)).stdout.decode().split()
    assert told == ["ConnectionRefusedError", "OSError", "OSError", "ConnectionRefusedError", "open", *["refused"] * 3]


async def test_command_inherits_no_descriptor_but_its_streams(sandbox: Sandbox) -> None:
    listed = await asyncio.gather(*(python(sandbox, "import os; print(os.listdir('/proc/self/fd'))") for _ in range(4)))
    assert {result.stdout for result in listed} == {b"['0', '1', '2', '3']\n"}  # the fourth lists them


async def test_only_its_own_processes_are_visible(sandbox: Sandbox) -> None:
    listed = await sandbox.execute("ls -d /proc/[0-9]*", timeout_seconds=10)
    assert len(listed.stdout.split()) <= 5
    assert (await sandbox.execute(["kill", "-0", str(os.getpid())], timeout_seconds=10)).exit_code != 0


async def test_no_privilege_and_no_way_to_one(sandbox: Sandbox) -> None:
    status = (await sandbox.execute("cat /proc/self/status", timeout_seconds=10)).stdout.decode()
    fields = dict(line.split(":\t", 1) for line in status.splitlines())
    assert {fields[name].strip("0") for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {""}
    assert fields["NoNewPrivs"] == "1"
    assert fields["Seccomp"] == "2"
    # Outside, its processes belong to a user that owns nothing: never to root.
    outside = Path(f"/proc/{host_pid(sandbox)}/status").read_text()
    assert "\nUid:\t0\t" not in outside


ATTACKS = """
import ctypes, os, json, errno
libc = ctypes.CDLL(None, use_errno=True)
def call(name, *arguments):
    function = getattr(libc, name)
    return "denied" if function(*arguments) == -1 else "done"
def syscall(*arguments):
    return "denied" if libc.syscall(*arguments) == -1 else "done"
def touch(path, flags=os.O_WRONLY):
    try:
        os.close(os.open(path, flags)); return "done"
    except OSError:
        return "denied"
def attempt(function, *arguments):
    try:
        function(*arguments); return "done"
    except (OSError, ValueError):
        return "denied"
NEWUSER, NEWNS, NEWNET, NEWPID = 0x10000000, 0x20000, 0x40000000, 0x20000000
results = {
    "mount tmpfs": call("mount", b"none", b"/tmp", b"tmpfs", 0, None),
    "mount proc": call("mount", b"proc", b"/tmp", b"proc", 0, None),
    "remount writable": call("mount", None, b"/usr", None, 32 | 4096, None),
    "bind": call("mount", b"/usr", b"/tmp", None, 4096, None),
    "umount": call("umount2", b"/proc/sys", 2),
    "pivot_root": syscall(155, b"/tmp", b"/tmp"),
    "chroot": call("chroot", b"/tmp"),
    "user namespace": call("unshare", NEWUSER),
    "mount namespace": call("unshare", NEWNS),
    "network namespace": call("unshare", NEWNET),
    "clone user namespace": syscall(56, NEWUSER | 17, 0, 0, 0, 0),
    "clone3": syscall(435, 0, 0),
    "setns": call("setns", os.open("/proc/self/ns/net", os.O_RDONLY), 0),
    "sethostname": call("sethostname", b"mine", 4),
    "keyctl": syscall(250, 0, -3, 0),
    "bpf": syscall(321, 0, 0, 0),
    "io_uring": syscall(425, 1, ctypes.create_string_buffer(256)),
    "perf_event_open": syscall(298, ctypes.create_string_buffer(256), 0, -1, -1, 0),
    "trace holder": call("ptrace", 16, 1, 0, 0),
    "read holder memory": touch("/proc/1/mem", os.O_RDONLY),
    "read holder environment": touch("/proc/1/environ", os.O_RDONLY),
    "list holder descriptors": attempt(os.listdir, "/proc/1/fd"),
    "steal holder descriptor": syscall(438, syscall(434, 1, 0) == "done" and os.pidfd_open(1), 0, 0),
    "trace supervisor": call("ptrace", 16, os.getppid(), 0, 0),
    "list supervisor descriptors": attempt(os.listdir, f"/proc/{os.getppid()}/fd"),
    "holder root": attempt(os.listdir, "/proc/1/root"),
    "core pattern": touch("/proc/sys/kernel/core_pattern"),
    "sysrq": touch("/proc/sysrq-trigger"),
    "kernel memory": touch("/proc/kcore", os.O_RDONLY),
    "write usr": touch("/usr/x", os.O_WRONLY | os.O_CREAT),
    "write etc": touch("/etc/passwd"),
    "write root": touch("/x", os.O_WRONLY | os.O_CREAT),
    "write dev": touch("/dev/x", os.O_WRONLY | os.O_CREAT),
    "write holder": touch("/run/holder.pyc"),
    "write interpreter": touch(os.path.realpath(os.sys.executable)),
    "device node": attempt(os.mknod, "/tmp/disk", 0o60600, os.makedev(254, 0)),
    "setuid": attempt(os.setuid, 0),
    "chown": (open("/tmp/own", "w").close(), attempt(os.chown, "/tmp/own", 0, 0))[1],
    "raise limit": attempt(__import__("resource").setrlimit, 6, (100000, 100000)),
    "set clock": call("clock_settime", 0, ctypes.create_string_buffer(16)),
    "reboot": syscall(169, 0xfee1dead, 672274793, 0, 0),
}
print(json.dumps(results))
"""


async def test_attacks_on_kernel_host_and_holder_are_denied(sandbox: Sandbox) -> None:
    result = await python(sandbox, ATTACKS)
    assert result.stderr == b""
    outcomes = json.loads(result.stdout)
    assert len(outcomes) > 35
    assert [name for name, outcome in outcomes.items() if outcome != "denied"] == []


async def test_first_process_survives_every_signal_from_inside(sandbox: Sandbox) -> None:
    await sandbox.execute("for s in 1 2 3 4 6 9 10 13 14 15 17 19 20 24 25; do kill -$s 1; done", timeout_seconds=10)
    assert (await sandbox.execute("echo well", timeout_seconds=10)).stdout == b"well\n"


@pytest.mark.parametrize("attack", ["kill -9 $PPID; sleep 30", "kill -19 $PPID; sleep 30"])
async def test_command_that_attacks_its_supervisor_ends_with_all_its_kin(sandbox: Sandbox, attack: str) -> None:
    result = await sandbox.execute(f"sleep 7731{os.getpid()} & {attack}", timeout_seconds=1)
    assert result.outcome is ExecOutcome.SIGNALLED
    assert await eventually_gone(f"7731{os.getpid()}")
    assert (await sandbox.execute("echo well", timeout_seconds=10)).stdout == b"well\n"


async def test_timeout_kills_what_detached_itself_and_spares_other_commands(sandbox: Sandbox) -> None:
    marker = f"6{os.getpid()}"
    await sandbox.execute(f"sleep 5{marker} >/dev/null 2>&1 &", timeout_seconds=10)
    detached = f"""
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.execlp('sleep', 'sleep', '4{marker}')
    os._exit(0)
time.sleep(60)
"""
    result = await python(sandbox, detached, timeout_seconds=1)
    assert result.outcome is ExecOutcome.TIMEOUT
    assert not host_processes(f"4{marker}")
    assert host_processes(f"5{marker}")


async def test_background_process_lives_on_and_may_print_after_its_command_ended(sandbox: Sandbox) -> None:
    started = time.monotonic()
    loop = "(i=0; while [ $i -lt 40 ]; do echo tick; i=$((i+1)); sleep 0.02; done; echo done > mark) & echo away"
    result = await sandbox.execute(loop, timeout_seconds=10)
    assert result.outcome is ExecOutcome.EXITED
    assert time.monotonic() - started < 0.7
    for _ in range(200):
        if (await sandbox.execute("cat mark", timeout_seconds=10)).exit_code == 0:
            return
        await asyncio.sleep(0.05)
    pytest.fail("the background loop died of its closed output")


async def test_memory_hog_is_killed_alone(driver: LocalDriver) -> None:
    limits = SandboxLimits(memory_bytes=96 * MIB)
    hungry = await driver.create(SandboxSpec("hungry", limits=limits))
    neighbour = await driver.create(SandboxSpec("neighbour", limits=limits))
    result = await python(hungry, "x = bytearray(400 * 2**20); print(len(x))")
    assert b"419430400" not in result.stdout
    if "control groups" in driver.limits_in_force():
        assert result.outcome is ExecOutcome.OUT_OF_MEMORY
        shell = await hungry.execute("python3 -c 'bytearray(400 * 2**20)'; exit 137", timeout_seconds=20)
        assert shell.outcome is ExecOutcome.OUT_OF_MEMORY
    for survivor in (hungry, neighbour):
        assert (await survivor.execute("echo well", timeout_seconds=10)).stdout == b"well\n"


async def test_many_small_hogs_do_not_take_the_holder_with_them(driver: LocalDriver) -> None:
    if "control groups" not in driver.limits_in_force():
        pytest.skip("without control groups memory is limited per process only")
    sandbox = await driver.create(SandboxSpec("a", limits=SandboxLimits(memory_bytes=64 * MIB)))
    hogs = """
import os, time
for _ in range(40):
    if os.fork() == 0:
        x = bytearray(6 * 2**20)
        time.sleep(60)
time.sleep(1.5)
"""
    await python(sandbox, hogs, timeout_seconds=4)
    assert (await sandbox.execute("echo well", timeout_seconds=10)).stdout == b"well\n"


async def test_files_alone_cannot_use_up_the_memory_of_a_sandbox(driver: LocalDriver) -> None:
    sandbox = await driver.create(SandboxSpec("a", limits=SandboxLimits(memory_bytes=64 * MIB)))
    fill = "for f in /workspace /tmp /dev/shm; do head -c 100M /dev/zero > $f/big; done"
    await sandbox.execute(f"{fill}; {fill}", timeout_seconds=20)
    assert (await sandbox.execute("echo well", timeout_seconds=10)).stdout == b"well\n"


async def test_fork_bomb_is_contained_and_ended_by_the_deadline(driver: LocalDriver) -> None:
    bomber = await driver.create(SandboxSpec("bomber", limits=SandboxLimits(num_processes=32)))
    neighbour = await driver.create(SandboxSpec("neighbour"))
    program = """
import os
while True:
    try:
        os.fork()
    except OSError:
        pass
"""
    bomb = asyncio.create_task(python(bomber, program, timeout_seconds=1.5))
    await asyncio.sleep(0.7)
    assert (await neighbour.execute("echo well", timeout_seconds=10)).stdout == b"well\n"
    assert 16 < len(host_processes("os.fork()")) <= 32 + 16
    assert (await bomb).outcome in (ExecOutcome.TIMEOUT, ExecOutcome.SIGNALLED)
    assert await eventually_gone("os.fork()")
    assert (await bomber.execute("echo well", timeout_seconds=10)).stdout == b"well\n"


async def test_sandbox_full_of_its_own_processes_answers_with_data(driver: LocalDriver) -> None:
    sandbox = await driver.create(SandboxSpec("a", limits=SandboxLimits(num_processes=16)))
    await sandbox.execute("for i in $(seq 100); do sleep 60 & done", timeout_seconds=10)
    result = await sandbox.execute("for i in 1 2 3; do ls > /dev/null; done", timeout_seconds=10)
    assert result.exit_code != 0
    await sandbox.destroy()


async def test_disk_has_a_size_and_stays_usable_when_full(driver: LocalDriver) -> None:
    sandbox = await driver.create(SandboxSpec("a", limits=SandboxLimits(disk_bytes=8 * MIB)))
    for folder in ("/workspace", "/tmp", "/dev/shm"):
        filled = await sandbox.execute(f"head -c 100M /dev/zero > {folder}/big", timeout_seconds=20)
        assert filled.outcome is not ExecOutcome.TIMEOUT
        size = await sandbox.execute(f"stat -c %s {folder}/big", timeout_seconds=10)
        assert int(size.stdout) <= 8 * MIB
    many = await sandbox.execute(
        "for i in 1 2 3 4; do head -c 7M /dev/zero > part$i; done; rm part*", timeout_seconds=20
    )
    assert b"No space left" in many.stderr
    with pytest.raises(SandboxError, match="cannot write"):
        await sandbox.write_file("more", bytes(8 * MIB))
    await sandbox.execute("rm -f /workspace/* /tmp/*", timeout_seconds=10)
    await sandbox.write_file("more", b"fits")
    assert await sandbox.read_file("more") == b"fits"


async def test_output_flood_costs_little_and_is_counted(sandbox: Sandbox) -> None:
    result = await sandbox.execute("yes", timeout_seconds=0.7)
    assert result.outcome is ExecOutcome.TIMEOUT
    assert len(result.stdout) == 64 * 1024
    assert result.stdout_total_bytes > 10 * MIB


async def test_cpu_time_of_a_command_is_limited(driver: LocalDriver) -> None:
    sandbox = await driver.create(SandboxSpec("a", limits=SandboxLimits(cpu_seconds_per_command=1.0)))
    result = await sandbox.execute("while :; do :; done", timeout_seconds=30)
    assert result.outcome is ExecOutcome.TIMEOUT
    assert (await sandbox.execute("echo well", timeout_seconds=10)).stdout == b"well\n"


async def test_file_operations_cannot_be_led_astray(sandbox: Sandbox) -> None:
    await sandbox.execute(
        "mkfifo pipe; ln -s /etc/shadow link; ln -s loop loop; truncate -s 1T sparse", timeout_seconds=10
    )
    for path in ("pipe", "link", "loop", "/workspace", "link/x"):
        with pytest.raises(NotFound):
            await sandbox.read_file(path)
    with pytest.raises(SandboxError):
        await sandbox.write_file("pipe", b"x")
    with pytest.raises(SandboxError):
        await sandbox.write_file("/usr/bin/ls", b"x")
    assert len(await sandbox.read_file("sparse")) <= SandboxLimits().disk_bytes


async def test_cancelled_command_is_killed(sandbox: Sandbox) -> None:
    marker = f"3{os.getpid()}"
    command = asyncio.create_task(sandbox.execute(["sleep", marker], timeout_seconds=60))
    assert await eventually_there(marker)
    command.cancel()
    with pytest.raises(asyncio.CancelledError):
        await command
    assert await eventually_gone(marker)
    assert (await sandbox.execute("echo well", timeout_seconds=10)).stdout == b"well\n"


async def test_sandbox_whose_first_process_dies_is_lost_for_everyone_who_uses_it(sandbox: Sandbox) -> None:
    command = asyncio.create_task(sandbox.execute("sleep 60", timeout_seconds=60))
    await asyncio.sleep(0.2)
    os.kill(host_pid(sandbox), signal.SIGKILL)
    with pytest.raises(SandboxLost):
        await command
    with pytest.raises(SandboxLost):
        await sandbox.execute("true", timeout_seconds=5)
    await sandbox.destroy()


def host_pid(sandbox: Sandbox) -> int:
    """The host's number of a sandbox's first process: the one whose parent is the bwrap that we started."""
    listed = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 2) for line in listed.splitlines()[1:]]
    starters = {int(pid) for pid, parent, args in rows if int(parent) == os.getpid() and "bwrap" in args}
    (holder,) = (int(pid) for pid, parent, _ in rows if int(parent) in starters)
    return holder


def traces() -> dict[str, object]:
    """What this process holds on the machine: descriptors, children, control groups, mounts."""
    children = subprocess.run(
        ["ps", "--ppid", str(os.getpid()), "-o", "args="], capture_output=True, text=True, check=False
    )
    return {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "children": sorted(line for line in children.stdout.splitlines() if not line.startswith("ps ")),
        "groups": control_groups(f"verbatim-{os.getpid()}-"),
        "mounts": len(Path("/proc/self/mounts").read_text().splitlines()),
    }


async def test_two_hundred_sandboxes_leave_nothing_behind(driver: LocalDriver) -> None:
    before = traces()
    await (await driver.create(SandboxSpec("first"))).destroy()
    working = traces()
    places = asyncio.Semaphore(4)

    async def live(number: int) -> None:
        async with places:
            sandbox = await driver.create(SandboxSpec(f"s{number}"))
            await sandbox.execute("echo x > file; sleep 60 &", timeout_seconds=20)
            await sandbox.destroy()

    await asyncio.gather(*(live(number) for number in range(200)))
    assert traces() == working
    await driver.aclose()
    assert traces() == before


async def test_cancelled_creation_leaves_nothing_behind(driver: LocalDriver) -> None:
    await (await driver.create(SandboxSpec("first"))).destroy()
    before = traces()
    marked = SandboxLimits(disk_bytes=MIB + os.getpid() * 4096)
    for number in range(60):
        creation = asyncio.create_task(driver.create(SandboxSpec(f"s{number}", limits=marked)))
        await asyncio.sleep(0.001 * number)
        creation.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await (await creation).destroy()
    assert traces() == before
    assert await eventually_gone(str(marked.disk_bytes))


async def test_missing_bubblewrap_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SandboxUnavailable, match=r"^bubblewrap is not installed \(Debian") as caught:
        LocalDriver().check()
    assert "\n" not in caught.value.message


async def test_machine_without_user_namespaces_is_one_clear_line(driver: LocalDriver) -> None:
    program = "from sandbox.local.driver import LocalDriver; LocalDriver().check()"
    forbidding = ["bwrap", "--dev-bind", "/", "/", "--unshare-user", "--disable-userns", "--", sys.executable]
    tried = await asyncio.to_thread(
        subprocess.run,
        [*forbidding, "-c", program],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert tried.stderr.splitlines()[-1].startswith(
        "gateway.contracts.errors.SandboxUnavailable: this machine does not let"
    )
    assert "subprocess" in tried.stderr.splitlines()[-1]


async def test_killing_the_controlling_process_leaves_nothing(tmp_path: Path) -> None:
    marker = f"9{os.getpid()}"
    program = f"""
import asyncio
from gateway.contracts.ports import SandboxSpec
from sandbox.local.driver import LocalDriver
async def main():
    driver = LocalDriver()
    for name in "abc":
        sandbox = await driver.create(SandboxSpec(name))
        await sandbox.execute("setsid sleep {marker} >/dev/null 2>&1 &", timeout_seconds=10)
    print(driver.limits_in_force(), flush=True)
    await sandbox.execute("sleep {marker}", timeout_seconds=60)
asyncio.run(main())
"""
    owner = start_python(program)
    assert owner.stdout is not None
    assert owner.stdout.readline()
    assert len(host_processes(marker)) >= 3
    owner.kill()
    owner.communicate()
    assert await eventually_gone(marker)
    name = f"verbatim-{owner.pid}-"
    for _ in range(100):
        if not control_groups(name) and not host_processes(name):
            return
        await asyncio.sleep(0.05)
    pytest.fail(f"left behind: {control_groups(name)}")


async def test_killing_the_controlling_process_while_it_creates_leaves_nothing() -> None:
    marked = MIB + os.getpid() * 4096
    program = f"""
import asyncio
from gateway.contracts.ports import SandboxLimits, SandboxSpec
from sandbox.local.driver import LocalDriver
async def main():
    driver = LocalDriver()
    print(await driver.create(SandboxSpec("first")), flush=True)
    limits = SandboxLimits(disk_bytes={marked})
    await asyncio.gather(*(driver.create(SandboxSpec(str(n), limits=limits)) for n in range(40)))
asyncio.run(main())
"""
    for number in range(6):
        owner = await asyncio.to_thread(start_python, program)
        assert owner.stdout is not None
        assert await asyncio.to_thread(owner.stdout.readline)
        await asyncio.sleep(0.02 * number)
        owner.kill()
        owner.communicate()
        assert await eventually_gone(f"verbatim-{owner.pid}-", 10)  # the keeper, which has the groups' names
        assert control_groups(f"verbatim-{owner.pid}-") == []
        assert await eventually_gone(str(marked))


def start_python(program: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2])


def control_groups(name: str) -> list[str]:
    search = ["find", "/sys/fs/cgroup", "-maxdepth", "6", "-type", "d", "-name", f"{name}*"]
    return subprocess.run(search, capture_output=True, text=True, check=False).stdout.split()
