"""The gateway's settings, as `--config FILE` (TOML), flags and `--set a.b=c` give them; secrets are not among them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from urllib.parse import urlsplit

from gateway.contracts.errors import ConfigurationError
from gateway.contracts.generation import Capability
from gateway.ledger.sweeping import StorageSettings
from gateway.replicas.pool import ReplicaSettings
from gateway.routes.forward import Forward, own_path
from gateway.routes.quotas import LimitSettings
from gateway.sessions.picks import DEFAULT_PICK
from gateway.sessions.turns import TurnSettings
from gateway.tito.backends import BackendChoice
from gateway.tito.conversation import HistoryPolicy
from gateway.tito.parsing.choice import AUTO, check_names
from gateway.wire.protection import FieldSettings

OPERATOR_KEY_VARIABLE = "VERBATIM_OPERATOR_KEY"
"""Environment variable with the operator's key, or several with spaces or commas between them, all of which are good;
without it keys are off, which only loopback allows."""


_MOST_WORKERS = 64


class UnknownSessions(StrEnum):
    """What a chat under an id that nobody made does."""

    CREATE = "create"
    REJECT = "reject"


@dataclass(frozen=True, slots=True)
class EngineTimeouts:
    """How long engines and routers may be silent.

    connect_seconds: for a connection. first_byte_seconds, between_bytes_seconds: of a stream, whatever the other side
    says of itself (long prompts and paused engines are silent). stall_seconds: after so much silence of a stream an
    SGLang or a router is asked whether it lives, and has probe_seconds to answer; 0 never asks.
    """

    connect_seconds: float = 5.0
    first_byte_seconds: float = 600.0
    between_bytes_seconds: float = 600.0
    stall_seconds: float = 10.0
    probe_seconds: float = 5.0

    def __post_init__(self) -> None:
        for name in ("connect_seconds", "first_byte_seconds", "between_bytes_seconds", "probe_seconds"):
            if getattr(self, name) <= 0:
                raise ConfigurationError(f"timeouts.{name} must be above 0")
        if self.stall_seconds < 0:
            raise ConfigurationError("timeouts.stall_seconds must not be negative")


DEFAULT_TIMEOUTS = EngineTimeouts()


@dataclass(frozen=True, slots=True)
class GatewaySettings:
    """Of one gateway.

    model: folder with tokenizer and chat template (weights are not needed). engines: `KIND=URL`, for example
    `sglang=http://127.0.0.1:30000`; kinds: sglang, smg (a router), vllm, openai. data: the ledger's folder.
    served_name: the model's name for agents (default: the folder's name). tool_call_parser, reasoning_parser: names of
    `gateway.tito.parsing.choice`; `auto` reads them from the template. drain_seconds: how long a stop waits for running
    replies. control: the socket by which `serve --replace` finds this process (default: control.sock in `data`).
    replaced_drain_seconds: how long replies may still run once another process has taken over. feed_consumer: whose
    feed figures are in `/metrics`. max_body_bytes: of one request; bodies_in_flight_bytes: of all requests under way,
    beyond the first mebibyte of each. read_timeout_seconds: for the head of a request, and again for its body.
    write_timeout_seconds: how long a reply may wait for a client that does not read it. pick: which turns train where a
    trainer does not say, a built-in name of `gateway.sessions.picks` or the operator's own `module:function`. require:
    what every engine must be able to do; one that cannot is refused, at the start and when it is added. forward: which
    other paths of an engine agents reach. forward_paths: paths of the operator's own that they reach besides, each as
    it is or, with `*` at its end, with whatever follows; a path listed here passes whatever it does at the engine.
    ledger, objects: PostgreSQL's URL without a password and the store of arrays (`s3://bucket/prefix`,
    `file:///folder`) that several gateways share; empty: the embedded ledger in `data`. storage: room on the data
    folder's disk, and what is dropped by itself. audit: the file with operators' calls (empty: audit.jsonl beside the
    ledger; none: off). allowed_hosts: names besides loopback's own by which a gateway without keys may be called.
    public_url: how agents reach the gateway, for the `base_url` of sessions (empty: as the caller did; behind a proxy
    that ends TLS it has to be said, because forwarded headers are not believed). tokenizer_backend: the library that
    spells texts in ids; `auto` takes the first faster one that is proven to spell as `tokenizers` does.
    workers: processes that serve the port together; limits of all sessions together and bodies_in_flight_bytes are
    divided among them.
    """

    model: Path | None = None
    engines: tuple[str, ...] = ()
    host: str = "127.0.0.1"
    port: int = 8600
    workers: int = 1
    data: Path = Path("verbatim-data")
    ledger: str = ""
    objects: str = ""
    served_name: str = ""
    tool_call_parser: str = AUTO
    reasoning_parser: str = AUTO
    tokenizer_backend: BackendChoice = BackendChoice.AUTO
    history_policy: HistoryPolicy = HistoryPolicy.KEEP
    unknown_sessions: UnknownSessions = UnknownSessions.CREATE
    forward: Forward = Forward.KNOWN
    forward_paths: tuple[str, ...] = ()
    sessions_in_memory: int = 10_000
    expiry_sweep_seconds: float = 10.0
    max_body_bytes: int = 64 * 2**20
    bodies_in_flight_bytes: int = 2 * 2**30
    read_timeout_seconds: float = 120.0
    write_timeout_seconds: float = 60.0
    drain_seconds: int = 30
    control: Path | None = None
    replaced_drain_seconds: float = 3600.0
    feed_consumer: str = "trainer"
    pick: str = DEFAULT_PICK
    require: tuple[Capability, ...] = ()
    audit: str = ""
    allowed_hosts: tuple[str, ...] = ()
    public_url: str = ""
    limits: LimitSettings = field(default_factory=LimitSettings)
    turns: TurnSettings = field(default_factory=TurnSettings)
    replicas: ReplicaSettings = field(default_factory=ReplicaSettings)
    fields: FieldSettings = field(default_factory=FieldSettings)
    timeouts: EngineTimeouts = field(default_factory=EngineTimeouts)
    storage: StorageSettings = field(default_factory=StorageSettings)

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise ConfigurationError(f"port {self.port} is none")
        if not 1 <= self.workers <= _MOST_WORKERS:
            raise ConfigurationError(f"workers is {self.workers}: expected 1 to {_MOST_WORKERS}")
        if not 0 < self.max_body_bytes <= self.bodies_in_flight_bytes:
            raise ConfigurationError(
                f"max_body_bytes is {self.max_body_bytes}: expected 1 to bodies_in_flight_bytes "
                f"({self.bodies_in_flight_bytes})"
            )
        if bool(self.ledger) != bool(self.objects):
            raise ConfigurationError("ledger and objects belong together: give both, or none for the ledger in `data`")
        if self.read_timeout_seconds <= 0 or self.write_timeout_seconds <= 0:
            raise ConfigurationError("read_timeout_seconds and write_timeout_seconds must be above 0")
        if self.expiry_sweep_seconds <= 0:
            raise ConfigurationError("expiry_sweep_seconds must be above 0")
        if self.forward is Forward.NONE and self.forward_paths:
            raise ConfigurationError("forward is none, which forwards nothing, and forward_paths lists paths")
        if self.replaced_drain_seconds < 0:
            raise ConfigurationError("replaced_drain_seconds must be 0 or more")
        if self.public_url and urlsplit(self.public_url).scheme not in ("http", "https"):
            raise ConfigurationError(f"public_url is {self.public_url!r}; expected http://… or https://…")
        for path in self.forward_paths:
            own_path(path)
        check_names(calls=self.tool_call_parser, reasoning=self.reasoning_parser)
        for engine in self.engines:
            split_engine(engine)

    @property
    def control_path(self) -> Path:
        """Where the control socket is."""
        return self.control or self.data / "control.sock"


def of_one_worker(settings: GatewaySettings) -> GatewaySettings:
    """What each of several workers may use, so that together they keep to the settings.

    >>> of_one_worker(GatewaySettings(workers=4, limits=LimitSettings(concurrent=10))).limits.concurrent
    3
    """
    num, limits = settings.workers, settings.limits
    return replace(
        settings,
        bodies_in_flight_bytes=max(settings.max_body_bytes, settings.bodies_in_flight_bytes // num),
        limits=replace(
            limits,
            requests_per_second=limits.requests_per_second / num,
            concurrent=-(-limits.concurrent // num),
        ),
    )


def split_engine(text: str) -> tuple[str, str]:
    """`KIND=URL` as (kind, url); raises ConfigurationError."""
    kind, equals, url = text.partition("=")
    if not equals or not kind or not url:
        raise ConfigurationError(f"engine {text!r}: write it as KIND=URL, for example sglang=http://127.0.0.1:30000")
    return kind, url.rstrip("/")
