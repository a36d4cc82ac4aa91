"""`verbatim bench updates`: weights change under running agents; none may notice, every token's version must be exact.

Agents of several turns talk to a gateway in front of one engine, the embedded one or a real SGLang, while a publisher
pauses, brings other weights and resumes, in each mode in turn. What the gateway recorded is then held against the
engine's own words, against the tokens themselves (each can be said by one version only), and against plain forwards.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks.chaos import environment, write_results
from benchmarks.custody.processes import Member
from benchmarks.weights.agents import Load, Seen, Update, Updated, agents_under_way, make_updates, until
from benchmarks.weights.door import Door
from benchmarks.weights.judge import Evidence, Verdict, judge
from benchmarks.weights.telling import TellingWeights, make_telling
from engines.launch import free_port, running_engine
from engines.weights.disk import DiskTransport
from engines.weights.distributed import DistributedTransport
from gateway.client import GatewayClient

RESULTS = Path(__file__).parent / "results" / "updates.json"
MODES = ("abort", "keep", "retract", "drain")
_ENTRY = "from gateway.cli import main; raise SystemExit(main())"
_UPDATE_SECONDS = 120.0
_SHOWN = 5


@dataclass(frozen=True, slots=True)
class UpdateSettings:
    """Of one run. modes, transports ("disk", "gloo"): of the updates, in turn; every_seconds: from one to the next."""

    updates: int = 10
    modes: tuple[str, ...] = MODES
    transports: tuple[str, ...] = ("disk",)
    every_seconds: float = 1.0
    load: Load = field(default_factory=Load)
    gateway_settings: tuple[str, ...] = ()

    def plan(self, weights: TellingWeights) -> list[Update]:
        """All updates in order; each mode is tried with each transport."""
        pairs = ((mode, transport) for transport in self.transports for mode in self.modes)
        return [
            update_of(weights, version, pause=mode, transport=transport)
            for version, (mode, transport) in enumerate(islice(cycle(list(pairs)), self.updates), start=1)
        ]


def update_of(weights: TellingWeights, version: int, *, pause: str, transport: str = "disk") -> Update:
    """One update to `version` during a pause of the gateway's; who keeps requests cannot flush their cache."""
    make = {"disk": DiskTransport, "gloo": DistributedTransport}[transport]
    carrier = make(pause=None, flush_cache=pause != "keep", timeout_seconds=_UPDATE_SECONDS)
    return Update(pause, transport, carrier, weights.folders[version], version)


@dataclass(frozen=True, slots=True)
class Stage:
    """An engine behind its door, a gateway, and the clients of both."""

    door: Door
    weights: TellingWeights
    url: str
    gateway: GatewayClient
    http: aiohttp.ClientSession

    async def evidence(self, seen: Seen) -> Evidence:
        """What the gateway holds of the agents' sessions, and what it is to be held against."""
        segments = {}
        for session_id in seen.sessions:
            async with self.http.get(f"{self.url}/sessions/{session_id}/segments?arrays=1") as answer:
                answer.raise_for_status()
                segments[session_id] = (await answer.json())["segments"]
        return Evidence(segments, self.door.served, self.weights, seen.num_replies)


@asynccontextmanager
async def staged(
    folder: Path, engine_url: str, weights: TellingWeights, *, gateway_settings: Sequence[str] = ()
) -> AsyncIterator[Stage]:
    """A gateway process, its ledger and log in `folder`, in front of an engine that serves `weights` of version 0."""
    await asyncio.to_thread(folder.mkdir, parents=True, exist_ok=True)
    url = f"http://127.0.0.1:{free_port()}"
    async with aiohttp.ClientSession() as http, Door(engine_url).open() as door:

        def command() -> Sequence[str]:
            return (
                *(sys.executable, "-c", _ENTRY, "serve", "--port", url.rpartition(":")[2]),
                *("--model", str(weights.folders[0]), "--data", str(folder / "ledger")),
                *("--engine", f"sglang={door.url}"),
                *(word for setting in gateway_settings for word in ("--set", setting)),
            )

        async def is_ready() -> bool:
            try:
                async with http.get(url + "/ready") as answer:
                    return answer.status == 200
            except aiohttp.ClientError:
                return False

        member = Member("gateway", command, folder / "gateway.log", is_ready)
        try:
            member.start()
            await member.wait_ready()
            async with GatewayClient(url) as gateway:
                yield Stage(door, weights, url, gateway, http)
            await member.stop()
        finally:
            member.close()


