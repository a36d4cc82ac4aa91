"""RoutingReplay: hand recorded expert ids to a model's routers for one forward (routing replay, arXiv 2510.11370).

Each router's forward runs under a mode that answers its selecting top-k with `(scores.gather(ids), ids)`; everything
after (renormalising, scaling, softmax over the chosen) is the model's own code on its live scores, so gradient reaches
router weights and hidden states as without replay.

Ids are keyed by (position in the batch, global layer) and handed in per forward by a context; there is no cursor and no
registry order, so micro-batches may interleave and layers may be computed again. Forwards outside a context (a
reference policy, a teacher) use the live router.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from gateway.contracts.errors import ExpertsMismatch, ReplayUnsupported
from gateway.contracts.experts import RoutingShape, narrow
from trainer.replay.plan import ReplayPlan, RouterSite, SelectingTopk, plan_replay
from trainer.replay.rows import RoutingRows
from trainer.replay.validate import RoutedLayers
from trainer.replay.verify import RoutingCheck


class _Slot(Protocol):
    """What the routers of one forward are told to do."""

    def choose(self, layer: int, scores_NE: Tensor, live: Callable[[], Any]) -> Any: ...

    def observe(self, layer: int, used_NK: Tensor) -> None: ...


class RoutingReplay:
    """Routing replay installed on one model; `remove` takes it off again."""

    def __init__(self, model: nn.Module, plan: ReplayPlan) -> None:
        self.plan = plan
        self._slot: ContextVar[_Slot | None] = ContextVar("routing_replay_slot", default=None)
        self._routers = [(site, model.get_submodule(site.path)) for site in plan.routers]
        for site, router in self._routers:
            router.forward = self._replaying_forward(site, router.forward)

    @classmethod
    def install(cls, model: nn.Module) -> RoutingReplay:
        """Probe the model, wrap its routers, and prove on a second probe that each is reached and answers with ids.

        Raises ReplayUnsupported.
        """
        replay = cls(model, plan_replay(model))
        try:
            replay._prove(model)
        except ReplayUnsupported:
            replay.remove()
            raise
        return replay

    def remove(self) -> None:
        """Give the routers their own forward back."""
        for _site, router in self._routers:
            router.__dict__.pop("forward", None)
        self._routers = []

    @contextmanager
    def replaying(self, rows: RoutingRows) -> Iterator[RoutingCheck]:
        """Within, forwards over N positions use `rows` where they are valid, else the live router. Yields the check
        that compares what was used with what was recorded (I10)."""
        check = RoutingCheck(rows, self.plan.routed)
        with self._using(_Replayed(rows, self.plan.shape, check)):
            yield check

    @contextmanager
    def recording(self) -> Iterator[RecordedRouting]:
        """Within, forwards use the live router and leave their choice in what is yielded."""
        record = RecordedRouting(self.plan.shape)
        with self._using(record):
            yield record

    def checkpoint_contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """`context_fn` of `torch.utils.checkpoint`: a layer that is computed again in the backward pass gets the ids of
        *its* forward, also where other micro-batches ran in between."""
        return nullcontext(), self._using(self._slot.get())

    @contextmanager
    def _using(self, slot: _Slot | None) -> Iterator[None]:
        token = self._slot.set(slot)
        try:
            yield
        finally:
            self._slot.reset(token)

    def _replaying_forward(self, site: RouterSite, forward: Callable[..., Any]) -> Callable[..., Any]:
        def replaying_forward(*args: Any, **kwargs: Any) -> Any:
            slot = self._slot.get()
            if slot is None:
                return forward(*args, **kwargs)
            layer = site.layer
            mode = SelectingTopk(self.plan.shape, lambda scores_NE, live: slot.choose(layer, scores_NE, live))
            with mode:
                output = forward(*args, **kwargs)
            if mode.num_selections != 1:
                raise ReplayUnsupported(
                    f"router {site.path} selected {mode.num_selections} times in one forward, not once"
                )
            slot.observe(layer, _ids_in(output, site, self.plan.shape))
            return output

        return replaying_forward

    def _prove(self, model: nn.Module) -> None:
        """A forward with recorded ids, and one with foreign ids that must come out at every router's end."""
        device = next(model.parameters()).device
        input_ids = torch.arange(1, 7, device=device)[None]
        with torch.no_grad(), self.recording() as record:
            model(input_ids=input_ids, use_cache=False)
        shape = self.plan.shape
        foreign_NLK = (record.ids() + 1) % shape.num_experts  # a shift keeps ids distinct and changes every one
        rows = recorded_rows(foreign_NLK, self.plan.routed)
        with torch.no_grad(), self.replaying(rows) as check:
            model(input_ids=input_ids, use_cache=False)
        report = check.report()
        if report.verified != report.total:
            raise ReplayUnsupported(f"{type(model).__name__}: ids handed to its routers are not the ids that they used")


