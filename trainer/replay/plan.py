"""ReplayPlan: where a model routes. Found by watching one probe forward, not from a list of architectures.

A *router* is the innermost module whose forward calls the top-k that selects experts: scores [positions, number
of experts], k = experts per token. (Group-limited routers call other top-ks on groups first; those do not match.)
The plan fails closed: exactly one router, called once and selecting once, in each layer that owns expert weights.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gateway.contracts.errors import ReplayUnsupported
from gateway.contracts.experts import RoutingShape
from trainer.replay.validate import RoutedLayers

NOT_REPLAYED = frozenset({"DeepseekV4HashRouter"})
"""Router types that choose by a fixed function of the token id: there is nothing to replay, and they are left alone."""

_NUM_EXPERTS_NAMES = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_TOP_K_NAMES = ("num_experts_per_tok", "moe_topk", "moe_top_k", "moe_k", "top_k_experts", "num_experts_per_token")
_LAYER_IN_PATH = re.compile(r"(?:^|\.)(?:layers|blocks|h)\.(\d+)\.")
_PROBE_TOKENS = 6


@dataclass(frozen=True, slots=True)
class RouterSite:
    """One router: its path in the model and the global index of its decoder layer, parsed from that path."""

    path: str
    layer: int


@dataclass(frozen=True, slots=True)
class ReplayPlan:
    """All routers of a model, in order of their layers."""

    shape: RoutingShape
    routers: tuple[RouterSite, ...]

    @property
    def routed(self) -> RoutedLayers:
        """What assembly must know to validate rows."""
        return RoutedLayers(self.shape, tuple(site.layer for site in self.routers))


def plan_replay(model: nn.Module) -> ReplayPlan:
    """Probe a transformers causal language model and return where it routes.

    Raises ReplayUnsupported, saying what does not fit, if replay would not reach every MoE layer exactly once.
    """
    shape = routing_shape(model)
    calls = _selecting_calls(model, shape)
    modules = dict(model.named_modules())
    routers = [path for path in calls if type(modules[path]).__name__ not in NOT_REPLAYED]
    sites = tuple(sorted((RouterSite(path, _layer_of(path)) for path in routers), key=lambda site: site.layer))
    _check(model, shape, sites, calls)
    return ReplayPlan(shape, sites)


def routing_shape(model: nn.Module) -> RoutingShape:
    """Layers, experts and experts per token from the model's config; raises ReplayUnsupported for a dense one."""
    config: Any = model.config
    config = config.get_text_config()
    values = config.to_dict() | {name: getattr(config, name) for name in config.attribute_map if hasattr(config, name)}
    num_experts, top_k = _first(values, _NUM_EXPERTS_NAMES), _first(values, _TOP_K_NAMES)
    if num_experts is None or top_k is None:
        raise ReplayUnsupported(
            f"{type(model).__name__} has no experts that its config names (looked for {_NUM_EXPERTS_NAMES} and "
            f"{_TOP_K_NAMES}); train a dense model with replay.mode = off"
        )
    return RoutingShape(int(config.num_hidden_layers), num_experts, top_k)


class SelectingTopk(TorchFunctionMode):
    """While active, hands every top-k that selects experts to `choose(scores, live)`, and counts them.

    `live()` computes the untouched top-k (values and indices).
    """

    def __init__(self, shape: RoutingShape, choose: Callable[[Tensor, Callable[[], Any]], Any]) -> None:
        super().__init__()
        self._shape = shape
        self._choose = choose
        self.num_selections = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.topk or func is Tensor.topk:
            scores = args[0] if args else kwargs["input"]
            k = args[1] if len(args) > 1 else kwargs["k"]
            # Two dimensions: [positions, experts]. Group-limited routers first score [positions, groups, experts of a
            # group], which has as many columns as experts when there is one group.
            if scores.ndim == 2 and scores.shape[1] == self._shape.num_experts and k == self._shape.top_k:
                self.num_selections += 1
                return self._choose(scores, lambda: func(*args, **kwargs))
        return func(*args, **kwargs)


