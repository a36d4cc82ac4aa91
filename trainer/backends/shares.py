"""A checkpoint of several processes: each one's shares of parameters and moments, and what all have in common.

    FOLDER/shares/     written by all ranks together (torch.distributed.checkpoint)
           common.pt   by rank 0

Shares name the whole tensor that they are cut from, so any number of processes takes them up, one too.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load as load_shares
from torch.distributed.checkpoint.state_dict_saver import save as save_shares
from torch.optim import Optimizer

from gateway.contracts.errors import ConfigurationError

_SHARES_FOLDER = "shares"
COMMON_FILE = "common.pt"
"""In every checkpoint of several processes, and in no other."""


def write_shares(
    folder: Path, parameters: Mapping[str, nn.Parameter], optimizer: Optimizer, rest: dict[str, Any], *, rank: int
) -> None:
    """This rank's shares into `folder`, which all ranks must see; from rank 0 also what is the same on all."""
    save_shares(_shares(parameters, optimizer), checkpoint_id=folder / _SHARES_FOLDER)
    if rank == 0:
        # Groups differ in their meshes only, of which another number of ranks has others.
        group = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
        torch.save({"rest": rest, "group": group}, folder / COMMON_FILE)


def read_shares(folder: Path, parameters: Mapping[str, nn.Parameter], optimizer: Optimizer) -> dict[str, Any]:
    """Take up what `write_shares` wrote, in place, and return `rest`; on every rank, or in one process alone.

    Raises ConfigurationError for other parameters.
    """
    shares = _shares(parameters, optimizer)
    try:
        with warnings.catch_warnings():
            # torch says so of every load in one process, though told that it is one.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
            load_shares(shares, checkpoint_id=folder / _SHARES_FOLDER, no_dist=not dist.is_initialized())
    except CheckpointException as error:
        reason = next(iter(error.failures.values()))[0]
        raise ConfigurationError(f"checkpoint {folder} is not of this model: {reason}") from error
    for name, parameter in parameters.items():
        optimizer.state[parameter] = {key: shares[key][name] for key in _fresh_moments(parameter)}
    common = torch.load(folder / COMMON_FILE, weights_only=True, map_location="cpu")
    for group in optimizer.param_groups:
        group.update(common["group"])
    rest: dict[str, Any] = common["rest"]
    return rest


def _shares(parameters: Mapping[str, nn.Parameter], optimizer: Optimizer) -> dict[str, dict[str, Tensor]]:
    """This rank's shares of parameters and of AdamW's moments, by kind and name; a load writes into them."""
    shares: dict[str, dict[str, Tensor]] = {"parameters": {}}
    for name, parameter in parameters.items():
        shares["parameters"][name] = parameter.detach()
        fresh = _fresh_moments(parameter)
        for key, value in (optimizer.state.get(parameter) or fresh).items():
            shares.setdefault(key, {})[name] = value
    return shares


def _fresh_moments(parameter: nn.Parameter) -> dict[str, Tensor]:
    """AdamW's state before its first step."""
    return {
        "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
        "exp_avg": torch.zeros_like(parameter, requires_grad=False),
        "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
    }
