"""The kinds of engines that ship, as `--engine KIND=URL` names them, and how a client of each is made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TypeAlias
from urllib.parse import urlsplit

from engines.openai_text import OpenAiTextEngine
from engines.sglang import SglangEngine
from engines.smg import SmgRouter
from engines.vllm import VllmEngine
from engines.weights.names import policy_version_of
from gateway.contracts.errors import (
    ConfigurationError,
)
from gateway.contracts.ports import Engine
from gateway.contracts.settings import engine_key
from gateway.sessions.model import ServedModel
from gateway.settings import (
    DEFAULT_TIMEOUTS,
    EngineTimeouts,
)

EngineMaker: TypeAlias = Callable[[str, str, ServedModel, Mapping[str, int]], Engine]
"""(engine_id, url, model, known policies) → a client of that engine."""


def make_engine(
    kinds: Mapping[str, EngineMaker],
    kind: str,
    url: str,
    model: ServedModel,
    policies: Mapping[str, int],
    *,
    engine_id: str | None = None,
) -> Engine:
    """A client of one engine; raises ConfigurationError for a kind that we do not know."""
    if kind not in kinds:
        raise ConfigurationError(f"engine kind {kind!r} is none of {', '.join(sorted(kinds))}")
    return kinds[kind](engine_id or default_engine_id(kind, url), url, model, policies)


def shipped_kinds(timeouts: EngineTimeouts = DEFAULT_TIMEOUTS) -> Mapping[str, EngineMaker]:
    """The kinds of engines that ship; raises ConfigurationError for an unusable key of the engines."""
    api_key = engine_key()
    limits = {
        "connect_timeout_seconds": timeouts.connect_seconds,
        "idle_timeout_seconds": timeouts.between_bytes_seconds,
    }
    watched = limits | {
        "first_byte_timeout_seconds": timeouts.first_byte_seconds,
        "stall_timeout_seconds": timeouts.stall_seconds,
        "probe_timeout_seconds": timeouts.probe_seconds,
    }

    def token_engine(
        client: Callable[..., Engine],
        limits: Mapping[str, float],
        engine_id: str,
        url: str,
        model: ServedModel,
        policies: Mapping[str, int],
    ) -> Engine:
        return client(
            url,
            engine_id=engine_id,
            routing=model.routing,
            policy_version_of=partial(policy_version_of, known=policies),
            context_length=model.context_length,
            api_key=api_key,
            **limits,
        )

    def openai_text(engine_id: str, url: str, model: ServedModel, policies: Mapping[str, int]) -> Engine:
        tokenizer = model.tokenizer
        return OpenAiTextEngine(
            url, engine_id=engine_id, decode=tokenizer.decode, encode=tokenizer.encode_after, api_key=api_key, **limits
        )

    return {
        "sglang": partial(token_engine, SglangEngine, watched),
        "smg": partial(token_engine, SmgRouter, watched),
        "vllm": partial(token_engine, VllmEngine, limits),
        "openai": openai_text,
    }


def default_engine_id(kind: str, url: str) -> str:
    """The same engine has the same id in every gateway process (replica selection hashes it)."""
    return f"{kind}-{urlsplit(url).netloc or url}"
