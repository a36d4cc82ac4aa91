"""A gateway's parts in this process, one set a model folder, with a scripted engine behind a witness.

What runs is the real thing (turn runner, replica pool, turn tree, ledger); only HTTP is left out.
"""

from __future__ import annotations

import asyncio
import traceback
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import orjson

from benchmarks.agents import Answer, Answered, Message, Refused, Vanished
from benchmarks.judge import Judge
from benchmarks.models.families import FAMILIES, Family, write_model
from benchmarks.models.vocabularies import VOCABULARIES
from benchmarks.policy import SEED_FIELD, Policy
from benchmarks.witness import Witness
from engines.scripted import ScriptedEngine
from gateway.contracts.errors import VerbatimError
from gateway.contracts.ports import Ledger
from gateway.contracts.records import SessionOrigin
from gateway.ledger.sqlite import SqliteLedger
from gateway.replicas.pool import ReplicaPool, ReplicaSettings
from gateway.sessions.model import ServedModel
from gateway.sessions.registry import Session, SessionRegistry, new_session
from gateway.sessions.turns import TurnParts, TurnRunner, TurnSettings
from gateway.tito.conversation import HistoryPolicy
from gateway.wire.openai import parse_chat_request


@dataclass(frozen=True, slots=True, order=True)
class ModelChoice:
    """Which model: names of a family and a vocabulary, and what is done where a template would rewrite history."""

    family: str
    vocabulary: str
    history_policy: HistoryPolicy

    @property
    def name(self) -> str:
        """For people and folders."""
        return f"{self.family}-{self.vocabulary}"


@dataclass(frozen=True, slots=True, eq=False)
class Bench:
    """One model served in this process."""

    family: Family
    folder: Path
    witness: Witness
    scripted: ScriptedEngine
    judge: Judge
    registry: SessionRegistry
    runner: TurnRunner

    async def session(self, session_id: str) -> Session:
        """A new session."""
        session, _ = await self.registry.create(new_session(session_id, key_hash="", origin=SessionOrigin.CREATED))
        return session


class Workshop:
    """Makes benches on demand around one ledger; files go below `folder`."""

    def __init__(self, folder: Path, ledger: Ledger) -> None:
        self.ledger = ledger
        self._folder = folder
        self._benches: dict[tuple[ModelChoice, int], Bench] = {}
        self._judges: dict[ModelChoice, Judge] = {}

    async def bench(self, choice: ModelChoice, number: int = 0) -> Bench:
        """One of a model's benches, made at its first use; all of them share the ledger, as several gateways do."""
        if (choice, number) not in self._benches:
            self._benches[choice, number] = await self.fresh_bench(choice)
        return self._benches[choice, number]

    async def fresh_bench(self, choice: ModelChoice) -> Bench:
        """Parts that remember nothing, as after a restart."""
        family = FAMILIES[choice.family]
        folder = self._folder / choice.name
        if not folder.exists():
            write_model(folder, family=family, vocabulary=choice.vocabulary)
        model = ServedModel.load(folder, history_policy=choice.history_policy)
        scripted = ScriptedEngine(
            Policy(folder, family).reply, routing=model.routing, vocab_size=model.tokenizer.vocab_size
        )
        witness = Witness(scripted)
        pool = ReplicaPool(
            ReplicaSettings(retry_delay_seconds=0.0),
            check_identity=model.check_engine,
            stop_token_ids=frozenset(model.tokenizer.eos_token_ids),
        )
        await pool.add(witness)
        parts = TurnParts(model, pool, self.ledger, TurnSettings(), lambda finished, generated, times: None)
        return Bench(
            family=family,
            folder=folder,
            witness=witness,
            scripted=scripted,
            judge=self._judge(choice, family, model),
            registry=SessionRegistry(self.ledger, capacity=64),
            runner=TurnRunner(parts),
        )

    def _judge(self, choice: ModelChoice, family: Family, model: ServedModel) -> Judge:
        if choice not in self._judges:
            self._judges[choice] = Judge(model.path, family, model.template, choice.history_policy)
        return self._judges[choice]

    def audits(self) -> Counter[str]:
        """How many turns of the prompt builders' short path were built the long way too, and how many differed."""
        audits = [bench.runner.parts.model.prompts.audits for bench in self._benches.values()]
        alarms = sum(audit.num_alarms for audit in audits)
        return Counter({"audited short paths": sum(audit.num_audits for audit in audits), "audit alarms": alarms})

    async def aclose(self) -> None:
        """Settle all turns."""
        for bench in self._benches.values():
            await bench.runner.aclose()


@asynccontextmanager
async def open_workshop(folder: Path, *, num_gateways: int = 1) -> AsyncIterator[Workshop]:
    """A workshop with a ledger of its own in `folder`; for several gateways it is a shared one."""
    ledger = SqliteLedger.open(folder / "ledger")
    ledger.share(num_gateways > 1)
    workshop = Workshop(folder / "models", ledger)
    try:
        yield workshop
    finally:
        await workshop.aclose()
        await ledger.aclose()


@dataclass(frozen=True, slots=True, eq=False)
class LocalChat:
    """`agents.Chat` without HTTP."""

    bench: Bench
    session: Session

    async def __call__(self, body: Message, *, leave_early: bool) -> Answer:
        """Run one turn; errors become what an agent would see of them."""
        # Gathered, so that a crash is an outcome too: over HTTP it would be a 500.
        (outcome,) = await asyncio.gather(self._run(body, leave_early=leave_early), return_exceptions=True)
        if isinstance(outcome, VerbatimError):
            return Refused(outcome.http_status, outcome.message)
        if isinstance(outcome, Exception):
            return Refused(500, "".join(traceback.format_exception(outcome)))
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    async def _run(self, body: Message, *, leave_early: bool) -> Answer:
        runner = self.bench.runner
        turn = runner.start(self.session, parse_chat_request(orjson.dumps(body), self.session.recent.texts))
        if leave_early:
            for _ in range(body[SEED_FIELD] % 12):  # somewhere between its first step and its last
                await asyncio.sleep(0)
            turn.abandon(grace_seconds=0.0)
            await turn.settled()
            return Vanished()
        finished = await turn.finished()
        runner.delivered(self.session, finished)
        return Answered(dict(finished.record.reply), str(finished.record.finish.reason))


@dataclass(frozen=True, slots=True, eq=False)
class ManyGateways:
    """`agents.Chat` where each request goes to one of several gateways, as its seed will have it."""

    benches: Sequence[Bench]
    session_id: str

    async def __call__(self, body: Message, *, leave_early: bool) -> Answer:
        """Run one turn there."""
        bench = self.benches[body[SEED_FIELD] // 4096 % len(self.benches)]
        session = await bench.registry.get(self.session_id)
        return await LocalChat(bench, session)(body, leave_early=leave_early)


def all_choices() -> list[ModelChoice]:
    """Every family with every vocabulary; `template` is the policy of every fourth."""
    names = [(family, vocabulary) for family in FAMILIES for vocabulary in VOCABULARIES]
    policies: Mapping[bool, HistoryPolicy] = {True: HistoryPolicy.TEMPLATE, False: HistoryPolicy.KEEP}
    return [ModelChoice(*pair, policies[i % 4 == 3]) for i, pair in enumerate(names)]
