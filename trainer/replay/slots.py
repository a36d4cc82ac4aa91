"""What the routers of one forward are told to do: replay rows, record the live choice, or compare it with rows.

A slot is handed to a forward by a context and kept by whatever recomputes that forward's layers. It holds no cursor:
routers say which layer they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from gateway.contracts.errors import ExpertsMismatch, ReplayUnsupported
from trainer.replay.device import DeviceRows
from trainer.replay.overrides import OVERRIDES
from trainer.replay.plan import ReplayPlan, RouterSite, Witness
from trainer.replay.rows import RoutingRows
from trainer.replay.selection import AnsweringMode, LayerIds
from trainer.replay.validate import RoutedLayers
from trainer.replay.verify import RoutingCheck, RoutingReport

Forward = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Router:
    """A router that replay is installed on, and its forward as it was."""

    site: RouterSite
    module: nn.Module
    forward: Forward


class Slot(Protocol):
    """Runs routers and sees the ids that they used."""

    def route(self, router: Router, args: Any, kwargs: Any) -> Any:
        """The router's forward, as this slot wants it."""
        ...

    def observe(self, site: RouterSite, used_NK: Tensor) -> None:
        """The ids int64[N, K] that a router's layer used."""
        ...


class Live:
    """The live router, unseen: what a layer that was run outside of any context is recomputed with."""

    def route(self, router: Router, args: Any, kwargs: Any) -> Any:
        """The untouched forward."""
        return router.forward(*args, **kwargs)

    def observe(self, site: RouterSite, used_NK: Tensor) -> None:
        """Nothing is kept."""


class Replayed:
    """Recorded ids; rows that are not valid keep the live choice (I9)."""

    def __init__(self, rows: RoutingRows, plan: ReplayPlan, check: RoutingCheck) -> None:
        check_rows(rows, plan)
        self._rows = rows
        self._plan = plan
        self._check = check
        self._on: DeviceRows | None = None

    def route(self, router: Router, args: Any, kwargs: Any) -> Any:
        """The router's forward with its selection answered."""
        site = router.site
        if site.override:
            return self._overridden(router, args, kwargs)
        mode = AnsweringMode(site.selection, _ForSite(self, site), leaves_early=site.path in self._plan.plain)
        with mode:
            output = router.forward(*args, **kwargs)
        if mode.num_alike != site.selection.num_alike:
            raise ReplayUnsupported(
                f"router {site.path} selected {mode.num_alike} times in one forward, not {site.selection.num_alike}"
            )
        if site.witness is Witness.ROUTER_OUTPUT:
            self.observe(site, ids_among(output, site))
        elif site.witness is Witness.ANSWER:
            assert mode.answered is not None
            self.observe(site, mode.answered)
        return output

    def observe(self, site: RouterSite, used_NK: Tensor) -> None:
        """Compare with what was recorded (I10)."""
        self._check.observe(site.layer, used_NK, self._there(used_NK.device))

    def layer_ids(self, site: RouterSite, device: torch.device, num_positions: int) -> LayerIds:
        """What a layer is to use; ExpertsMismatch where it routes another number of positions."""
        there = self._there(device)
        if num_positions != there.num_positions:
            raise ExpertsMismatch(
                f"layer {site.layer} routes {num_positions} positions, {there.num_positions} rows are given"
            )
        return LayerIds(there.ids(site.layer, site.selection.top_k), there.valid(site.layer))

    def _overridden(self, router: Router, args: Any, kwargs: Any) -> Any:
        site = router.site
        hidden_NH = args[0].reshape(-1, args[0].shape[-1])
        ids_NK, valid_N = self.layer_ids(site, hidden_NH.device, len(hidden_NH))
        if valid_N is not None:
            with torch.no_grad():
                live_NK = ids_among(router.forward(*args, **kwargs), site)
            ids_NK = torch.where(valid_N[:, None], ids_NK, live_NK)
        output = OVERRIDES[site.override](router.module, hidden_NH, ids_NK)
        self.observe(site, ids_among(output, site))
        return output

    def _there(self, device: torch.device) -> DeviceRows:
        if self._on is None or self._on.device != device:
            self._on = DeviceRows(self._rows, device)
        return self._on


class _ForSite:
    """`layer_ids` of one router."""

    __slots__ = ("_site", "_slot")

    def __init__(self, slot: Replayed, site: RouterSite) -> None:
        self._slot = slot
        self._site = site

    def __call__(self, device: torch.device, num_positions: int) -> LayerIds:
        return self._slot.layer_ids(self._site, device, num_positions)


class _Watching:
    """The live router, with the ids that it chose."""

    def route(self, router: Router, args: Any, kwargs: Any) -> Any:
        """The untouched forward, with the plan's witness."""
        site = router.site
        if site.witness is not Witness.ANSWER:
            output = router.forward(*args, **kwargs)
            if site.witness is Witness.ROUTER_OUTPUT:
                self.observe(site, ids_among(output, site))
            return output
        mode = AnsweringMode(site.selection, None)
        with mode:
            output = router.forward(*args, **kwargs)
        if mode.answered is None:
            raise ReplayUnsupported(f"router {site.path} made no call that selects")
        self.observe(site, mode.answered)
        return output

    def observe(self, site: RouterSite, used_NK: Tensor) -> None:
        raise NotImplementedError


