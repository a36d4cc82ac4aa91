"""Which engine samples a turn, and going on with another one when it fails (design 4, Interruption; I5).

`generate` has one owner per turn and never more than one live engine request for it. It retries what another replica or
a later try can cure, from the tokens that it already has; the caller sees one stream.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from gateway.contracts.errors import (
    Conflict,
    EngineBusy,
    EngineError,
    EngineProtocolError,
    EngineTimeout,
    EngineUnavailable,
    IdentityMismatch,
    NotFound,
    UnknownWeights,
    VerbatimError,
    WorkerUnavailable,
)
from gateway.contracts.generation import (
    EngineIdentity,
    Finish,
    FinishReason,
    GenerateChunk,
    GenerateEnd,
)
from gateway.contracts.ports import Engine
from gateway.contracts.verification import Proof, Verification
from gateway.replicas.continuation import Continuation
from gateway.replicas.pause import GatewayPause, Pause, PauseGate

_log = logging.getLogger(__name__)

IdentityCheck: TypeAlias = Callable[[Engine, EngineIdentity, Verification | None], Awaitable[Verification]]
"""(engine, what it says it is, what was proven of the same process and weights before) → how it was verified.

Raises IdentityMismatch for an engine that must not serve this gateway's model, EngineError for one that fails.
"""


@dataclass(frozen=True, slots=True)
class ReplicaSettings:
    """Retries and health.

    max_fruitless_attempts: how many engine requests in a row may fail without one new token; then the agent gets the
    error. With their delays they outlast a health check, which is how a router's dead worker becomes known.
    wait_seconds: how long a turn waits for a healthy engine, or for one that takes it (an engine that says that it is
    busy has not failed). busy_seconds: how long an engine is left alone that is busy and does not say for how
    long. shun_seconds: how long others are preferred to an engine that failed; doubled each time that it fails again
    before it completed a request, up to longest_shun_seconds. sticky_slack: a session keeps its engine while that has
    at most so many more running requests than the idlest one. found_pause_seconds: how long an engine
    is left paused by someone else (another gateway, or one that died) before it is resumed; 0: for ever.
    """

    max_fruitless_attempts: int = 16
    retry_delay_seconds: float = 0.25
    wait_seconds: float = 60.0
    busy_seconds: float = 1.0
    shun_seconds: float = 0.5
    longest_shun_seconds: float = 30.0
    sticky_slack: int = 4
    health_interval_seconds: float = 2.0
    health_timeout_seconds: float = 5.0
    drain_seconds: float = 600.0
    found_pause_seconds: float = 900.0


@dataclass(eq=False, slots=True)
class Replica:
    """One engine and what the pool knows of it now. verified: the identity that `verification` was made of.

    busy_until, shunned_until: by the event loop's clock; requests wait for the one, and prefer others because of the
    other. strikes: how often it failed since it last completed a request. held_since: when it was found paused by
    someone else (unix time), None while it is not.
    """

    engine: Engine
    identity: EngineIdentity
    verification: Verification
    verified: EngineIdentity
    healthy: bool = True
    draining: bool = False
    running: int = 0
    failures: int = 0
    strikes: int = 0
    busy_until: float = 0.0
    shunned_until: float = 0.0
    last_error: str = ""
    held_since: float | None = None
    idle: asyncio.Event = field(default_factory=asyncio.Event)

    def leave(self) -> None:
        """One request less under way; draining waits for the last one."""
        self.running -= 1
        if self.draining and not self.running:
            self.idle.set()

    @property
    def able(self) -> bool:
        """Whether it may be given a turn."""
        return self.healthy and not self.draining and self.held_since is None


@dataclass(frozen=True, slots=True)
class Interruption:
    """One attempt that did not finish a turn, for metrics: `cause` is "abort" or an error's code."""

    engine_id: str
    cause: str


