"""`verbatim bench chaos`: everything is killed, hung and restarted under running agents; nothing may be lost.

Agents → gateway → a real smg router → engines whose every token is known, and a trainer that writes down what it
trains. From a seed, every few seconds one of them is killed, stopped or restarted, or the weights change. At the end
the files are counted by a reader that knows nothing of the gateway. `--kill-points N` sweeps the gateway's own death.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks.custody.agents import Agents, Habits
from benchmarks.custody.place import Place, prepare
from benchmarks.custody.processes import Fleet
from benchmarks.custody.schedule import Deed, Harmer, Planned, plan
from benchmarks.custody.sweep import run_sweep
from benchmarks.custody.trainer import CONSUMER
from gateway.client import GatewayClient
from gateway.contracts.errors import VerbatimError

_CHECKOUT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results" / "chaos.json"
_PACKAGES = ("verbatim-rl", "smg", "aiohttp", "uvicorn", "uvloop")
_SHOWN = 3
SWEEP_LANES = 24
"""Sessions at once in a sweep."""

_SETTLE_SECONDS = 90.0
GATEWAY_SETTINGS = ("replicas.health_interval_seconds=1.0", "timeouts.stall_seconds=3.0", "timeouts.probe_seconds=2.0")


@dataclass(frozen=True, slots=True)
class ChaosSettings:
    """Of one run. every_seconds: between two deeds, on average. trainer: how the trainer's program is started."""

    agents: int = 200
    seconds: float = 180.0
    every_seconds: float = 4.0
    seed: int = 0
    group_size: int = 4
    num_engines: int = 2
    habits: Habits = field(default_factory=Habits)
    gateway_settings: tuple[str, ...] = GATEWAY_SETTINGS
    trainer: tuple[str, ...] = ("-m", "benchmarks.custody.trainer")


def configure(parser: argparse.ArgumentParser) -> None:
    """The flags of `verbatim bench chaos`."""
    parser.add_argument("--agents", type=int, default=200, help="how many at once (200)")
    parser.add_argument("--seconds", type=float, default=180.0, help="for how long (180)")
    parser.add_argument("--every", type=float, default=4.0, help="seconds between two deeds, on average (4)")
    parser.add_argument("--seed", type=int, help="of the schedule and of the agents (random)")
    parser.add_argument(
        "--kill-points",
        type=int,
        metavar="N",
        help="instead: SIGKILL the gateway N times, each time at other instants of 25 clients' steps",
    )
    parser.add_argument("--keep", type=Path, metavar="DIR", help="leave all files of the run there")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="FILE", help="where the figures go")


def run(arguments: argparse.Namespace) -> int:
    """Run and report; 0 if nothing was lost, doubled or seen to fail."""
    seed = random.SystemRandom().randrange(1 << 31) if arguments.seed is None else arguments.seed
    if arguments.kill_points is not None:
        return _run_sweep(arguments, seed)
    settings = ChaosSettings(arguments.agents, arguments.seconds, arguments.every, seed)
    with _folder(arguments.keep) as folder:
        _tell(f"seed {seed}: {settings.agents} agents, {settings.seconds:g} s, files in {folder}\n")
        report = asyncio.run(run_chaos(folder, settings, tell=_tell))
    sys.stdout.write(shown(report))
    write_results(arguments.output, "chaos", report)
    return 0 if is_clean(report) else 1


def _run_sweep(arguments: argparse.Namespace, seed: int) -> int:
    with _folder(arguments.keep) as folder:
        _tell(f"seed {seed}: {arguments.kill_points} kill points, files in {folder}\n")
        report = asyncio.run(sweep_and_count(folder, arguments.kill_points, seed=seed, tell=_tell))
    sys.stdout.write(shown_sweep(report))
    write_results(arguments.output, "kill_points", report)
    return 0 if is_clean(report) else 1


async def sweep_and_count(
    folder: Path, num_kills: int, *, num_lanes: int = SWEEP_LANES, seed: int, tell: Callable[[str], None]
) -> dict[str, Any]:
    """A sweep in `folder`, and what the reader and the doctor find there."""
    report = await run_sweep(folder, num_kills, num_lanes=num_lanes, seed=seed, tell=tell)
    return {**report, "reader": await count(folder), "doctor": await examine(folder), **environment()}


