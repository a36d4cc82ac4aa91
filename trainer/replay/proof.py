"""What `RoutingReplay.install` proves by: the experts that live routers rank last, and whether those get a weight.

Experts that a router ranks last lie outside of the groups that it chose, if it chooses groups. A router that masks in a
way that replay does not see gives them the weight zero, or divides zero by zero; such a model is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gateway.contracts.errors import ReplayUnsupported
from trainer.replay.plan import ReplayPlan, RouterSite
from trainer.replay.rows import RoutingRows
from trainer.replay.selection import AnsweringMode
from trainer.replay.slots import Router, ids_among, recorded_rows


class ForeignRows(NamedTuple):
    """Two routings that the live routers did not choose: the experts ranked last, and those before them."""

    last: RoutingRows
    before: RoutingRows


class Ranked:
    """A slot for one forward of the live routers: keeps what each ranked last."""

    def __init__(self, plan: ReplayPlan, num_positions: int) -> None:
        self._plan = plan
        shape = (num_positions, plan.shape.num_layers, plan.shape.top_k)
        self._last, self._before = np.zeros(shape, plan.shape.dtype), np.zeros(shape, plan.shape.dtype)

    def route(self, router: Router, args: Any, kwargs: Any) -> Any:
        """The router's forward, looked at."""
        site = router.site
        if site.override:
            output = router.forward(*args, **kwargs)
            ids_NK = ids_among(output, site)
            self._keep(site, (ids_NK + 1) % site.selection.num_scores, (ids_NK + 2) % site.selection.num_scores)
            return output
        mode = AnsweringMode(site.selection, None)
        with mode:
            output = router.forward(*args, **kwargs)
        if mode.scores is None:
            raise ReplayUnsupported(f"router {site.path} made no call that selects")
        selection, top_k = site.selection, site.selection.top_k
        scores_NE = mode.scores.detach().reshape(-1, selection.num_scores)
        order_NE = scores_NE[:, : selection.num_scores - selection.num_idle].argsort(dim=-1)  # idle ones weigh nothing
        self._keep(site, order_NE[:, :top_k], order_NE[:, top_k : 2 * top_k])
        return output

    def observe(self, site: RouterSite, used_NK: Tensor) -> None:
        """Nothing is kept."""

    def rows(self) -> ForeignRows:
        """All layers' together."""
        routed = self._plan.routed
        return ForeignRows(recorded_rows(self._last, routed), recorded_rows(self._before, routed))

    def _keep(self, site: RouterSite, last_NK: Tensor, before_NK: Tensor) -> None:
        if before_NK.shape != last_NK.shape:  # more than half of all experts are chosen
            before_NK = (last_NK + 1) % site.selection.num_scores
        self._last[:, site.layer, : last_NK.shape[1]] = last_NK.cpu().numpy()
        self._before[:, site.layer, : before_NK.shape[1]] = before_NK.cpu().numpy()


def gives_weight(output: Any, ids_NK: Tensor, site: RouterSite, otherwise: Callable[[], Any]) -> bool:
    """Whether each position's experts `ids_NK` have finite weights in a router's results, not all of them zero.

    Weights are [N, K], or [N, E] with scores among them; where results have neither (a block that computes its experts
    too) they must differ at each position from `otherwise()`, the results for other experts.
    """
    num_positions, top_k = ids_NK.shape
    by_width: dict[int, list[Tensor]] = {}
    for value in _floats(output, num_positions):
        by_width.setdefault(value.shape[1], []).append(value)
    weights = by_width.get(top_k) or [
        value.gather(1, ids_NK.to(value.device)) for value in by_width.get(site.selection.num_scores, [])
    ]
    if not weights:
        others = _floats(otherwise(), num_positions)
        weights = [value - other for value, other in zip(_floats(output, num_positions), others, strict=True)]
    return all(bool(value.isfinite().all()) and bool(value.any(dim=1).all()) for value in weights)


def _floats(output: Any, num_positions: int) -> list[Tensor]:
    return [
        value.detach().reshape(num_positions, -1)
        for value in _leaves(output)
        if value.is_floating_point() and value.numel() and value.numel() % num_positions == 0
    ]


def _leaves(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, list | tuple):
        for value in output:
            yield from _leaves(value)


def same_logits(output: Any, other: Any) -> bool:
    """Whether two outputs of a model have equal logits."""
    logits, others = (getattr(value, "logits", value) for value in (output, other))
    return isinstance(logits, Tensor) and torch.equal(logits, others)
