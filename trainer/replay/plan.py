"""ReplayPlan: where a model routes, how its choice is replayed there, and by what the ids really used are witnessed.

Found by watching one probe forward, not from a list of architectures. A *router* is the innermost module whose forward
makes the call that selects experts: a router of its own, or the block that holds the experts. Where several calls look
like it (group-limited routers rank groups first), the last one selects.

The plan fails closed: one router, selecting once, in each decoder layer that owns experts, or `ReplayUnsupported`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from gateway.contracts.errors import ReplayUnsupported
from gateway.contracts.experts import RoutingShape
from trainer.replay.overrides import NOT_REPLAYED, OVERRIDES, REFUSED
from trainer.replay.probe import WHOLE, Place, SeenCall, Watched, probe_length, watch
from trainer.replay.selection import SORTS, Selection
from trainer.replay.sites import decoder_layer, experts_by_layer, structural_experts
from trainer.replay.validate import RoutedLayers

_NUM_EXPERTS_NAMES = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")
_TOP_K_NAMES = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "experts_per_token",
    "moe_topk",
    "moe_top_k",
    "moe_k",
    "top_k_experts",
)
_NUM_LAYERS_NAMES = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
_NESTED = ("ffn_config", "moe_config")


class DenseModel(ReplayUnsupported):
    """No layer of the model chooses experts: there is nothing to replay."""


class Witness(StrEnum):
    """Where the ids really used are read: among the router's results, at the experts' door, or, where neither shows
    them, in the answer that the selecting call was given."""

    ROUTER_OUTPUT = "router output"
    EXPERTS_INPUT = "experts input"
    ANSWER = "selection's answer"


@dataclass(frozen=True, slots=True)
class RouterSite:
    """One router: its path, the global index of its decoder layer, the name of its class, what selects in it, and the
    witness of what was used: the module and the place among its results or arguments. `override` names the entry of the
    table of overrides that replays it."""

    path: str
    layer: int
    router: str
    selection: Selection
    witness: Witness
    witness_path: str = ""
    witness_place: Place = WHOLE
    override: str = ""


@dataclass(frozen=True, slots=True)
class ReplayPlan:
    """All routers of a model, in order of their layers, and layers that are left alone with the reason.

    `shape` has the largest number of experts and of experts a token; layers may have fewer. `plain`: paths of routers
    whose parameters are no tensor subclasses with torch functions of their own.
    """

    shape: RoutingShape
    routers: tuple[RouterSite, ...]
    left_alone: Mapping[int, str]
    num_probed: int
    plain: frozenset[str] = frozenset()

    @property
    def routed(self) -> RoutedLayers:
        """What assembly must know to validate rows."""
        sizes = tuple((site.selection.num_scores, site.selection.top_k) for site in self.routers)
        is_uniform = set(sizes) == {(self.shape.num_experts, self.shape.top_k)}
        return RoutedLayers(self.shape, tuple(site.layer for site in self.routers), () if is_uniform else sizes)


class NamedSizes(NamedTuple):
    """Sizes that a config names; a set for experts and experts a token, as layers may differ. 0 layers: unknown."""

    num_layers: int
    num_experts: frozenset[int]
    top_k: frozenset[int]


def plan_replay(model: nn.Module) -> ReplayPlan:
    """Probe a causal language model and return where it routes.

    Raises ReplayUnsupported, saying what does not fit, if replay would not reach every MoE layer exactly once.
    """
    sizes = named_sizes(model)
    modules = dict(model.named_modules())
    _refuse_known(model, modules)
    num_listed = _num_layers_of(modules)
    num_layers = min(sizes.num_layers or num_listed, num_listed)  # some configs count halves of a layer
    owned = experts_by_layer(model, num_layers, sizes.num_experts)
    counts = frozenset(count for layer in owned.values() for count in layer) | sizes.num_experts
    num_probed = probe_length(counts | sizes.top_k)
    seen = watch(model, num_probed)
    owned = owned or structural_experts(modules, num_layers, frozenset(call.num_scores for call in seen.calls))
    left_alone = _left_alone(modules, owned)
    sites = [_site(model, modules, layer, owned[layer], sizes, seen) for layer in owned if layer not in left_alone]
    if not sites:
        if sizes.num_experts - {1} and not left_alone:
            raise ReplayUnsupported(
                f"{_name(model)}: its config names {_list(sizes.num_experts)} experts, but no layer that owns them was"
                " found; its routing cannot be replayed"
            )
        raise DenseModel(f"{_name(model)} has no MoE layer that routes; train it with replay.mode = off")
    shape = RoutingShape(
        num_layers,
        max(site.selection.num_scores for site in sites),
        max(site.selection.top_k for site in sites),
    )
    plain = frozenset(site.path for site in sites if _is_plain(modules[site.path]))
    return ReplayPlan(shape, tuple(sites), left_alone, num_probed, plain)


def named_sizes(model: nn.Module) -> NamedSizes:
    """What the text part of a model's config names."""
    config: Any = getattr(model, "config", None)
    if config is None:
        return NamedSizes(0, frozenset(), frozenset())
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    values = dict(config.to_dict()) if hasattr(config, "to_dict") else dict(vars(config))
    for name in (*getattr(config, "attribute_map", ()), *_NUM_LAYERS_NAMES):
        if hasattr(config, name):
            values[name] = getattr(config, name)
    for name in _NESTED:
        nested = getattr(config, name, None)
        if nested is not None:
            values = {**(nested.to_dict() if hasattr(nested, "to_dict") else vars(nested)), **values}
    num_layers = next((values[name] for name in _NUM_LAYERS_NAMES if isinstance(values.get(name), int)), 0)
    return NamedSizes(num_layers, _positive(values, _NUM_EXPERTS_NAMES), _positive(values, _TOP_K_NAMES))


