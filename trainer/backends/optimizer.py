"""AdamW over float32 master parameters, the learning rate's course, and clipping."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from gateway.contracts.errors import ConfigurationError
from trainer.backends.settings import OptimizerSettings


class MasterWeights:
    """The float32 parameters that the optimiser steps.

    A parameter that is float32 is its own master. One that forwards use in bfloat16 has a float32 copy, whose gradient
    is summed in float32 as soon as a backward pass has made the bfloat16 one, and which is rounded to the parameter
    after a step: forwards then are those of the bfloat16 checkpoint that engines serve.
    """

    def __init__(self, trained: Iterable[tuple[str, nn.Parameter]], exact: Mapping[str, Tensor]) -> None:
        """`exact`: float32 values by name, of a checkpoint that has more bits than the parameters."""
        self.by_name: dict[str, nn.Parameter] = {}
        self._copies: list[tuple[nn.Parameter, nn.Parameter]] = []
        for name, parameter in trained:
            if parameter.dtype == torch.float32:
                self.by_name[name] = parameter
                continue
            values = exact.get(name, parameter).detach().to(parameter.device)
            master = nn.Parameter(values.to(torch.float32, copy=True))
            parameter.register_post_accumulate_grad_hook(self._moving_gradient_to(master))
            self.by_name[name] = master
            self._copies.append((parameter, master))

    @property
    def parameters(self) -> list[nn.Parameter]:
        """In the model's order."""
        return list(self.by_name.values())

    def tensors_of(self, model: nn.Module) -> dict[str, Tensor]:
        """The masters of a model whose parameters all train, under every name that its parameters have."""
        name_of = {id(parameter): name for name, parameter in model.named_parameters()}
        return {
            name: self.by_name[name_of[id(parameter)]]
            for name, parameter in model.named_parameters(remove_duplicate=False)
        }

    @torch.no_grad()
    def round_to_model(self) -> None:
        """After masters changed: the model's parameters become their rounded values."""
        for parameter, master in self._copies:
            parameter.copy_(master)

    @staticmethod
    def _moving_gradient_to(master: nn.Parameter) -> Any:
        def move(parameter: nn.Parameter) -> None:
            assert parameter.grad is not None
            if master.grad is None:
                master.grad = parameter.grad.float()
            else:
                master.grad += parameter.grad
            parameter.grad = None

        return move


def make_optimizer(
    groups: list[list[nn.Parameter]], settings: OptimizerSettings, *, num_updates: int
) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW (decoupled weight decay on every parameter) and its schedule over `num_updates` optimiser steps.

    Raises ConfigurationError for a schedule that transformers does not have, or that needs more than a warm-up.
    """
    optimizer = torch.optim.AdamW(
        [{"params": group} for group in groups],
        lr=settings.learning_rate,
        betas=(settings.betas[0], settings.betas[1]),
        weight_decay=settings.weight_decay,
        fused=True,
    )
    name = settings.schedule
    if name == "constant" and settings.warmup_steps:
        name = "constant_with_warmup"
    try:
        schedule = transformers.get_scheduler(name, optimizer, settings.warmup_steps, num_updates)
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigurationError(f"optimizer.schedule {settings.schedule!r} cannot be used: {error}") from error
    if not isinstance(schedule, torch.optim.lr_scheduler.LambdaLR):
        raise ConfigurationError(f"optimizer.schedule {settings.schedule!r} follows a metric, which no step reports")
    return optimizer, schedule


def resume_schedule(schedule: torch.optim.lr_scheduler.LRScheduler, state: Mapping[str, Any]) -> None:
    """Take up a schedule's `state_dict()`. All parameter groups follow one course, and one process has fewer of them
    than several: what is kept by group is cut to those that there are."""
    num_groups = len(schedule.base_lrs)
    schedule.load_state_dict(
        {key: value[:num_groups] if isinstance(value, list) else value for key, value in state.items()}
    )
