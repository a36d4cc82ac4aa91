"""One short forward of a model, watched: which modules make calls that may select experts, and where ids show.

The probe runs in evaluation mode, without gradient, over a few positions whose number equals no number of experts, so
that scores of experts cannot be mistaken for scores of positions (as an attention's index over tokens has).
"""

from __future__ import annotations

import inspect
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from trainer.replay.selection import (
    IN_PLACE,
    PRODUCTS,
    SELECTING,
    Call,
    Masked,
    Masking,
    factors,
    masked,
    parsed,
    place_of_factor,
)

Place: TypeAlias = int | str
"""Position or keyword of an argument, or position among the parts of an output."""
WHOLE = -1


@dataclass(frozen=True, slots=True, eq=False)
class SeenCall:
    """A call of the probe that may select: the innermost module whose forward made it, and the indices it returned,
    int64[N, k] (of a sort: int64[N, E]). factors: see `Selection`.
    """

    path: str
    function: str
    num_scores: int
    top_k: int | None
    masking: Masking
    indices: Tensor
    factors: tuple[tuple[int, int], ...] = ()


@dataclass(slots=True)
class Watched:
    """What a probe saw. inputs, outputs: by module path, the integer tensors [N, k] that it was called with or
    returned, each with its position or name there (`WHOLE` for an output that is a tensor itself)."""

    calls: list[SeenCall] = field(default_factory=list)
    inputs: dict[str, list[tuple[Place, Tensor]]] = field(default_factory=dict)
    outputs: dict[str, list[tuple[Place, Tensor]]] = field(default_factory=dict)
    picked: dict[int, tuple[Tensor, int]] = field(default_factory=dict)
    """By identity: scores that a call picked (held, so that no other tensor gets their identity), and which call."""
    used: set[int] = field(default_factory=set)
    """Calls of which the picked scores, not only their indices, were used."""

    def note_use(self, values: Iterable[Any]) -> None:
        """Of picked scores among the arguments of a call, or in lists of them."""
        for value in values:
            if isinstance(value, list | tuple):
                self.note_use(value)
            elif id(value) in self.picked:
                self.used.add(self.picked[id(value)][1])


def probe_length(counts: frozenset[int]) -> int:
    """The number of probed positions: the least from 5 that equals none of `counts`."""
    return next(length for length in range(5, 6 + len(counts)) if length not in counts)


def run_probe(model: nn.Module, num_positions: int) -> Any:
    """A forward over one row of `num_positions` tokens, in evaluation mode; its output."""
    device = next(model.parameters()).device
    input_ids = torch.arange(1, num_positions + 1, device=device)[None]
    parameters = inspect.signature(model.forward).parameters
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    arguments = {"use_cache": False} if takes_any or "use_cache" in parameters else {}
    with torch.no_grad(), _evaluating(model):
        if takes_any or "input_ids" in parameters:
            return model(input_ids=input_ids, **arguments)
        return model(input_ids, **arguments)


def watch(model: nn.Module, num_positions: int) -> Watched:
    """Probe a model and return what was seen."""
    seen = Watched()
    with _module_stack(model, seen, num_positions) as stack, _Watching(stack, seen, num_positions):
        run_probe(model, num_positions)
    seen.calls = [
        call if number in seen.used else replace(call, masking=Masking.NONE) for number, call in enumerate(seen.calls)
    ]  # a mask matters to those that use the scores that they picked
    return seen


class _Watching(TorchFunctionMode):
    def __init__(self, stack: list[str], seen: Watched, num_positions: int) -> None:
        super().__init__()
        self._stack = stack
        self._seen = seen
        self._num_positions = num_positions
        self._masked_sizes: set[tuple[str, int]] = set()
        self._masked_results: dict[int, Any] = {}
        self._num_products: Counter[str] = Counter()
        self._factors: defaultdict[str, list[tuple[int, int]]] = defaultdict(list)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self._seen.note_use((*args, *kwargs.values()))
        function = SELECTING.get(func)
        call = None if function is None else parsed(function, args, kwargs)
        masking = None if call is None else self._masking_of(call)
        result = func(*args, **kwargs)
        if call is not None and masking is not None and call.num_positions == self._num_positions:
            self._note(call, masking, result)
        found = self._factor(func, args) if func in PRODUCTS else masked(func, args, kwargs)
        if found is not None:
            self._masked_sizes.add((self._stack[-1], found.scores.numel()))
            if not found.in_place:
                self._masked_results[id(result)] = result
        return result

    def _factor(self, func: Any, args: tuple[Any, ...]) -> Masked | None:
        operands = factors(args)
        if operands is None:
            return None
        path = self._stack[-1]
        number = self._num_products[path]
        self._num_products[path] += 1
        place = place_of_factor(operands)
        if place is None:
            return None
        self._factors[path].append((number, place))
        return Masked(operands[1 - place], operands[place], func in IN_PLACE)

    def _masking_of(self, call: Call) -> Masking:
        if id(call.scores) in self._masked_results:
            return Masking.LAST
        if (self._stack[-1], call.scores.numel()) in self._masked_sizes:
            return Masking.EARLIER
        return Masking.NONE

    def _note(self, call: Call, masking: Masking, result: Any) -> None:
        indices = (result if isinstance(result, Tensor) else result[1]).reshape(self._num_positions, -1)
        if not isinstance(result, Tensor):
            self._seen.picked[id(result[0])] = (result[0], len(self._seen.calls))
        path = self._stack[-1]
        by = tuple(self._factors[path])
        self._seen.calls.append(SeenCall(path, call.function, call.num_scores, call.top_k, masking, indices, by))


@contextmanager
def _module_stack(model: nn.Module, seen: Watched, num_positions: int) -> Iterator[list[str]]:
    """The paths of the modules whose forward is running, outermost first; notes integer tensors on their way."""
    stack: list[str] = []
    handles = []
    for path, module in model.named_modules():

        def enter(_module: nn.Module, args: Any, kwargs: Any, path: str = path) -> None:
            stack.append(path)
            seen.note_use((*args, *kwargs.values()))
            for place, value in (*enumerate(args), *kwargs.items()):
                if is_ids(value, num_positions):
                    seen.inputs.setdefault(path, []).append((place, value.reshape(num_positions, -1)))

        def leave(_module: nn.Module, _args: Any, output: Any, path: str = path) -> None:
            stack.pop()
            seen.note_use((output,))
            for place, value in enumerate(output) if isinstance(output, tuple | list) else ((WHOLE, output),):
                if is_ids(value, num_positions):
                    seen.outputs.setdefault(path, []).append((place, value.reshape(num_positions, -1)))

        handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield stack
    finally:
        for handle in handles:
            handle.remove()


def is_ids(value: Any, num_positions: int) -> bool:
    """Whether a value may be the chosen ids of N positions: integers, and a whole number of them for each."""
    return (
        isinstance(value, Tensor)
        and value.dtype in (torch.int64, torch.int32)
        and value.ndim > 0
        and value.numel() > 0
        and value.numel() % num_positions == 0
    )


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode, and afterwards as it was."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
