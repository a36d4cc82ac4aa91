"""Client of an smg router: one address in front of many workers that speak SGLang's protocol over HTTP.

    gateway ──/generate, X-SMG-Routing-Key──▶ smg ──▶ worker, the same one for a session as long as it lives
       └──────pause · resume · abort · who are you──▶ every worker at its own address (the router has no such routes)

The router must pass requests on as they are ("verbatim mode": no retries of its own, a policy that reads no text),
which `identity` tries out; retries are the gateway's. A reply whose worker died ends with an error frame and `[DONE]`:
that is never success. Routers that speak gRPC to workers, or split prefill and decode, cannot be verbatim: refused.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
from collections import OrderedDict
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import asdict, replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

import orjson

from engines.connection import Answer, EngineHttp, EventStream
from engines.event_stream import EventReader
from engines.http_engine import HttpEngine
from engines.refusals import failure, refusal
from engines.sglang import SglangEngine, generate_body
from engines.sglang_stream import StreamReader, read_generation
from gateway.contracts.errors import (
    EngineError,
    EngineProtocolError,
    EngineRejected,
    EngineTimeout,
    EngineUnavailable,
    IdentityMismatch,
    VerbatimError,
    WorkerUnavailable,
)
from gateway.contracts.experts import RoutingShape
from gateway.contracts.generation import EngineIdentity, GenerateChunk, GenerateEnd, GenerateRequest
from gateway.contracts.ports import PauseMode

_log = logging.getLogger(__name__)

T = TypeVar("T")

_ROUTING_KEY = "X-SMG-Routing-Key"
_ROUTED_WORKER = "x-smg-routed-worker-id"
_STREAM_ERROR = "stream_error"
_WORKER_FAILED = frozenset(
    ("call_upstream_connection_failed", "call_upstream_request_error", "read_response_body_failed")
)
_NO_WORKERS_YET = "model_not_found"
"""What a router says until its workers have registered, for a moment after its start."""

_PROBE = {"sampling_params": "verbatim-mode-probe"}
"""A router in verbatim mode passes this on and a worker refuses it; another one refuses it itself."""
_NUM_PROBES = 3
_HOW_TO_START = "start it with --disable-retries --policy consistent_hashing"

_ROUTER_SECONDS = 5.0
_WORKER_SECONDS = 2.0
"""A worker that is slower to say who it is than this holds nobody up; the others speak for the router."""
_CONTROL_SECONDS = 60.0
_MAX_DETOURS = 10_000
_MAX_KEY_CHARACTERS = 1024
"""Workers refuse long headers; a longer key is sent as its hash."""
_WEIGHTS = "weights"

_SILENCE = (EngineUnavailable, EngineTimeout)

_MAY_DIFFER = frozenset(
    (
        "engine_id", "url", "kind", "weight_version", "policy_version", "model_path", "served_model_name",
        "context_length", "one_version", "paused", "process",
    )
)  # fmt: skip
"""Of workers' identities. Their paths and names move with their weights and are compared among those of one label."""


