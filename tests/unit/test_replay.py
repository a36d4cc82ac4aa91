"""Routing replay on tiny random models of many architectures (I10): bitwise, with gradient, failing closed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM

from gateway.contracts.errors import ExpertsMismatch, ReplayUnsupported
from trainer.replay.inject import RoutingReplay

NUM_EXPERTS, TOP_K, NUM_TOKENS = 8, 2, 12
ALL_VALID = torch.ones(NUM_TOKENS, dtype=torch.bool)

TINY: Mapping[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": NUM_EXPERTS,
    "num_local_experts": NUM_EXPERTS,
    "n_routed_experts": NUM_EXPERTS,
    "num_experts_per_tok": TOP_K,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LATENT_ATTENTION: Mapping[str, Any] = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "first_k_dense_replace": 1,
}
GROUPS_OF_FOUR: Mapping[str, Any] = {"n_group": 4, "topk_group": 2}
ONE_GROUP: Mapping[str, Any] = {"n_group": 1, "topk_group": 1}
LINEAR_ATTENTION: Mapping[str, Any] = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "shared_expert_intermediate_size": 16,
    "num_hidden_layers": 4,
}
ARCHITECTURES: Mapping[str, Mapping[str, Any]] = {
    "qwen3_moe": {},
    "qwen2_moe": {"shared_expert_intermediate_size": 16},
    "qwen3_next": LINEAR_ATTENTION,
    "qwen3_5_moe_text": LINEAR_ATTENTION,
    "mixtral": {},
    "olmoe": {},
    "flex_olmo": {},
    "gpt_oss": {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}},
    "granitemoe": {},
    "minimax": {},
    "minimax_m2": {},
    "ernie4_5_moe": {
        "moe_num_experts": NUM_EXPERTS,
        "moe_k": TOP_K,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": 2,
        "moe_num_shared_experts": 1,
    },
    "dots1": {**GROUPS_OF_FOUR, "first_k_dense_replace": 1, "n_shared_experts": 1},
    "deepseek_v2": {**LATENT_ATTENTION, **GROUPS_OF_FOUR, "topk_method": "group_limited_greedy"},
    "deepseek_v3": {**LATENT_ATTENTION, **GROUPS_OF_FOUR},
    "glm4_moe": {**ONE_GROUP, "first_k_dense_replace": 1},
    "glm4_moe_lite": {**LATENT_ATTENTION, **ONE_GROUP},
    "hunyuan_v1_moe": {"moe_topk": TOP_K},
    "jamba": {
        "mamba_d_state": 4,
        "mamba_d_conv": 4,
        "mamba_dt_rank": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "num_hidden_layers": 4,
    },
    "nemotron_h": {},
    "solar_open": ONE_GROUP,
    "exaone_moe": {**ONE_GROUP, "num_shared_experts": 1},
    "afmoe": {**ONE_GROUP, "num_dense_layers": 1},
    "axk1": {**LATENT_ATTENTION, **GROUPS_OF_FOUR},
}


def tiny_model(architecture: str, **changes: Any) -> Any:
    """A random model whose routers are not all zero (some types start so)."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture, **{**TINY, **ARCHITECTURES.get(architecture, {}), **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        if not parameter.detach().any():
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def input_ids() -> torch.Tensor:
    return torch.randint(3, TINY["vocab_size"], (1, NUM_TOKENS), generator=torch.Generator().manual_seed(1))


def logits(model: Any) -> torch.Tensor:
    return model(input_ids=input_ids(), use_cache=False).logits


def foreign_ids(num_layers: int) -> torch.Tensor:
    """Distinct random ids, uint8[N, L, K]."""
    order = torch.rand(NUM_TOKENS, num_layers, NUM_EXPERTS, generator=torch.Generator().manual_seed(2)).argsort(-1)
    return order[..., :TOP_K].to(torch.uint8)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_replaying_the_recorded_routing_is_bitwise_the_untouched_model(architecture: str) -> None:
    """I10, also for group-limited, biased, sigmoid and softmax-after-topk routers."""
    model = tiny_model(architecture)
    with torch.no_grad():
        untouched = logits(model)
        replay = RoutingReplay.install(model)
        with replay.recording() as record:
            recorded = logits(model)
        with replay.replaying(record.ids().to(torch.uint8), ALL_VALID) as check:
            replayed = logits(model)
    assert torch.equal(untouched, recorded)
    assert torch.equal(untouched, replayed)
    assert check.report().verified == check.report().replayed == NUM_TOKENS


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_foreign_routing_stays_finite_and_every_router_keeps_its_gradient(architecture: str) -> None:
    model = tiny_model(architecture)
    replay = RoutingReplay.install(model)
    with replay.replaying(foreign_ids(model.config.num_hidden_layers), ALL_VALID) as check:
        output = logits(model)
    output.log_softmax(-1)[..., 5].sum().backward()
    assert bool(output.isfinite().all())
    assert check.report().verified == NUM_TOKENS
    for site in replay.plan.routers:
        gradients = [p.grad for p in model.get_submodule(site.path).parameters() if p.grad is not None]
        assert max(float(gradient.abs().max()) for gradient in gradients) > 0, site