class _Replayed:
    """Answers the selecting top-k with recorded ids; rows that are not valid keep the live choice (I9)."""

    def __init__(self, rows: RoutingRows, shape: RoutingShape, check: RoutingCheck) -> None:
        if (rows.num_layers, rows.top_k) != (shape.num_layers, shape.top_k):
            raise ExpertsMismatch(f"rows to replay have {rows.num_layers} layers of {rows.top_k} ids; model: {shape}")
        self._rows = rows
        self._check = check

    def choose(self, layer: int, scores_NE: Tensor, live: Callable[[], Any]) -> Any:
        rows = self._rows.layer(layer)
        if len(scores_NE) != len(rows.ids):
            raise ExpertsMismatch(f"layer {layer} routes {len(scores_NE)} positions, {len(rows.ids)} rows are given")
        ids_NK = torch.from_numpy(rows.ids).to(scores_NE.device)
        if not rows.valid.all():
            valid_N = torch.from_numpy(rows.valid).to(scores_NE.device)
            ids_NK = torch.where(valid_N[:, None], ids_NK, live().indices)
        return torch.return_types.topk((scores_NE.gather(1, ids_NK), ids_NK))

    def observe(self, layer: int, used_NK: Tensor) -> None:
        self._check.observe(layer, used_NK)


class RecordedRouting:
    """What the live routers chose in one forward."""

    def __init__(self, shape: RoutingShape) -> None:
        self._shape = shape
        self._chosen: dict[int, Tensor] = {}

    def choose(self, layer: int, scores_NE: Tensor, live: Callable[[], Any]) -> Any:
        """The live choice."""
        return live()

    def observe(self, layer: int, used_NK: Tensor) -> None:
        """Keep what `layer` used."""
        self._chosen[layer] = used_NK.detach()

    def ids(self) -> Tensor:
        """int64[N, L, K]; layers without experts are 0, as SGLang returns them."""
        some_NK = next(iter(self._chosen.values()))
        ids_NLK = some_NK.new_zeros((len(some_NK), self._shape.num_layers, self._shape.top_k), dtype=torch.int64)
        for layer, used_NK in self._chosen.items():
            ids_NLK[:, layer] = used_NK
        return ids_NLK


def recorded_rows(ids_NLK: Tensor, routed: RoutedLayers) -> RoutingRows:
    """Ids that `RecordedRouting` kept as rows to replay, every one of a routed layer valid."""
    valid_NL = np.zeros(ids_NLK.shape[:2], dtype=np.bool_)
    valid_NL[:, list(routed.layers)] = True
    return RoutingRows.of(narrow(ids_NLK.cpu().numpy(), routed.shape), valid_NL)


def _ids_in(output: Any, site: RouterSite, shape: RoutingShape) -> Tensor:
    """The chosen ids [N, K] among a router's outputs: what the experts will be called with."""
    parts = output if isinstance(output, tuple | list) else (output,)
    found = [
        part
        for part in parts
        if isinstance(part, Tensor) and not part.is_floating_point() and part.shape[-1:] == (shape.top_k,)
    ]
    if len(found) != 1:
        raise ReplayUnsupported(f"router {site.path} does not return the ids that it chose; they could not be verified")
    return found[0].reshape(-1, shape.top_k)
