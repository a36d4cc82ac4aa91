"""Selections: the calls by which a router picks experts, seen and answered while its forward runs.

A router may select by top-k, by an arg-max (one expert a token) or by a descending sort. Each is known by its function
and by the shape of its scores: the last dimension holds one score an expert, the others together one entry a position.
`AnsweringMode` answers the call that a plan names with `(scores.gather(ids), ids)`, so values and gradient are those of
the live scores.

Group-limited routers mask the scores of groups that they did not choose, and some then use what their top-k returns as
gate weights. A replayed expert may lie in such a group; its weight must come from the unmasked score, else it is
exactly zero and without gradient. Masks are therefore lifted for replayed experts, which changes nothing for those that
the live router could have chosen. A mask may be boolean, or a factor of zeros and ones.

Shape letters: N = positions, E = scores a position, K = experts of a token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class Masking(StrEnum):
    """What a router does to scores before it selects: it masks none; it selects among the masked scores themselves; it
    does something else to masked scores first (a softmax, a change of shape, an assignment in place)."""

    NONE = "none"
    LAST = "last"
    EARLIER = "earlier"


@dataclass(frozen=True, slots=True)
class Selection:
    """The call that selects: `function` over `num_scores` scores a position, taking `top_k` of them, the `index`-th of
    `num_alike` such calls in one forward of its module."""

    function: str
    num_scores: int
    top_k: int
    index: int = 0
    num_alike: int = 1
    masking: Masking = Masking.NONE
    factors: tuple[tuple[int, int], ...] = ()
    """Products by which the router masks: which of its products of two tensors, and which of the two is the mask."""
    num_idle: int = 0
    """How many of the scores, the last ones, are of experts that do nothing."""


class LayerIds(NamedTuple):
    """What one layer is to use: ids int64[N, K] on the router's device; valid bool[N] there, None if every row is."""

    ids: Tensor
    valid: Tensor | None


class Call(NamedTuple):
    """A call that may select. top_k is None for a sort, which does not say how many will be taken."""

    function: str
    scores: Tensor
    top_k: int | None
    keepdim: bool

    @property
    def num_scores(self) -> int:
        """E."""
        return int(self.scores.shape[-1])

    @property
    def num_positions(self) -> int:
        """N."""
        return self.scores.numel() // max(self.num_scores, 1)


SELECTING: Mapping[Any, str] = {
    getattr(owner, name): name for name in ("topk", "max", "argmax", "sort", "argsort") for owner in (torch, Tensor)
}
"""Functions that may select."""
SORTS = frozenset({"sort", "argsort"})
_MASK_ARGUMENT: Mapping[Any, int] = {
    torch.masked_fill: 1,
    Tensor.masked_fill: 1,
    Tensor.masked_fill_: 1,
    Tensor.__setitem__: 1,
    torch.where: 0,
    Tensor.where: 1,
}
"""Functions that mask, and which argument is the mask."""
PRODUCTS: frozenset[Any] = frozenset(
    getattr(owner, name)
    for owner, names in (
        (torch, ("mul", "multiply")),
        (Tensor, ("mul", "mul_", "multiply", "multiply_", "__mul__", "__rmul__", "__imul__")),
    )
    for name in names
)
"""Functions that multiply."""
_SELECTING_OR_MASKING = frozenset({*SELECTING, *_MASK_ARGUMENT, *PRODUCTS})
_torch: Any = torch._C  # these are not in its type stubs
_ENABLED, _DISABLED = _torch._TorchFunctionState.ENABLED, _torch._TorchFunctionState.ALL_DISABLED
_KEEPS_WHERE_TRUE = frozenset({torch.where, Tensor.where})
IN_PLACE = frozenset({Tensor.masked_fill_, Tensor.__setitem__, Tensor.mul_, Tensor.multiply_, Tensor.__imul__})
"""Functions that change the scores themselves."""


