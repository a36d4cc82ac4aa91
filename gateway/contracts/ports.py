"""The Protocols at which engines, ledger, sandboxes, rewards and weight transports meet the rest.

Each has one contract suite under `tests/contract/` that runs against every implementation. Composition roots
(`gateway/parts.py`, `gateway/cli.py`, `trainer/main.py`, `engines/embedded/server.py`) choose the classes.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Protocol, TypeAlias, runtime_checkable

from gateway.contracts.experts import RoutedExperts
from gateway.contracts.generation import EngineIdentity, GenerateChunk, GenerateEnd, GenerateRequest, JsonValue
from gateway.contracts.media import Blob
from gateway.contracts.records import FinishRecord, SessionRecord, TurnRecord
from gateway.contracts.rollouts import Compressed, FeedCounts, Lease, Reclaimed, StoredRollout, StoreUsage


class PauseMode(StrEnum):
    """What happens to running requests while generation is paused (SGLang's words).

    ABORT: they end with what they have. IN_PLACE: they stop and later go on with their old KV cache.
    RETRACT: they go back to the queue and their cache is recomputed.
    """

    ABORT = "abort"
    IN_PLACE = "in_place"
    RETRACT = "retract"


class Engine(Protocol):
    """A client of one inference engine process."""

    @property
    def engine_id(self) -> str: ...

    @property
    def url(self) -> str: ...

    def generate(self, request: GenerateRequest) -> AsyncGenerator[GenerateChunk | GenerateEnd, None]:
        """Stream new tokens, then exactly one GenerateEnd.

        Raises EngineUnavailable, EngineTimeout, EngineRejected, EngineProtocolError; chunks that were yielded before
        stay valid. Closing the generator early aborts the request at the engine.
        """
        ...

    async def identity(self) -> EngineIdentity:
        """Ask the engine who it is; raises EngineError."""
        ...

    async def tokenize(self, texts: Sequence[str]) -> Sequence[Sequence[int]] | None:
        """Each text's ids as the engine's own tokenizer spells it, adding no token; None if it cannot be asked.

        Raises EngineError.
        """
        ...

    async def healthy(self) -> bool:
        """Whether the engine answers its cheap health check."""
        ...

    async def abort(self, request_id: str) -> None:
        """Stop one request; unknown ids are fine."""
        ...

    async def pause(self, mode: PauseMode) -> None: ...

    async def resume(self) -> None: ...

    async def aclose(self) -> None: ...


HttpHeaders: TypeAlias = Sequence[tuple[str, str]]
"""Names and values in order; a name may come several times."""


@dataclass(frozen=True, slots=True)
class RawCall:
    """An HTTP request as it is to reach an engine; `target` is path and query as they stand in the request line."""

    method: str
    target: str
    headers: HttpHeaders
    body: bytes


@dataclass(frozen=True, slots=True, eq=False)
class RawReply:
    """An engine's answer, whatever its status; `body` as it came over the wire, in pieces of any length."""

    status: int
    headers: HttpHeaders
    body: AsyncIterator[bytes]


@runtime_checkable
class ForwardingEngine(Protocol):
    """What an engine's client may be besides: a way to its other paths. Which of them, is not the client's business."""

    def forward(self, call: RawCall) -> AbstractAsyncContextManager[RawReply]:
        """Send a call on; leaving the context ends it. Raises EngineUnavailable, EngineTimeout, EngineProtocolError,
        also while the body is read."""
        ...


class Ledger(Protocol):
    """The durable store of sessions, turns, routing rows, finishes and leases.

    Every method that writes returns when its data is on disk (I4). All are safe to call concurrently, and from several
    processes where the implementation allows more than one.
    """

    @property
    def shared(self) -> bool:
        """Whether other processes may write meanwhile, so that what was read of a session may be out of date."""
        ...

    async def create_session(self, session: SessionRecord) -> SessionRecord:
        """Store a session; an equal session that exists already is returned, another one raises Conflict."""
        ...

    async def session(self, session_id: str) -> SessionRecord | None: ...

    async def sessions(
        self, *, labels: Mapping[str, str] | None = None, limit: int = 100, after: str | None = None
    ) -> Sequence[SessionRecord]:
        """Sessions in order of id, starting after `after`."""
        ...

    async def append_turn(self, turn: TurnRecord, experts: RoutedExperts | None) -> None:
        """Store one turn; a second append of the same (session_id, turn_id) is a no-op, so that retries are safe.

        Raises SessionSealed if the session is finished, NotFound if it does not exist, TurnIndexTaken if another turn
        has its index.
        """
        ...

    async def append_late_turn(self, turn: TurnRecord, experts: RoutedExperts | None) -> FinishRecord:
        """Store a turn that began before its session was finished elsewhere; the rollout's new snapshot.

        Leases on the earlier snapshot keep it, and who reads by it finds what it was. A consumer that has not leased
        the rollout gets the new one; one that acknowledged it is not offered it again. The same turn again changes
        nothing. Raises as `append_turn`, Conflict for a session that is not finished, SessionSealed for a rollout that
        was dropped.
        """
        ...

    def mark_delivered(self, session_id: str, turn_id: str, delivered_at: float) -> Awaitable[None]:
        """Note when a turn's reply left; begun when it returns, so that nobody needs a task to wait for it later."""
        ...

    def mark_lost(self, session_id: str, turn_id: str, lost_at: float) -> Awaitable[None]:
        """Note that a turn's reply reached nobody; a delivery, noted before or after, counts more."""
        ...

    async def unknown_deliveries(self, session_id: str) -> Sequence[str]:
        """Turns of whose reply nobody has said that it was delivered, or lost; who answered them has died, or is about
        to say so."""
        ...

    async def turns(self, session_id: str, *, after: int = -1, snapshot: str | None = None) -> Sequence[TurnRecord]:
        """Turns of a session in order of `index`, from those above `after`; with a snapshot, only those that it is
        made of (none for an unknown one)."""
        ...

    async def deliveries(self, session_id: str) -> Mapping[str, float]:
        """When each delivered turn's reply left: delivered_at by turn id."""
        ...

    async def experts(self, session_id: str, turn_id: str) -> RoutedExperts | None:
        """The routing rows stored with a turn; raises LedgerCorrupt if their checksum does not hold."""
        ...

    async def put_blob(self, session_id: str, blob: Blob) -> None:
        """Keep a content that a session's messages refer to; the same again is a no-op.

        Equal contents are stored once, and freed with the last session that refers to them (its deletion, or the drop
        of its rollout). Raises NotFound for an unknown session, SessionSealed for one whose rollout was dropped.
        """
        ...

    async def blob(self, session_id: str, sha256: str) -> Blob | None:
        """A content that this session refers to, None if it refers to no such; raises LedgerCorrupt if it is not what
        its name says."""
        ...

    async def finish(
        self,
        session_id: str,
        *,
        reward: float | None,
        outcome: str,
        metadata: Mapping[str, JsonValue],
        finished_at: float,
    ) -> FinishRecord:
        """Seal a session with a snapshot of the turns that are recorded now (`snapshot_of`).

        An equal repetition (the time aside) returns the record as it is, a different one raises Conflict.
        """
        ...

    async def finish_record(self, session_id: str, *, snapshot: str | None = None) -> FinishRecord | None:
        """How the session ended, with its latest snapshot or with an earlier one; None while it is open, or if it never
        had that snapshot."""
        ...

    async def delete_session(self, session_id: str) -> None:
        """Forget a session that was never finished, or whose rollout was acknowledged or dropped; else Conflict."""
        ...

    async def lease(
        self,
        *,
        consumer: str,
        limit: int,
        lease_seconds: float,
        whole_groups: bool,
        labels: Mapping[str, str] | None,
        now: float,
        group_deadline_seconds: float | None = None,
        lease_id: str | None = None,
    ) -> Lease | None:
        """Lend up to `limit` finished rollouts that this consumer has neither leased nor acknowledged, oldest first.

        With `whole_groups` a group is lent when all of its sessions have ended and none of it is lent at the moment;
        a group larger than `limit` is lent alone. Once `group_deadline_seconds` have passed since the first of its
        members ended, those that are there are lent, and later those that end later; `Lease.incomplete` names what is
        missing. None if there is nothing to lend.

        lease_id: chosen by the caller, so that a call whose reply was lost can be repeated: the lease is returned as it
        was made. Conflict if it has ended, or belongs to another consumer.
        """
        ...

    async def extend_lease(self, lease_id: str, *, lease_seconds: float, now: float) -> float:
        """Let a lease run for `lease_seconds` from `now` at least; when it expires then.

        Raises NotFound, and Conflict if it was acknowledged or released, or one of its rollouts was lent anew.
        """
        ...

    async def acknowledge(self, lease_id: str) -> Sequence[str]:
        """Mark a lease's rollouts as consumed and return their session ids; repeating it is fine; unknown: NotFound.

        An expired lease is still acknowledged unless one of its rollouts was lent anew since, which raises Conflict.
        """
        ...

    async def release(self, lease_id: str) -> None:
        """Give a lease's rollouts back at once; unknown or ended leases are fine."""
        ...

    async def release_consumer(self, consumer: str) -> int:
        """Release every live lease of a consumer (a trainer that starts again); returns how many rollouts came back."""
        ...

    async def drop_rollout(self, session_id: str, snapshot: str) -> None:
        """Free a rollout's data; needs the snapshot that was read, else Conflict."""
        ...

    async def counts(self, consumer: str, now: float) -> FeedCounts: ...

    async def leases(self, *, now: float, consumer: str | None = None, limit: int = 100) -> Sequence[Lease]:
        """Leases that have not ended, of one consumer or of all; those that expire soonest first."""
        ...

    async def consumers(self, *, limit: int = 100) -> Sequence[str]:
        """Names of consumers that hold or have acknowledged rollouts, in order."""
        ...

    async def sessions_past_ttl(self, now: float, *, limit: int) -> Sequence[str]:
        """Open sessions whose `ttl_seconds` have passed since their creation or since their latest turn was recorded,
        whichever is later."""
        ...

    async def stored_rollouts(
        self, *, finished_before: float, limit: int, after: StoredRollout | None = None
    ) -> Sequence[StoredRollout]:
        """Finished rollouts that still hold data, oldest first, starting behind `after`."""
        ...

    async def stored_bytes(self) -> int:
        """What turns, routing rows and blobs of all sessions take (a blob counts once)."""
        ...

    async def usage(self) -> StoreUsage:
        """What the store takes on its disks, by kind."""
        ...

    async def reclaim(self) -> Reclaimed:
        """Give back to the disk what drops and deletions have freed; may take long, and hold nobody up meanwhile."""
        ...

    async def compress(self, *, bytes_per_second: float) -> Compressed:
        """Write routing rows anew that take less room so, at no more than this pace (0: as fast as it can be); may take
        long, and hold nobody up meanwhile."""
        ...

    async def set_policy(self, policy_version: int, weight_version: str) -> None:
        """Remember that the engines' label `weight_version` means `policy_version`."""
        ...

    async def policies(self) -> Mapping[str, int]:
        """All remembered labels."""
        ...

    async def aclose(self) -> None: ...


class NetworkAccess(StrEnum):
    """What a sandbox can reach."""

    NONE = "none"
    LOOPBACK = "loopback"


@dataclass(frozen=True, slots=True)
class SandboxLimits:
    """Of one sandbox. `output_bytes` bounds what one command's stdout and stderr may each return."""

    memory_bytes: int = 256 * 2**20
    num_processes: int = 64
    disk_bytes: int = 64 * 2**20
    cpu_seconds_per_command: float = 30.0
    output_bytes: int = 64 * 1024


@dataclass(frozen=True, slots=True)
class SandboxSpec:
    """What to make: `key` is the rollout's id (creation is idempotent per key); `files` are written before it is handed
    out (path inside the sandbox → content)."""

    key: str
    limits: SandboxLimits = field(default_factory=SandboxLimits)
    network: NetworkAccess = NetworkAccess.NONE
    files: Mapping[str, bytes] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)


