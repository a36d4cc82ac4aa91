"""What a model folder's JSON files say, without its weights: routing shape, context length, end and special tokens.

Promises: a file that is absent means "unknown"; one that is there but unreadable is a ConfigurationError in one line.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

from gateway.contracts.errors import ConfigurationError
from gateway.contracts.experts import RoutingShape
from gateway.contracts.generation import JsonValue

# The same three facts under the names that model families give them, most specific first.
_NUM_EXPERTS_KEYS = (
    "num_experts",  # Qwen2/3-MoE, OLMoE, Hunyuan, Llama 4 (beside num_local_experts)
    "n_routed_experts",  # DeepSeek V2/V3, GLM-4.5+, Kimi-K2, Ling
    "num_local_experts",  # Mixtral, gpt-oss, MiniMax, Granite-MoE
    "moe_num_experts",  # Ernie 4.5, Step
    "num_routed_experts",
)
_TOP_K_KEYS = (
    "num_experts_per_tok",
    "experts_per_token",  # gpt-oss beside num_experts_per_tok
    "num_experts_per_token",
    "moe_topk",  # Hunyuan, LongCat
    "moe_k",  # Ernie 4.5
    "top_k_experts",  # Gemma MoE
    "moe_top_k",
)
_NUM_LAYERS_KEYS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
_CONTEXT_KEYS = ("max_position_embeddings", "max_sequence_length", "max_seq_len", "seq_length", "n_positions")
_NESTED_CONFIGS = ("text_config", "llm_config", "language_config", "thinker_config")


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """`routing` is None for a dense model or where config.json is absent; `context_length` is in tokens, 0 unknown."""

    routing: RoutingShape | None
    context_length: int


def read_model_files(model_path: Path) -> ModelFiles:
    """Routing shape and context length of a model folder; raises ConfigurationError for a file that is not JSON."""
    config = read_json_object(model_path / "config.json")
    return ModelFiles(routing=_routing_shape(config), context_length=_first_integer(config, _CONTEXT_KEYS) or 0)


def read_eos_entries(model_path: Path) -> tuple[int, ...]:
    """End token ids of generation_config.json, then config.json (nested text configurations too), without repeats."""
    entries: dict[int, None] = {}
    for file_name in ("generation_config.json", "config.json"):
        for config in _with_nested(read_json_object(model_path / file_name)):
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


def _routing_shape(config: Mapping[str, JsonValue]) -> RoutingShape | None:
    for candidate in _with_nested(config):
        num_experts = _own_integer(candidate, _NUM_EXPERTS_KEYS)
        top_k = _own_integer(candidate, _TOP_K_KEYS)
        num_layers = _own_integer(candidate, _NUM_LAYERS_KEYS)
        if num_experts and top_k and num_layers:
            return RoutingShape(num_layers=num_layers, num_experts=num_experts, top_k=top_k)
    return None


def _first_integer(config: Mapping[str, JsonValue], keys: tuple[str, ...]) -> int | None:
    found = (_own_integer(candidate, keys) for candidate in _with_nested(config))
    return next((value for value in found if value), None)


def _own_integer(config: Mapping[str, JsonValue], keys: tuple[str, ...]) -> int | None:
    """The first positive integer among `keys`; a list (one entry a layer, as Hunyuan writes) counts by its largest."""
    for key in keys:
        value = config.get(key)
        if isinstance(value, list) and value and all(_is_integer(entry) for entry in value):
            value = max(value)
        if _is_integer(value) and value > 0:
            return int(value)
    return None


def _with_nested(config: Mapping[str, JsonValue]) -> Iterator[Mapping[str, JsonValue]]:
    yield config
    for name in _NESTED_CONFIGS:
        nested = config.get(name)
        if isinstance(nested, dict):
            yield from _with_nested(nested)


def _is_integer(value: JsonValue) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)
