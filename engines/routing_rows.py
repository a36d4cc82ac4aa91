"""Routing rows as engines send them, read piece by piece into the type in which they are stored.

    base64 ─▶ pieces of whole integers ─▶ ids as a file or a plain array has them ─▶ range check ─▶ uint8 or uint16

Nothing of the size of the answer is made on the way: 67 MB of base64 become 12.6 MB of ids in the buffer that is kept,
and never are more than `_SLICE` characters in between. SGLang sends little-endian int32; vLLM a `.npy` file.
"""

from __future__ import annotations

import binascii
import io
import math
from typing import Any, Literal, Protocol, Self, TypeAlias

import numpy as np
import numpy.lib.format as npy
import numpy.typing as npt
import pybase64

from gateway.contracts.errors import ExpertsMismatch
from gateway.contracts.experts import ExpertIds, RoutedExperts, RoutingShape
from gateway.contracts.generation import GenerateRequest

Integers: TypeAlias = npt.NDArray[np.integer[Any]]

_SLICE = 2**18
_STAND_IN = "rows "
_NPY_START_BYTES = 12
_NPY_HEADER_BYTES = 2**16
_UNIT = 64
"""Characters that are decoded together: 48 bytes, whole integers of any size, so that no bytes are carried over."""
_FIRST_BYTES = 64 * 2**20
"""Of a buffer, untouched until it is used; longer rows make it grow."""


class Layout(Protocol):
    """How ids lie in the decoded bytes; one object an answer."""

    columns_first: bool
    """Whether they are in Fortran's order."""

    def integers(self, raw: bytes) -> Integers:
        """The ids [n] that these bytes complete, in order; raises ExpertsMismatch."""
        ...

    def check(self, shape: RoutingShape, start: int, stop: int) -> None:
        """Raise ExpertsMismatch unless all bytes are there, and as many as rows [start, stop) take."""
        ...