def _selecting_calls(model: nn.Module, shape: RoutingShape) -> Counter[str]:
    """Path of the innermost running module at each selecting top-k of one short forward."""
    calls: Counter[str] = Counter()
    with _module_stack(model) as stack:

        def observe(scores: Tensor, live: Callable[[], Any]) -> Any:
            calls[stack[-1]] += 1
            return live()

        device = next(model.parameters()).device
        input_ids = torch.arange(1, _PROBE_TOKENS + 1, device=device)[None]
        with torch.no_grad(), SelectingTopk(shape, observe):
            model(input_ids=input_ids, use_cache=False)
    return calls


@contextmanager
def _module_stack(model: nn.Module) -> Iterator[list[str]]:
    """The paths of the modules whose forward is running, outermost first."""
    stack: list[str] = []
    handles = []
    for path, module in model.named_modules():

        def enter(_module: nn.Module, _inputs: Any, path: str = path) -> None:
            stack.append(path)

        def leave(_module: nn.Module, _inputs: Any, _output: Any) -> None:
            stack.pop()

        handles.append(module.register_forward_pre_hook(enter))
        handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield stack
    finally:
        for handle in handles:
            handle.remove()


def _check(model: nn.Module, shape: RoutingShape, sites: tuple[RouterSite, ...], calls: Counter[str]) -> None:
    name = type(model).__name__
    more_than_once = {path: count for path, count in calls.items() if count != 1}
    if more_than_once:
        raise ReplayUnsupported(f"{name}: these modules select experts more than once in a forward: {more_than_once}")
    expected = moe_layers(model, shape)
    found = [site.layer for site in sites]
    if found != expected:
        raise ReplayUnsupported(
            f"{name}: layers {expected} own experts, but a selecting top-k ({shape.top_k} of {shape.num_experts}) "
            f"was seen in layers {found}; its routing cannot be replayed"
        )
    if not sites:
        raise ReplayUnsupported(f"{name} has no MoE layer; train it with replay.mode = off")


def moe_layers(model: nn.Module, shape: RoutingShape) -> list[int]:
    """Global indices of the decoder layers that own routed experts and choose among them, ascending.

    Read from the weights that the config made (per-expert modules or stacked weights under a name with `experts`),
    so it needs no per-architecture reading of `first_k_dense_replace`, `mlp_only_layers` and their kin.
    """
    layers = {
        _layer_of(path)
        for path, parameter in model.named_parameters()
        if "experts" in path and "shared" not in path and _is_expert_weight(model, path, parameter, shape)
    }
    fixed = {_layer_of(path) for path, module in model.named_modules() if type(module).__name__ in NOT_REPLAYED}
    return sorted(layers - fixed)


def _is_expert_weight(model: nn.Module, path: str, parameter: Tensor, shape: RoutingShape) -> bool:
    if parameter.ndim == 3 and parameter.shape[0] == shape.num_experts:
        return True
    listed = re.match(r"(.*\bexperts)\.\d+\.", path)
    if listed is None:
        return False
    experts = model.get_submodule(listed.group(1))
    return isinstance(experts, nn.ModuleList) and len(experts) == shape.num_experts


def _layer_of(path: str) -> int:
    match = _LAYER_IN_PATH.search(path)
    if match is None:
        raise ReplayUnsupported(f"cannot tell the decoder layer of {path!r}")
    return int(match.group(1))


def _first(values: Mapping[str, Any], names: tuple[str, ...]) -> int | None:
    """The first of `names` with a positive value; a list (one value a layer) counts if all of it is equal."""
    for name in names:
        value = values.get(name)
        if isinstance(value, list | tuple) and value and all(entry == value[0] for entry in value):
            value = value[0]
        if isinstance(value, int) and value > 0:
            return value
    return None
