"""What a model folder says about itself: routing shape, vocabulary, and fingerprints of tokenizer and chat template."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gateway.contracts.experts import RoutingShape

logger = logging.getLogger(__name__)

_EXPERT_COUNTS = ("num_experts", "n_routed_experts", "num_local_experts")
"""What Hugging Face configurations call the routed experts of a layer."""


@dataclass(frozen=True, slots=True)
class FolderIdentity:
    """`routing` None and `vocab_size` 0 where the folder does not say; `fingerprints` of the files that it has.

    Keys of `fingerprints`: "tokenizer" (sha256 of tokenizer.json) and "template" (sha256 of the chat template's text).
    """

    routing: RoutingShape | None
    vocab_size: int
    fingerprints: Mapping[str, str]


UNKNOWN_FOLDER = FolderIdentity(routing=None, vocab_size=0, fingerprints={})


def read_folder(folder: Path) -> FolderIdentity:
    """Read what is there; a folder that is on another machine gives UNKNOWN_FOLDER."""
    config = _json(folder / "config.json")
    text_config = config.get("text_config", config)
    return FolderIdentity(
        routing=routing_of(text_config),
        vocab_size=int(text_config.get("vocab_size") or 0),
        fingerprints=_fingerprints(folder),
    )


async def read_if_here(path: str) -> FolderIdentity:
    """What the folder at an engine's own `path` says; UNKNOWN_FOLDER if it is not on this machine or not readable."""
    if not path or not Path(path).is_absolute():
        return UNKNOWN_FOLDER
    try:
        return await asyncio.to_thread(read_folder, Path(path))
    except (OSError, ValueError) as error:
        logger.info("model folder %s cannot be read here: %s", path, error)
        return UNKNOWN_FOLDER


def routing_of(config: Mapping[str, Any]) -> RoutingShape | None:
    """The routing shape that a Hugging Face configuration names; None for a dense model."""
    num_experts = next((int(config[name]) for name in _EXPERT_COUNTS if config.get(name)), 0)
    if not num_experts or "num_hidden_layers" not in config or "num_experts_per_tok" not in config:
        return None
    return RoutingShape(int(config["num_hidden_layers"]), num_experts, int(config["num_experts_per_tok"]))


def _fingerprints(folder: Path) -> dict[str, str]:
    prints: dict[str, str] = {}
    tokenizer = folder / "tokenizer.json"
    if tokenizer.is_file():
        prints["tokenizer"] = hashlib.sha256(tokenizer.read_bytes()).hexdigest()
    template = _chat_template(folder)
    if template is not None:
        prints["template"] = hashlib.sha256(template.encode()).hexdigest()
    return prints


def _chat_template(folder: Path) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = _json(folder / "tokenizer_config.json").get("chat_template")
    return template if isinstance(template, str) else None


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    content = json.loads(file.read_text(encoding="utf-8"))
    return content if isinstance(content, dict) else {}