class Recorded(_Watching):
    """What the live routers chose in one forward, in the type that rows are kept in."""

    def __init__(self, plan: ReplayPlan) -> None:
        self._plan = plan
        self._ids: Tensor | None = None
        self._seen: set[int] = set()

    def observe(self, site: RouterSite, used_NK: Tensor) -> None:
        """Keep what a layer chose; a layer may run again over the same positions, and then chooses the same."""
        shape = self._plan.shape
        if self._ids is None:
            dtype = torch.uint8 if shape.dtype == np.uint8 else torch.uint16
            size = (len(used_NK), shape.num_layers, shape.top_k)
            self._ids = torch.zeros(size, dtype=dtype, device=used_NK.device)
        if len(used_NK) != len(self._ids):
            raise ExpertsMismatch("one recording takes one forward: open another context for the next micro-batch")
        self._ids[:, site.layer, : used_NK.shape[1]] = used_NK.detach()
        self._seen.add(site.layer)

    def rows(self) -> RoutingRows:
        """Rows ready for replay, valid in every routed layer; raises ReplayUnsupported if not all layers ran."""
        missing = set(self._plan.routed.layers) - self._seen
        if self._ids is None or missing:
            raise ReplayUnsupported(f"the routers of layers {sorted(missing)} did not run while routing was recorded")
        return recorded_rows(self._ids.cpu().numpy(), self._plan.routed)


class Compared(_Watching):
    """Counts rows for which the live router chooses another set of experts than was recorded, whatever their order."""

    def __init__(self, rows: RoutingRows, plan: ReplayPlan) -> None:
        check_rows(rows, plan)
        self._rows = rows
        self._counted = rows.counted()
        self._compared = 0
        self._flipped: Tensor | None = None
        self._on: DeviceRows | None = None

    def observe(self, site: RouterSite, used_NK: Tensor) -> None:
        """Compare one layer."""
        if self._on is None:
            self._on = DeviceRows(self._rows, used_NK.device)
        if len(used_NK) != self._on.num_positions:
            raise ExpertsMismatch(
                f"layer {site.layer} routes {len(used_NK)} positions, {self._on.num_positions} rows are given"
            )
        recorded_NK = self._on.ids(site.layer, used_NK.shape[1])
        differs_N = (used_NK.detach().sort(dim=1).values != recorded_NK.sort(dim=1).values).any(dim=1)
        flipped = (differs_N & self._on.counted_valid(site.layer)).sum()
        self._flipped = flipped if self._flipped is None else self._flipped + flipped
        self._compared += self._rows.num_valid((site.layer,))

    def report(self) -> RoutingReport:
        """`compared` and `flipped` so far; nothing was replayed."""
        return RoutingReport(compared=self._compared, flipped=0 if self._flipped is None else int(self._flipped))


def recorded_rows(ids_NLK: np.ndarray[Any, Any], routed: RoutedLayers) -> RoutingRows:
    """Ids uint8/uint16[N, L, K] of a live router as rows to replay, valid in every routed layer."""
    valid_L = np.zeros(ids_NLK.shape[1], dtype=np.bool_)
    valid_L[list(routed.layers)] = True
    bits = np.broadcast_to(np.packbits(valid_L), (len(ids_NLK), -(-len(valid_L) // 8)))
    return RoutingRows((ids_NLK,), (bits,))


def check_rows(rows: RoutingRows, plan: ReplayPlan) -> None:
    """Raise ExpertsMismatch where rows are of another model, or hold an id in a valid row that it has no expert for."""
    shape = plan.shape
    if (rows.num_layers, rows.top_k) != (shape.num_layers, shape.top_k):
        raise ExpertsMismatch(f"rows to replay have {rows.num_layers} layers of {rows.top_k} ids; model: {shape}")
    if rows.largest_id() < min(site.selection.num_scores for site in plan.routers):
        return
    for site in plan.routers:
        layer = rows.layer(site.layer)
        used = layer.ids[layer.valid, : site.selection.top_k]
        if used.size and int(used.max()) >= site.selection.num_scores:
            raise ExpertsMismatch(
                f"rows to replay name expert {int(used.max())} in layer {site.layer}, which has"
                f" {site.selection.num_scores}"
            )


def ids_among(values: Any, site: RouterSite) -> Tensor:
    """The ids [N, K] at the plan's place among a module's results or arguments."""
    value = values if isinstance(values, Tensor) else values[site.witness_place]
    top_k = site.selection.top_k
    return value if value.ndim == 2 and value.shape[1] == top_k else value.reshape(-1, top_k)
