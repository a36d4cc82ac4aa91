"""What a model folder says about itself: dimensions, and fingerprints of tokenizer and chat template.

And what an engine says of itself where it says the same things (`verbatim engine` does): that counts before its folder.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from gateway.contracts.dimensions import UNKNOWN_DIMENSIONS, ModelDimensions, dimensions_of
from gateway.contracts.errors import EngineProtocolError, IdentityMismatch
from gateway.contracts.experts import RoutingShape
from gateway.contracts.fingerprints import template_sha256, tokenizer_sha256

logger = logging.getLogger(__name__)

_TOKENIZER_KEY, _TEMPLATE_KEY, _DIMENSIONS_KEY = "tokenizer_sha256", "chat_template_sha256", "dimensions"
_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@dataclass(frozen=True, slots=True)
class FolderIdentity:
    """What is not known is absent: a folder without config.json has unknown dimensions.

    Keys of `fingerprints`: "tokenizer" and "template", as `gateway.contracts.fingerprints` has them. `told`: which of
    these and "dimensions" the engine itself said, and not its folder.
    """

    dimensions: ModelDimensions = UNKNOWN_DIMENSIONS
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    told: tuple[str, ...] = ()

    @property
    def routing(self) -> RoutingShape | None:
        """The routing shape; None for a dense model or an unknown one."""
        return self.dimensions.routing


UNKNOWN_FOLDER = FolderIdentity()


def read_folder(folder: Path) -> FolderIdentity:
    """Read what is there, once for each state of its files; a folder that is on another machine gives UNKNOWN_FOLDER.

    Raises OSError and ValueError for files that cannot be read, IdentityMismatch for a tokenizer.json that is none.
    """
    return _read_folder(folder, tuple(_state(folder / name) for name in _FILES))


async def read_if_here(path: str) -> FolderIdentity:
    """What the folder at an engine's own `path` says; UNKNOWN_FOLDER if it is not on this machine or not readable."""
    if not path or not Path(path).is_absolute():
        return UNKNOWN_FOLDER
    try:
        return await asyncio.to_thread(read_folder, Path(path))
    except (OSError, ValueError, IdentityMismatch) as error:
        logger.info("model folder %s cannot be read here: %s", path, error)
        return UNKNOWN_FOLDER


def told_information(folder: FolderIdentity) -> dict[str, Any]:
    """What an engine of ours says of itself in `/model_info`, on top of SGLang's fields."""
    dimensions = folder.dimensions
    return {
        _TOKENIZER_KEY: folder.fingerprints.get("tokenizer"),
        _TEMPLATE_KEY: folder.fingerprints.get("template"),
        _DIMENSIONS_KEY: {
            "num_hidden_layers": dimensions.num_layers,
            "moe_layers": list(dimensions.moe_layers),
            "num_experts": dimensions.num_experts,
            "num_experts_per_tok": dimensions.top_k,
            "vocab_size": dimensions.vocab_size,
        },
    }


def with_told(folder: FolderIdentity, information: Mapping[str, Any], *, named: str) -> FolderIdentity:
    """A folder's identity, under what the engine itself says in `/model_info`; raises EngineProtocolError."""
    told: list[str] = []
    prints = dict(folder.fingerprints)
    for part, key in (("tokenizer", _TOKENIZER_KEY), ("template", _TEMPLATE_KEY)):
        value = information.get(key)
        if isinstance(value, str) and value:
            prints[part] = value.lower()
            told.append(part)
    dimensions, said = folder.dimensions, information.get(_DIMENSIONS_KEY)
    if isinstance(said, dict):
        try:
            dimensions = _told_dimensions(said)
        except (KeyError, TypeError, ValueError) as error:
            raise EngineProtocolError(f"{named}: {_DIMENSIONS_KEY} {said} of its /model_info is unreadable") from error
        told.append("dimensions")
    return replace(folder, dimensions=dimensions, fingerprints=prints, told=tuple(told))


def routing_of(config: Mapping[str, Any]) -> RoutingShape | None:
    """The routing shape that a Hugging Face configuration names; None for a dense model."""
    return dimensions_of(config).routing


def _told_dimensions(said: Mapping[str, Any]) -> ModelDimensions:
    return ModelDimensions(
        num_layers=int(said["num_hidden_layers"]),
        moe_layers=tuple(int(layer) for layer in said["moe_layers"]),
        num_experts=int(said["num_experts"]),
        top_k=int(said["num_experts_per_tok"]),
        vocab_size=int(said["vocab_size"]),
    )


def _state(file: Path) -> tuple[int, int] | None:
    try:
        status = file.stat()
    except FileNotFoundError:
        return None
    return status.st_mtime_ns, status.st_size


# A large tokenizer takes a second to read, and engines are asked who they are every few seconds.
@lru_cache(maxsize=32)
def _read_folder(folder: Path, _state: tuple[tuple[int, int] | None, ...]) -> FolderIdentity:
    return FolderIdentity(dimensions=dimensions_of(_json(folder / "config.json")), fingerprints=_fingerprints(folder))


def _fingerprints(folder: Path) -> dict[str, str]:
    prints: dict[str, str] = {}
    if (folder / "tokenizer.json").is_file():
        prints["tokenizer"] = tokenizer_sha256(_json(folder / "tokenizer.json"))
    template = _chat_template(folder)
    if template is not None:
        prints["template"] = template_sha256(template)
    return prints


def _chat_template(folder: Path) -> str | None:
    """The default template's text."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_bytes().decode()
    template = _json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):  # several, by name
        template = {named.get("name"): named.get("template") for named in template if isinstance(named, dict)}
    if isinstance(template, dict):
        template = template.get("default")
    return template if isinstance(template, str) else None


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    content = json.loads(file.read_text(encoding="utf-8"))
    return content if isinstance(content, dict) else {}