class ReplicaPool:
    """The engines that may sample.

    check_identity: who may serve here. stop_token_ids: ids that end a turn, to know a finished reply whose stream broke
    at the very end.
    """

    def __init__(
        self,
        settings: ReplicaSettings,
        *,
        check_identity: IdentityCheck,
        stop_token_ids: frozenset[int],
        on_interruption: Callable[[Interruption], None] = lambda interruption: None,
    ) -> None:
        self.settings = settings
        self._check_identity = check_identity
        self._stop_token_ids = stop_token_ids
        self._on_interruption = on_interruption
        self._replicas: dict[str, Replica] = {}
        self._expected: dict[str, tuple[Engine, VerbatimError]] = {}
        self._changed = asyncio.Event()
        self._gate = PauseGate()
        self._pause: Pause | None = None
        self.context_length = 0
        """The shortest context of the engines in tokens, 0 if none says."""
        self.vocab_size = 0
        """The smallest vocabulary of the engines, 0 if none says."""

    @property
    def replicas(self) -> Sequence[Replica]:
        """All of them, healthy or not."""
        return list(self._replicas.values())

    @property
    def paused(self) -> Pause | None:
        """The pause that holds generation now."""
        return self._pause

    @property
    def ordered_pause(self) -> Pause | None:
        """The one in force, unless it was found: who looks finds that too."""
        return self._pause if self.is_pausing else None

    @property
    def engine_ids(self) -> Sequence[str]:
        """Of the engines in use and of those expected, without those on their way out."""
        return [*(name for name, replica in self._replicas.items() if not replica.draining), *self._expected]

    def replica(self, engine_id: str) -> Replica:
        """Raises NotFound."""
        try:
            return self._replicas[engine_id]
        except KeyError as error:
            raise NotFound(f"no engine {engine_id!r}; there are {', '.join(self._replicas) or 'none'}") from error

    async def add(self, engine: Engine) -> EngineIdentity:
        """Take an engine in; raises EngineError if it does not answer, IdentityMismatch if it is the wrong one."""
        if engine.engine_id in self._replicas:
            raise Conflict(f"there is an engine {engine.engine_id!r} already")
        replica = await self._verified(engine)
        if engine.engine_id in self._replicas:
            raise Conflict(f"there is an engine {engine.engine_id!r} already")
        if engine.engine_id in self._expected:
            await self._expected.pop(engine.engine_id)[0].aclose()
        self._take_in(replica)
        return replica.identity

    async def _verified(self, engine: Engine) -> Replica:
        identity = await engine.identity()
        verification = await self._check_identity(engine, identity, None)
        _tell_unverified(identity, verification)
        return Replica(engine, identity, verification, identity)

    def _take_in(self, replica: Replica) -> None:
        self._replicas[replica.engine.engine_id] = replica
        self._note_sizes()
        self._note_holds()
        self._changed.set()

    def expect(self, engine: Engine, error: VerbatimError) -> None:
        """Take an engine in as soon as it answers; `error` is why it could not be added."""
        self._expected[engine.engine_id] = (engine, error)

    async def greet(self) -> None:
        """Try again to add the engines that are expected."""
        await asyncio.gather(*(self._greet(engine) for engine, _ in list(self._expected.values())))

    async def _greet(self, engine: Engine) -> None:
        seconds = self.settings.health_timeout_seconds
        outcome: Replica | VerbatimError
        try:
            async with asyncio.timeout(seconds):
                outcome = await self._verified(engine)
        except TimeoutError:
            outcome = EngineTimeout(f"no answer within {seconds:g} s")
        except (EngineError, IdentityMismatch) as error:
            outcome = error
        if self._expected.get(engine.engine_id, (None, None))[0] is not engine:
            return  # it was removed meanwhile, or taken in again
        if isinstance(outcome, VerbatimError):
            self._expected[engine.engine_id] = (engine, outcome)
        else:
            _log.warning("engine %s is there", engine.engine_id)
            del self._expected[engine.engine_id]
            self._take_in(outcome)

    async def remove(self, engine_id: str, *, drain: bool) -> None:
        """Take an engine out; with `drain` after its running requests, else they go on elsewhere."""
        if engine_id in self._expected:
            engine, _ = self._expected.pop(engine_id)
            await engine.aclose()
            return
        replica = self.replica(engine_id)
        replica.draining = True
        if drain and replica.running:
            await self._drained(replica)
        self._replicas.pop(engine_id, None)
        self._note_sizes()
        self._note_holds()
        await replica.engine.aclose()

    async def hold(self, pause: Pause) -> None:
        """Send engines nothing new from now on; for DRAIN wait for what runs, raises EngineTimeout."""
        self._gate.close()
        self._pause = pause
        if pause.mode is GatewayPause.DRAIN:
            longest = self.settings.drain_seconds
            seconds = longest if pause.max_seconds is None else min(pause.max_seconds, longest)
            await self._gate.drained(timeout_seconds=seconds)

    async def stand_still(self) -> None:
        """Have the engines stop as the pause in force says; raises EngineUnavailable if none can be paused."""
        mode = None if self._pause is None or self._pause.mode is None else self._pause.mode.engine_mode
        if mode is None:
            return
        asked = [replica for replica in self.replicas if replica.healthy]
        outcomes = await asyncio.gather(*(replica.engine.pause(mode) for replica in asked), return_exceptions=True)
        failed = [(replica, outcome) for replica, outcome in zip(asked, outcomes, strict=True) if outcome is not None]
        for replica, outcome in failed:
            if not isinstance(outcome, EngineError):
                raise outcome
            self.eject(replica, outcome)  # weights that it keeps meanwhile are those that its answers name (I5)
        if failed and len(failed) == len(asked):
            raise EngineUnavailable(f"no engine could be paused: {'; '.join(str(outcome) for _, outcome in failed)}")

    async def resume(self) -> None:
        """Let generation go on, with what the engines say of their weights now."""
        ended = self._pause
        if ended is None or ended.mode is not GatewayPause.DRAIN:
            await asyncio.gather(*map(self._resume, self.replicas))
        await self._release(ended)

    async def release(self) -> None:
        """Let generation go on where somebody else tells the engines so."""
        await self._release(self._pause)

    async def _release(self, ended: Pause | None) -> None:
        await self.refresh_identities()
        if self._pause is ended:  # else there is a newer one
            self._pause = None
            self._note_holds()
            if self._pause is None:
                self._gate.open()

    async def end_overdue_pauses(self) -> None:
        """Resume what has been paused for longer than was asked for, or than engines found paused are left so."""
        now = time.time()
        if self._pause is not None and self._pause.is_over(now):
            _log.warning("generation was paused (%s) for %g s: it goes on", self._pause.name, now - self._pause.since)
            await self.resume()
        longest = self.settings.found_pause_seconds
        for replica in self.replicas:
            if replica.held_since is not None and longest and now - replica.held_since >= longest:
                _log.warning("engine %s was found paused %g s ago: it is resumed", replica.engine.engine_id, longest)
                await self._resume(replica)
                await self.refresh(replica)

    async def refresh_identities(self) -> None:
        """Ask every engine who it is (its weights may have changed)."""
        await asyncio.gather(*map(self.refresh, self.replicas))

    async def refresh(self, replica: Replica) -> None:
        """Ask one engine who it is: the right one is (re)admitted, a silent or a wrong one ejected."""
        try:
            identity = await replica.engine.identity()
            proven = replica.verification if self._is_proven(replica, identity) else None
            verification = await self._check_identity(replica.engine, identity, proven)
        except (EngineError, IdentityMismatch) as error:
            if isinstance(error, UnknownWeights):  # I9: nor is it known what samples the turns that still run there
                replica.identity = replace(replica.identity, one_version=False)
            self.eject(replica, error)
            return
        if verification != replica.verification:
            _tell_unverified(identity, verification)
        if proven is None:
            replica.verification, replica.verified = verification, identity
        replica.identity = identity
        self._note_sizes()
        self._readmit(replica)
        self._note_holds()

    def _is_proven(self, replica: Replica, identity: EngineIdentity) -> bool:
        """Whether an engine is the same as when it was verified; an ejection forgets it.

        While generation is paused only its process counts: new weights are coming in, and an engine that holds requests
        back could not be asked in every way. The next health check asks it.
        """
        if not replica.healthy or identity.process != replica.verified.process:
            return False
        return self.is_pausing or _weights(identity) == _weights(replica.verified)

    @property
    def is_pausing(self) -> bool:
        """Whether generation is paused by this process."""
        return self._pause is not None and self._pause.mode is not None

    def eject(self, replica: Replica, error: VerbatimError) -> None:
        """Send nothing more to an engine until a health check passes."""
        replica.failures += 1
        replica.last_error = str(error)
        if replica.healthy:
            _log.warning("engine %s is ejected: %s", replica.engine.engine_id, error)
        replica.healthy = False
        self._note_holds()

    async def generate(
        self, progress: Continuation, *, session_id: str, hear: Callable[[GenerateChunk], None] = lambda chunk: None
    ) -> Finish:
        """How a turn ended; `hear` is told of new tokens as they come, and `progress` holds all, also of one cut off.

        Raises EngineRejected at once, and EngineUnavailable, EngineTimeout or EngineProtocolError when retries are used
        up; tokens that came before stay in `progress`.
        """
        # Every turn comes through here, perhaps with each of its tokens: one loop that calls who listens, and no
        # generator or context manager around it that would have to be entered, resumed and closed for each.
        patience: _Patience | None = None
        finish: Finish | None = None
        while finish is None:
            before, error = progress.num_tokens, None
            replica = await self._admitted(session_id)
            identity = replica.identity
            stream: AsyncGenerator[GenerateChunk | GenerateEnd, None] | None = None
            try:
                stream = replica.engine.generate(progress.next_request(identity))
                async for item in stream:
                    if isinstance(item, GenerateChunk):
                        progress.add_chunk(item)
                        hear(item)
                        continue
                    progress.end(item)
                    if item.finish.reason is not FinishReason.ABORT:  # one that we did not ask for is an interruption
                        finish = item.finish
            except (EngineUnavailable, EngineTimeout, EngineProtocolError) as failure:
                error = failure
            finally:
                try:
                    if stream is not None:
                        await stream.aclose()
                finally:
                    # Whatever ended it, its tokens and their versions are in `progress`. I5: without the engine's own
                    # spans the version is only certain if the engine says the same as before. I9: nor where weights
                    # that nobody knows sampled some of them.
                    if progress.is_open:
                        same = _same_weights(identity, replica.identity)
                        certain = same and not isinstance(error, UnknownWeights)
                        progress.lose(identity.policy_version, certain=certain)
                    replica.leave()
                    self._gate.leave()
            if error is not None:
                self._interrupted(replica, error)
                patience = patience or _Patience(self.settings)
                patience.spend(error, gained=progress.num_tokens - before)
            else:
                replica.strikes = 0
                if finish is None:
                    self._on_interruption(Interruption(replica.engine.engine_id, "abort"))
            if finish is None:
                finish = progress.stop_if_over(self._stop_token_ids)
            if finish is None:
                await asyncio.sleep(self.settings.retry_delay_seconds if progress.num_tokens == before else 0)
        return finish

    @asynccontextmanager
    async def lend(self, session_id: str) -> AsyncIterator[Engine]:
        """The engine that a session's next turn would go to, for something else than a turn; draining waits for it."""
        replica = await self._select(session_id)
        replica.running += 1
        try:
            yield replica.engine
        finally:
            replica.leave()

    async def aclose(self) -> None:
        """Close every engine's connections."""
        for engine in [*(r.engine for r in self.replicas), *(engine for engine, _ in self._expected.values())]:
            await engine.aclose()
        self._replicas.clear()
        self._expected.clear()
        self._note_sizes()

    async def _admitted(self, session_id: str) -> Replica:
        """The engine for one request of a session, inside the gate; waits while generation is paused."""
        while self._gate.closed:
            await self._gate.opened()
        self._gate.enter()
        try:
            replica = await self._select(session_id)
        except BaseException:
            self._gate.leave()
            raise
        replica.running += 1
        return replica

    async def _select(self, session_id: str) -> Replica:
        """The session's own engine unless it is much busier than another; waits for one that takes requests."""
        able = self._able() or await self._some_able()
        if len(able) == 1:
            return able[0]
        idlest = min(able, key=_running)
        # Rendezvous hashing: the same engine for a session in every gateway process, without remembering anything.
        session = hashlib.blake2b(f"{session_id}\0".encode(), digest_size=8)
        own = max(able, key=lambda replica: _affinity(session, replica.engine.engine_id))
        return own if own.running <= idlest.running + self.settings.sticky_slack else idlest

    async def _some_able(self) -> Sequence[Replica]:
        """Who takes requests as soon as anybody does; raises EngineUnavailable."""
        try:
            async with asyncio.timeout(self.settings.wait_seconds):
                while not (able := self._able()):
                    self._changed.clear()
                    with suppress(TimeoutError):
                        async with asyncio.timeout_at(self._next_try()):
                            await self._changed.wait()
        except TimeoutError as error:
            raise EngineUnavailable(self._none_healthy()) from error
        return able

    def _able(self) -> Sequence[Replica]:
        """Who takes a request now: those that failed of late only where there is nobody else."""
        now = asyncio.get_running_loop().time()
        able: list[Replica] = []
        shunned: list[Replica] = []
        for r in self._replicas.values():
            if r.able and r.busy_until <= now:
                (able if r.shunned_until <= now else shunned).append(r)
        return able or shunned

    def _next_try(self) -> float | None:
        """When the first of those that are busy may be asked again."""
        return min((r.busy_until for r in self._replicas.values() if r.able), default=None)

    async def _drained(self, replica: Replica) -> None:
        replica.idle.clear()
        try:
            async with asyncio.timeout(self.settings.drain_seconds):
                await replica.idle.wait()
        except TimeoutError as error:
            raise EngineTimeout(
                f"engine {replica.engine.engine_id} still runs {replica.running} requests after "
                f"{self.settings.drain_seconds:g} s of draining; it gets no new ones"
            ) from error

    def _note_sizes(self) -> None:
        """What every engine has room for, as they say now: each turn asks."""
        identities = [replica.identity for replica in self._replicas.values()]
        self.context_length = min((i.context_length for i in identities if i.context_length), default=0)
        self.vocab_size = min((i.vocab_size for i in identities if i.vocab_size), default=0)

    def _note_holds(self) -> None:
        """Engines that someone else holds get no turns; while all are held, turns wait as in a pause of our own."""
        if self.is_pausing:
            return
        healthy = [replica for replica in self._replicas.values() if replica.healthy]
        for replica in self._replicas.values():
            if not (replica.healthy and replica.identity.paused):
                replica.held_since = None
            elif replica.held_since is None:
                replica.held_since = time.time()
                _log.warning("engine %s is paused, and not by this gateway", replica.engine.engine_id)
        since = [replica.held_since for replica in healthy if replica.held_since is not None]
        if healthy and len(since) == len(healthy):
            self._pause = self._pause or Pause(None, min(since))
            self._gate.close()
        elif self._pause is not None:
            self._pause = None
            self._gate.open()
        self._changed.set()

    async def _resume(self, replica: Replica) -> None:
        """An engine that does not answer must not hold the others; it is ejected instead."""
        try:
            await replica.engine.resume()
        except EngineError as error:
            self.eject(replica, error)

    def _readmit(self, replica: Replica) -> None:
        if not replica.healthy:
            _log.warning("engine %s is back", replica.engine.engine_id)
        replica.healthy = True
        replica.last_error = ""
        self._changed.set()

    def _interrupted(self, replica: Replica, error: EngineError) -> None:
        """What an attempt that failed says of its engine."""
        self._on_interruption(Interruption(replica.engine.engine_id, error.code))
        now, settings = asyncio.get_running_loop().time(), self.settings
        if isinstance(error, EngineBusy):
            wait = settings.busy_seconds if error.retry_after_seconds is None else error.retry_after_seconds
            replica.busy_until = max(replica.busy_until, now + wait)
            replica.last_error = error.message
        elif not isinstance(error, WorkerUnavailable):  # else the router that it is behind has other workers
            if replica.healthy:  # one outage breaks many requests at once
                replica.strikes += 1
                wait = settings.shun_seconds * 2.0 ** min(replica.strikes - 1, 30)
                replica.shunned_until = now + min(wait, settings.longest_shun_seconds)
            self.eject(replica, error)

    def _none_healthy(self) -> str:
        states = "; ".join(
            [f"{r.engine.engine_id}: {r.last_error or 'draining'}" for r in self._replicas.values()]
            + [f"{engine_id}: {error.message}" for engine_id, (_, error) in self._expected.items()]
        )
        return f"no engine is able to sample ({states or 'none is registered'})"


