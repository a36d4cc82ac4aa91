"""Which engine samples a turn, and going on with another one when it fails (design 4, Interruption; I5).

`generate` has one owner per turn and never more than one live engine request for it. It retries what another replica or
a later try can cure, from the tokens that it already has; the caller sees one stream.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import TypeAlias

from gateway.contracts.errors import (
    Conflict,
    EngineError,
    EngineProtocolError,
    EngineTimeout,
    EngineUnavailable,
    IdentityMismatch,
    NotFound,
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
from gateway.replicas.pause import GatewayPause, PauseGate

_log = logging.getLogger(__name__)

IdentityCheck: TypeAlias = Callable[[Engine, EngineIdentity, Verification | None], Awaitable[Verification]]
"""(engine, what it says it is, what was proven of the same process and weights before) → how it was verified.

Raises IdentityMismatch for an engine that must not serve this gateway's model, EngineError for one that fails.
"""


@dataclass(frozen=True, slots=True)
class ReplicaSettings:
    """Retries and health.

    max_fruitless_attempts: how many engine requests in a row may fail without one new token; then the agent gets the
    error. wait_seconds: how long a turn waits for a healthy engine. sticky_slack: a session keeps its engine while
    that has at most so many more running requests than the idlest one.
    """

    max_fruitless_attempts: int = 8
    retry_delay_seconds: float = 0.25
    wait_seconds: float = 60.0
    sticky_slack: int = 4
    health_interval_seconds: float = 2.0
    health_timeout_seconds: float = 5.0
    drain_seconds: float = 600.0


@dataclass(eq=False, slots=True)
class Replica:
    """One engine and what the pool knows of it now. verified: the identity that `verification` was made of."""

    engine: Engine
    identity: EngineIdentity
    verification: Verification
    verified: EngineIdentity
    healthy: bool = True
    draining: bool = False
    running: int = 0
    failures: int = 0
    last_error: str = ""
    idle: asyncio.Event = field(default_factory=asyncio.Event)

    @contextmanager
    def busy(self) -> Iterator[None]:
        """One more request under way; draining waits for the last one."""
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1
            if not self.running:
                self.idle.set()


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
        self._changed = asyncio.Event()
        self._gate = PauseGate()
        self._paused: GatewayPause | None = None

    @property
    def replicas(self) -> Sequence[Replica]:
        """All of them, healthy or not."""
        return list(self._replicas.values())

    @property
    def paused(self) -> GatewayPause | None:
        """The mode of the pause that holds generation now."""
        return self._paused

    @property
    def context_length(self) -> int:
        """The shortest context of the engines in tokens, 0 if none says."""
        return min((r.identity.context_length for r in self._replicas.values() if r.identity.context_length), default=0)

    @property
    def vocab_size(self) -> int:
        """The smallest vocabulary of the engines, 0 if none says."""
        return min((r.identity.vocab_size for r in self._replicas.values() if r.identity.vocab_size), default=0)

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
        identity = await engine.identity()
        verification = await self._check_identity(engine, identity, None)
        if engine.engine_id in self._replicas:
            raise Conflict(f"there is an engine {engine.engine_id!r} already")
        self._replicas[engine.engine_id] = Replica(engine, identity, verification, identity)
        _tell_unverified(identity, verification)
        self._changed.set()
        return identity

    async def remove(self, engine_id: str, *, drain: bool) -> None:
        """Take an engine out; with `drain` after its running requests, else they go on elsewhere."""
        replica = self.replica(engine_id)
        replica.draining = True
        if drain and replica.running:
            await self._drained(replica)
        self._replicas.pop(engine_id, None)
        await replica.engine.aclose()

    async def pause(self, mode: GatewayPause) -> None:
        """Hold generation at every engine; returns when it stands still. A second pause changes the mode."""
        await self.hold(mode)
        if mode.engine_mode is not None:
            await asyncio.gather(*(r.engine.pause(mode.engine_mode) for r in self.replicas if r.healthy))

    async def hold(self, mode: GatewayPause) -> None:
        """Send engines nothing new, where somebody else tells them of the pause; DRAIN waits for what runs."""
        self._gate.close()
        self._paused = mode
        if mode is GatewayPause.DRAIN:
            await self._gate.drained(timeout_seconds=self.settings.drain_seconds)

    async def resume(self) -> None:
        """Let generation go on, with what the engines say of their weights now."""
        if self._paused is not GatewayPause.DRAIN:
            await asyncio.gather(*map(self._resume, self.replicas))
        await self.release()

    async def release(self) -> None:
        """Go on after a `hold`."""
        await self.refresh_identities()
        self._paused = None
        self._gate.open()

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
            self.eject(replica, error)
            return
        if verification != replica.verification:
            _tell_unverified(identity, verification)
        if proven is None:
            replica.verification, replica.verified = verification, identity
        replica.identity = identity
        self._readmit(replica)

    def _is_proven(self, replica: Replica, identity: EngineIdentity) -> bool:
        """Whether an engine is the same as when it was verified; an ejection forgets it.

        While generation is paused only its process counts: new weights are coming in, and an engine that holds requests
        back could not be asked in every way. The next health check asks it.
        """
        if not replica.healthy or identity.process != replica.verified.process:
            return False
        return self._paused is not None or _weights(identity) == _weights(replica.verified)

    def eject(self, replica: Replica, error: VerbatimError) -> None:
        """Send nothing more to an engine until a health check passes."""
        replica.failures += 1
        replica.last_error = str(error)
        if replica.healthy:
            _log.warning("engine %s is ejected: %s", replica.engine.engine_id, error)
        replica.healthy = False

    async def generate(
        self, progress: Continuation, *, session_id: str
    ) -> AsyncGenerator[GenerateChunk | Finish, None]:
        """Stream new tokens, then exactly one Finish; `progress` holds all of it, also when this is cut off.

        Raises EngineRejected at once, and EngineUnavailable, EngineTimeout or EngineProtocolError when retries are used
        up; tokens that came before stay in `progress`.
        """
        fruitless = 0
        finish: Finish | None = None
        while finish is None:
            before = progress.num_tokens
            async with self._gate.admitted():
                replica = await self._select(session_id)
                try:
                    async with aclosing(self._attempt(replica, progress)) as stream:
                        async for item in stream:
                            if isinstance(item, GenerateEnd):
                                finish = _final(item)
                            else:
                                yield item
                except (EngineUnavailable, EngineTimeout, EngineProtocolError) as error:
                    fruitless = 0 if progress.num_tokens > before else fruitless + 1
                    self._interrupted(replica, error, last_chance=fruitless >= self.settings.max_fruitless_attempts)
                else:
                    if finish is None:
                        self._on_interruption(Interruption(replica.engine.engine_id, "abort"))
            finish = finish or progress.stop_if_over(self._stop_token_ids)
            if finish is None:
                await asyncio.sleep(self.settings.retry_delay_seconds if progress.num_tokens == before else 0)
        yield finish

    @asynccontextmanager
    async def lend(self, session_id: str) -> AsyncIterator[Engine]:
        """The engine that a session's next turn would go to, for something else than a turn; draining waits for it."""
        replica = await self._select(session_id)
        with replica.busy():
            yield replica.engine

    async def aclose(self) -> None:
        """Close every engine's connections."""
        for replica in self.replicas:
            await replica.engine.aclose()
        self._replicas.clear()

    async def _attempt(
        self, replica: Replica, progress: Continuation
    ) -> AsyncGenerator[GenerateChunk | GenerateEnd, None]:
        """One engine request; whatever ends it, its tokens and their versions are in `progress` afterwards."""
        before = replica.identity
        request = progress.next_request(replica.identity)
        with replica.busy():
            try:
                async with aclosing(replica.engine.generate(request)) as stream:
                    async for item in stream:
                        if isinstance(item, GenerateEnd):
                            progress.end(item)
                        else:
                            progress.add_chunk(item)
                        yield item
            finally:
                # I5: without the engine's own spans the version is only certain if the engine says the same as before.
                progress.lose(before.policy_version, certain=_same_weights(before, replica.identity))

    async def _select(self, session_id: str) -> Replica:
        """The session's own engine unless it is much busier than another; waits for a healthy one."""
        try:
            async with asyncio.timeout(self.settings.wait_seconds):
                while not (able := [r for r in self._replicas.values() if r.healthy and not r.draining]):
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError as error:
            raise EngineUnavailable(self._none_healthy()) from error
        idlest = min(able, key=lambda replica: replica.running)
        # Rendezvous hashing: the same engine for a session in every gateway process, without remembering anything.
        own = max(able, key=lambda replica: _affinity(session_id, replica.engine.engine_id))
        return own if own.running <= idlest.running + self.settings.sticky_slack else idlest

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

    def _interrupted(self, replica: Replica, error: EngineError, *, last_chance: bool) -> None:
        self._on_interruption(Interruption(replica.engine.engine_id, error.code))
        if not isinstance(error, WorkerUnavailable):  # else the router that it is behind goes on with its other workers
            self.eject(replica, error)
        if last_chance:
            raise error

    def _none_healthy(self) -> str:
        states = "; ".join(f"{r.engine.engine_id}: {r.last_error or 'draining'}" for r in self._replicas.values())
        return f"no engine is able to sample ({states or 'none is registered'})"


def _same_weights(before: EngineIdentity, now: EngineIdentity) -> bool:
    return before.one_version and now.one_version and now.policy_version == before.policy_version


def _final(end: GenerateEnd) -> Finish | None:
    """An abort that we did not ask for is an interruption, not an end."""
    return None if end.finish.reason is FinishReason.ABORT else end.finish


def _weights(identity: EngineIdentity) -> tuple[str, str]:
    return identity.model_path, identity.weight_version


def _tell_unverified(identity: EngineIdentity, verification: Verification) -> None:
    if verification.tokenizer is Proof.UNVERIFIED and identity.token_exact:
        _log.warning(
            "engine %s: its tokenizer is not verified: it has no fingerprint, no way to tokenise a text, and no model "
            "folder here; if it is another one, every token is recorded wrongly",
            identity.engine_id,
        )


def _affinity(session_id: str, engine_id: str) -> bytes:
    return hashlib.blake2b(f"{session_id}\0{engine_id}".encode(), digest_size=8).digest()