class Int32Layout:
    """SGLang's: little-endian int32, [rows, layers, top_k], nothing else."""

    columns_first = False

    def __init__(self) -> None:
        self._num_bytes = 0
        self._rest = b""

    def integers(self, raw: bytes) -> Integers:
        """As the protocol says."""
        self._num_bytes += len(raw)
        raw = self._rest + raw
        num_bytes = len(raw) & ~3
        self._rest = raw[num_bytes:]
        return np.frombuffer(raw, "<i4", num_bytes // 4)

    def check(self, shape: RoutingShape, start: int, stop: int) -> None:
        """As the protocol says."""
        row_bytes = 4 * shape.num_layers * shape.top_k
        if self._num_bytes != (stop - start) * row_bytes:
            raise ExpertsMismatch(
                f"{self._num_bytes} bytes of routing for tokens {start} to {stop}, "
                f"expected {stop - start} rows of {row_bytes}"
            )


class NpyLayout:
    """vLLM's: a `.npy` file (numpy.lib.format) of integers [rows, layers, top_k]."""

    def __init__(self) -> None:
        self.columns_first = False
        self._rest = b""
        self._dtype: np.dtype[Any] | None = None
        self._shape: tuple[int, ...] = ()
        self._missing = 0  # ids

    def integers(self, raw: bytes) -> Integers:
        """As the protocol says."""
        raw = self._rest + raw
        if self._dtype is None:
            raw = self._behind_header(raw)
            if self._dtype is None:
                self._rest = raw
                return np.empty(0, np.int32)
        num_ids = min(len(raw) // self._dtype.itemsize, self._missing)
        self._missing -= num_ids
        # What follows the array is not looked at (`np.load` does not either).
        self._rest = raw[num_ids * self._dtype.itemsize :] if self._missing else b""
        return np.frombuffer(raw, self._dtype, num_ids)

    def _behind_header(self, raw: bytes) -> bytes:
        """What follows the header, or all while that is not whole."""
        if len(raw) < _NPY_START_BYTES:
            return raw
        file = io.BytesIO(raw)
        try:
            is_first = npy.read_magic(file) == (1, 0)
            num_bytes = int.from_bytes(raw[8:10] if is_first else raw[8:12], "little") + (10 if is_first else 12)
            if len(raw) < min(num_bytes, _NPY_HEADER_BYTES):
                return raw
            read = npy.read_array_header_1_0 if is_first else npy.read_array_header_2_0
            self._shape, columns_first, dtype = read(file)
        except (ValueError, EOFError, OSError) as error:
            raise ExpertsMismatch(f"routed experts are no base64 of a .npy file: {error}") from error
        if dtype.kind not in "iu":
            raise ExpertsMismatch(f"routing rows are {dtype}, expected integers")
        self._dtype, self.columns_first = dtype, columns_first
        self._missing = math.prod(self._shape)
        return raw[file.tell() :]

    def check(self, shape: RoutingShape, start: int, stop: int) -> None:
        """As the protocol says."""
        expected = (stop - start, shape.num_layers, shape.top_k)
        if self._dtype is None or (self._shape == expected and self._missing):
            raise ExpertsMismatch("routed experts are no base64 of a .npy file: it is cut")
        if self._shape != expected:
            raise ExpertsMismatch(
                f"routing of shape {self._shape} ({self._dtype}) for tokens {start} to {stop}, "
                f"expected integers {expected}"
            )


class RoutingRows:
    """The routing rows of one answer (`engines.event_stream.RoutingSink`); `rows` gives them when all has come.

    num_rows: how many are expected at most. Of several strings the last one counts.
    """

    def __init__(self, shape: RoutingShape, layout: type[Layout], *, start: int, num_rows: int) -> None:
        self._shape = shape
        self._layout = layout
        self._start = start
        self._num_ids = max(num_rows, 1) * shape.num_layers * shape.top_k
        self._num_begun = 0
        self._num_noted = 0
        self._string: _RowsString | None = None
        self._failure: str | None = None

    @classmethod
    def of(cls, request: GenerateRequest, shape: RoutingShape | None, layout: type[Layout]) -> Self | None:
        """For the answer to a request, None where it asks for no rows or nothing is known of their shape."""
        start = request.routed_experts_start
        if start is None or shape is None:
            return None
        num_rows = len(request.token_ids) + request.sampling.max_new_tokens - 1 - start
        return cls(shape, layout, start=start, num_rows=num_rows)

    @property
    def stand_in(self) -> str | None:
        """The word for the latest string, None before the first."""
        return f"{_STAND_IN}{self._num_begun}" if self._num_begun else None

    def begin(self) -> str:
        """As the protocol says."""
        self._num_begun += 1
        self._string, self._failure = _RowsString(self._shape, self._layout(), self._num_ids), None
        return f"{_STAND_IN}{self._num_begun}"

    def feed(self, text: bytes) -> None:
        """As the protocol says; what cannot be read is told by `rows`, and no more of it is kept."""
        if self._string is None:
            return
        try:
            self._string.feed(memoryview(text))
        except ExpertsMismatch as error:
            self._string, self._failure = None, error.message

    def note(self, value: object) -> None:
        """`value` stands in an event where its rows should."""
        self._num_noted += isinstance(value, str) and value.startswith(_STAND_IN)

    @property
    def strayed(self) -> bool:
        """Whether a big string of that name came at another place: it was taken for rows, and is lost to whom it was
        for (I8). Asked when every event up to the last was noted; a later one may be arriving before."""
        return self._num_begun != self._num_noted

    def rows(self, stop: int) -> RoutedExperts:
        """The latest string as rows up to `stop`, in the stored type; nothing of them is kept here.

        A layer's row with an id that the model has not is zeros (as `gateway.contracts.experts.narrow` has it, I9).
        Raises ExpertsMismatch where they cannot be read, or their number or shape is another one.
        """
        string, self._string = self._string, None
        if string is None:
            raise ExpertsMismatch(self._failure or "no routed experts came")
        return RoutedExperts(string.ids(self._start, stop), self._start)


class _RowsString:
    """One string on its way from base64 to ids; whatever is wrong with it is an ExpertsMismatch."""

    def __init__(self, shape: RoutingShape, layout: Layout, num_ids: int) -> None:
        self._shape = shape
        self._layout = layout
        self._text = b""
        self._is_padded = False
        self._ids = np.empty(min(num_ids, _FIRST_BYTES // shape.dtype.itemsize), shape.dtype)
        self._num_ids = 0
        self._unknown: list[npt.NDArray[np.intp]] = []

    def feed(self, text: memoryview) -> None:
        """The next characters."""
        if self._text:
            missing = _UNIT - len(self._text)
            self._text += text[:missing]
            if len(self._text) < _UNIT:
                return
            self._decode(self._text)
            text = text[missing:]
        stop = len(text) - len(text) % _UNIT
        self._text = bytes(text[stop:])
        for first in range(0, stop, _SLICE):
            self._decode(text[first : min(first + _SLICE, stop)])

    def ids(self, start: int, stop: int) -> ExpertIds:
        """All of it, [stop - start, layers, top_k]."""
        self._decode(self._text)
        self._layout.check(self._shape, start, stop)
        order: Literal["C", "F"] = "F" if self._layout.columns_first else "C"
        shape = (stop - start, self._shape.num_layers, self._shape.top_k)
        ids = self._ids[: self._num_ids].reshape(shape, order=order)
        if self._unknown:
            if self._shape.top_k == 1:  # a row of one id can hold no mark
                raise ExpertsMismatch(f"an expert id is none of the model's {self._shape.num_experts}")
            rows, layers, _ = np.unravel_index(np.concatenate(self._unknown), shape, order=order)
            ids[rows, layers] = 0
        return np.ascontiguousarray(ids)

    def _decode(self, text: bytes | memoryview) -> None:
        if self._is_padded and text:
            raise ExpertsMismatch("routed experts are not base64: something follows the padding")
        try:
            raw = pybase64.b64decode(text, validate=True)
        except (binascii.Error, ValueError) as error:
            raise ExpertsMismatch(f"routed experts are not base64: {error}") from error
        self._is_padded = len(raw) * 4 != len(text) * 3
        self._keep(self._layout.integers(raw))

    def _keep(self, ids: Integers) -> None:
        """Append ids in the stored type; a note of where those are that the model has not."""
        if not len(ids):
            return
        num_experts = self._shape.num_experts
        if ids.dtype.kind == "i" and num_experts > np.iinfo(ids.dtype).max + 1:
            ids = ids.astype(np.int32)  # else -1 would be a number that the model has
        # Without their sign, negative ones are above all that a model has: one comparison looks for both.
        unsigned = ids.view(ids.dtype.str.replace("i", "u"))
        if unsigned.max() >= num_experts:
            where = np.flatnonzero(unsigned >= num_experts) + self._num_ids
            if not self._layout.columns_first:  # a layer's row goes as a whole: its first id will do
                where = np.unique(where - where % self._shape.top_k)
            self._unknown.append(where)
        stop = self._num_ids + len(ids)
        if stop > len(self._ids):
            self._grow(stop)
        self._ids[self._num_ids : stop] = ids
        self._num_ids = stop

    def _grow(self, num_ids: int) -> None:
        longer = np.empty(max(num_ids, 2 * len(self._ids)), self._ids.dtype)
        longer[: self._num_ids] = self._ids[: self._num_ids]
        self._ids = longer


def decode_routing(encoded: str, shape: RoutingShape, layout: type[Layout], *, start: int, stop: int) -> RoutedExperts:
    """A string that came with its event → rows [start, stop) in the stored type; raises ExpertsMismatch."""
    rows = RoutingRows(shape, layout, start=start, num_rows=stop - start)
    rows.begin()
    rows.feed(encoded.encode("utf-8", "surrogatepass"))
    return rows.rows(stop)
