"""FullySharded: a policy cut over processes, by FSDP2 `fully_shard` and expert parallelism.

    all ranks        every weight is cut over all of them; a layer's are gathered while it runs
    dp x ep          experts: `ep` ranks own a block each (expert_parallel.py), cut over the `dp` ranks of one block

Every rank runs micro-batches of its own, and gradients are *sums* over ranks: a step's global denominators are in the
tokens' weights. Ranks meet in every layer, so all must run the same number of forwards and backwards in one order.
Needs the default process group (gloo or nccl); knows nothing of who started the ranks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.optim import Optimizer

from gateway.contracts.errors import ConfigurationError
from trainer.backends.expert_parallel import spread_experts
from trainer.backends.shares import COMMON_FILE, read_shares, write_shares

_LAYER = re.compile(r"(?:^|\.)(?:layers|blocks|h)\.\d+$")


class FullySharded:
    """The meshes of one run, the same on every rank."""

    casts = True

    def __init__(self, *, device: torch.device, compute_dtype: torch.dtype, expert_parallel: int) -> None:
        """Collective: every rank of the default process group must come here. Forwards compute in `compute_dtype`;
        weights keep their own, and gradients are summed in float32."""
        self.num_ranks = dist.get_world_size()
        self.rank = dist.get_rank()
        self._device = device
        self._policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
        self._all = init_device_mesh(device.type, (self.num_ranks, 1), mesh_dim_names=("all", "single"))
        self._experts: DeviceMesh | None = None
        if expert_parallel > 1:
            shape = (self.num_ranks // expert_parallel, expert_parallel)
            self._experts = init_device_mesh(device.type, shape, mesh_dim_names=("dp", "ep"))

    def shard(self, model: Any) -> Any:
        """Cut a model that is the same on all ranks, in place.

        Raises ConfigurationError where experts cannot be spread.
        """
        if self._experts is not None:
            for experts in spread_experts(model, self._experts["ep"], self._all["single"]):
                self._cut(experts, self._experts["dp"])
        for layer in _decoder_layers(model):
            self._cut(layer, self._all["all"])
        self._cut(model, self._all["all"])
        return model

    def parameter_groups(self, parameters: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
        """Those cut over all ranks, and experts that are spread, which one kernel does not take together. Always two
        groups, of which one may be empty: schedules are saved by group, for any number of ranks."""
        spread = [isinstance(one, DTensor) and one.device_mesh.ndim > 1 for one in parameters]
        return [
            [one for one, is_spread in zip(parameters, spread, strict=True) if is_spread is wanted]
            for wanted in (False, True)
        ]

    def total(self, values: Tensor) -> Tensor:
        """`values` summed over the ranks."""
        summed = values.to(self._device, copy=True)
        dist.all_reduce(summed)
        return summed.to(values.device)

    def union(self, names: Iterable[str]) -> list[str]:
        """The names that any rank has, in one order."""
        of_ranks: list[list[str]] = [[] for _ in range(self.num_ranks)]
        dist.all_gather_object(of_ranks, list(names))
        return sorted({name for one in of_ranks for name in one})

    def clip(self, parameters: Sequence[nn.Parameter], limit: float) -> Tensor:
        """Scale gradients so that their global norm is at most `limit` (0: leave them); returns the norm before.

        Every element of a gradient lies on exactly one rank, whichever mesh it is cut over.
        """
        gradients = [_local(parameter.grad) for parameter in parameters if parameter.grad is not None]
        square = torch.zeros((), dtype=torch.float64, device=self._device)
        for gradient in gradients:
            square += torch.linalg.vector_norm(gradient).double().square()
        norm = self.total(square).sqrt()
        if limit > 0:
            # The factor of torch.nn.utils.clip_grads_with_norm_, which cannot be given tensors of two meshes.
            factor = (limit / (norm + 1e-6)).clamp(max=1.0)
            for gradient in gradients:
                gradient.mul_(factor.to(gradient.dtype))
        return norm

    def whole(self, tensor: Tensor) -> Tensor:
        """A tensor gathered from all ranks, which must all ask for it: in host memory on rank 0, empty elsewhere.

        Dimension by dimension of its mesh, the outer first: the inner cut, by expert, was made before it.
        """
        gathered: Any = tensor.detach()
        if isinstance(gathered, DTensor):
            placements = list(gathered.placements)
            for dimension in range(len(placements)):
                placements[dimension] = Replicate()
                gathered = gathered.redistribute(placements=placements)
            gathered = gathered.to_local()
        return gathered.cpu() if self.rank == 0 else gathered.new_empty(0, device="cpu")

    def save(
        self, folder: Path, parameters: Mapping[str, nn.Parameter], optimizer: Optimizer, rest: dict[str, Any]
    ) -> None:
        """Each rank writes its own shares into `folder`, which all ranks must see; rank 0 what all have in common."""
        write_shares(folder, parameters, optimizer, rest, rank=self.rank)

    def load(self, folder: Path, parameters: Mapping[str, nn.Parameter], optimizer: Optimizer) -> dict[str, Any]:
        """Take up what `save` wrote, bit for bit; with another number of ranks too.

        Raises ConfigurationError for other parameters, and for a checkpoint of one process.
        """
        if not (folder / COMMON_FILE).is_file():
            raise ConfigurationError(
                f"checkpoint {folder} was not written by several processes (no {COMMON_FILE} in it): go on with "
                "parallel.processes = 1, or start a new run from its exported policy"
            )
        return read_shares(folder, parameters, optimizer)

    def _cut(self, module: nn.Module, mesh: DeviceMesh) -> None:
        """FSDP2 takes means over the ranks of a mesh by default, which are others for experts; these are sums."""
        sharded = fully_shard(module, mesh=mesh, mp_policy=self._policy)
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)  # without it a factor is a reduction that gloo does not know


def _decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that weights are gathered for, one at a time; inner ones (a layer of a layer) are part of theirs."""
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        if _LAYER.search(path) and not any(path.startswith(f"{outer}.") for outer in found):
            found[path] = module
    return list(found.values())


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
