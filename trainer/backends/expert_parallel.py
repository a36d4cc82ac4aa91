"""A layer's experts spread over ranks: each rank owns a block of them, tokens travel to their experts and back.

    router (live weights, replayed ids) ─▶ all-to-all ─▶ this rank's experts ─▶ all-to-all ─▶ weighted sum, per token

The exchange is transformers' `AllToAllEP`, called between router and experts: `experts(hidden, global ids, weights)`.
Replay happens in the router, before it, so that replayed ids decide where tokens travel, and the gate weights, which
are applied by the rank that owns the token, keep their gradient. Needs experts as transformers stacks them: every
weight of the module has the experts as its first dimension.
"""

from __future__ import annotations

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers.distributed.expert_parallel import apply_expert_parallelism

from gateway.contracts.errors import ConfigurationError


def spread_experts(model: nn.Module, expert_mesh: DeviceMesh, single_mesh: DeviceMesh) -> list[nn.Module]:
    """Leave this rank's block of every layer's experts on it, and route tokens to the blocks of the others.

    expert_mesh: the ranks that share one set of experts, in order of their blocks. single_mesh: this rank alone
    (transformers slices a batch that a tensor-parallel group shares; ranks here hold batches of their own).
    Returns the modules whose weights are now blocks. Raises ConfigurationError where experts cannot be spread.
    """
    modules = expert_modules(model, num_ranks=expert_mesh.size())
    plan: dict[str, str] = {}
    for path, module in modules.items():
        plan |= {f"{path}.{name}": "grouped_gemm" for name, _weight in module.named_parameters(recurse=False)}
        plan[path] = "ep_dispatch_experts"
    apply_expert_parallelism(model, expert_mesh, single_mesh, plan, ep_implementation="all_to_all")
    return list(modules.values())


def expert_modules(model: nn.Module, *, num_ranks: int) -> dict[str, nn.Module]:
    """The modules that own a layer's experts, by path; raises ConfigurationError, saying which cannot be spread."""
    name = type(model).__name__
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and path.rpartition(".")[2] == "experts":
            raise ConfigurationError(
                f"parallel.expert_parallel {num_ranks}: {name} keeps {path} as single modules, not stacked weights; "
                "set it to 1"
            )
        if hasattr(module, "_is_expert_parallel"):  # set by transformers on experts that can run a block of themselves
            found[path] = module
    if not found:
        raise ConfigurationError(f"parallel.expert_parallel {num_ranks}: {name} has no experts to spread; set it to 1")
    for path, module in found.items():
        if "forward" in vars(module):
            raise ConfigurationError(
                f"parallel.expert_parallel {num_ranks}: routing of {name} is verified at the inputs of {path}, which "
                "do not stay on one rank; set it to 1"
            )
        num_experts = int(module.num_experts)  # type: ignore[arg-type]
        for weight_name, weight in module.named_parameters(recurse=False):
            if weight.shape[0] != num_experts:
                raise ConfigurationError(
                    f"parallel.expert_parallel {num_ranks}: {path}.{weight_name} of {name} is not stacked by expert; "
                    "set it to 1"
                )
        if num_experts % num_ranks:
            raise ConfigurationError(
                f"parallel.expert_parallel {num_ranks} does not divide the {num_experts} experts of {path}"
            )
    return found
