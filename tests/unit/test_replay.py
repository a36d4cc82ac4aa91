"""Routing replay's semantics: what is replayed and what is not, recomputation, interleaving, counts (I10)."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM

from gateway.contracts.errors import ExpertsMismatch, ReplayUnsupported
from gateway.contracts.experts import RoutingShape
from tests.tiny_moe import NUM_TOKENS, TINY, TOP_K, foreign_rows, input_ids, logits, tiny_model
from trainer.replay.inject import RoutingReplay
from trainer.replay.padding import padding_rows
from trainer.replay.rows import RoutingRows
from trainer.replay.verify import RoutingReport


def with_validity(rows: RoutingRows, valid_N: np.ndarray) -> RoutingRows:
    ids_NLK = np.concatenate(rows.chunks).copy()
    ids_NLK[~valid_N] = 0
    return RoutingRows.of(ids_NLK, np.repeat(valid_N[:, None], ids_NLK.shape[1], axis=1))


def recorded(model: Any, replay: RoutingReplay, ids: torch.Tensor | None = None) -> RoutingRows:
    with torch.no_grad(), replay.recording() as record:
        logits(model, ids)
    return record.rows()


def loss(model: Any, ids: torch.Tensor | None = None) -> torch.Tensor:
    return logits(model, ids).log_softmax(-1)[..., 5].sum()


def gradients(model: Any) -> list[torch.Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def test_rows_that_are_not_valid_keep_the_live_router_and_are_counted() -> None:
    """I9: nothing is invented for a row that was not recorded."""
    model = tiny_model("qwen3_moe")
    replay = RoutingReplay.install(model)
    valid = np.ones(NUM_TOKENS, dtype=np.bool_)
    valid[::3] = False
    with torch.no_grad():
        untouched = logits(model)
        with replay.replaying(with_validity(recorded(model, replay), valid)) as check:
            replayed = logits(model)
    assert torch.equal(untouched, replayed)
    assert check.report() == RoutingReport(total=36, replayed=24, verified=24, fallback=12)


def test_validity_is_by_layer() -> None:
    """A row that is bad in one layer is replayed in the others."""
    model = tiny_model("qwen3_moe")
    replay = RoutingReplay.install(model)
    foreign = foreign_rows(replay)
    valid_NL = np.ones((NUM_TOKENS, 3), dtype=np.bool_)
    valid_NL[4, 1] = False
    with torch.no_grad(), replay.replaying(RoutingRows.of(foreign.chunks[0], valid_NL)) as check:
        logits(model)
    assert check.report() == RoutingReport(total=36, replayed=35, verified=35, fallback=1)


def test_ids_above_255_are_replayed_from_uint16() -> None:
    model = tiny_model("qwen3_moe", num_experts=300, num_local_experts=300, n_routed_experts=300)
    replay = RoutingReplay.install(model)
    rows = foreign_rows(replay)
    assert rows.chunks[0].dtype == np.uint16
    assert rows.largest_id() > 255
    assert recorded(model, replay).chunks[0].dtype == np.uint16
    with torch.no_grad(), replay.replaying(rows) as check:
        logits(model)
    assert check.report().verified == 36


def test_forwards_outside_of_replay_use_the_live_router() -> None:
    """Reference and teacher forwards are never replayed."""
    model = tiny_model("qwen3_moe")
    with torch.no_grad():
        before = logits(model)
        replay = RoutingReplay.install(model)
        with replay.replaying(foreign_rows(replay)):
            foreign = logits(model)
        after = logits(model)
        replay.remove()
        removed = logits(model)
    assert torch.equal(before, after)
    assert torch.equal(before, removed)
    assert not torch.equal(before, foreign)


def test_installing_again_after_removal_works_as_the_first_time() -> None:
    model = tiny_model("qwen3_moe")
    RoutingReplay.install(model).remove()
    replay = RoutingReplay.install(model)
    with torch.no_grad(), replay.replaying(foreign_rows(replay)) as check:
        logits(model)
    assert check.report().verified == 36


def test_a_live_router_is_compared_with_recorded_sets_whatever_their_order() -> None:
    model = tiny_model("qwen3_moe")
    replay = RoutingReplay.install(model)
    rows = recorded(model, replay)
    ids = rows.chunks[0].copy()
    ids[0, 0] = ids[0, 0, ::-1]  # another order is the same set
    ids[3, 1, 0] = next(e for e in range(8) if e not in ids[3, 1])
    valid = np.ones((NUM_TOKENS, 3), dtype=np.bool_)
    valid[7, 2] = False
    with torch.no_grad():
        untouched = logits(model)
        with replay.comparing(RoutingRows.of(ids, valid)) as comparison:
            live = logits(model)
    assert torch.equal(live, untouched)
    assert comparison.report() == RoutingReport(compared=35, flipped=1)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_layers_that_transformers_checkpoints_are_recomputed_with_their_own_routing(use_reentrant: bool) -> None:
    """Two micro-batches with different rows, both contexts closed before either backward."""

    def run(*, recompute: bool) -> list[torch.Tensor]:
        model = tiny_model("qwen3_moe").train()
        replay = RoutingReplay.install(model)
        if recompute:
            model.enable_input_require_grads()
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": use_reentrant})
        losses, checks = [], []
        for seed in (2, 3):
            with replay.replaying(foreign_rows(replay, seed=seed)) as check:
                losses.append(loss(model))
            checks.append(check)
        for each in reversed(losses):
            each.backward()
        assert all(check.report().verified == 36 for check in checks)
        return gradients(model)

    plain, recomputed = run(recompute=False), run(recompute=True)
    assert len(plain) == len(recomputed)
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))


@pytest.mark.parametrize("by", ["context_fn", "bound"])
def test_own_checkpoint_calls_keep_the_routing_of_their_forward(by: str) -> None:
    def run(*, recompute: bool) -> list[torch.Tensor]:
        model = tiny_model("qwen3_moe")
        replay = RoutingReplay.install(model)
        for layer in model.model.layers if recompute else ():
            layer.forward = _recomputing(layer.forward, replay, by)
        losses = []
        for seed in (2, 3):
            with replay.replaying(foreign_rows(replay, seed=seed)):
                losses.append(loss(model))
        losses.append(loss(model))  # one without replay among them
        for each in losses:
            each.backward()
        return gradients(model)

    assert all(torch.equal(a, b) for a, b in zip(run(recompute=False), run(recompute=True), strict=True))


def _recomputing(forward: Any, replay: RoutingReplay, by: str) -> Any:
    def run(hidden: torch.Tensor, **kwargs: Any) -> Any:
        if by == "bound":
            return checkpoint(replay.bound(lambda x: forward(x, **kwargs)), hidden, use_reentrant=True)
        contexts = replay.checkpoint_contexts
        return checkpoint(lambda x: forward(x, **kwargs), hidden, use_reentrant=False, context_fn=contexts)

    return run


def test_recomputation_that_forgot_its_routing_raises_instead_of_using_the_live_router() -> None:
    model = tiny_model("qwen3_moe")
    replay = RoutingReplay.install(model)
    for layer in model.model.layers:
        forward = layer.forward
        layer.forward = lambda hidden, forward=forward, **kwargs: checkpoint(
            lambda x: forward(x, **kwargs), hidden, use_reentrant=False
        )
    with replay.replaying(foreign_rows(replay)):
        total = loss(model)
    with pytest.raises(ReplayUnsupported, match="context_fn=replay"):
        total.backward()


@settings(max_examples=12)
@given(st.lists(st.tuples(st.sampled_from(["replay", "live", "record"]), st.integers(0, 4)), max_size=6), st.randoms())
def test_any_interleaving_of_forwards_and_backwards_gives_what_each_gives_alone(
    work: list[tuple[str, int]], random: Any
) -> None:
    """No cursor, no registry: results depend on the rows handed in, not on what ran before or between."""
    model, replay = _SHARED
    model.zero_grad(set_to_none=True)  # Hypothesis may break an example off where `random` draws, behind a backward
    losses, oracle = [], []
    for kind, seed in work:
        losses.append(_forward(model, replay, kind, seed))
        random.shuffle(losses)
        if len(losses) > 2:
            losses.pop()[1].backward()
    for _key, total in losses:
        total.backward()
    together = gradients(model)
    model.zero_grad(set_to_none=True)
    for kind, seed in work:
        oracle.append(_alone(kind, seed))
    for each, *parts in zip(together, *oracle, strict=True):
        torch.testing.assert_close(each, torch.stack(parts).sum(dim=0), rtol=1e-4, atol=1e-5)


_SHARED = (lambda model: (model, RoutingReplay.install(model)))(tiny_model("qwen3_moe"))


def _forward(model: Any, replay: RoutingReplay, kind: str, seed: int) -> tuple[tuple[str, int], torch.Tensor]:
    if kind == "live":
        return (kind, seed), loss(model, input_ids(seed=seed))
    if kind == "record":
        with replay.recording():
            return (kind, seed), loss(model, input_ids(seed=seed))
    with replay.replaying(foreign_rows(replay, seed=seed)):
        return (kind, seed), loss(model, input_ids(seed=seed))


def _alone(kind: str, seed: int) -> list[torch.Tensor]:
    model = tiny_model("qwen3_moe")
    _forward(model, RoutingReplay.install(model), kind, seed)[1].backward()
    return gradients(model)


def test_two_threads_replay_different_rows_on_one_model_at_once() -> None:
    model = tiny_model("qwen3_moe")
    replay = RoutingReplay.install(model)
    rows = [foreign_rows(replay, seed=seed) for seed in (2, 3)]
    meet = threading.Barrier(2)

    def forward(i: int) -> torch.Tensor:
        with torch.no_grad(), replay.replaying(rows[i]):
            meet.wait(timeout=30)
            return logits(model)

    async def both() -> list[torch.Tensor]:
        return list(await asyncio.gather(*(asyncio.to_thread(forward, i) for i in range(2))))

    together = asyncio.run(both())
    for i in range(2):
        with torch.no_grad(), replay.replaying(rows[i]):
            assert torch.equal(together[i], logits(model))


def test_packed_samples_are_replayed_as_they_are_alone() -> None:
    model = tiny_model("qwen3_moe")
    replay = RoutingReplay.install(model)
    rows = [foreign_rows(replay, num_tokens=n, seed=n) for n in (5, 7)]
    ids = input_ids()
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    with torch.no_grad():
        with replay.replaying(RoutingRows.join(rows)) as check:
            packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits[0]
        alone = []
        for part, sample in zip(rows, ids.split([5, 7], dim=1), strict=True):
            with replay.replaying(part):
                alone.append(logits(model, sample)[0])
    assert check.report().verified == 36
    torch.testing.assert_close(packed, torch.cat(alone), atol=1e-5, rtol=1e-4)


def test_rows_that_are_off_by_one_raise_the_gap_more_than_tenfold() -> None:
    """The test of the test: a misaligned replay must be visible in log-probs, else alignment proves nothing."""
    engine = tiny_model("qwen3_moe")
    for name, parameter in engine.named_parameters():
        if "experts" in name:
            torch.nn.init.normal_(parameter, std=0.5)  # experts that differ as much as trained ones do
    engine.to(torch.bfloat16)
    model = tiny_model("qwen3_moe")
    model.load_state_dict(engine.state_dict())
    with torch.no_grad():
        rollout = logits(engine).float().log_softmax(-1)
        rows = recorded(engine, RoutingReplay.install(engine)).chunks[0]
        replay = RoutingReplay.install(model)

        def gap(ids_NLK: np.ndarray) -> float:
            with replay.replaying(RoutingRows.of(ids_NLK, np.ones(ids_NLK.shape[:2], np.bool_))):
                return float((logits(model).log_softmax(-1) - rollout).abs().mean())

        assert gap(np.roll(rows, 1, axis=0)) > 10 * gap(rows)


def test_the_load_balancing_loss_is_off_while_replay_is_installed() -> None:
    model = tiny_model("qwen3_moe", output_router_logits=True, router_aux_loss_coef=0.5)
    ids = input_ids()
    with torch.no_grad():
        with_aux = model(input_ids=ids, labels=ids).loss
        replay = RoutingReplay.install(model)
        under_replay = model(input_ids=ids, labels=ids).loss
        asked_for = model(input_ids=ids, labels=ids, output_router_logits=True).loss
        replay.remove()
        afterwards = model(input_ids=ids, labels=ids).loss
    assert float(with_aux) > float(under_replay) + 0.1
    assert torch.equal(under_replay, asked_for)
    assert torch.equal(with_aux, afterwards)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_model_with_lora_adapters_is_replayed() -> None:
    model = get_peft_model(tiny_model("qwen3_moe"), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    replay = RoutingReplay.install(model)
    with replay.replaying(foreign_rows(replay)) as check:
        loss(model).backward()
    assert replay.plan.routers[0].path.startswith("base_model.model.")
    assert check.report().verified == 36


@pytest.mark.slow
def test_a_compiled_model_is_replayed() -> None:
    model = tiny_model("qwen3_moe")
    replay = RoutingReplay.install(model)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        for seed in (2, 3):
            rows = foreign_rows(replay, seed=seed)
            with replay.replaying(rows):
                expected = logits(model)
            with replay.replaying(rows) as check:
                found = logits(compiled)
            assert check.report().verified == 36
            torch.testing.assert_close(found, expected)


def test_installing_leaves_modes_and_random_state_as_they_were() -> None:
    model = tiny_model("qwen3_moe").train()
    model.model.layers[1].eval()
    before = {name: module.training for name, module in model.named_modules()}
    state = torch.get_rng_state()
    RoutingReplay.install(model)
    assert {name: module.training for name, module in model.named_modules()} == before
    assert torch.equal(torch.get_rng_state(), state)


def test_a_dense_model_is_refused() -> None:
    dense = {k: v for k, v in TINY.items() if "expert" not in k and k != "moe_intermediate_size"}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3", **dense))
    with pytest.raises(ReplayUnsupported, match=r"replay\.mode = off"):
        RoutingReplay.install(model)


def test_a_layer_whose_router_was_bypassed_is_refused() -> None:
    model = tiny_model("qwen3_moe")
    block = model.model.layers[1].mlp
    block.forward = lambda hidden: hidden  # its experts are still there, but nothing selects them
    with pytest.raises(ReplayUnsupported, match="layer 1 owns experts"):
        RoutingReplay.install(model)


def test_rows_of_another_shape_or_batch_are_refused() -> None:
    model = tiny_model("qwen3_moe")
    replay = RoutingReplay.install(model)
    other = RoutingRows.unrecorded(NUM_TOKENS, RoutingShape(2, 8, TOP_K))
    with pytest.raises(ExpertsMismatch, match="2 layers"), replay.replaying(other):
        logits(model)
    with pytest.raises(ExpertsMismatch, match="12 positions, 11 rows"), replay.replaying(foreign_rows(replay, 11)):
        logits(model)


def test_an_id_out_of_range_in_a_valid_row_is_refused_before_any_forward() -> None:
    """Never wrapped, and no device is left in an undefined state."""
    model = tiny_model("qwen3_moe")
    replay = RoutingReplay.install(model)
    ids = foreign_rows(replay).chunks[0].copy()
    ids[4, 1, 0] = 8
    valid = np.ones((NUM_TOKENS, 3), dtype=np.bool_)
    with (
        pytest.raises(ExpertsMismatch, match="expert 8 in layer 1, which has 8"),
        replay.replaying(RoutingRows.of(ids, valid)),
    ):
        logits(model)
    valid[4, 1] = False
    with torch.no_grad(), replay.replaying(RoutingRows.of(ids, valid)) as check:
        logits(model)
    assert check.report().fallback == 1


def test_a_router_that_uses_other_ids_than_it_was_given_is_not_verified() -> None:
    """I10 is measured on what came out, not on what went in."""
    model = tiny_model("qwen3_moe")
    replay = RoutingReplay.install(model)
    rows = foreign_rows(replay)
    replay.remove()
    router = model.get_submodule(replay.plan.routers[1].path)
    own = router.forward

    def other(hidden: torch.Tensor) -> Any:
        scores, weights, ids = own(hidden)
        return scores, weights, torch.where(torch.arange(len(ids))[:, None] == 2, ids.flip(1), ids)

    router.forward = other
    replay = RoutingReplay(model, replay.plan)
    with torch.no_grad(), replay.replaying(rows) as check:
        logits(model)
    assert check.report() == RoutingReport(total=36, replayed=36, verified=35)


@settings(max_examples=60)
@given(
    per_rank=st.integers(1, 48),
    num_ranks=st.sampled_from([1, 2, 4, 8]),
    num_positions=st.integers(1, 40),
    data=st.data(),
)
def test_padding_rows_are_distinct_in_range_and_spread_evenly_over_ranks(
    per_rank: int, num_ranks: int, num_positions: int, data: st.DataObject
) -> None:
    num_experts = per_rank * num_ranks
    top_k = data.draw(st.integers(1, min(num_experts, 12)))
    shape = RoutingShape(3, num_experts, top_k)
    rows = padding_rows(num_positions, shape, num_ranks)
    ids = rows.chunks[0]
    assert ids.dtype == shape.dtype
    assert int(ids.max()) < num_experts
    assert all(len(set(row)) == top_k for row in ids[:, 0].tolist())
    load = np.bincount((ids[:, 0] // per_rank).ravel(), minlength=num_ranks)
    assert load.max() - load.min() <= 1
    assert rows.num_real == rows.num_valid(range(3)) == 0


def test_padding_is_replayed_and_counted_nowhere() -> None:
    model = tiny_model("qwen3_moe")
    replay = RoutingReplay.install(model)
    rows = RoutingRows.join([foreign_rows(replay, 9), padding_rows(3, replay.plan.shape, 2)])
    with torch.no_grad(), replay.replaying(rows) as check:
        logits(model)
    with torch.no_grad(), replay.comparing(rows) as comparison:
        logits(model)
    assert check.report() == RoutingReport(total=27, replayed=27, verified=27)
    assert comparison.report().compared == 27