async def run_chaos(
    folder: Path, settings: ChaosSettings, *, tell: Callable[[str], None], planned: Iterable[Planned] | None = None
) -> dict[str, Any]:
    """One run in `folder`, from the first process to the reader's account. planned: deeds instead of a seed's."""
    if planned is None:
        planned = plan(settings.seed, seconds=settings.seconds, every_seconds=settings.every_seconds)
    place = await asyncio.to_thread(prepare, folder)
    began = time.time()
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as http:
        fleet = Fleet(
            place,
            http,
            group_size=settings.group_size,
            num_engines=settings.num_engines,
            gateway_settings=settings.gateway_settings,
            trainer=settings.trainer,
        )
        agents = Agents(place, fleet.gateway_url, http, group_size=settings.group_size, habits=settings.habits)
        try:
            await fleet.start()
            harmer = Harmer(fleet, place, http)
            await _play(agents, harmer, settings, planned, tell)
            settled = await _settle(fleet, harmer, tell)
            await fleet.trainer.stop()
            exit_code = await fleet.gateway.stop()
        finally:
            fleet.close()
            agents.close()
    account = await count(folder)
    return {
        "settings": asdict(settings),
        "seconds": round(time.time() - began, 1),
        "deeds": _deeds(harmer.deeds, agents.account.replies, place, began),
        "agents": {
            "counts": dict(agents.account.counts),
            "retries": dict(agents.account.retries.most_common(12)),
            "num_retries": agents.account.retries.total(),
            "failures": len(agents.account.failures),
            "first_failures": agents.account.failures[:_SHOWN],
        },
        "feed_empty": settled,
        "gateway_exit_code": exit_code,
        "reader": account,
        "doctor": await examine(folder),
        **environment(),
    }


async def _play(
    agents: Agents, harmer: Harmer, settings: ChaosSettings, planned: Iterable[Planned], tell: Callable[[str], None]
) -> None:
    """Agents, and harm once they are under way; when the last deed is repaired, they end what they have begun."""
    enough = asyncio.Event()
    rng = random.Random(settings.seed)

    async def harm() -> None:
        account = agents.account
        while len(account.replies) < settings.agents and not account.failures:  # noqa: ASYNC110 (of other tasks)
            await asyncio.sleep(0.05)
        async with asyncio.TaskGroup() as both:
            both.create_task(harmer.follow(planned, tell=tell))
            both.create_task(asyncio.sleep(settings.seconds))
        enough.set()

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(harm())
        for _ in range(settings.agents):
            tasks.create_task(agents.run(rng.randrange(1 << 40), enough=enough))


async def _settle(fleet: Fleet, harmer: Harmer, tell: Callable[[str], None]) -> bool:
    """Wait until the trainer has everything; whether it came to that."""
    deadline = time.monotonic() + _SETTLE_SECONDS
    tell("the agents are done; waiting for the trainer\n")
    async with GatewayClient(fleet.gateway_url) as gateway:
        while time.monotonic() < deadline:
            try:
                counts = await gateway.counts(CONSUMER)
                if counts.finished == counts.acknowledged:
                    return True
            except VerbatimError as error:
                tell(f"{error.message}\n")
            await asyncio.sleep(0.5)
    return False


async def count(folder: Path) -> dict[str, Any]:
    """The reader's account, by a process of its own."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "benchmarks.custody.reader", str(folder)),
        stdout=asyncio.subprocess.PIPE,
        cwd=_CHECKOUT,
    )
    output, _ = await process.communicate()
    return dict(json.loads(output))


async def examine(folder: Path) -> dict[str, Any]:
    """What `verbatim doctor --data` says of the ledger."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", "from gateway.cli import main; raise SystemExit(main())"),
        *("doctor", "--data", str(folder / "data"), "--json"),
        stdout=asyncio.subprocess.PIPE,
        cwd=_CHECKOUT,
    )
    output, _ = await process.communicate()
    return {"exit_code": process.returncode, "said": json.loads(output)}