def test_rows_that_are_not_valid_keep_the_live_router_and_are_counted() -> None:
    """I9: nothing is invented for a row that was not recorded."""
    model = tiny_model("qwen3_moe")
    replay = RoutingReplay.install(model)
    with torch.no_grad():
        with replay.recording() as record:
            untouched = logits(model)
        ids = record.ids().to(torch.uint8)
        ids[::3] = 0
        valid = ALL_VALID.clone()
        valid[::3] = False
        with replay.replaying(ids, valid) as check:
            replayed = logits(model)
    assert torch.equal(untouched, replayed)
    report = check.report()
    assert (report.total, report.fallback, report.replayed, report.verified) == (12, 4, 8, 8)


def test_ids_above_255_are_replayed_from_uint16() -> None:
    model = tiny_model("qwen3_moe", num_experts=300, num_local_experts=300, n_routed_experts=300)
    replay = RoutingReplay.install(model)
    ids = torch.arange(NUM_TOKENS * 3 * TOP_K).reshape(NUM_TOKENS, 3, TOP_K) + 228
    with torch.no_grad(), replay.replaying(ids.to(torch.uint16), ALL_VALID) as check:
        logits(model)
    assert int(ids.max()) == 299
    assert check.report().verified == NUM_TOKENS


def test_forwards_outside_of_replay_use_the_live_router() -> None:
    """Reference and teacher forwards are never replayed."""
    model = tiny_model("qwen3_moe")
    replay = RoutingReplay.install(model)
    with torch.no_grad():
        before = logits(model)
        with replay.replaying(foreign_ids(3), ALL_VALID):
            foreign = logits(model)
        after = logits(model)
        replay.remove()
        removed = logits(model)
    assert torch.equal(before, after)
    assert torch.equal(before, removed)
    assert not torch.equal(before, foreign)


def test_two_installs_on_one_model_do_not_disturb_each_other_after_removal() -> None:
    model = tiny_model("qwen3_moe")
    RoutingReplay.install(model).remove()
    replay = RoutingReplay.install(model)
    with torch.no_grad(), replay.replaying(foreign_ids(3), ALL_VALID) as check:
        logits(model)
    assert check.report().verified == NUM_TOKENS


def test_recomputed_layers_get_the_ids_of_their_own_forward_when_microbatches_interleave() -> None:
    """Two forwards with different ids, then their backwards: gradients as without recomputation."""
    routings = [foreign_ids(3), foreign_ids(3).flip(0)]

    def gradients(*, recompute: bool) -> list[torch.Tensor]:
        model = tiny_model("qwen3_moe")
        replay = RoutingReplay.install(model)
        if recompute:
            for layer in model.model.layers:
                layer.forward = _recomputing(layer.forward, replay)
        outputs = []
        for ids in routings:
            with replay.replaying(ids, ALL_VALID):
                outputs.append(logits(model).log_softmax(-1)[..., 5].sum())
        for output in outputs:
            output.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain, recomputed = gradients(recompute=False), gradients(recompute=True)
    assert len(plain) == len(recomputed)
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))


def _recomputing(forward: Any, replay: RoutingReplay) -> Any:
    def run(hidden: torch.Tensor, **kwargs: Any) -> Any:
        return checkpoint(
            lambda x: forward(x, **kwargs), hidden, use_reentrant=False, context_fn=replay.checkpoint_contexts
        )

    return run


def test_a_dense_model_is_refused() -> None:
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(
            "qwen3", **{k: v for k, v in TINY.items() if "expert" not in k and k != "moe_intermediate_size"}
        )
    )
    with pytest.raises(ReplayUnsupported, match=r"replay\.mode = off"):
        RoutingReplay.install(model)


def test_a_router_that_selects_without_topk_is_refused_not_ignored() -> None:
    """PhiMoE's sparse mixer has no top-k: replay would silently do nothing."""
    with pytest.raises(ReplayUnsupported, match="layers \\[0, 1, 2\\] own experts"):
        RoutingReplay.install(tiny_model("phimoe"))


def test_a_layer_whose_router_was_bypassed_is_refused() -> None:
    model = tiny_model("qwen3_moe")
    block = model.model.layers[1].mlp
    block.forward = lambda hidden: hidden  # its experts are still there, but nothing selects them
    with pytest.raises(ReplayUnsupported, match="seen in layers \\[0, 2\\]"):
        RoutingReplay.install(model)


def test_ids_of_another_shape_or_batch_are_refused() -> None:
    model = tiny_model("qwen3_moe")
    replay = RoutingReplay.install(model)
    with pytest.raises(ExpertsMismatch), replay.replaying(foreign_ids(2), ALL_VALID):
        logits(model)
    with (
        pytest.raises(ExpertsMismatch, match="12 positions, 11 rows"),
        replay.replaying(foreign_ids(3)[1:], ALL_VALID[1:]),
    ):
        logits(model)
