"""Results of a user's functions (`trainer.extension` finds them), checked at each call."""

from __future__ import annotations

import torch
from torch import Tensor

from gateway.contracts.errors import ConfigurationError, NonFiniteLoss


def checked_tensor(result: object, *, what: str, like: Tensor, inputs_finite: bool = True) -> Tensor:
    """`result` if it is a floating tensor of the shape of `like`, finite where `inputs_finite`.

    Raises ConfigurationError naming `what`, or NonFiniteLoss for a value that is not finite.
    """
    if not isinstance(result, Tensor) or not result.is_floating_point():
        kind = f"a tensor of {result.dtype}" if isinstance(result, Tensor) else f"a {type(result).__name__}"
        raise ConfigurationError(f"{what} returned {kind}; a floating tensor of shape {list(like.shape)} was expected")
    if result.shape != like.shape:
        raise ConfigurationError(f"{what} returned shape {list(result.shape)}; {list(like.shape)} was expected")
    if inputs_finite and not bool(torch.isfinite(result).all()):
        at = int((~torch.isfinite(result)).nonzero()[0, 0])
        raise NonFiniteLoss(f"{what} returned {float(result.detach()[at])} at [{at}], from inputs that are finite")
    return result