def _positive(values: Mapping[str, Any], names: Iterable[str]) -> frozenset[int]:
    """Every positive value under any of the names; of a list (one value a layer), each of its values."""
    found: set[int] = set()
    for name in names:
        value = values.get(name)
        entries = value if isinstance(value, list | tuple) else [value]
        found |= {entry for entry in entries if isinstance(entry, int) and entry > 0}
    return frozenset(found)


def _site(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    layer: int,
    counts: frozenset[int],
    sizes: NamedSizes,
    seen: Watched,
) -> RouterSite:
    overridden = _overridden_site(modules, layer, seen)
    if overridden is not None:
        return overridden
    calls = [call for call in seen.calls if decoder_layer(call.path, modules) == layer]
    selecting = _selecting(calls, counts, sizes)
    paths = {call.path for call in selecting}
    if len(paths) != 1:
        where = f"modules {sorted(paths)} do" if paths else "no call was seen that does"
        raise ReplayUnsupported(
            f"{_name(model)}: layer {layer} owns experts ({_list(counts)}), and one module must select among them with "
            f"top-k, arg-max or a descending sort, but {where}; its routing cannot be replayed"
        )
    chosen = selecting[-1]
    top_k = chosen.top_k or _single(sizes.top_k, f"{_name(model)}: layer {layer} sorts its scores")
    alike = [
        call
        for call in calls
        if (call.path, call.function, call.num_scores) == (chosen.path, chosen.function, chosen.num_scores)
        and call.top_k == chosen.top_k
    ]
    selection = Selection(
        chosen.function,
        chosen.num_scores,
        top_k,
        index=next(i for i, call in enumerate(alike) if call is chosen),
        num_alike=len(alike),
        masking=chosen.masking,
        factors=chosen.factors,
        num_idle=0 if chosen.num_scores in counts else chosen.num_scores - _largest_below(counts, chosen.num_scores),
    )
    site = RouterSite(chosen.path, layer, type(modules[chosen.path]).__name__, selection, Witness.ANSWER)
    if selection.num_idle:
        return site  # an expert that does nothing may be left out of what the router returns
    return _with_witness(site, modules, chosen.indices[:, :top_k], seen)