@dataclass(frozen=True, slots=True)
class Run:
    """What one run gave."""

    seen: Seen
    made: Sequence[Updated]
    evidence: Evidence
    verdict: Verdict

    @property
    def clean(self) -> bool:
        """Whether no agent saw an error and no record is wrong."""
        return not self.seen.errors and not self.verdict.faults

    def report(self, settings: UpdateSettings) -> dict[str, Any]:
        """For the results file."""
        verdict = self.verdict
        return {
            "settings": asdict(settings),
            "agents": {
                "sessions": len(self.seen.sessions),
                "replies": self.seen.num_replies,
                "tokens": self.seen.num_tokens,
                "errors": len(self.seen.errors),
                "first_errors": self.seen.errors[:_SHOWN],
            },
            "updates": [asdict(update) for update in self.made],
            "turns_that_weights_changed_in": verdict.changed,
            "turns_by_version_that_came_into_them": dict(sorted(verdict.changes.items())),
            "tokens_checked": verdict.tokens,
            "engine_requests": verdict.attempts,
            "flagged_turns": dict(verdict.flags),
            "routing_rows": {
                "checked": verdict.rows,
                "differing": verdict.rows_differing,
                "marked_missing": verdict.rows_missing,
            },
            "logprobs_straying": verdict.strays,
            "largest_logprob_difference": verdict.largest_fresh_difference,
            "faults": len(verdict.faults),
            "first_faults": verdict.faults[:_SHOWN],
            **environment(),
        }


async def run_updates(folder: Path, engine_url: str, weights: TellingWeights, settings: UpdateSettings) -> Run:
    """One run against an engine that is there; whatever it served before, it begins with version 0."""
    await DiskTransport().publish(weights.folders[0], policy_version=0, engine_urls=[engine_url])
    async with staged(folder, engine_url, weights, gateway_settings=settings.gateway_settings) as stage:
        busy = max(1, settings.load.agents // 2)
        async with agents_under_way(stage.url, settings.load) as seen:
            made = await make_updates(
                stage.gateway,
                [stage.door.url],
                settings.plan(weights),
                every_seconds=settings.every_seconds,
                is_busy=lambda: stage.door.num_sampling >= busy,
            )
            await _undisturbed_reply(seen, settings.load.agents)
        evidence = await stage.evidence(seen)
    return Run(seen, made, evidence, judge(evidence))


async def _undisturbed_reply(seen: Seen, num_agents: int) -> None:
    """Wait for one that was asked for after the last update: records of turns that nothing met are judged as well."""
    before = seen.num_replies  # each agent may have one under way by now
    await until(lambda: seen.num_replies > before + num_agents or bool(seen.errors), seconds=_UPDATE_SECONDS)


def configure(parser: argparse.ArgumentParser) -> None:
    """The flags of `verbatim bench updates`."""
    parser.add_argument("--agents", type=int, default=24, help="how many at once (24)")
    parser.add_argument("--updates", type=int, default=10, help="how many (10)")
    parser.add_argument("--every", type=float, default=1.0, help="seconds from one update to the next (1)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and agents (0)")
    parser.add_argument("--checkpoints", type=Path, metavar="DIR", help="where the checkpoints are made, and stay")
    parser.add_argument(
        "--sglang", metavar="URL", help="of a real SGLang that serves DIR/policy-000000 in float32 with routing"
    )
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="FILE", help="where the figures go")


def run(arguments: argparse.Namespace) -> int:
    """Run and report; 0 if no agent saw an error and no record is wrong."""
    settings = UpdateSettings(
        updates=arguments.updates,
        modes=MODES[:3] if arguments.sglang else MODES,
        transports=("disk", "gloo") if arguments.sglang else ("disk",),
        every_seconds=arguments.every,
        load=Load(agents=arguments.agents, seed=arguments.seed),
    )
    folder = Path(tempfile.mkdtemp(prefix="verbatim-updates-"))
    try:
        weights = make_telling(
            arguments.checkpoints or folder / "policies", num_versions=settings.updates + 1, seed=arguments.seed
        )
        if arguments.sglang:
            outcome = asyncio.run(run_updates(folder, arguments.sglang, weights, settings))
        else:
            with running_engine(weights.folders[0], flags=("--dtype", "float32")) as engine:
                outcome = asyncio.run(run_updates(folder, engine.url, weights, settings))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    sys.stdout.write(shown(outcome))
    write_results(arguments.output, "sglang" if arguments.sglang else "embedded", outcome.report(settings))
    return 0 if outcome.clean else 1


def shown(outcome: Run) -> str:
    """The run in lines."""
    seen, verdict = outcome.seen, outcome.verdict
    lines = [
        f"policy {update.policy_version:2} {update.pause:8} {update.transport_name:5} paused "
        f"{update.paused_seconds:5.2f} s, came into {verdict.changes[update.policy_version]} turns"
        for update in outcome.made
    ]
    flags = ", ".join(f"{name} {count}" for name, count in sorted(verdict.flags.items())) or "none"
    lines += [
        f"{len(outcome.made)} updates under {seen.num_replies} replies: {len(seen.errors)} errors seen by agents",
        f"{verdict.tokens} tokens in {verdict.turns} turns, {verdict.changed} of them under several versions, "
        f"from {verdict.attempts} engine requests; flagged: {flags}",
        f"{verdict.rows} routing rows checked, {verdict.rows_differing} differ, {verdict.rows_missing} marked missing",
        f"log-probs differ by {verdict.largest_fresh_difference:.1e} at most, {verdict.strays} stray",
        f"{len(verdict.faults)} faults",
        *seen.errors[:_SHOWN],
        *verdict.faults[:_SHOWN],
    ]
    return "\n".join(lines) + "\n"
