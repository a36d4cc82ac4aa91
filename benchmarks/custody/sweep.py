"""The gateway's own death, at every instant of what it does: many sessions at named instants, SIGKILL, and again.

In each round every session is brought to an instant of its next step (the engine, which is in this process, holds its
reply at a token; requests, last tokens and calls of the feed are let go some milliseconds before the kill, or the kill
comes with a byte that somebody reads). Then the gateway's process is killed, its ledger is read with sqlite3, and
another is started. Every client asks the same again, unchanged. What a step was struck at is told from what was seen
outside: what the engine had sampled, what the ledger held, what the client had read.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
import sqlite3
import subprocess
import sys
import time
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import aiohttp
from aiohttp import web
from tokenizers import Tokenizer

from benchmarks.custody.agents import (
    TOOLS,
    Account,
    AgentsFailure,
    Lost,
    Reply,
    Witness,
    first_messages,
    gathered_reply,
    next_message,
    refused,
    whole_reply,
)
from benchmarks.custody.engine import JournallingEngine, Request
from benchmarks.custody.oracle import NUM_DRAWN, Script
from benchmarks.custody.place import Place, prepare
from benchmarks.custody.trainer import CONSUMER, ChaosTrainer, Journal
from engines.launch import free_port
from gateway.client import GatewayClient

_CHECKOUT = Path(__file__).resolve().parents[2]
_STEP_TOKENS = 4
_FUSE_SECONDS = 0.06
"""The longest time between what is let go and the kill."""

_SOON_SECONDS = 0.02
"""The longest time between what is seen and the kill that follows it."""

_TRIGGERS = ("time", "asked", "piece", "read", "sampled", "sampled", "feed", "feed")
_READY_SECONDS = 60.0
_RETRY_SECONDS = 120.0
_RETRY_PAUSE_SECONDS = 0.05
_FEWEST_TURNS, _MOST_TURNS = 1, 4

Tell: TypeAlias = Callable[[str], None]


class Instants:
    """What the gateway was doing for a client when it was killed; one line of the report each."""

    MAKING = "session asked for, not on disk"
    MADE = "session on disk, its reply not read"
    ADMISSION = "turn asked for, the engine not asked"
    NO_TOKEN = "engine asked, no token"
    FIRST = "first tokens sampled"
    HALF = "half of the tokens sampled"
    LAST = "all but the last tokens sampled"
    SAMPLED = "all sampled, the turn not on disk"
    COMMITTED = "turn on disk, no byte of what follows read"
    READING = "turn on disk, reply read in part"
    STREAMING = "turn on disk, stream not read to its end"
    READ = "reply read, delivery not noted"
    NOTED = "reply read, delivery noted"
    FINISHING = "finish asked for, not on disk"
    FINISHED = "finish on disk, its reply not read"
    LEASING = "lease asked for, not on disk"
    LEASED = "lease on disk, its reply not read"
    FETCHING = "rollouts of a lease being read"
    ACKING = "acknowledgement asked for, not on disk"
    ACKED = "acknowledgement on disk, its reply not read"


class Hold:
    """Where the engine stops a session's reply: after no token, the first, half, or all but the last step's."""

    def __init__(self, at: str) -> None:
        self.at = at
        self.reached = asyncio.Event()
        self.released = asyncio.Event()


class HeldEngine(JournallingEngine):
    """The journalling engine in this process, which stops replies where it is told."""

    def __init__(self, place: Place, script: Script) -> None:
        super().__init__(
            place.model,
            script,
            place.sampled(0),
            weight_version="policy-000000",
            step_seconds=0.001,
            step_tokens=_STEP_TOKENS,
        )
        self._oracle = script
        self._tokenizer = Tokenizer.from_file(str(place.model / "tokenizer.json"))
        self.holds: dict[str, Hold] = {}
        self.latest: dict[str, Request] = {}
        self.on_asked: Callable[[], None] = lambda: None
        self.on_sampled: Callable[[], None] = lambda: None

    def session_of(self, request: web.Request, token_ids: Sequence[int]) -> str:
        """Conversations of a sweep name their session."""
        found = re.search(r"This is (\S+):", self._tokenizer.decode(list(token_ids)[:200]))
        return found[1] if found is not None else ""

    async def before_step(self, running: Request) -> None:
        """Wait where the session is to be held."""
        if self.latest.get(running.key) is not running:
            self.latest[running.key] = running
            self.on_asked()
        hold = self.holds.get(running.key)
        if hold is not None and not hold.released.is_set() and self.stage(running) >= _STAGES.index(hold.at):
            hold.reached.set()
            await hold.released.wait()
        await asyncio.sleep(0.001)

    def sample(self, running: Request) -> dict[str, Any] | None:
        """As any engine; the end is told."""
        finish = super().sample(running)
        if finish is not None:
            self.on_sampled()
        return finish

    def stage(self, running: Request) -> int:
        """How far a reply is, as an index of `_STAGES`."""
        num = len(running.token_ids)
        if num < NUM_DRAWN:
            return 0
        whole = self._oracle.reply(running.asked, running.token_ids[:NUM_DRAWN])
        if num >= len(whole):
            return 4
        if len(whole) - num <= _STEP_TOKENS:
            return 3
        return 2 if 2 * num >= len(whole) else 1


ALL_INSTANTS = tuple(value for name, value in vars(Instants).items() if name.isupper())
_STAGES = (Instants.NO_TOKEN, Instants.FIRST, Instants.HALF, Instants.LAST, Instants.SAMPLED)
_AIMS = (*_STAGES, Instants.SAMPLED, Instants.SAMPLED, Instants.ADMISSION)
"""The short instants are aimed at more often."""


class StoredTurn(NamedTuple):
    """What the ledger holds of a turn, read by sqlite3."""

    turn_id: str
    token_ids: list[int]
    is_whole: bool
    is_delivered: bool


@dataclass(slots=True)
class Look:
    """What the ledger held when the gateway had died. turns: of each session in order of index."""

    sessions: set[str]
    turns: Mapping[str, list[StoredTurn]]
    finished: set[str]
    open_leases: set[str]


def look(data: Path, session_ids: Sequence[str]) -> Look:
    """Read the store of a dead gateway; nothing is written to it."""
    marks = ",".join("?" * len(session_ids))
    turns: dict[str, list[StoredTurn]] = defaultdict(list)
    with closing(sqlite3.connect(f"file:{data / 'ledger.sqlite'}?mode=ro", uri=True)) as store:
        query = f"SELECT session_id FROM sessions WHERE session_id IN ({marks})"
        known = {row[0] for row in store.execute(query, session_ids)}
        rows = store.execute(
            "SELECT session_id, turn_id, facts, output_token_ids, delivered_at FROM turns "
            f"WHERE session_id IN ({marks}) ORDER BY session_id, turn_index",
            session_ids,
        )
        for session_id, turn_id, facts, output, delivered_at in rows:
            reason = json.loads(facts.decode("utf-8", "surrogatepass"))["finish"]["reason"]
            ids = list(array("i", output))
            turns[session_id].append(StoredTurn(turn_id, ids, reason != "abort", delivered_at is not None))
        query = f"SELECT session_id FROM finishes WHERE session_id IN ({marks})"
        finished = {row[0] for row in store.execute(query, session_ids)}
        leases = {row[0] for row in store.execute("SELECT lease_id FROM leases WHERE state = 'open'")}
    return Look(known, turns, finished, leases)


@dataclass(slots=True)
class Sight:
    """One step as its client sees it. session_id: a lease's id for calls of the feed. asked: a request has been sent.
    pieces: of the reply, read so far. promised: the reply that was on disk when the gateway died."""

    kind: str = "idle"
    session_id: str = ""
    streamed: bool = False
    asked: bool = False
    pieces: int = 0
    is_read: bool = False
    promised: list[int] | None = None


@dataclass(slots=True)
class Lane:
    """One agent, session after session; each call of `step` takes it one step further, however often it has to ask."""

    name: str
    url: str
    http: aiohttp.ClientSession
    witness: Witness
    account: Account
    rng: random.Random
    sight: Sight = field(default_factory=Sight)
    on_sight: Callable[[str], None] = lambda event: None
    session_id: str = ""
    num_sessions: int = 0
    num_turns: int = 0
    turns_left: int = 0
    is_made: bool = False
    messages: list[Any] = field(default_factory=list)
    expected: list[int] | None = None

    @property
    def next_kind(self) -> str:
        """Of the step that comes: make, turn, finish."""
        if not self.session_id or not self.is_made:
            return "make"
        return "turn" if self.turns_left else "finish"

    def prepare(self) -> None:
        """Name the next session, if there is none."""
        if not self.session_id:
            self.session_id = f"{self.name}-{self.num_sessions:04d}"
            self.num_sessions += 1
            self.messages, self.expected = first_messages(self.session_id, self.rng), None
            self.turns_left, self.num_turns = self.rng.randint(_FEWEST_TURNS, _MOST_TURNS), 0

    async def step(self) -> None:
        """The next step, to its end."""
        self.prepare()
        self.sight = Sight(self.next_kind, self.session_id, streamed=self.rng.random() < 0.5)
        try:
            if self.sight.kind == "make":
                await self._persist(lambda: self._control("/sessions", {"session_id": self.session_id}))
                self.is_made = True
            elif self.sight.kind == "turn":
                await self._turn()
            else:
                end = {"reward": 1.0, "outcome": "completed"}
                await self._persist(lambda: self._control(f"/sessions/{self.session_id}/finish", end))
                self.session_id, self.is_made = "", False
                self.account.counts["sessions"] += 1
        except AgentsFailure as error:
            self.account.fail(self.session_id, "request", str(error))
            self.session_id, self.is_made = "", False

    async def _turn(self) -> None:
        body = {"messages": self.messages, "tools": TOOLS, "return_token_ids": True}
        if self.sight.streamed:
            body |= {"stream": True}
        reply = await self._persist(lambda: self._ask(body))
        self.witness.accept(self.session_id, self.num_turns, reply, self.expected)
        promised = self.sight.promised
        if promised is not None and list(reply.token_ids) != promised:
            detail = f"on disk at the kill: {promised}; given afterwards: {list(reply.token_ids)}"
            self.account.fail(self.session_id, "another reply than the committed one", detail)
        answer = next_message(reply, self.rng)
        self.messages += [reply.message, answer]
        self.expected = self.witness.next_prompt(reply, answer)
        self.turns_left -= 1
        self.num_turns += 1

    async def _persist(self, ask: Callable[[], Coroutine[None, None, Any]]) -> Any:
        """Ask until it is answered, each time the same."""
        deadline = time.monotonic() + _RETRY_SECONDS
        while True:
            self.sight.asked, self.sight.pieces = True, 0
            try:
                found = await ask()
            except (Lost, aiohttp.ClientError, TimeoutError) as error:
                self.account.retries[str(error)[:60] if isinstance(error, Lost) else type(error).__name__] += 1
                if time.monotonic() > deadline:
                    raise AgentsFailure(f"{self.sight.kind}: {error!r} for {_RETRY_SECONDS:g} s") from error
                await asyncio.sleep(_RETRY_PAUSE_SECONDS)
            else:
                self.sight.is_read = True
                self.on_sight("read")
                return found

    async def _control(self, path: str, body: Mapping[str, Any]) -> Any:
        async with self.http.post(self.url + path, json=body) as answer:
            if answer.status >= 300:
                raise refused(answer.status, await answer.text())
            return await answer.json()

    async def _ask(self, body: Mapping[str, Any]) -> Reply:
        url = f"{self.url}/sessions/{self.session_id}/v1/chat/completions"
        try:
            async with self.http.post(url, json=body) as answer:
                if answer.status != 200:
                    raise refused(answer.status, await answer.text())
                if body.get("stream"):
                    return await gathered_reply(answer, on_piece=self._notice)
                self._notice()
                return whole_reply(await answer.json())
        except aiohttp.ClientPayloadError as error:
            raise Lost("broken off") from error

    def _notice(self) -> None:
        self.sight.pieces += 1
        self.on_sight("piece")


class FeedLane(ChaosTrainer):
    """The trainer, one call of the feed at a time."""

    def __init__(self, gateway: GatewayClient, journal: Journal) -> None:
        super().__init__(gateway, journal, group_size=1)
        self.sight = Sight("lease")
        self.on_begin: Callable[[], None] = lambda: None
        self._lease: Any = None

    async def step(self) -> None:
        """Lease, read, or acknowledge, whichever comes next."""
        kind = self.sight.kind
        self.sight = Sight(kind, "" if self._lease is None else self._lease.lease_id, asked=True)
        self.on_begin()
        if kind == "lease":
            self._lease = await self._gateway.lease(consumer=CONSUMER, limit=32, wait_seconds=0.0, lease_seconds=600.0)
            following = "lease" if self._lease is None else "fetch"
        elif kind == "fetch":
            await self.keep(self._lease)
            following = "ack"
        else:
            await self._acknowledge(self._lease.lease_id)
            following = "lease"
        self.sight.is_read = True
        self.sight = Sight(following)

    async def drain(self) -> None:
        """Until there is nothing left to train."""
        while True:
            await self.step()
            if self._lease is None:
                return


class Forked:
    """Gateway processes from `forks`, one at a time on one port."""

    def __init__(self, place: Place, engine_url: str) -> None:
        self._place = place
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._engine = engine_url
        self._log = place.log("forks").open("ab")
        self._forks = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.custody.forks"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            cwd=_CHECKOUT,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(_CHECKOUT)},
        )
        self._handle: int | None = None

    async def start(self) -> None:
        """Another process; it does not serve yet."""
        flags = ["--port", str(self.port), "--model", str(self._place.model), "--data", str(self._place.data)]
        words = ["serve", *flags, "--engine", f"sglang={self._engine}"]
        order = json.dumps({"words": words, "log": str(self._place.log("gateway"))}) + "\n"
        self._handle = os.pidfd_open(await asyncio.to_thread(self._fork, order.encode()))

    def _fork(self, order: bytes) -> int:
        assert self._forks.stdin is not None
        assert self._forks.stdout is not None
        self._forks.stdin.write(order)
        self._forks.stdin.flush()
        return int(self._forks.stdout.readline())

    def kill(self) -> None:
        """SIGKILL, at once."""
        assert self._handle is not None
        signal.pidfd_send_signal(self._handle, signal.SIGKILL)

    async def gone(self) -> None:
        """Wait until the process has ended."""
        assert self._handle is not None
        ended, loop = asyncio.Event(), asyncio.get_running_loop()
        loop.add_reader(self._handle, ended.set)
        await ended.wait()
        loop.remove_reader(self._handle)
        os.close(self._handle)
        self._handle = None

    async def stop(self) -> None:
        """SIGTERM, and wait."""
        assert self._handle is not None
        signal.pidfd_send_signal(self._handle, signal.SIGTERM)
        await self.gone()

    def close(self) -> None:
        """Leave nothing behind."""
        if self._handle is not None:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._handle, signal.SIGKILL)
            os.close(self._handle)
        self._forks.communicate()  # the end of its input is its end
        self._log.close()


@dataclass(slots=True)
class SweepReport:
    """What was struck. points: instants with how many steps were struck there; retried: how those ended."""

    kills: int = 0
    points: Counter[str] = field(default_factory=Counter)
    kept_replies: int = 0
    restart_seconds: list[float] = field(default_factory=list)

    @property
    def num_struck(self) -> int:
        """Steps that were under way when a gateway was killed."""
        return self.points.total() - self.points[Instants.NOTED]


class _Struck(NamedTuple):
    """A lane at the kill. stage: of its reply at the engine, None where that was not asked."""

    lane: Lane
    sight: Sight
    stage: int | None


class Sweep:
    """All rounds. Lanes and the engine live in this process; the gateway is another."""

    def __init__(
        self,
        place: Place,
        gateway: Forked,
        engine: HeldEngine,
        lanes: Sequence[Lane],
        feed: FeedLane,
        account: Account,
        *,
        seed: int,
    ) -> None:
        self.report = SweepReport()
        self._place = place
        self._gateway = gateway
        self._engine = engine
        self._lanes = lanes
        self._feed = feed
        self._account = account
        self._rng = random.Random(seed)

    async def run(self, num_kills: int, *, tell: Tell) -> None:
        """So many rounds, fewer after a SIGTERM; then everything ends as it would without a kill."""
        enough = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, enough.set)
        await self._gateway.start()
        await self._served()
        while self.report.kills < num_kills and not enough.is_set():
            await self._round()
            if self.report.kills % 20 == 0:
                tell(f"{self.report.kills} kills, {self.report.num_struck} steps struck\n")
        await asyncio.gather(*(_to_its_end(lane) for lane in self._lanes))
        await self._feed.drain()
        await self._gateway.stop()

    async def _round(self) -> None:
        """Everybody to an instant, the kill, and everybody's step to its end."""
        struck, strikes = asyncio.Event(), []

        def strike() -> None:
            if not struck.is_set():
                self._gateway.kill()
                strikes.extend(self._at_the_kill())
                struck.set()

        for lane in self._lanes:
            lane.prepare()
        before = look(self._place.data, [lane.session_id for lane in self._lanes])
        tasks, fuses = await self._take_places(struck)
        loop = asyncio.get_running_loop()
        loop.call_later(self._set_trigger(strike), strike)
        for light in fuses:
            loop.call_later(self._rng.uniform(0, _FUSE_SECONDS), light)
        await struck.wait()
        began = time.time()
        await self._gateway.gone()
        self._judge(strikes, before)
        self._let_go()
        await self._gateway.start()
        await self._served()
        self._note(began)
        await asyncio.gather(*tasks)

    async def _take_places(self, struck: asyncio.Event) -> tuple[list[asyncio.Task[None]], list[Callable[[], None]]]:
        """Start what is held until the kill and wait until it is there; what is let go shortly before it comes back."""
        tasks: list[asyncio.Task[None]] = []
        fuses: list[Callable[[], None]] = []
        holds: list[Hold] = []
        self._engine.latest.clear()

        def begin(work: Callable[[], Coroutine[None, None, None]]) -> None:
            if not struck.is_set():
                tasks.append(asyncio.create_task(work()))

        for lane in self._lanes:
            lane.sight = Sight()
            aim = self._rng.choice(_AIMS)
            if lane.next_kind != "turn" or aim == Instants.ADMISSION:
                fuses.append(partial(begin, lane.step))
                continue
            hold = self._engine.holds[lane.session_id] = Hold(Instants.LAST if aim == Instants.SAMPLED else aim)
            holds.append(hold)
            if aim == Instants.SAMPLED:
                fuses.append(hold.released.set)
            begin(lane.step)
        fuses.append(partial(begin, self._feed.step))
        async with asyncio.timeout(_READY_SECONDS):
            for hold in holds:
                await hold.reached.wait()
        return tasks, fuses

    def _set_trigger(self, strike: Callable[[], None]) -> float:
        """How long until the kill in seconds; in most rounds it comes before, with or soon after something seen."""
        kind = self._rng.choice(_TRIGGERS)
        soon = self._rng.uniform(0, _SOON_SECONDS)
        if kind == "asked":
            self._engine.on_asked = strike
        elif kind == "sampled":
            self._engine.on_sampled = partial(_later, soon, strike)
        elif kind == "feed":
            self._feed.on_begin = partial(_later, soon, strike)
        elif kind in ("piece", "read"):
            for lane in self._lanes:
                lane.on_sight = lambda event: strike() if event == kind else None
        return self._rng.uniform(0, _FUSE_SECONDS) if kind == "time" else 4 * _FUSE_SECONDS

    def _let_go(self) -> None:
        """From here on everybody may go on."""
        for hold in self._engine.holds.values():
            hold.released.set()
        self._engine.holds.clear()
        self._engine.on_asked = self._engine.on_sampled = self._feed.on_begin = _nothing
        for lane in self._lanes:
            lane.on_sight = lambda event: None

    def _at_the_kill(self) -> list[_Struck]:
        found = []
        for lane in self._lanes:
            if lane.sight.asked:
                running = self._engine.latest.get(lane.sight.session_id)
                stage = None if running is None else self._engine.stage(running)
                found.append(_Struck(lane, replace(lane.sight), stage))
        found_feed = self._feed.sight
        if found_feed.asked:
            found.append(_Struck(self._lanes[0], replace(found_feed), None))
        return found

    def _judge(self, strikes: Sequence[_Struck], before: Look) -> None:
        """Name where each step was struck, and what its client has a right to."""
        self.report.kills += bool(strikes)
        found = look(self._place.data, [one.sight.session_id for one in strikes])
        for one in strikes:
            if one.sight.kind in ("lease", "fetch", "ack"):
                self.report.points[self._feed_instant(one.sight, found)] += 1
                continue
            num_before = len(before.turns.get(one.sight.session_id, ()))
            turns = found.turns.get(one.sight.session_id, [])[num_before:]
            self.report.points[_instant(one, found, turns)] += 1
            if one.sight.kind != "turn":
                continue
            if one.sight.is_read and not turns:
                self._account.fail(one.sight.session_id, "a reply that was read is not on disk", "")
            if turns and turns[-1].is_whole and not turns[-1].is_delivered and not one.sight.is_read:
                one.lane.sight.promised = turns[-1].token_ids
                self.report.kept_replies += 1

    def _feed_instant(self, sight: Sight, found: Look) -> str:
        if sight.kind == "lease":
            return Instants.LEASED if found.open_leases else Instants.LEASING
        if sight.kind == "fetch":
            return Instants.FETCHING
        return Instants.ACKING if sight.session_id in found.open_leases else Instants.ACKED

    async def _served(self) -> None:
        deadline = time.monotonic() + _READY_SECONDS
        while True:
            with suppress(aiohttp.ClientError, TimeoutError):
                async with self._lanes[0].http.get(self._gateway.url + "/health") as answer:
                    if answer.status == 200:
                        return
            if time.monotonic() > deadline:
                raise TimeoutError(f"the gateway does not come back; see {self._place.log('gateway')}")
            await asyncio.sleep(0.02)

    def _note(self, began: float) -> None:
        ended = time.time()
        self.report.restart_seconds.append(ended - began)
        deed = {"target": "gateway", "harm": "kill", "mode": "", "began": began, "ended": ended}
        with self._place.deeds.open("a") as file:
            file.write(json.dumps(deed) + "\n")


