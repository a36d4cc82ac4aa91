"""Which experts computed each token: forward hooks on the model's own router modules, keyed by global layer index.

A router is a module whose forward selects experts and returns their ids, as transformers' MoE models of today do
(`…layers.{i}.mlp.gate` of class `*Router`); the hook reads what it returned and changes nothing.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from gateway.contracts.errors import ConfigurationError
from gateway.contracts.experts import RoutingShape

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


class RouterCapture:
    """Collects the expert ids of one forward pass; layers without experts stay zero, as SGLang reports them."""

    def __init__(self, model: torch.nn.Module, shape: RoutingShape) -> None:
        """Install the hooks; raises ConfigurationError if this model's routers cannot be read."""
        self._shape = shape
        self._selected: dict[int, torch.Tensor] = {}
        self.layers = self._install(model)

    def _install(self, model: torch.nn.Module) -> tuple[int, ...]:
        layers: list[int] = []
        for name, module in model.named_modules():
            match = _LAYER.search(name)
            if match is not None and type(module).__name__.endswith("Router"):
                layers.append(int(match[1]))
                module.register_forward_hook(self._hook(int(match[1])))
        if not layers or len(set(layers)) != len(layers):
            raise ConfigurationError(
                f"{type(model).__name__}: routers found in layers {layers}; this engine cannot record its experts"
            )
        return tuple(layers)

    def _hook(self, layer: int) -> Any:
        top_k = self._shape.top_k

        def record(_module: torch.nn.Module, _inputs: Any, output: Any) -> None:
            indices = output[-1]
            if indices.dtype != torch.int64 or indices.shape[-1] != top_k:
                raise ConfigurationError(f"router of layer {layer} returned {indices.dtype} {tuple(indices.shape)}")
            self._selected[layer] = indices.reshape(-1, top_k)

        return record

    def take(self, num_tokens: int) -> npt.NDArray[np.integer]:
        """Ids of the last forward pass, [num_tokens, num_layers, top_k] in the stored type; forgets them."""
        rows = np.zeros((num_tokens, self._shape.num_layers, self._shape.top_k), dtype=self._shape.dtype)
        ids = torch.stack([self._selected[layer] for layer in self.layers], dim=1)
        rows[:, list(self.layers)] = ids.numpy()
        self._selected.clear()
        return rows


def routing_shape(config: Any) -> RoutingShape | None:
    """Layers, experts and top-k that a transformers configuration names; None for a dense model."""
    for name in ("num_experts", "n_routed_experts", "num_local_experts"):
        num_experts = getattr(config, name, None)
        if num_experts:
            return RoutingShape(config.num_hidden_layers, int(num_experts), int(config.num_experts_per_tok))
    return None
