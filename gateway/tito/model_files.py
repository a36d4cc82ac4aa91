"""What a model folder's JSON files say, without its weights: dimensions, context length, end and special tokens.

Promises: a file that is absent means "unknown"; one that is there but unreadable is a ConfigurationError in one line.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

from gateway.contracts.dimensions import ModelDimensions, dimensions_of, first_positive, with_nested
from gateway.contracts.errors import ConfigurationError
from gateway.contracts.generation import JsonValue

_CONTEXT_KEYS = ("max_position_embeddings", "max_sequence_length", "max_seq_len", "seq_length", "n_positions")


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """`dimensions` are unknown where config.json is absent; `context_length` is in tokens, 0 unknown."""

    dimensions: ModelDimensions
    context_length: int


def read_model_files(model_path: Path) -> ModelFiles:
    """Dimensions and context length of a model folder; raises ConfigurationError for a file that is not JSON."""
    config = read_json_object(model_path / "config.json")
    lengths = (first_positive(candidate, _CONTEXT_KEYS) for candidate in with_nested(config))
    return ModelFiles(dimensions_of(config), context_length=next(filter(None, lengths), 0))


def read_eos_entries(model_path: Path) -> tuple[int, ...]:
    """End token ids of generation_config.json, then config.json (nested text configurations too), without repeats."""
    entries: dict[int, None] = {}
    for file_name in ("generation_config.json", "config.json"):
        for config in with_nested(read_json_object(model_path / file_name)):
            value = config.get("eos_token_id")
            for token_id in value if isinstance(value, list) else [value]:
                if _is_integer(token_id):
                    entries[token_id] = None
    return tuple(entries)


def read_special_tokens(model_path: Path) -> dict[str, str]:
    """Named special tokens (`bos_token`, `eos_token`, …) → text, as chat templates see them.

    tokenizer_config.json decides; the older special_tokens_map.json fills what it leaves out.
    """
    named: dict[str, str] = {}
    for file_name in ("special_tokens_map.json", "tokenizer_config.json"):
        entries = read_json_object(model_path / file_name)
        extra = entries.get("extra_special_tokens")
        for name, value in (*entries.items(), *(extra.items() if isinstance(extra, dict) else ())):
            text = value.get("content") if isinstance(value, dict) else value
            if name.endswith("_token") and isinstance(text, str):
                named[name] = text
    return named


def read_json_object(file: Path) -> dict[str, JsonValue]:
    """A JSON object from `file`, {} if there is no such file; raises ConfigurationError for anything else."""
    try:
        value = json.loads(file.read_bytes())
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ConfigurationError(f"{file}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ConfigurationError(f"{file}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigurationError(f"{file}: expected a JSON object")
    return value


def _is_integer(value: JsonValue) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)