class ExecOutcome(StrEnum):
    """How a command ended; everything but EXITED says that its exit code is not its own doing."""

    EXITED = "exited"
    TIMEOUT = "timeout"
    OUT_OF_MEMORY = "out_of_memory"
    SIGNALLED = "signalled"


@dataclass(frozen=True, slots=True)
class ExecResult:
    """One command's end. `exit_code` is set iff outcome is EXITED.

    stdout and stderr are cut in the middle at the limit; `*_total_bytes` says how much there was.
    """

    outcome: ExecOutcome
    exit_code: int | None
    stdout: bytes
    stderr: bytes
    stdout_total_bytes: int
    stderr_total_bytes: int
    seconds: float


class Sandbox(Protocol):
    """One isolated runtime; its files and background processes live until it is destroyed."""

    @property
    def sandbox_id(self) -> str: ...

    async def execute(
        self,
        command: str | Sequence[str],
        *,
        timeout_seconds: float,
        stdin: bytes = b"",
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
    ) -> ExecResult:
        """Run a shell line (str) or an argument vector; raises SandboxLost if the sandbox is gone."""
        ...

    async def write_file(self, path: str, content: bytes) -> None: ...

    async def read_file(self, path: str) -> bytes:
        """Raises NotFound if there is no such file."""
        ...

    async def destroy(self) -> None:
        """End all of its processes and free its files; repeating it is fine."""
        ...


class SandboxDriver(Protocol):
    """Makes sandboxes of one kind."""

    async def create(self, spec: SandboxSpec) -> Sandbox:
        """Returns when commands can run; raises SandboxUnavailable with what to do about it."""
        ...

    async def aclose(self) -> None:
        """Destroy every sandbox that this driver made."""
        ...


class WeightTransport(Protocol):
    """Brings weights to engines."""

    async def publish(self, checkpoint: Path, *, policy_version: int, engine_urls: Sequence[str]) -> str:
        """Load a Hugging Face checkpoint folder into every engine and return the engines' new label (`weight_version`).

        Raises TransportError naming the engine that failed; engines that already took the weights keep them.
        """
        ...

    async def aclose(self) -> None: ...


class Reward(Protocol):
    """Scores one ended conversation."""

    async def score(self, task: JsonValue, messages: Sequence[JsonValue]) -> float:
        """Raises RewardError when no score can be computed."""
        ...
