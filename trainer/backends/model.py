"""The model of a policy: loading a transformers checkpoint onto a device, and what must be known of it before training.

A model stays in evaluation mode while it trains: dropout and router jitter would make its log-probs those of another
distribution than the engine sampled from.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from gateway.contracts.errors import ConfigurationError
from trainer.backends.settings import ModelSettings

_LEAK_FLOAT32, _LEAK_BFLOAT16 = 1e-5, 2.0**-8
_PACKING_TOLERANCE = 1e-4
_PACKING_SHARE = 0.1


def choose_device(name: str) -> torch.device:
    """The device that `model.device` names; auto is cuda where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigurationError(f"model.device {name!r} is no device: {error}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError(f"model.device is {name}, but torch {torch.__version__} sees no CUDA device")
    return device


def load_model(path: Path, settings: ModelSettings, *, dtype: torch.dtype, device: torch.device) -> Any:
    """A causal language model with parameters in `dtype`, in evaluation mode, on `device`.

    Raises ConfigurationError for a folder that holds none, or a quantised one.
    """
    if settings.attention == "flex_attention" and device.type == "cpu":
        raise ConfigurationError("model.attention flex_attention has no backward pass on CPU; use sdpa there")
    if not (path / "config.json").is_file():
        raise ConfigurationError(f"model.path {path} is not a Hugging Face folder (no config.json in it)")
    transformers.utils.logging.disable_progress_bar()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            experts_implementation=None if settings.experts == "auto" else settings.experts,
            attn_implementation=None if settings.attention == "auto" else settings.attention,
            local_files_only=True,
        )
    except (OSError, ValueError, ImportError) as error:
        raise ConfigurationError(f"model.path {path} cannot be loaded: {error}") from error
    if getattr(model, "hf_quantizer", None) is not None:
        raise ConfigurationError(f"model.path {path} is quantised; train from its unquantised checkpoint")
    return model.eval().to(device)


def recompute_layers(model: nn.Module, contexts: Callable[[], Any] | None) -> None:
    """Let every decoder layer keep its input only, and be computed again in the backward pass.

    `contexts`: `context_fn` of `torch.utils.checkpoint`. Not transformers' own switch, which does nothing in evaluation
    mode. Raises ConfigurationError for a model without layers that allow it.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ConfigurationError(
            f"{type(model).__name__} has no layers that model.checkpoint_activations could compute again"
        )
    options: dict[str, Any] = {} if contexts is None else {"context_fn": contexts}
    for layer in layers:
        layer.forward = partial(_recomputed, layer.forward, options)


def _recomputed(forward: Callable[..., Any], options: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    # No operation draws random numbers in evaluation mode.
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **options, **kwargs)


def is_dense(model: nn.Module) -> bool:
    """Whether a model has no experts: no module is named for them. One that has some under names unknown to replay is
    not dense, and replay refuses it."""
    return not any("expert" in path or "moe" in path for path, _module in model.named_modules())


@torch.no_grad()
def packing_holds(model: Any) -> bool:
    """Whether two short samples in one row get the logits that they get alone.

    Two things must hold: the second sample does not feel which tokens the first has (a recurrent state or a convolution
    would carry them over), and its positions count from 0 as when it is alone. The first is exact up to rounding in any
    dtype, as nothing but those tokens differs; the second, in less than float32, must only be far from the logits that
    the samples have when they do see each other.
    """
    parameter = next(model.parameters())
    exact = parameter.dtype == torch.float32

    def logits(input_ids: list[int], position_ids: list[int]) -> Tensor:
        ids, positions = (torch.tensor([values], device=parameter.device) for values in (input_ids, position_ids))
        result: Tensor = model(input_ids=ids, position_ids=positions, use_cache=False).logits[0].float()
        return result

    first, other, second = [1, 2, 3, 4, 5], [6, 4, 7, 2, 9], [2, 3, 4, 5, 6, 7, 8]
    restarting = [*range(5), *range(7)]
    packed = logits(first + second, restarting)[5:]
    scale = float(packed.abs().max())
    leak = float((packed - logits(other + second, restarting)[5:]).abs().max())
    if leak > scale * (_LEAK_FLOAT32 if exact else _LEAK_BFLOAT16):
        return False
    alone = logits(second, list(range(7)))
    gap = float((packed - alone).abs().max())
    if exact:
        return gap <= _PACKING_TOLERANCE
    seen = float((logits(first + second, list(range(12)))[5:] - alone).abs().max())
    return gap <= _PACKING_SHARE * seen
