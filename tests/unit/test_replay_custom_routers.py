"""Routing replay on models that no library has: plain modules, with routers of every style and no config to read."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gateway.contracts.errors import ReplayUnsupported
from tests.tiny_moe import foreign_rows
from trainer.replay.inject import RoutingReplay
from trainer.replay.plan import Witness

NUM_EXPERTS, TOP_K, HIDDEN = 8, 2, 16


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(HIDDEN, 24), nn.Linear(24, HIDDEN)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down(F.silu(self.up(hidden)))


class Block(nn.Module):
    """A linear gate, the selection in the block's forward, and a loop over a list of experts."""

    experts_name = "experts"
    num_scores = NUM_EXPERTS

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, self.num_scores, bias=False)
        self.register_buffer("bias", torch.randn(self.num_scores))
        setattr(self, self.experts_name, nn.ModuleList(Expert() for _ in range(NUM_EXPERTS)))

    def pick(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def forward(self, hidden: Tensor) -> Tensor:
        weights, ids = self.pick(hidden)
        flat = hidden.reshape(-1, HIDDEN)
        ids_NK, weights_NK = ids.reshape(len(flat), -1), weights.reshape(len(flat), -1)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(getattr(self, self.experts_name)):
            position, column = torch.where(ids_NK == number)
            if len(position):
                out.index_add_(0, position, expert(flat[position]) * weights_NK[position, column, None])
        return out.view(hidden.shape)

    def flat_scores(self, hidden: Tensor) -> Tensor:
        return self.gate(hidden.reshape(-1, HIDDEN)).sigmoid()


def allowed(scores_NE: Tensor) -> Tensor:
    """bool[N, E]: experts of the two best of four groups."""
    groups = scores_NE.view(-1, 4, 2).topk(2, dim=-1)[0].sum(dim=-1).topk(2, dim=-1).indices
    return torch.zeros(len(scores_NE), 4).scatter(1, groups, 1).bool().repeat_interleave(2, dim=1)


class ThreeDimensional(Block):
    def pick(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = self.gate(hidden).softmax(-1).topk(k=TOP_K, dim=2)
        return weights / weights.sum(dim=-1, keepdim=True), ids


class ByKeyword(Block):
    def pick(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.gate(hidden).sigmoid()
        ids = torch.topk(input=scores + self.bias, k=TOP_K, dim=-1, sorted=False).indices
        return scores.gather(-1, ids), ids


class SoftmaxAfterTopk(Block):
    def pick(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        values, ids = torch.topk(self.gate(hidden.reshape(-1, HIDDEN)), TOP_K)
        return values.softmax(-1), ids


class TopOneByArgmax(Block):
    def pick(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.gate(hidden).softmax(-1)
        ids = scores.argmax(dim=-1)[..., None]
        return scores.gather(-1, ids), ids


class TopOneByMax(Block):
    def pick(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        values, ids = self.gate(hidden).softmax(-1).max(dim=-1)
        return values[..., None], ids[..., None]


class BySorting(Block):
    def pick(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        values, ids = torch.sort(self.gate(hidden).softmax(-1), dim=-1, descending=True)
        return values[..., :TOP_K], ids[..., :TOP_K]


class ByArgsort(Block):
    def pick(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.gate(hidden).softmax(-1)
        ids = scores.argsort(dim=-1, descending=True)[..., :TOP_K]
        return scores.gather(-1, ids), ids


class MaskedValues(Block):
    def pick(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.flat_scores(hidden)
        return tuple(torch.topk(scores.masked_fill(~allowed(scores), 0.0), TOP_K))  # type: ignore[return-value]


class MaskedBeforeSoftmax(Block):
    def pick(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.gate(hidden.reshape(-1, HIDDEN))
        masked = logits.masked_fill(mask=~allowed(logits.softmax(-1)), value=float("-inf"))
        weights, ids = torch.topk(masked.softmax(-1), TOP_K)
        return weights / weights.sum(dim=-1, keepdim=True), ids


class MaskedByWhere(Block):
    def pick(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.flat_scores(hidden)
        return tuple(torch.topk(torch.where(allowed(scores), scores, 0.0), TOP_K))  # type: ignore[return-value]


class MaskedInPlace(Block):
    def pick(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.flat_scores(hidden)
        masked = scores.clone()
        masked[~allowed(scores)] = 0.0
        return tuple(torch.topk(masked, TOP_K))  # type: ignore[return-value]


class MaskedByGroup(Block):
    def pick(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.flat_scores(hidden)
        by_group = scores.view(-1, 4, 2).masked_fill(~allowed(scores).view(-1, 4, 2), 0.0)
        return tuple(torch.topk(by_group.flatten(1), TOP_K))  # type: ignore[return-value]


class MaskedByProduct(Block):
    def pick(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.flat_scores(hidden)
        return tuple(torch.topk(scores * allowed(scores).float(), TOP_K))  # type: ignore[return-value]


class MaskedByProductOfGroups(Block):
    def pick(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.gate(hidden.reshape(-1, HIDDEN)).softmax(-1) * 1.5
        groups = allowed(scores).view(-1, 4, 2)[..., :1].to(scores.dtype)
        weights, ids = torch.mul(groups, scores.view(-1, 4, 2)).flatten(1).topk(TOP_K)
        return weights / weights.sum(dim=-1, keepdim=True), ids


class MaskedByClamping(Block):
    def pick(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.flat_scores(hidden)
        return tuple(torch.topk(scores.minimum(allowed(scores).float()), TOP_K))  # type: ignore[return-value]


class MaskedByClampingInARouter(MaskedByClamping):
    def __init__(self) -> None:
        super().__init__()
        self.router = _Picking(self)

    def pick(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        return self.router(hidden)


class _Picking(nn.Module):
    def __init__(self, block: MaskedByClamping) -> None:
        super().__init__()
        self._block = [block]

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        return MaskedByClamping.pick(self._block[0], hidden)


class WithIdleExperts(ThreeDimensional):
    num_scores = NUM_EXPERTS + 3  # of which the last three do nothing


class NothingNamedExperts(ThreeDimensional):
    experts_name = "feed_forwards"


class Sampled(Block):
    def pick(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.gate(hidden.reshape(-1, HIDDEN)).softmax(-1)
        ids = torch.multinomial(scores, TOP_K)
        return scores.gather(1, ids), ids


class ExpertChoice(Block):
    def forward(self, hidden: Tensor) -> Tensor:
        flat = hidden.reshape(-1, HIDDEN)
        weights, positions = self.gate(flat).softmax(-1).t().topk(3, dim=-1)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            out.index_add_(0, positions[number], expert(flat[positions[number]]) * weights[number][:, None])
        return out.view(hidden.shape)


class Layer(nn.Module):
    def __init__(self, block: type[Block]) -> None:
        super().__init__()
        self.mlp = block()

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.mlp(hidden)


class Model(nn.Module):
    def __init__(self, block: type[Block], **config: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(64, HIDDEN), nn.Linear(HIDDEN, 64)
        self.layers = nn.ModuleList(Layer(block) for _ in range(3))
        if config:
            self.config = SimpleNamespace(**config)

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.embedding(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return self.head(hidden)


SORTING = {BySorting: {"num_experts_per_tok": TOP_K}, ByArgsort: {"num_experts_per_tok": TOP_K}}


@pytest.mark.parametrize(
    "block",
    [
        ThreeDimensional,
        ByKeyword,
        SoftmaxAfterTopk,
        TopOneByArgmax,
        TopOneByMax,
        BySorting,
        ByArgsort,
        MaskedValues,
        MaskedBeforeSoftmax,
        MaskedByWhere,
        MaskedInPlace,
        MaskedByGroup,
        MaskedByProduct,
        MaskedByProductOfGroups,
        WithIdleExperts,
        NothingNamedExperts,
    ],
)
def test_a_router_of_any_style_is_replayed_bitwise_and_every_replayed_expert_has_gradient(block: type[Block]) -> None:
    """I10. Experts outside of the groups that the live router chose have their live weight too."""
    model = Model(block, **SORTING.get(block, {}))
    input_ids = torch.randint(0, 64, (2, 6))
    untouched = model(input_ids)
    replay = RoutingReplay.install(model)
    with torch.no_grad(), replay.recording() as record:
        recorded = model(input_ids)
    with replay.replaying(record.rows()) as check:
        replayed = model(input_ids)
    assert torch.equal(untouched, recorded)
    assert torch.equal(untouched, replayed)
    assert check.report().verified == check.report().total == 36

    rows = foreign_rows(replay)
    with replay.replaying(rows) as check:
        output = model(input_ids)
    assert bool(output.isfinite().all())
    assert check.report().verified == 36
    output.log_softmax(-1)[..., 5].sum().backward()
    for number, layer in enumerate(model.layers):
        used = np.unique(rows.chunks[0][:, number]).astype(np.int64)
        gradient = layer.mlp.gate.weight.grad[used[used < NUM_EXPERTS]]
        assert bool((gradient.abs().sum(dim=1) > 0).all())


@pytest.mark.parametrize("block", [MaskedValues, MaskedBeforeSoftmax, TopOneByArgmax, BySorting])
def test_rows_that_are_not_valid_keep_the_live_choice_in_routers_of_any_style(block: type[Block]) -> None:
    model = Model(block, **SORTING.get(block, {}))
    input_ids = torch.randint(0, 64, (2, 6))
    replay = RoutingReplay.install(model)
    with torch.no_grad():
        untouched = model(input_ids)
        with replay.recording() as record:
            model(input_ids)
        rows = record.rows()
        valid = np.ones((12, 3), dtype=np.bool_)
        valid[::3] = False
        ids = rows.chunks[0].copy()
        ids[::3] = 0
        with replay.replaying(type(rows).of(ids, valid)) as check:
            replayed = model(input_ids)
    assert torch.equal(untouched, replayed)
    assert (check.report().fallback, check.report().verified) == (12, 24)


def test_the_plan_says_where_used_ids_are_read() -> None:
    replay = RoutingReplay.install(Model(ThreeDimensional))
    assert {site.witness for site in replay.plan.routers} == {Witness.ANSWER}
    assert [site.path for site in replay.plan.routers] == [f"layers.{i}.mlp" for i in range(3)]


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (Sampled, "no call was seen that does"),
        (ExpertChoice, "no call was seen that does"),
        (MaskedByClamping, "no weight"),
        (MaskedByClampingInARouter, "no weight"),
        (BySorting, "the config does not name how many experts a token takes"),
    ],
)
def test_routers_whose_choice_cannot_be_answered_are_refused(block: type[Block], reason: str) -> None:
    with pytest.raises(ReplayUnsupported, match=reason):
        RoutingReplay.install(Model(block))
