"""A model of a folder's architecture that is small enough to prove replay on here.

A model of up to `_SMALL` parameters is taken as it is, with its weights where the folder has them. A larger one is
built from its config with random weights: a first few layers that hold every kind of layer, narrow, with the same
routers and the same numbers of experts, of groups and of experts a token. What replay depends on
is that code, not the weights.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from gateway.contracts.errors import ConfigurationError
from trainer.replay.sites import decoder_layer

_SMALL = 50_000_000
_LARGEST_BUILT = 1_000_000_000
_NARROW: Mapping[str, int] = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16,
    "expert_ffn_hidden_size": 16,
    "ffn_hidden_size": 64,
    "shared_intermediate_size": 16,
    "vocab_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "index_n_heads": 4,
    "index_head_dim": 16,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_FEWER: Mapping[str, int] = {"moe_intermediate_size": 16, "intermediate_size": 64, "vocab_size": 512}
_BUILD_ERRORS = (
    RuntimeError,
    ValueError,
    TypeError,
    AssertionError,
    IndexError,
    KeyError,
    ZeroDivisionError,
    StrictDataclassError,
)
"""What transformers raises for sizes that do not fit one another."""


@dataclass(frozen=True, slots=True)
class SmallModel:
    """A model to try replay on, in words how it came from the folder, and how many decoder layers the folder's has."""

    model: Any
    origin: str
    num_layers: int


def small_model(folder: Path) -> SmallModel:
    """Raises ConfigurationError for a folder from which no causal language model can be built here."""
    try:
        config: Any = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigurationError(f"{folder}: transformers cannot read its config: {error}") from error
    try:
        with torch.device("meta"):
            whole = _built(config)
    except _BUILD_ERRORS as error:
        raise ConfigurationError(f"{folder}: transformers cannot build what its config says: {error}") from error
    modules = dict(whole.named_modules())
    layers = (decoder_layer(path, modules) for path in modules)
    num_whole = max((layer + 1 for layer in layers if layer is not None), default=0)
    num_parameters = sum(parameter.numel() for parameter in whole.parameters())
    if num_parameters <= _SMALL:
        if any(folder.glob("*.safetensors")):
            model = type(whole).from_pretrained(folder, dtype=torch.float32, local_files_only=True)
            return SmallModel(model.eval(), "the folder's own weights", num_whole)
        return SmallModel(_random(config), "random weights of its full size", num_whole)
    num_layers = _layers_of_every_kind(whole)
    problems = []
    for sizes, words in ((_NARROW, "narrow"), (_FEWER, "with small experts")):
        try:
            reduced = _reduced(config, num_layers, sizes)
            with torch.device("meta"):
                count = sum(parameter.numel() for parameter in _built(reduced).parameters())
            if count > _LARGEST_BUILT:
                problems.append(f"{words}: {count:,} parameters")
                continue
            model = _random(reduced)
            with torch.no_grad():
                model(input_ids=torch.arange(1, 6)[None], use_cache=False)
        except _BUILD_ERRORS as error:
            problems.append(f"{words}: {error}")
            continue
        origin = f"random weights of its first {num_layers} layers, {words}, with all its experts"
        return SmallModel(model, origin, num_whole)
    raise ConfigurationError(f"{folder}: too large to try replay on, and it could not be made smaller: {problems}")


def _built(config: Any) -> Any:
    for kind in (AutoModelForCausalLM, AutoModelForImageTextToText):
        if type(config) in kind._model_mapping:
            return kind.from_config(config, dtype=torch.float32)
    raise ConfigurationError(f"transformers has no causal language model {config.model_type}")


def _random(config: Any) -> Any:
    """Random weights; those that start as zero too, as a router of zeros chooses nothing."""
    torch.manual_seed(0)
    model = _built(config).eval()
    for parameter in model.parameters():
        if not parameter.detach().any():
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def _layers_of_every_kind(model: nn.Module) -> int:
    """How many first layers show every kind of layer, and one more."""
    modules = dict(model.named_modules())
    kinds: dict[int, set[str]] = {}
    for path, module in modules.items():
        layer = decoder_layer(path, modules)
        if layer is not None:
            kinds.setdefault(layer, set()).add(type(module).__name__)
    first_of_kind = {frozenset(names): layer for layer, names in sorted(kinds.items(), reverse=True)}
    return min(max(first_of_kind.values(), default=0) + 2, max(kinds, default=0) + 1)


def _reduced(config: Any, num_layers: int, sizes: Mapping[str, int]) -> Any:
    values = copy.deepcopy(config).to_dict()
    text_name = next((name for name in config.sub_configs if getattr(config, name) is config.get_text_config()), None)
    text = values if text_name is None else values[text_name]
    all_layers = config.get_text_config().num_hidden_layers
    for name, value in list(text.items()):
        if isinstance(value, list) and len(value) == all_layers:
            text[name] = value[:num_layers]
    for name, size in sizes.items():
        if isinstance(text.get(name), int):
            text[name] = min(size, text[name])
    text["num_hidden_layers"] = num_layers
    if sizes is _NARROW:
        _fit(text)
    for name, value in text.items():
        if name.endswith("_token_id") and isinstance(value, int | list):
            text[name] = 0
    for name in config.sub_configs:
        if name != text_name and isinstance(values.get(name), dict):
            values[name] |= {key: 1 for key in ("num_hidden_layers", "depth") if key in values[name]}
    values.pop("quantization_config", None)
    return type(config).from_dict(values)


def _fit(text: dict[str, Any]) -> None:
    """Sizes that follow from others."""
    if text.get("kv_lora_rank"):
        text.pop("qk_head_dim", None)
        if isinstance(text.get("head_dim"), int):
            text["head_dim"] = text["qk_rope_head_dim"]
    if "mamba_n_heads" in text and "mamba_d_head" in text:
        text["mamba_n_heads"] = 8
        text["mamba_d_head"] = text.get("mamba_expand", 2) * text["hidden_size"] // 8
