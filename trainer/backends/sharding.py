"""Sharding: the one place where a policy may be spread over processes. `WholeModel` is a policy in one process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gateway.contracts.errors import ConfigurationError
from trainer.backends.shares import COMMON_FILE, read_shares

Parameters: TypeAlias = Mapping[str, nn.Parameter]
"""What the optimiser steps, by name."""

_STATE_FILE = "backend.pt"


class Sharding(Protocol):
    """What `HFBackend` asks for; every rank calls each method in the same order."""

    @property
    def casts(self) -> bool:
        """Whether `shard` makes a float32 model compute in `model.dtype`; False: the backend keeps such a copy."""
        ...

    def shard(self, model: Any) -> Any:
        """The model with this rank's part of the parameters; called once for each model, adapters included, with
        replay installed and layers to be computed again already wrapped."""
        ...

    def parameter_groups(self, parameters: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
        """The parameters that one fused optimiser kernel may take together."""
        ...

    def total(self, values: Tensor) -> Tensor:
        """float64[n] summed over the ranks."""
        ...

    def clip(self, parameters: Sequence[nn.Parameter], limit: float) -> Tensor:
        """Scale gradients so that their global norm is at most `limit` (0: leave them); returns the norm before."""
        ...

    def whole(self, tensor: Tensor) -> Tensor:
        """A parameter (or its master) as one tensor of all ranks, for export."""
        ...

    def save(self, folder: Path, parameters: Parameters, optimizer: Optimizer, rest: dict[str, Any]) -> None:
        """Write all of them into `folder`, so that `load` gives them back bit for bit. `rest` is the same on all ranks
        (numbers, strings, CPU tensors)."""
        ...

    def load(self, folder: Path, parameters: Parameters, optimizer: Optimizer) -> dict[str, Any]:
        """Take up what `save` wrote, in place, and return `rest`; raises ConfigurationError for other parameters."""
        ...


class WholeModel:
    """One process holds all."""

    casts = False

    def shard(self, model: Any) -> Any:
        """As it is."""
        return model

    def parameter_groups(self, parameters: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
        """All."""
        return [list(parameters)]

    def total(self, values: Tensor) -> Tensor:
        """As they are."""
        return values

    def clip(self, parameters: Sequence[nn.Parameter], limit: float) -> Tensor:
        """By torch's own functions."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if limit > 0:
            torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
        return norm

    def whole(self, tensor: Tensor) -> Tensor:
        """As it is."""
        return tensor

    def save(self, folder: Path, parameters: Parameters, optimizer: Optimizer, rest: dict[str, Any]) -> None:
        """One file."""
        values = {name: parameter.detach() for name, parameter in parameters.items()}
        torch.save({"parameters": values, "optimizer": optimizer.state_dict(), "rest": rest}, folder / _STATE_FILE)

    def load(self, folder: Path, parameters: Parameters, optimizer: Optimizer) -> dict[str, Any]:
        """From that file, or from what several processes wrote."""
        if (folder / COMMON_FILE).is_file():
            return read_shares(folder, parameters, optimizer)
        state = torch.load(folder / _STATE_FILE, weights_only=True, map_location="cpu")
        if state.keys() != {"parameters", "optimizer", "rest"}:
            raise ConfigurationError(f"{folder} was written by another version of this program; choose another run.dir")
        values: Mapping[str, Tensor] = state["parameters"]
        differing = sorted(
            name
            for name in values.keys() | parameters.keys()
            if name not in values or name not in parameters or values[name].shape != parameters[name].shape
        )
        if differing:
            raise ConfigurationError(
                f"checkpoint {folder} is not of this model with these [lora] settings: {len(differing)} parameters "
                f"differ, the first is {differing[0]}"
            )
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(values[name])
        optimizer.load_state_dict(state["optimizer"])
        rest: dict[str, Any] = state["rest"]
        return rest
