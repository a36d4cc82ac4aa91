"""A router's own forward, with the selecting call handed in: the way without a mode, which costs nothing for each of
the operations before the selection.

The forward's code is bound to globals in which `torch` is a stand-in that answers `topk` and has everything else as it
is. That needs a selecting call that the code of `forward` itself makes, as `torch.topk`; the probe saw whether it does.
Other routers run under a mode (`selection.py`). Proof and verification are the same for both.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Answer = Callable[[Tensor], Any]
"""What a selecting call returns, for its scores."""


def own_forward(module: nn.Module) -> types.FunctionType | None:
    """The function that a module's class has as `forward`; None if the instance, or a wrapper, has another."""
    function = getattr(module.forward, "__func__", None)
    is_own = isinstance(function, types.FunctionType) and getattr(module.forward, "__self__", None) is module
    return function if is_own else None


def answered_forward(module: nn.Module, num_scores: int, top_k: int, answer: Answer) -> Callable[..., Any]:
    """`module.forward`, in which `torch.topk` of `top_k` out of `num_scores` scores returns `answer(scores)`.

    `module` must have an `own_forward`.
    """
    forward = own_forward(module)
    assert forward is not None

    def topk(input: Tensor, k: int, dim: int = -1, *options: Any, **named: Any) -> Any:  # noqa: A002
        if k == top_k and input.shape[-1] == num_scores and dim in (-1, input.ndim - 1) and "out" not in named:
            return answer(input)
        return torch.topk(input, k, dim, *options, **named)

    stand_in: Any = _StandIn("torch")
    for name in forward.__code__.co_names:
        if hasattr(torch, name):
            setattr(stand_in, name, getattr(torch, name))  # found at once, not by way of __getattr__
    stand_in.topk = topk
    own = {name: stand_in if value is torch else value for name, value in forward.__globals__.items()}
    bound = types.FunctionType(forward.__code__, own, forward.__name__, forward.__defaults__, forward.__closure__)
    bound.__kwdefaults__ = forward.__kwdefaults__
    return types.MethodType(bound, module)


class _StandIn(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)
