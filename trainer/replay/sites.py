"""Where a model owns routed experts: found in its modules and weights, not in a list of architectures.

Only experts of decoder layers count. Shared experts take every token and are never routed; layers that predict tokens
further ahead (multi-token prediction) are no part of the policy's forward and are left alone.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping

from torch import nn

_LEFT_ALONE = re.compile(r"(^|\.)(mtp|mtp_\w+|nextn\w*|\w*shared_?experts?\w*|visual|vision_\w+|audio_\w+)(\.|$)")


def decoder_layer(path: str, modules: Mapping[str, nn.Module]) -> int | None:
    """The global index of the decoder layer that a path lies in, None outside of any.

    A decoder layer is the outermost numbered entry of a list of modules on the way to `path`.
    """
    if _LEFT_ALONE.search(path):
        return None
    parts = path.split(".")
    for depth, part in enumerate(parts):
        if part.isdigit() and isinstance(modules.get(".".join(parts[:depth])), nn.ModuleList | nn.Sequential):
            return int(part)
        if part.isdigit() and isinstance(modules.get(".".join(parts[:depth])), nn.ModuleDict):
            return int(part)
    return None


def experts_by_layer(model: nn.Module, num_layers: int, num_experts: frozenset[int]) -> dict[int, frozenset[int]]:
    """For each decoder layer that owns routed experts, how many it may have, as its weights say.

    Experts are a list of modules or weights stacked along their first dimension, in a module that is named after them;
    or a module so named whose weights the config's `num_experts` divides (experts joined along rows).
    """
    modules = dict(model.named_modules())
    found: defaultdict[int, set[int]] = defaultdict(set)
    for path, module in modules.items():
        layer = decoder_layer(path, modules)
        if layer is None or layer >= num_layers or not _is_named_after_experts(path, module):
            continue
        found[layer] |= set(_counts(module, num_experts))
    return {layer: frozenset(counts) for layer, counts in sorted(found.items()) if counts}


def _is_named_after_experts(path: str, module: nn.Module) -> bool:
    own = path.rsplit(".", 1)[-1].lower()
    return "expert" in own or "experts" in type(module).__name__.lower() or ".experts." in f"{path}."


def _counts(module: nn.Module, num_experts: frozenset[int]) -> Iterator[int]:
    if isinstance(module, nn.ModuleList):
        if len(module) > 1:
            yield len(module)
        return
    for parameter in module.parameters(recurse=False):
        if parameter.ndim >= 3 and parameter.shape[0] > 1:
            yield int(parameter.shape[0])
        elif parameter.ndim == 2 and not isinstance(module, nn.Linear):
            yield from (count for count in num_experts if parameter.shape[0] % count == 0)


def structural_experts(
    modules: Mapping[str, nn.Module], num_layers: int, num_scores: frozenset[int]
) -> dict[int, frozenset[int]]:
    """As `experts_by_layer` for a model that names nothing after experts: lists of modules, or stacked weights, of
    which a decoder layer has as many as some call of the probe had scores a position."""
    found: defaultdict[int, set[int]] = defaultdict(set)
    for path, module in modules.items():
        layer = decoder_layer(path, modules)
        if layer is not None and layer < num_layers:
            found[layer] |= {count for count in _counts(module, frozenset()) if count in num_scores}
    return {layer: frozenset(counts) for layer, counts in sorted(found.items()) if counts}