@contextmanager
def _folder(kept: Path | None) -> Iterator[Path]:
    """Where a run leaves its files; gone afterwards unless it was asked for."""
    if kept is not None:
        yield kept
        return
    with tempfile.TemporaryDirectory(prefix="verbatim-chaos-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def is_clean(report: Mapping[str, Any]) -> bool:
    """Whether nothing was lost, doubled, or seen to fail."""
    is_whole = report["doctor"]["exit_code"] == 0 and not report["reader"]["findings"]
    is_quiet = not any(deed["trouble"] for deed in report.get("deeds", ()))
    return is_whole and is_quiet and not report["agents"]["failures"] and report.get("feed_empty", True)


def shown(report: Mapping[str, Any]) -> str:
    """For people."""
    return "\n".join([*(_deed_line(deed) for deed in report["deeds"]), *_accounts(report)]) + "\n"


def shown_sweep(report: Mapping[str, Any]) -> str:
    """A sweep, for people."""
    points = [f"{times:6d} × {name}" for name, times in report["struck_steps_by_instant"].items()]
    lines = [
        f"{report['kill_points']} gateways killed, {report['struck_steps']} steps of clients struck:",
        *points,
        f"{report['replies_on_disk_and_not_read']} replies were on disk and not read; "
        f"back after {report['restart_seconds']['median']} s (median)",
    ]
    return "\n".join([*lines, *_accounts(report)]) + "\n"


def _accounts(report: Mapping[str, Any]) -> list[str]:
    agents, reader = report["agents"], report["reader"]
    return [
        f"{agents['counts'].get('turns', 0)} turns of {agents['counts'].get('sessions', 0)} sessions seen by agents, "
        f"{agents['num_retries']} retries, {agents['failures']} failures",
        *(f"    {failure['kind']} {failure['session']}: {failure['detail']}" for failure in agents["first_failures"]),
        *(f"    {times:6d} × {reason}" for reason, times in agents["retries"].items()),
        *(f"{name}: {json.dumps(value)}" for name, value in reader["figures"].items()),
        *(f"FOUND {times} times: {kind}" for kind, times in reader["findings"].items()),
        *(f"    {kind}: {detail}" for kind, details in reader["examples"].items() for detail in details[:_SHOWN]),
        f"verbatim doctor ends with {report['doctor']['exit_code']}",
        "clean" if is_clean(report) else "NOT CLEAN",
    ]


def _deed_line(deed: Mapping[str, Any]) -> str:
    recovery = "never" if deed["recovery_seconds"] is None else f"{deed['recovery_seconds']:.2f} s"
    done = f"{deed['harm']:16} {deed['target']:12} {deed['mode']:6}"
    return f"{deed['at']:8.2f} s  {done} recovered in {recovery} {deed['trouble']}".rstrip()


def _deeds(
    deeds: Sequence[Deed], replies: Sequence[tuple[float, float]], place: Place, began: float
) -> list[dict[str, Any]]:
    """What was done when, and how long until it was over for those who wait: a reply that was asked for afterwards has
    come, or a rollout has been trained."""
    commits = [line["at"] for line in _lines(place.trained) if "commit" in line]
    found = []
    for deed in deeds:
        if deed.target == "trainer":
            ends = [at for at in commits if at > deed.began]
        else:
            ends = [end for start, end in replies if start > deed.began]
        recovery = round(min(ends) - deed.began, 3) if ends else None
        found.append(
            {
                "at": round(deed.began - began, 2),
                "target": deed.target,
                "harm": deed.harm.value,
                "mode": deed.mode,
                "lasted_seconds": round(deed.ended - deed.began, 2),
                "recovery_seconds": recovery,
                "trouble": deed.trouble,
            }
        )
    return found


def _lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def environment() -> dict[str, Any]:
    """Versions and machine."""
    return {
        "versions": {name: version(name) for name in _PACKAGES} | {"python": platform.python_version()},
        "machine": {"cores": os.cpu_count(), "processor": platform.machine(), "system": platform.system()},
    }


def write_results(file: Path, name: str, report: Mapping[str, Any]) -> None:
    """One entry of the results file; others in it stay."""
    file.parent.mkdir(parents=True, exist_ok=True)
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(content | {name: report}, indent=1, ensure_ascii=False, default=str) + "\n")


def _tell(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