def _instant(one: _Struck, found: Look, turns: Sequence[StoredTurn]) -> str:
    """turns: of the step, as the ledger held them."""
    sight = one.sight
    if sight.kind == "make":
        return Instants.MADE if sight.session_id in found.sessions else Instants.MAKING
    if sight.kind == "finish":
        return Instants.FINISHED if sight.session_id in found.finished else Instants.FINISHING
    if turns and sight.is_read:
        return Instants.NOTED if turns[-1].is_delivered else Instants.READ
    if turns and sight.streamed:
        return Instants.STREAMING
    if turns:
        return Instants.READING if sight.pieces else Instants.COMMITTED
    return Instants.ADMISSION if one.stage is None else _STAGES[one.stage]


def _later(seconds: float, work: Callable[[], None]) -> None:
    asyncio.get_running_loop().call_later(seconds, work)


def _nothing() -> None:
    """What is not watched for."""


async def _to_its_end(lane: Lane) -> None:
    while lane.session_id:
        await lane.step()


async def run_sweep(folder: Path, num_kills: int, *, num_lanes: int, seed: int, tell: Tell) -> dict[str, Any]:
    """A whole sweep in `folder`; what was struck, what clients saw. The files are for the reader."""
    place = await asyncio.to_thread(prepare, folder)
    engine = HeldEngine(place, Script.load(place.script))
    runner = web.AppRunner(engine.app(), access_log=None, handler_cancellation=True, shutdown_timeout=1.0)
    await runner.setup()
    engine_port = free_port()
    await web.TCPSite(runner, "127.0.0.1", engine_port).start()
    account = Account()
    witness = Witness(place, account)
    gateway = Forked(place, f"http://127.0.0.1:{engine_port}")
    began = time.time()
    try:
        timeout = aiohttp.ClientTimeout(total=_RETRY_SECONDS)
        async with (
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as http,
            GatewayClient(gateway.url, timeout_seconds=20.0) as client,
        ):
            rng = random.Random(seed)
            lanes = [
                Lane(f"lane-{i:02d}", gateway.url, http, witness, account, random.Random(rng.random()))
                for i in range(num_lanes)
            ]
            feed = FeedLane(client, Journal(place.trained))
            sweep = Sweep(place, gateway, engine, lanes, feed, account, seed=seed)
            await sweep.run(num_kills, tell=tell)
    finally:
        gateway.close()
        witness.close()
        await runner.cleanup()
        engine.close()
    return _told(sweep.report, account, num_lanes=num_lanes, seed=seed, seconds=time.time() - began)


def _told(report: SweepReport, account: Account, *, num_lanes: int, seed: int, seconds: float) -> dict[str, Any]:
    restarts = sorted(report.restart_seconds)
    return {
        "settings": {"sessions_at_once": num_lanes, "seed": seed},
        "seconds": round(seconds, 1),
        "kill_points": report.kills,
        "struck_steps": report.num_struck,
        "struck_steps_by_instant": {name: report.points[name] for name in ALL_INSTANTS},
        "replies_on_disk_and_not_read": report.kept_replies,
        "restart_seconds": {"median": round(restarts[len(restarts) // 2], 2), "longest": round(restarts[-1], 2)},
        "agents": {
            "counts": dict(account.counts),
            "retries": dict(account.retries.most_common(12)),
            "num_retries": account.retries.total(),
            "failures": len(account.failures),
            "first_failures": account.failures[:3],
        },
    }