def _largest_below(counts: frozenset[int], num_scores: int) -> int:
    return max(count for count in counts if count < num_scores)


def _selecting(calls: list[SeenCall], counts: frozenset[int], sizes: NamedSizes) -> list[SeenCall]:
    """Those of a layer's calls that may be the one that selects experts, the likeliest kind only.

    Scores are one an expert; some routers score experts that do nothing beside those (zero experts). Top-k goes before
    arg-max, and that before sorting, as routers also take a maximum, or sort, on their way.
    """
    with_k = [call for call in calls if call.top_k is None or not sizes.top_k or call.top_k in sizes.top_k]
    exact = [call for call in with_k if call.num_scores in counts]
    extended = [call for call in with_k if min(counts) < call.num_scores <= 2 * max(counts)]
    for candidates in (exact, extended):
        for functions in (frozenset({"topk"}), frozenset({"max", "argmax"}), SORTS):
            found = [call for call in candidates if call.function in functions]
            if found:
                return found
    return []


def _with_witness(site: RouterSite, modules: Mapping[str, nn.Module], chosen_NK: Tensor, seen: Watched) -> RouterSite:
    for place, value in seen.outputs.get(site.path, []):
        if _equal(value, chosen_NK):
            return replace(site, witness=Witness.ROUTER_OUTPUT, witness_path=site.path, witness_place=place)
    for path, values in seen.inputs.items():
        for place, value in values:
            if path != site.path and decoder_layer(path, modules) == site.layer and _equal(value, chosen_NK):
                return replace(site, witness=Witness.EXPERTS_INPUT, witness_path=path, witness_place=place)
    return site


def _equal(value: Tensor, chosen_NK: Tensor) -> bool:
    return value.shape == chosen_NK.shape and torch.equal(value.to(torch.int64), chosen_NK.to(torch.int64))


def _overridden_site(modules: Mapping[str, nn.Module], layer: int, seen: Watched) -> RouterSite | None:
    for path, module in modules.items():
        name = type(module).__name__
        if name not in OVERRIDES or decoder_layer(path, modules) != layer:
            continue
        ids_NK = seen.outputs.get(path, [])
        if len(ids_NK) != 1:
            raise ReplayUnsupported(f"router {path} ({name}) was not called exactly once in a forward")
        place, value = ids_NK[0]
        selection = Selection("", int(cast(Any, module).num_experts), int(value.shape[1]))
        return RouterSite(path, layer, name, selection, Witness.ROUTER_OUTPUT, path, place, override=name)
    return None


def _left_alone(modules: Mapping[str, nn.Module], owned: Mapping[int, frozenset[int]]) -> dict[int, str]:
    left: dict[int, str] = {}
    for path, module in modules.items():
        layer = decoder_layer(path, modules)
        if layer is not None and layer in owned and type(module).__name__ in NOT_REPLAYED:
            left[layer] = NOT_REPLAYED[type(module).__name__]
    return left


def _refuse_known(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    for path, module in modules.items():
        if type(module).__name__ in REFUSED:
            raise ReplayUnsupported(
                f"{_name(model)}: {path} ({type(module).__name__}) cannot be replayed: {REFUSED[type(module).__name__]}"
            )


def _is_plain(module: nn.Module) -> bool:
    own = nn.Parameter.__torch_function__
    return all(type(parameter).__torch_function__ == own for parameter in module.parameters())


def _num_layers_of(modules: Mapping[str, nn.Module]) -> int:
    layers = (decoder_layer(path, modules) for path in modules)
    return max((layer + 1 for layer in layers if layer is not None), default=0)


def _single(values: frozenset[int], who: str) -> int:
    if len(values) != 1:
        raise ReplayUnsupported(f"{who}, and the config does not name how many experts a token takes")
    return next(iter(values))


def _list(counts: Iterable[int]) -> str:
    return " or ".join(map(str, sorted(counts)))


def _name(model: nn.Module) -> str:
    return type(model).__name__
