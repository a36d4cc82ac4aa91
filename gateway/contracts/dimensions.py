"""A model's dimensions as its config.json names them, under the names that model families have for the same things."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from gateway.contracts.experts import RoutingShape

# The same facts under the names that model families give them, most specific first.
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
_NESTED_CONFIGS = ("text_config", "llm_config", "language_config", "thinker_config")


@dataclass(frozen=True, slots=True)
class ModelDimensions:
    """Sizes that two copies of one model share. 0 (and no `moe_layers`) is unknown; a dense model has no experts.

    num_layers: all decoder layers, as in routing rows. moe_layers: indices of those that route (a DeepSeek-like model
    begins with dense ones). num_experts: routed ones of a layer, top_k of them compute a token.

    >>> dimensions_of(
    ...     {
    ...         "num_hidden_layers": 4,
    ...         "n_routed_experts": 8,
    ...         "num_experts_per_tok": 2,
    ...         "first_k_dense_replace": 1,
    ...         "vocab_size": 400,
    ...     }
    ... )
    ModelDimensions(num_layers=4, moe_layers=(1, 2, 3), num_experts=8, top_k=2, vocab_size=400)
    """

    num_layers: int = 0
    moe_layers: tuple[int, ...] = ()
    num_experts: int = 0
    top_k: int = 0
    vocab_size: int = 0

    @property
    def routing(self) -> RoutingShape | None:
        """What is needed to read routing rows; None for a dense model or where something is unknown."""
        if not (self.num_layers and self.num_experts and self.top_k):
            return None
        return RoutingShape(self.num_layers, self.num_experts, self.top_k)

    def differences(self, other: ModelDimensions) -> tuple[tuple[str, str, str], ...]:
        """(name, our value, the other's) of every dimension that both know and that differs."""
        pairs: list[tuple[str, int | str, int | str]] = []
        if self.num_layers and other.num_layers:
            pairs += [
                ("layers", self.num_layers, other.num_layers),
                ("experts a layer", self.num_experts, other.num_experts),
                ("experts a token", self.top_k, other.top_k),
                ("layers with experts", _ranges(self.moe_layers), _ranges(other.moe_layers)),
            ]
        if self.vocab_size and other.vocab_size:
            pairs.append(("vocabulary", self.vocab_size, other.vocab_size))
        return tuple((name, str(ours), str(theirs)) for name, ours, theirs in pairs if ours != theirs)

    def __str__(self) -> str:
        experts = f"{self.top_k} of {self.num_experts} experts in layers {_ranges(self.moe_layers)}"
        parts = [f"{self.num_layers} layers"] if self.num_layers else []
        parts += [experts] if self.num_experts else []
        parts += [f"vocabulary {self.vocab_size}"] if self.vocab_size else []
        return ", ".join(parts) or "unknown"


UNKNOWN_DIMENSIONS = ModelDimensions()


def dimensions_of(config: Mapping[str, Any]) -> ModelDimensions:
    """What a config.json says, of the first nested text configuration that says it; unknown for an empty one."""
    candidates = list(with_nested(config))
    complete = (c for c in candidates if first_positive(c, _NUM_EXPERTS_KEYS) and first_positive(c, _NUM_LAYERS_KEYS))
    layered = (c for c in candidates if first_positive(c, _NUM_LAYERS_KEYS))
    chosen = next(complete, next(layered, config))
    num_layers = first_positive(chosen, _NUM_LAYERS_KEYS) or 0
    num_experts = first_positive(chosen, _NUM_EXPERTS_KEYS) or 0
    top_k = first_positive(chosen, _TOP_K_KEYS) or 0
    vocab_size = next((size for c in [chosen, *candidates] if (size := first_positive(c, ("vocab_size",)))), 0)
    if not (num_layers and num_experts and top_k):
        return ModelDimensions(num_layers=num_layers, vocab_size=vocab_size)
    return ModelDimensions(num_layers, _moe_layers(chosen, num_layers), num_experts, top_k, vocab_size)


def first_positive(config: Mapping[str, Any], keys: Iterable[str]) -> int | None:
    """The first positive integer among `keys`; a list (one entry a layer, as Hunyuan writes) counts by its largest."""
    for key in keys:
        value = config.get(key)
        if isinstance(value, list) and value and all(_is_integer(entry) for entry in value):
            value = max(value)
        if _is_integer(value) and value > 0:
            return int(value)
    return None


def with_nested(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """A configuration, then the text configurations inside it."""
    yield config
    for name in _NESTED_CONFIGS:
        nested = config.get(name)
        if isinstance(nested, dict):
            yield from with_nested(nested)


def _moe_layers(config: Mapping[str, Any], num_layers: int) -> tuple[int, ...]:
    """Layers that every rule in the configuration lets route; all where it has none."""
    return tuple(i for i in range(num_layers) if all(_rules(config, i, num_layers)))


def _rules(config: Mapping[str, Any], i: int, num_layers: int) -> Iterator[bool]:
    """What each rule that model families know says of layer `i`."""
    yield i >= _count(config, "first_k_dense_replace", 0)  # DeepSeek, GLM-4.5+, Kimi-K2, Ling, dots1
    yield i >= _count(config, "num_dense_layers", 0)  # AFMoE, LFM2-MoE
    yield i >= _count(config, "moe_layer_num_skipped", 0)  # Hunyuan
    yield i not in _listed(config, "mlp_only_layers", ())  # Qwen2/3-MoE
    yield (i + 1) % _count(config, "decoder_sparse_step", 1) == 0  # Qwen2/3-MoE
    yield (i + 1) % _count(config, "interleave_moe_layer_step", 1) == 0  # Llama 4
    yield i in _listed(config, "moe_layers", range(num_layers))  # Llama 4
    if "expert_layer_period" in config:  # Jamba
        yield i % _count(config, "expert_layer_period", 1) == _count(config, "expert_layer_offset", 0)
    if "moe_layer_interval" in config:  # Ernie 4.5
        last = _count(config, "moe_layer_end_index", num_layers - 1)
        yield _count(config, "moe_layer_start_index", 0) <= i <= (last if last >= 0 else num_layers - 1)
        yield (i + 1) % _count(config, "moe_layer_interval", 1) == 0
    frequency = config.get("moe_layer_freq")  # DeepSeek: a number; MiMo: 0 or 1 for each layer
    if isinstance(frequency, list) and len(frequency) == num_layers:
        yield bool(frequency[i])
    else:
        yield i % _count(config, "moe_layer_freq", 1) == 0
    kinds = config.get("mlp_layer_types")  # "dense" or "sparse" for each layer
    if isinstance(kinds, list) and len(kinds) == num_layers:
        yield kinds[i] != "dense"
    pattern = config.get("hybrid_override_pattern")  # Nemotron-H: a letter for each layer
    if isinstance(pattern, str) and len(pattern) == num_layers and "E" in pattern:
        yield pattern[i] == "E"


def _count(config: Mapping[str, Any], key: str, default: int) -> int:
    value = config.get(key)
    if not _is_integer(value) or (value == 0 and default == 1):  # a step of 0 is none
        return default
    return value


def _listed(config: Mapping[str, Any], key: str, default: Iterable[int]) -> frozenset[int]:
    value = config.get(key)
    return frozenset(value if isinstance(value, list) and all(map(_is_integer, value)) else default)


def _ranges(layers: tuple[int, ...]) -> str:
    """`1-3,5` for (1, 2, 3, 5), "none" for ()."""
    parts: list[list[int]] = []
    for layer in layers:
        if parts and parts[-1][1] == layer - 1:
            parts[-1][1] = layer
        else:
            parts.append([layer, layer])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in parts) or "none"


def _is_integer(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)
