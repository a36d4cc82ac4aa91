"""Routing replay on tiny random models of every architecture of transformers that it supports (I10)."""

from __future__ import annotations

import pytest
import torch

from gateway.contracts.errors import ReplayUnsupported
from tests.tiny_moe import ARCHITECTURES, NESTED, NUM_TOKENS, SLOW, foreign_rows, logits, tiny_model
from trainer.replay.inject import RoutingReplay

EVERY = [
    pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in sorted({*ARCHITECTURES, *NESTED})
]


@pytest.mark.parametrize("architecture", EVERY)
def test_replay_is_bitwise_and_foreign_experts_stay_finite_with_gradient(architecture: str) -> None:
    """I10, for group-limited, biased, sigmoid, softmax-after-topk, sparse-mixer and zero-expert routers alike."""
    model = tiny_model(architecture)
    with torch.no_grad():
        untouched = logits(model)
        replay = RoutingReplay.install(model)
        with replay.recording() as record:
            recorded = logits(model)
        with replay.replaying(record.rows()) as check:
            replayed = logits(model)
    num_rows = NUM_TOKENS * len(replay.plan.routers)
    assert torch.equal(untouched, recorded)
    assert torch.equal(untouched, replayed)
    assert check.report().verified == check.report().total == num_rows

    with replay.replaying(foreign_rows(replay)) as check:
        output = logits(model)
    output.log_softmax(-1)[..., 5].sum().backward()
    assert not torch.equal(output.detach(), untouched)
    assert bool(output.isfinite().all())
    assert check.report().verified == num_rows
    for site in replay.plan.routers:
        named = model.get_submodule(site.path).named_parameters()
        gradients = [p.grad for name, p in named if p.grad is not None and "experts" not in name]
        assert max(float(gradient.abs().max()) for gradient in gradients) > 0, site


@pytest.mark.parametrize("architecture", ["deepseek_v2", "deepseek_v3", "dots1", "axk1"])
def test_an_expert_outside_of_the_groups_chosen_live_keeps_its_live_weight_and_gradient(architecture: str) -> None:
    """Weights come from unmasked scores: of each replayed expert by itself, the router's row has gradient."""
    model = tiny_model(architecture)
    replay = RoutingReplay.install(model)
    rows = foreign_rows(replay, seed=5)
    site = replay.plan.routers[0]
    router = model.get_submodule(site.path)
    weights = []
    handle = router.register_forward_hook(lambda _module, _args, output: weights.append(output[1]))
    with replay.replaying(rows):
        logits(model)
    handle.remove()
    assert bool((weights[0].abs() > 0).all())
    weights[0].log().sum().backward()
    used = torch.from_numpy(rows.chunks[0][:, site.layer].astype("int64")).unique()
    assert bool((router.weight.grad[used].abs().sum(dim=1) > 0).all())


@pytest.mark.parametrize(
    ("architecture", "changes", "reason"),
    [
        ("doge", {"is_moe": True, "num_experts": 64}, "products of two smaller selections"),
        ("jetmoe", {}, "attention chooses experts too"),
    ],
)
def test_architectures_whose_choice_fits_no_row_are_refused_with_the_reason(
    architecture: str, changes: dict[str, object], reason: str
) -> None:
    with pytest.raises(ReplayUnsupported, match=reason):
        RoutingReplay.install(tiny_model(architecture, **changes))