class SmgRouter(HttpEngine):
    """One smg router and its workers (implements `gateway.contracts.ports.Engine`); arguments as of `SglangEngine`."""

    def __init__(
        self,
        url: str,
        *,
        engine_id: str,
        routing: RoutingShape | None,
        policy_version_of: Callable[[str], int],
        context_length: int = 0,
        connect_timeout_seconds: float = 5.0,
        idle_timeout_seconds: float = 600.0,
        first_byte_timeout_seconds: float | None = None,
        stall_timeout_seconds: float = 10.0,
        probe_timeout_seconds: float = 5.0,
        api_key: str | None = None,
    ) -> None:
        super().__init__(
            EngineHttp(
                url,
                engine_id=engine_id,
                connect_timeout_seconds=connect_timeout_seconds,
                idle_timeout_seconds=idle_timeout_seconds,
                first_byte_timeout_seconds=first_byte_timeout_seconds,
                stall_timeout_seconds=stall_timeout_seconds,
                api_key=api_key,
                refusal_of=_refusal,
            )
        )
        self._probe_timeout_seconds = probe_timeout_seconds
        self._routing = routing
        self._policy_version_of = policy_version_of
        self._context_length = context_length
        self._api_key = api_key
        self._learnt_routing: RoutingShape | None = None
        self._workers: dict[str, SglangEngine] = {}
        self._registered: Mapping[str, str] = {}
        self._lost: set[str] = set()
        self._was_away = False
        self._serving: dict[str, str] = {}
        self._detours: OrderedDict[str, int] = OrderedDict()
        self._is_verbatim = False
        self._told: set[str] = set()

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[GenerateChunk | GenerateEnd, None]:
        """Stream new tokens, then exactly one GenerateEnd; closing early aborts the request at its worker.

        Raises WorkerUnavailable if the worker is lost and others live: the session's next request goes to another.
        """
        if request.media:
            await self._of_some_worker(lambda worker: worker.check_media(request))
        try:
            async with aclosing(read_generation(partial(self._prepare, request), abort=self.abort)) as items:
                async for item in items:
                    yield item
        except WorkerUnavailable as error:
            self._take_detour(request.routing_key)
            if not await self._living():
                raise EngineUnavailable(error.message) from error
            raise
        finally:
            self._serving.pop(request.request_id, None)

    async def _shape(self, request: GenerateRequest) -> RoutingShape | None:
        """The model's routing shape, where the request's answer needs it."""
        if request.routed_experts_start is not None and self._routing is None and self._learnt_routing is None:
            self._learnt_routing = (await self.identity()).routing
        return self._routing or self._learnt_routing

    async def _prepare(self, request: GenerateRequest) -> tuple[EventStream, StreamReader]:
        shape = await self._shape(request)
        reader = StreamReader(request, shape, self._policy_version_of, self.engine_id, failure_of=self._failure)

        def remember_worker(headers: Mapping[str, str]) -> None:
            worker = headers.get(_ROUTED_WORKER)
            if worker is not None:
                self._serving[request.request_id] = _address(worker)

        stream = self._http.stream(
            "/generate",
            generate_body(request),
            headers=self._routing_headers(request.routing_key),
            reader=EventReader(reader.rows),
            on_headers=remember_worker,
            on_silence=partial(self._check_silence, request.request_id),
        )
        return stream, reader

    def _failure(self, error: Any, named: str) -> VerbatimError:
        """The router's own frame about a worker that it lost, or a worker's failure."""
        match error:
            case {"type": str(kind), "message": message} if kind == _STREAM_ERROR:
                return WorkerUnavailable(f"router {self.engine_id} lost its worker: {message}")
        return failure(error, named)

    async def _check_silence(self, request_id: str) -> None:
        """Raise the error that a silent stream stands for: who hangs, router or worker, keeps connections open."""
        await self._http.get_status("/liveness", timeout_seconds=self._probe_timeout_seconds)
        known = self._workers.get(self._serving.get(request_id, ""))
        # Before the first byte nobody says which worker it is: it may be any that is silent.
        workers = {known.url: known} if known is not None else dict(self._workers)
        for url, answers in (await _each(workers, lambda worker: worker.healthy())).items():
            if answers is not True:
                raise WorkerUnavailable(f"worker {url} of router {self.engine_id} hangs")

    def _routing_headers(self, routing_key: str) -> Mapping[str, str]:
        """A session's key; another one as often as its worker was lost, so that it comes to another worker."""
        if not routing_key:
            return {}
        detour = self._detours.get(routing_key, 0)
        key = f"{routing_key}#{detour}" if detour else routing_key
        if len(key) > _MAX_KEY_CHARACTERS:
            key = hashlib.blake2b(key.encode(), digest_size=32).hexdigest()
        return {_ROUTING_KEY: key}

    def _take_detour(self, routing_key: str) -> None:
        """The router notices a dead worker only after several failures; until then it hashes the session to it."""
        self._detours[routing_key] = self._detours.get(routing_key, 0) + 1
        self._detours.move_to_end(routing_key)
        if len(self._detours) > _MAX_DETOURS:
            self._detours.popitem(last=False)

    async def identity(self) -> EngineIdentity:
        """What all workers that answer agree on.

        Raises EngineRejected if the router changes what it passes on, IdentityMismatch naming the workers that differ,
        EngineUnavailable if none answers from here.
        """
        workers = await self._known_workers()
        if not self._is_verbatim:
            await self._check_mode()
        found = await _each(workers, lambda worker: _in_time(worker.identity()))
        identities = [answer for answer in found.values() if isinstance(answer, EngineIdentity)]
        silent = {url: answer for url, answer in found.items() if isinstance(answer, _SILENCE)}
        for url, answer in found.items():
            if isinstance(answer, VerbatimError) and url not in silent:
                raise answer
        if not identities:
            raise EngineUnavailable(
                f"router {self.engine_id} at {self.url}: none of its workers answers at its own address, which pauses, "
                f"aborts and identity need ({'; '.join(answer.message for answer in silent.values())})"
            )
        for url, answer in silent.items():
            self._tell(url, f"worker {url} of router {self.engine_id} does not answer here: {answer.message}")
        self._told &= silent.keys() | {_WEIGHTS}
        _check_agreement(self.engine_id, identities)
        return self._joined(identities)

    def _joined(self, identities: Sequence[EngineIdentity]) -> EngineIdentity:
        oldest = min(identities, key=lambda identity: identity.policy_version)
        labels = {identity.weight_version: identity.url for identity in identities}
        if len(labels) > 1:
            holds = ", ".join(f"{url}: {label}" for label, url in labels.items())
            self._tell(_WEIGHTS, f"workers of router {self.engine_id} hold different weights ({holds})")
        else:
            self._told.discard(_WEIGHTS)
        lengths = [identity.context_length for identity in identities if identity.context_length]
        return replace(
            oldest,
            engine_id=self.engine_id,
            url=self.url,
            kind="smg",
            context_length=min(lengths, default=0),
            process=" ".join(sorted(identity.process for identity in identities)),
            one_version=len(labels) == 1,
            paused=any(identity.paused for identity in identities),
        )

    def _tell(self, key: str, message: str) -> None:
        """Warn once, until it is over."""
        if key not in self._told:
            self._told.add(key)
            _log.warning("%s", message)

    async def tokenize(self, texts: Sequence[str]) -> Sequence[Sequence[int]] | None:
        """Each text's ids by a worker's tokenizer; `identity` has found all workers to have the same one."""
        return await self._of_some_worker(lambda worker: worker.tokenize(texts))

    async def _of_some_worker(self, question: Callable[[SglangEngine], Awaitable[T]]) -> T:
        """The first answer; raises what the last worker raised if none gives one."""
        *first, last = (await self._known_workers()).values()
        for worker in first:
            try:
                return await question(worker)
            except _SILENCE as error:
                _log.info("worker %s of router %s was passed over: %s", worker.url, self.engine_id, error.message)
        return await question(last)

    async def _check_mode(self) -> None:
        """Find out whether requests are passed on as they are, and those of one session to one worker."""
        headers = {_ROUTING_KEY: "verbatim-mode-probe"}
        routed = set()
        for _ in range(_NUM_PROBES):
            answer = await self._http.ask(
                "POST", "/generate", _PROBE, headers=headers, timeout_seconds=_CONTROL_SECONDS
            )
            routed.add(self._passed_on_to(answer))
        if len(routed) > 1:
            _log.warning(
                "router %s sends one session to different workers (%s), which then compute its prompts anew: %s",
                self.engine_id,
                ", ".join(sorted(routed)),
                _HOW_TO_START,
            )
        self._is_verbatim = True

    def _passed_on_to(self, answer: Answer) -> str:
        """The worker that a probe came to."""
        worker = answer.headers.get(_ROUTED_WORKER)
        if worker is not None or _error_code(answer.body) in _WORKER_FAILED:
            return worker or "a worker that is gone"
        named = f"router {self.engine_id} at {self.url}"
        error = _refusal(answer.status, answer.body, named)
        if isinstance(error, EngineUnavailable):
            raise error
        raise EngineRejected(
            f"{named} does not pass requests on as they are (it would drop fields of them): {_HOW_TO_START}"
        )

    async def _known_workers(self) -> Mapping[str, SglangEngine]:
        """Clients of the workers that the router lists now, by address."""
        listed = await self._listed()
        if not listed:
            raise EngineUnavailable(f"router {self.engine_id} at {self.url} has no workers")
        now = {worker.url for worker in listed}
        gone = [self._workers.pop(url) for url in self._workers.keys() - now - self._lost]
        for url in now - self._workers.keys():
            self._workers[url] = self._worker(url)
        workers = {url: worker for url, worker in self._workers.items() if url in now}
        for client in gone:
            await client.aclose()
        return workers

    async def _listed(self) -> Sequence[ListedWorker]:
        """The router's workers; those that it forgot because it was started again are registered anew."""
        try:
            listed = await _registered_workers(self._http)
        except EngineUnavailable:
            self._was_away = True
            raise
        before, now = self._registered, {worker.url: worker.registration for worker in listed}
        if not set(now.values()) <= set(before.values()):
            self._is_verbatim = False  # a router that starts registers anew; its flags may be others
        if not set(now.values()) & set(before.values()) and (self._was_away or now.keys() & before.keys()):
            self._lost |= before.keys()
        self._was_away = False
        self._lost -= now.keys()
        self._registered = now
        for url in sorted(self._lost):
            await self._register(url)
        return listed

    async def _register(self, url: str) -> None:
        """Tell the router of a worker that it had, once that worker answers."""
        worker = self._workers[url]
        try:
            if not await _in_time(worker.healthy()):
                return
        except EngineTimeout:
            return
        key = {} if self._api_key is None else {"api_key": self._api_key}
        answer = await self._http.ask("POST", "/workers", {"url": url, **key}, timeout_seconds=_ROUTER_SECONDS)
        _log.warning("router %s had forgotten worker %s; it was told again (%d)", self.engine_id, url, answer.status)

    def _worker(self, url: str) -> SglangEngine:
        return SglangEngine(
            url,
            engine_id=url,
            routing=self._routing,
            policy_version_of=self._policy_version_of,
            context_length=self._context_length,
            connect_timeout_seconds=_WORKER_SECONDS,
            api_key=self._api_key,
        )

    async def _living(self) -> bool:
        """Whether a worker answers its health check."""
        found = await _each(self._workers, lambda worker: _in_time(worker.healthy()))
        return any(answer is True for answer in found.values())

    async def healthy(self) -> bool:
        """Whether the router has workers to send requests to."""
        try:
            status = await self._http.get_status("/readiness", timeout_seconds=_ROUTER_SECONDS)
            if status != 200:
                await self._listed()  # one that was started again may have forgotten its workers
        except EngineError as error:
            self._was_away |= isinstance(error, EngineUnavailable)
            return False
        return status == 200

    async def abort(self, request_id: str) -> None:
        """Stop one request at the worker that has it, or wherever it may be; unknown ids are fine."""
        worker = self._workers.get(self._serving.get(request_id, ""))
        if worker is not None:
            await worker.abort(request_id)
        else:
            # It never came to a worker, or it is not ours: a worker that cannot be asked now is no news.
            await _each(self._workers, lambda worker: worker.abort(request_id))

    async def pause(self, mode: PauseMode) -> None:
        """Stop generating at every worker; raises the EngineError of one that may go on."""
        await self._order(lambda worker: worker.pause(mode))

    async def resume(self) -> None:
        """Go on at every worker."""
        await self._order(lambda worker: worker.resume())

    async def _order(self, command: Callable[[SglangEngine], Awaitable[None]]) -> None:
        """Tell all workers; one that cannot be reached is passed over as long as another can."""
        try:
            workers = await self._known_workers()
        except _SILENCE:
            workers = dict(self._workers)  # a router that is away must not leave its workers paused
            if not workers:
                raise
        found = await _each(workers, command)
        failed = {url: answer for url, answer in found.items() if isinstance(answer, VerbatimError)}
        for url, error in failed.items():
            if not isinstance(error, EngineUnavailable) or len(failed) == len(found):
                raise error
            _log.warning("worker %s of router %s was passed over: %s", url, self.engine_id, error.message)

    async def aclose(self) -> None:
        """Close all connections."""
        for worker in self._workers.values():
            await worker.aclose()
        await super().aclose()


