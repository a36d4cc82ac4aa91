"""Small random mixture-of-experts checkpoints that transformers, SGLang and vLLM serve on a CPU.

Weights are larger than usual, so that log-probs of neighbouring tokens and rows differ enough for a mistake to show.
Attention heads have the 32 dimensions that vLLM wants on a CPU; embeddings are not tied, which SGLang would overlook.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PretrainedConfig
from transformers.models.glm4_moe import Glm4MoeConfig
from transformers.models.granitemoe import GraniteMoeConfig
from transformers.models.mixtral import MixtralConfig
from transformers.models.olmoe import OlmoeConfig
from transformers.models.qwen2_moe import Qwen2MoeConfig
from transformers.models.qwen3_moe import Qwen3MoeConfig

from benchmarks.models.words import SENTENCES, THOUGHTS
from trainer.recipes.checkpoint import CHAT_TEMPLATE_FILE, END_OF_TEXT, TURN_END, train_tokenizer

HEAD_SIZE = 32


@dataclass(frozen=True, slots=True)
class MoeShape:
    """Of a model to be made. `scale`: standard deviation of its random weights."""

    num_layers: int = 4
    hidden_size: int = 128
    num_experts: int = 8
    top_k: int = 2
    expert_size: int = 64
    scale: float = 0.08
    vocab_size: int = 512
    context_length: int = 2048


WIDE = MoeShape(num_layers=8, num_experts=32, top_k=4, scale=0.12)
"""Eight layers that choose 4 of 32 experts: many near-ties, and a gap of the size that real models have."""


def _qwen3(shape: MoeShape, common: Mapping[str, Any]) -> PretrainedConfig:
    sizes = {"num_experts": shape.num_experts, "moe_intermediate_size": shape.expert_size, "head_dim": HEAD_SIZE}
    return Qwen3MoeConfig(**common, **sizes, norm_topk_prob=True)


def _qwen2(shape: MoeShape, common: Mapping[str, Any]) -> PretrainedConfig:
    """A shared expert behind a gate of its own; gates are not renormalised."""
    sizes = {"num_experts": shape.num_experts, "moe_intermediate_size": shape.expert_size}
    return Qwen2MoeConfig(**common, **sizes, shared_expert_intermediate_size=shape.expert_size, norm_topk_prob=False)


def _mixtral(shape: MoeShape, common: Mapping[str, Any]) -> PretrainedConfig:
    sizes = {"num_local_experts": shape.num_experts, "sliding_window": None, "head_dim": HEAD_SIZE}
    return MixtralConfig(**(common | {"intermediate_size": shape.expert_size}), **sizes)


def _olmoe(shape: MoeShape, common: Mapping[str, Any]) -> PretrainedConfig:
    """Queries and keys are normalised over all heads, of which there are as many keys as queries; gates are not
    renormalised."""
    sizes = {"intermediate_size": shape.expert_size, "num_key_value_heads": common["num_attention_heads"]}
    return OlmoeConfig(**(common | sizes), num_experts=shape.num_experts)


def _granite(shape: MoeShape, common: Mapping[str, Any]) -> PretrainedConfig:
    """Softmax over the chosen logits, and multipliers everywhere."""
    scales = {"embedding_multiplier": 1.5, "residual_multiplier": 0.7, "logits_scaling": 0.8}
    experts = {"num_local_experts": shape.num_experts}
    return GraniteMoeConfig(**(common | {"intermediate_size": shape.expert_size}), **experts, **scales)


def _glm4(shape: MoeShape, common: Mapping[str, Any]) -> PretrainedConfig:
    """Sigmoid scores, a correction bias for the choice only, a dense first layer, a shared expert."""
    return Glm4MoeConfig(
        **common,
        n_routed_experts=shape.num_experts,
        n_shared_experts=1,
        moe_intermediate_size=shape.expert_size,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
        norm_topk_prob=True,
        routed_scaling_factor=1.5,
        head_dim=HEAD_SIZE,
        use_qk_norm=True,
    )


FAMILIES: Mapping[str, Callable[[MoeShape, Mapping[str, Any]], PretrainedConfig]] = {
    "qwen3_moe": _qwen3,
    "qwen2_moe": _qwen2,
    "mixtral": _mixtral,
    "olmoe": _olmoe,
    "granitemoe": _granite,
    "glm4_moe": _glm4,
}
"""Architectures that can be made, by transformers' name."""


def make_moe(folder: Path, family: str, *, seed: int, shape: MoeShape) -> Path:
    """Write config, random float32 weights, tokenizer and chat template; the same arguments give the same bytes."""
    folder.mkdir(parents=True)
    tokenizer = train_tokenizer([*SENTENCES, *THOUGHTS] * 3, vocab_size=shape.vocab_size)
    tokenizer.chat_template = CHAT_TEMPLATE_FILE.read_text()
    tokenizer.save_pretrained(folder)
    end_of_text, turn_end = (tokenizer.vocab[token] for token in (END_OF_TEXT, TURN_END))
    num_heads = shape.hidden_size // HEAD_SIZE
    common = {
        "vocab_size": len(tokenizer),
        "hidden_size": shape.hidden_size,
        "intermediate_size": 2 * shape.hidden_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": max(num_heads // 2, 1),
        "num_experts_per_tok": shape.top_k,
        "max_position_embeddings": shape.context_length,
        "initializer_range": shape.scale,
        "router_aux_loss_coef": 0.0,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": turn_end,
        "pad_token_id": end_of_text,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(FAMILIES[family](shape, common), dtype=torch.float32)
        _randomise_constants(model)
    model.generation_config = GenerationConfig(eos_token_id=[turn_end, end_of_text], pad_token_id=end_of_text)
    model.save_pretrained(folder)
    _name_experts_as_published(folder / "config.json")
    return folder


def perturbed_routers(folder: Path, changed: Path, *, noise: float, seed: int) -> Path:
    """The model of `folder` with its routers' weights off by `noise` of their standard deviation, in `changed`."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for path, weight in model.named_parameters():
            if path.endswith(("mlp.gate.weight", "router.weight", "router.layer.weight")):
                weight += noise * weight.std() * torch.randn(weight.shape, generator=generator)
    model.save_pretrained(changed)
    for file in folder.iterdir():
        if not (changed / file.name).exists():
            (changed / file.name).write_bytes(file.read_bytes())
    _name_experts_as_published(changed / "config.json")
    return changed


def _randomise_constants(model: torch.nn.Module) -> None:
    """What begins as zeros or ones, and would hide where it is applied: correction biases and biases."""
    with torch.no_grad():
        for path, values in [*model.named_parameters(), *model.named_buffers()]:
            if path.endswith(("e_score_correction_bias", "proj.bias")):
                values.copy_(0.05 * torch.randn(values.shape))


def _name_experts_as_published(file: Path) -> None:
    """Published checkpoints call the number of experts `num_experts`; transformers 5 writes `num_local_experts`."""
    config = json.loads(file.read_text())
    if "num_local_experts" in config and config["model_type"] in ("qwen3_moe", "qwen2_moe", "olmoe"):
        config["num_experts"] = config["num_local_experts"]
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