class _Patience:
    """What one turn may still spend on attempts that bring nothing."""

    def __init__(self, settings: ReplicaSettings) -> None:
        self._settings = settings
        self._fruitless = 0
        self._since: float | None = None

    def spend(self, error: EngineError, *, gained: int) -> None:
        """Count an attempt that failed after so many new tokens; raises its error when that was the last one."""
        now = asyncio.get_running_loop().time()
        if gained:
            self._fruitless, self._since = 0, None
        self._since = now if self._since is None else self._since
        if isinstance(error, EngineBusy):  # it has not failed, but nobody waits for ever
            if now - self._since >= self._settings.wait_seconds:
                raise error
            return
        self._fruitless += not gained
        if self._fruitless >= self._settings.max_fruitless_attempts:
            raise error


def _same_weights(before: EngineIdentity, now: EngineIdentity) -> bool:
    return before.one_version and now.one_version and now.policy_version == before.policy_version


def _weights(identity: EngineIdentity) -> tuple[str, str]:
    return identity.model_path, identity.weight_version


def _tell_unverified(identity: EngineIdentity, verification: Verification) -> None:
    if verification.tokenizer is Proof.UNVERIFIED and identity.token_exact:
        _log.warning(
            "engine %s: its tokenizer is not verified: it has no fingerprint, no way to tokenise a text, and no model "
            "folder here; if it is another one, every token is recorded wrongly",
            identity.engine_id,
        )


def _running(replica: Replica) -> int:
    return replica.running


def _affinity(session: hashlib.blake2b, engine_id: str) -> bytes:
    own = session.copy()
    own.update(engine_id.encode())
    return own.digest()
