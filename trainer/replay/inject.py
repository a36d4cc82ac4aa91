"""RoutingReplay: hand recorded expert ids to a model's routers for one forward (routing replay, arXiv 2510.11370).

Each router's forward runs under a mode that answers its selecting call with `(scores.gather(ids), ids)`; everything
after (renormalising, scaling, softmax over the chosen) is the model's own code on its live scores, so gradient reaches
router weights and hidden states as without replay.

Ids are keyed by (position in the batch, global layer) and handed in per forward by a context; there is no cursor and no
registry order, so micro-batches may interleave and layers may be computed again. Forwards outside a context (a
reference policy, a teacher) use the live router.

**Recomputation.** A layer that is computed again in the backward pass must get the ids of *its* forward. Layers that
transformers checkpoints (`activation_checkpointing_enable`, reentrant or not) do so by themselves. Own calls of
`torch.utils.checkpoint` take `context_fn=replay.checkpoint_contexts`, or checkpoint `replay.bound(function)`. A router
that runs in a backward pass without either raises, as its live choice might not be what its forward used.

**Load-balancing loss.** It would push routers towards or away from what the engine chose. It is off while replay is
installed: `output_router_logits` and the model's `router_aux_loss_coef` are set to nothing, and put back by `remove`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from gateway.contracts.errors import ReplayUnsupported
from trainer.replay.plan import ReplayPlan, RouterSite, Witness, plan_replay
from trainer.replay.probe import run_probe
from trainer.replay.proof import ForeignRows, Ranked, gives_weight, same_logits
from trainer.replay.rows import RoutingRows
from trainer.replay.slots import Compared, Live, Recorded, Replayed, Router, Slot, ids_among
from trainer.replay.verify import RoutingCheck

_LIVE = Live()


class RoutingReplay:
    """Routing replay installed on one model; `remove` takes it off again."""

    def __init__(self, model: nn.Module, plan: ReplayPlan) -> None:
        """Wrap the routers of `plan`. `install` is the way that proves them; this one is for a copy of a model whose
        plan was proved already (the shards of one that is spread over ranks)."""
        self.plan = plan
        self._slot: ContextVar[Slot | None] = ContextVar("routing_replay_slot", default=None)
        self._has_replayed = False
        self._wrapped: list[nn.Module] = []
        for site in plan.routers:
            module = model.get_submodule(site.path)
            self._wrap(module, self._routing_forward(Router(site, module, module.forward)))
            if site.witness is Witness.EXPERTS_INPUT:
                experts = model.get_submodule(site.witness_path)
                self._wrap(experts, self._witnessed_forward(site, experts.forward))
        self._checkpointed: list[Any] = [
            module for module in model.modules() if hasattr(module, "gradient_checkpointing")
        ]
        self._aux_loss = _AuxLoss(model)

    @classmethod
    def install(cls, model: nn.Module) -> RoutingReplay:
        """Probe the model, wrap its routers, and prove on more probes that each is reached once and uses what it is
        given.

        Raises ReplayUnsupported.
        """
        model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
        replay = cls(model, plan_replay(model))
        try:
            replay._prove(model)
        except ReplayUnsupported:
            replay.remove()
            raise
        return replay

    def remove(self) -> None:
        """Give the routers their own forward back."""
        for module in self._wrapped:
            module.__dict__.pop("forward", None)
        for module in self._checkpointed:
            function = module.__dict__.get("_gradient_checkpointing_func")
            if isinstance(function, _SlotKeeping):
                module._gradient_checkpointing_func = function.checkpoint
        self._wrapped, self._checkpointed = [], []
        self._aux_loss.restore()

    @contextmanager
    def replaying(self, rows: RoutingRows) -> Iterator[RoutingCheck]:
        """Within, forwards over N positions use `rows` where they are valid, else the live router. Yields the check
        that compares what was used with what was recorded (I10)."""
        check = RoutingCheck(rows, self.plan.routed.layers)
        self._has_replayed = True
        with self._using(Replayed(rows, self.plan, check)):
            yield check

    @contextmanager
    def recording(self) -> Iterator[Recorded]:
        """Within, one forward uses the live router and leaves its choice in what is yielded (`rows()`)."""
        with self._using(record := Recorded(self.plan)):
            yield record

    @contextmanager
    def comparing(self, rows: RoutingRows) -> Iterator[Compared]:
        """Within, forwards use the live router; what is yielded counts for how many rows it chose other experts."""
        with self._using(compared := Compared(rows, self.plan)):
            yield compared

    def checkpoint_contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """`context_fn` of `torch.utils.checkpoint`: a layer that is computed again in the backward pass gets the ids of
        *its* forward, also where other micro-batches ran in between, and on whatever thread it runs."""
        return nullcontext(), self._using(self._slot.get() or _LIVE)

    def bound(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, wherever and whenever it runs, with the routing of the context that this is called in."""
        slot = self._slot.get() or _LIVE

        def run(*args: Any, **kwargs: Any) -> Any:
            with self._using(slot):
                return function(*args, **kwargs)

        return run

    @contextmanager
    def _using(self, slot: Slot) -> Iterator[None]:
        for module in self._checkpointed:
            function = module.__dict__.get("_gradient_checkpointing_func")
            if function is not None and not isinstance(function, _SlotKeeping):
                module._gradient_checkpointing_func = _SlotKeeping(function, self)
        token = self._slot.set(slot)
        try:
            yield
        finally:
            self._slot.reset(token)

    def _wrap(self, module: Any, forward: Callable[..., Any]) -> None:
        module.forward = forward
        self._wrapped.append(module)

    def _routing_forward(self, router: Router) -> Callable[..., Any]:
        forward, current = router.forward, self._slot

        def routing_forward(*args: Any, **kwargs: Any) -> Any:
            slot = current.get()
            if slot is not None:
                return slot.route(router, args, kwargs)
            if self._has_replayed and torch._C._current_graph_task_id() != -1:
                raise ReplayUnsupported(
                    f"router {router.site.path} is computed again in a backward pass that does not say with which"
                    " routing: give torch.utils.checkpoint context_fn=replay.checkpoint_contexts"
                )
            return forward(*args, **kwargs)

        return routing_forward

    def _witnessed_forward(self, site: RouterSite, forward: Callable[..., Any]) -> Callable[..., Any]:
        def witnessed_forward(*args: Any, **kwargs: Any) -> Any:
            slot = self._slot.get()
            if slot is not None:
                slot.observe(site, ids_among(kwargs if isinstance(site.witness_place, str) else args, site))
            return forward(*args, **kwargs)

        return witnessed_forward

    def _prove(self, model: nn.Module) -> None:
        """A forward of the live routers, and one with the experts that they ranked last, which must come out at every
        witness, have weights, and change the model's result."""
        with self._using(ranked := Ranked(self.plan, self.plan.num_probed)):
            live = run_probe(model, self.plan.num_probed)
        foreign = ranked.rows()
        with self._weights_seen(model, foreign) as unweighted, self.replaying(foreign.last) as check:
            shifted = run_probe(model, self.plan.num_probed)
        self._has_replayed = False
        report = check.report()
        if report.verified != report.total:
            raise ReplayUnsupported(f"{type(model).__name__}: ids handed to its routers are not the ids that they used")
        if unweighted:
            raise ReplayUnsupported(
                f"{type(model).__name__}: experts that its routers rank last get no weight in {unweighted[0]}: it masks"
                " scores in a way that replay cannot lift"
            )
        if any(site.witness is Witness.ANSWER for site in self.plan.routers) and same_logits(live, shifted):
            raise ReplayUnsupported(f"{type(model).__name__}: other experts do not change its result")

    @contextmanager
    def _weights_seen(self, model: nn.Module, foreign: ForeignRows) -> Iterator[list[str]]:
        """Within, each router that gives replayed experts no weight is put on the list that is yielded."""
        unweighted: list[str] = []
        handles = []
        for site in self.plan.routers:

            def look(router: nn.Module, args: Any, kwargs: Any, output: Any, site: RouterSite = site) -> None:
                def otherwise() -> Any:
                    with self.replaying(foreign.before):
                        return router.forward(*args, **kwargs)

                ids_NK = torch.from_numpy(foreign.last.layer(site.layer).ids[:, : site.selection.top_k])
                if not gives_weight(output, ids_NK, site, otherwise):
                    unweighted.append(site.path)

            handles.append(model.get_submodule(site.path).register_forward_hook(look, with_kwargs=True))
        try:
            yield unweighted
        finally:
            for handle in handles:
                handle.remove()


class _SlotKeeping:
    """A checkpoint function of transformers that recomputes a layer with the routing of its forward."""

    def __init__(self, checkpoint: Callable[..., Any], replay: RoutingReplay) -> None:
        self.checkpoint = checkpoint
        self._replay = replay

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self.checkpoint(self._replay.bound(function), *args, **kwargs)


class _AuxLoss:
    """A model's load-balancing loss, switched off until `restore`."""

    def __init__(self, model: nn.Module) -> None:
        self._before: list[tuple[Any, str, Any]] = []
        config: Any = getattr(model, "config", None)
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        for owner in {id(each): each for each in (config, text) if each is not None}.values():
            self._set(owner, "output_router_logits", False)
        for module in model.modules():
            self._set(module, "router_aux_loss_coef", 0.0)

    def _set(self, owner: Any, name: str, value: Any) -> None:
        if name in vars(owner):
            self._before.append((owner, name, vars(owner)[name]))
            setattr(owner, name, value)

    def restore(self) -> None:
        """As it was."""
        for owner, name, value in self._before:
            setattr(owner, name, value)
        self._before = []