def parsed(function: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call | None:
    """The call, if it picks from the last dimension of its scores in descending order; else None."""
    scores = args[0] if args else kwargs.get("input")
    if not isinstance(scores, Tensor) or not scores.ndim:
        return None
    if function == "topk":
        dim, top_k = _argument(args, kwargs, 2, "dim", -1), _argument(args, kwargs, 1, "k", None)
        return Call(function, scores, int(top_k), True) if _is_last(dim, scores) else None
    if function in SORTS:
        by_keyword = isinstance(kwargs.get("stable"), bool) and len(args) < 2
        dim = kwargs.get("dim", -1) if by_keyword else _argument(args, kwargs, 1, "dim", -1)
        descending = kwargs.get("descending", False) if by_keyword else _argument(args, kwargs, 2, "descending", False)
        return Call(function, scores, None, True) if descending and _is_last(dim, scores) else None
    dim = _argument(args, kwargs, 1, "dim", None)
    return (
        Call(function, scores, 1, bool(_argument(args, kwargs, 2, "keepdim", False))) if _is_last(dim, scores) else None
    )


def _argument(args: tuple[Any, ...], kwargs: Mapping[str, Any], position: int, name: str, default: Any) -> Any:
    return args[position] if len(args) > position else kwargs.get(name, default)


def _is_last(dim: Any, scores: Tensor) -> bool:
    return isinstance(dim, int) and dim in (-1, scores.ndim - 1)


class AnsweringMode(TorchFunctionMode):
    """While active, answers the selection of one router forward and counts the calls that look like it.

    With `layer_ids` None it only notes the live answer, and the `scores` that it is of. Either way `answered` holds
    int64[N, K] afterwards.
    """

    def __init__(
        self,
        selection: Selection,
        layer_ids: Callable[[torch.device, int], LayerIds] | None,
        *,
        leaves_early: bool = False,
    ) -> None:
        """layer_ids: called at most once, with the device of the scores and N. leaves_early: nothing after the answer
        needs torch functions to be dispatched (no other mode, no tensor subclass), so they are not until `__exit__`:
        that is most of what a mode costs."""
        super().__init__()
        self._selection = selection
        self._layer_ids = layer_ids
        self._leaves_early = leaves_early
        self._has_left = False
        masks = selection.masking is not Masking.NONE and layer_ids is not None
        self._watched = _SELECTING_OR_MASKING if masks else SELECTING
        self._given: LayerIds | None = None
        self._unmasked: dict[int, tuple[Any, Tensor]] = {}
        self._factors = dict(selection.factors)
        self._num_products = 0
        self.num_alike = 0
        self.answered: Tensor | None = None
        self.scores: Tensor | None = None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func not in self._watched:
            return func(*args, **kwargs) if kwargs else func(*args)
        function = SELECTING.get(func)
        if function is not None:
            return self._selecting(function, func, args, kwargs or {})
        return self._masking(func, args, kwargs or {})

    def __exit__(self, *exception: Any) -> None:
        if self._has_left:
            _torch._set_torch_function_state(_ENABLED)
        super().__exit__(*exception)

    def _leave(self) -> None:
        if not self._leaves_early or torch.compiler.is_compiling():
            return
        is_alone = _torch._len_torch_function_stack() == 0 and _torch._get_torch_function_state() == _ENABLED
        if is_alone and self.num_alike == self._selection.num_alike:
            self._has_left = True
            _torch._set_torch_function_state(_DISABLED)

    def _selecting(self, function: str, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        call = parsed(function, args, kwargs)
        if call is None or not is_alike(call, self._selection):
            return func(*args, **kwargs)
        self.num_alike += 1
        if self.num_alike != self._selection.index + 1:
            return func(*args, **kwargs)
        if self._layer_ids is None:
            result = func(*args, **kwargs)
            self.scores = call.scores
            self.answered = _indices(result).reshape(call.num_positions, -1)[:, : self._selection.top_k]
            return result
        ids, valid = self._ids_on(call.scores.device, call.num_positions)
        live_NE = None
        if valid is not None or function in SORTS:
            live_NE = _indices(func(*args, **kwargs)).reshape(call.num_positions, -1)
        if valid is not None and live_NE is not None:
            ids = torch.where(valid[:, None], ids, live_NE[:, : self._selection.top_k])
        self.answered = ids
        scores = self._unmasked[id(call.scores)][1] if id(call.scores) in self._unmasked else call.scores
        answer = _answer(call, scores, ids, live_NE)
        self._leave()
        return answer

    def _masking(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        found = self._factor(func, args) if func in PRODUCTS else masked(func, args, kwargs)
        num_scores = self._selection.num_scores
        if found is None or self.answered is not None or found.scores.numel() % num_scores:
            return func(*args, **kwargs)
        if self._selection.masking is Masking.LAST:
            result = func(*args, **kwargs)
            self._unmasked[id(result)] = (result, self._unmasked.get(id(found.scores), (None, found.scores))[1])
            return result
        ids, valid = self._ids_on(found.scores.device, found.scores.numel() // num_scores)
        kept_NE = torch.zeros(len(ids), num_scores, dtype=torch.bool, device=ids.device).scatter_(1, ids, True)
        if valid is not None:
            kept_NE &= valid[:, None]
        kept = kept_NE.view(found.scores.shape)
        if func in PRODUCTS:
            lifted = torch.where(kept, torch.ones_like(found.mask), found.mask)
            return func(*((lifted, args[1]) if args[0] is found.mask else (args[0], lifted)))
        lifted = found.mask | kept if func in _KEEPS_WHERE_TRUE else found.mask & ~kept
        position = _MASK_ARGUMENT[func]
        if len(args) > position:
            return func(*args[:position], lifted, *args[position + 1 :], **kwargs)
        return func(*args, **{**kwargs, _mask_name(func): lifted})

    def _factor(self, func: Any, args: tuple[Any, ...]) -> Masked | None:
        """A product that the plan knows as a mask."""
        operands = factors(args)
        if operands is None:
            return None
        place = self._factors.get(self._num_products)
        self._num_products += 1
        return None if place is None else Masked(operands[1 - place], operands[place], func in IN_PLACE)

    def _ids_on(self, device: torch.device, num_positions: int) -> LayerIds:
        if self._given is None:
            assert self._layer_ids is not None
            self._given = self._layer_ids(device, num_positions)
        return self._given


class Masked(NamedTuple):
    """Scores before a mask, the mask as it was given, and whether the scores themselves were changed."""

    scores: Tensor
    mask: Tensor
    in_place: bool


def masked(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Masked | None:
    """What a masking call masks; None where it is no boolean mask over scores."""
    position = _MASK_ARGUMENT.get(func)
    if position is None:
        return None
    mask = _argument(args, kwargs, position, _mask_name(func), None)
    scores = _argument(args, kwargs, 1, "input", None) if func is torch.where else (args[0] if args else None)
    if func is torch.masked_fill:
        scores = _argument(args, kwargs, 0, "input", None)
    if not (isinstance(mask, Tensor) and isinstance(scores, Tensor) and mask.dtype == torch.bool):
        return None
    return Masked(scores, mask, func in IN_PLACE)


def factors(args: tuple[Any, ...]) -> tuple[Tensor, Tensor] | None:
    """The two tensors of a product; None where one of them is none."""
    is_both = len(args) == 2 and isinstance(args[0], Tensor) and isinstance(args[1], Tensor)
    return (args[0], args[1]) if is_both else None


def place_of_factor(operands: tuple[Tensor, Tensor]) -> int | None:
    """Which operand masks the other: one of zeros and ones, both among them, that is not the larger one."""
    for place, (mask, scores) in enumerate((operands, operands[::-1])):
        if mask.numel() <= scores.numel() and scores.is_floating_point() and not mask.is_complex():
            values = mask.unique()
            if len(values) == 2 and values.tolist() == [0, 1]:
                return place
    return None


def _mask_name(func: Any) -> str:
    return "condition" if func in _KEEPS_WHERE_TRUE else "mask"


def is_alike(call: Call, selection: Selection) -> bool:
    """Whether a call has the function, the scores and the number of experts of the selection."""
    return (
        call.function == selection.function
        and call.num_scores == selection.num_scores
        and call.top_k in (None, selection.top_k)
    )


def _indices(result: Any) -> Tensor:
    return result if isinstance(result, Tensor) else result[1]


def _answer(call: Call, scores: Tensor, ids_NK: Tensor, live_NE: Tensor | None) -> Any:
    """What the call returns when the experts are `ids_NK`; after them, a sort returns the others in its own order."""
    if call.function in SORTS:
        assert live_NE is not None
        is_other_NE = (live_NE[:, :, None] != ids_NK[:, None, :]).all(dim=-1)
        ids_NK = torch.cat([ids_NK, live_NE[is_other_NE].view(len(ids_NK), -1)], dim=1)
    ids = ids_NK if scores.ndim == 2 else ids_NK.view(*scores.shape[:-1], ids_NK.shape[1])
    if call.function == "argsort":
        return ids
    if call.function == "argmax":
        return ids if call.keepdim else ids.squeeze(-1)
    values = scores.gather(-1, ids)
    if call.function == "max" and not call.keepdim:
        return torch.return_types.max((values.squeeze(-1), ids.squeeze(-1)))
    return getattr(torch.return_types, call.function)((values, ids))