class ListedWorker(NamedTuple):
    """A worker as its router knows it; `registration` is of this entry, a router that starts again makes new ones."""

    registration: str
    url: str


async def listed_workers(router: EngineHttp) -> Sequence[ListedWorker]:
    """A router's workers, one for each address.

    Raises EngineRejected for those that cannot be spoken to verbatim, EngineUnavailable where there are none.
    """
    workers = await _registered_workers(router)
    if not workers:
        raise EngineUnavailable(f"router {router.engine_id} at {router.url} has no workers")
    return workers


async def _registered_workers(router: EngineHttp) -> Sequence[ListedWorker]:
    named = f"router {router.engine_id} at {router.url}"
    try:
        listed = await router.get_object("/workers", timeout_seconds=_ROUTER_SECONDS)
    except EngineRejected as error:
        raise EngineRejected(f"{error.message}; is it an smg router (smg=URL), or an engine (sglang=URL)?") from error
    try:
        workers = [
            (ListedWorker(str(w["id"]), _address(w["url"])), w["worker_type"], w["connection_mode"])
            for w in listed["workers"]
        ]
    except (KeyError, TypeError) as error:
        raise EngineProtocolError(f"{named}: its list of workers is unreadable ({error})") from error
    for worker, kind, protocol in workers:
        if (kind, protocol) != ("regular", "http"):
            raise EngineRejected(
                f"{named}: worker {worker.url} is {kind} over {protocol}; only regular http can be exact"
            )
    return list({worker.url: worker for worker, _, _ in workers}.values())


