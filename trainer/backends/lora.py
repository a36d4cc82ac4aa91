"""Low-rank adapters through peft: added to a model, switched off, and merged into a copy of its weights."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import peft
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor

from gateway.contracts.errors import ConfigurationError
from trainer.backends.settings import LoraSettings

_ADAPTER = "default"
_PEFT_NAME = re.compile(r"(^|\.)base_layer\.")


def add_adapters(model: Any, settings: LoraSettings) -> Any:
    """The model with float32 adapters, which alone train; its layers are changed in place.

    Raises ConfigurationError where no module has a target's name.
    """
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # any number will do
        target_modules=list(settings.targets),
        lora_dropout=0.0,
        task_type=peft.TaskType.CAUSAL_LM,
    )
    try:
        with warnings.catch_warnings():
            # peft 0.21 reads an attribute that transformers 5.23 has renamed; nobody here can help it.
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
            return peft.get_peft_model(model, config).eval()
    except ValueError as error:
        raise ConfigurationError(f"lora.targets {list(settings.targets)}: {error}") from error


def adapters_off(model: Any) -> AbstractContextManager[None]:
    """Within, the model is the one that adapters were added to."""
    return model.disable_adapter()


def base_model(model: Any) -> Any:
    """The transformers model, adapters in its layers or not."""
    return model.get_base_model() if isinstance(model, peft.PeftModel) else model


@torch.no_grad()
def merged_state(model: Any) -> dict[str, Tensor]:
    """The transformers model's state with adapters merged in, under the names that it has without them; a tied
    parameter is one object under all its names.

    Nothing of the model changes: merging in place and taking it back would leave rounding behind.
    """
    state: Mapping[str, Tensor] = base_model(model).state_dict(keep_vars=True)
    if not isinstance(model, peft.PeftModel):
        return dict(state)
    merged = {_PEFT_NAME.sub(r"\1", name): tensor for name, tensor in state.items() if ".lora_" not in name}
    for path, layer in _adapted(base_model(model)):
        name = f"{path}.weight"
        merged[name] = (merged[name].float() + layer.get_delta_weight(_ADAPTER).float()).to(merged[name].dtype)
    return merged


def _adapted(model: Any) -> Iterator[tuple[str, Any]]:
    for path, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield path, module