async def workers_behind(engine: EngineHttp) -> Sequence[str]:
    """The addresses of a router's workers; () for an engine, which has no such list."""
    answer = await engine.ask("GET", "/workers", timeout_seconds=_ROUTER_SECONDS)
    return [worker.url for worker in await listed_workers(engine)] if answer.status == 200 else ()


def _address(worker: str) -> str:
    """A worker's own address; routers that tell the ranks of one server apart append `@RANK`."""
    return re.sub(r"@\d+$", "", worker).rstrip("/")


def _check_agreement(router: str, identities: Sequence[EngineIdentity]) -> None:
    first = identities[0]
    for other in identities[1:]:
        compared: Iterable[str] = asdict(first).keys() - _MAY_DIFFER
        if other.weight_version == first.weight_version:
            compared = {*compared, "model_path", "served_model_name"}
        for name in sorted(compared):
            ours, theirs = (asdict(identity)[name] for identity in (first, other))
            if ours != theirs:
                raise IdentityMismatch(
                    f"workers of router {router} differ in {name}: {first.url} has {ours}, {other.url} has {theirs}"
                )


async def _each(
    workers: Mapping[str, SglangEngine], question: Callable[[SglangEngine], Awaitable[Any]]
) -> Mapping[str, Any]:
    """What each worker answers at once, by address: the answer, or the VerbatimError."""

    async def ask(worker: SglangEngine) -> Any:
        try:
            return await question(worker)
        except VerbatimError as error:
            return error

    answers = await asyncio.gather(*(ask(worker) for worker in workers.values()))
    return dict(zip(workers, answers, strict=True))


async def _in_time(answer: Awaitable[Any]) -> Any:
    try:
        async with asyncio.timeout(_WORKER_SECONDS):
            return await answer
    except TimeoutError as error:
        raise EngineTimeout(f"no answer in {_WORKER_SECONDS:g} s") from error


def _refusal(status: int, body: bytes, named: str) -> VerbatimError:
    """As of an engine; the router's own words for lost workers and for a start that is not over are passing ones."""
    code = _error_code(body)
    if code in _WORKER_FAILED:
        return WorkerUnavailable(f"{named} lost a worker: {code}")
    if status == 404 and code == _NO_WORKERS_YET:
        return EngineUnavailable(f"{named} has no workers yet")
    return refusal(status, body, named)


def _error_code(body: bytes) -> str:
    try:
        content = orjson.loads(body)
    except orjson.JSONDecodeError:
        return ""
    match content:
        case {"error": {"code": str(code)}}:
            return code
    return ""
