"""A finished rollout as one safetensors body, and back.

The layout is safetensors' own (8 bytes little-endian header length, JSON header, raw little-endian arrays), so that any
safetensors reader opens it. Written here because the feed streams it array by array, without a joined copy.
Per segment i the tensors are `segments.{i}.token_ids` i32[T], `.loss_mask` u8[T], `.rollout_logprobs` f32[T],
`.policy_version` i32[T], `.routed_valid` u8[T-1] and, with routing, `.routed_experts` u8/u16[T-1, L, K].
Everything else is JSON text under `__metadata__.rollout`, with `schema_version`: the body's own, not the ledger's.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt

from gateway.contracts.errors import IntegrityError, SchemaMismatch
from gateway.contracts.generation import LogprobKind
from gateway.contracts.records import FinishRecord, SessionOrigin, SessionRecord
from gateway.contracts.rollouts import FinishedRollout, LeftOut, PickReport
from gateway.contracts.samples import Segment, TurnSpan

BODY_VERSION = 3
"""Of the feed's body; raised with every change of its layout (2: with `pick`, 3: with `cache_flags`)."""

_DTYPE_NAMES = {"int32": "I32", "float32": "F32", "uint8": "U8", "uint16": "U16"}
_DTYPES = {name: np.dtype(numpy_name).newbyteorder("<") for numpy_name, name in _DTYPE_NAMES.items()}
_HEADER_LENGTH = struct.Struct("<Q")
_MAX_HEADER_BYTES = 100_000_000


def encode_rollout(rollout: FinishedRollout) -> Iterator[bytes | memoryview]:
    """The body piece by piece: header first, then each array's bytes."""
    arrays = _segment_arrays(rollout)
    header: dict[str, Any] = {"__metadata__": {"schema_version": str(BODY_VERSION), "rollout": _metadata(rollout)}}
    offset = 0
    for name, array in arrays.items():
        header[name] = {
            "dtype": _DTYPE_NAMES[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [offset, offset + array.nbytes],
        }
        offset += array.nbytes
    header_bytes = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    header_bytes += b" " * (-len(header_bytes) % 8)
    yield _HEADER_LENGTH.pack(len(header_bytes)) + header_bytes
    for array in arrays.values():
        if array.nbytes:
            yield np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False).data.cast("B")


def decode_rollout(body: bytes | bytearray) -> FinishedRollout:
    """Read what `encode_rollout` wrote; arrays are read-only views of `body`.

    Raises SchemaMismatch for another schema version, IntegrityError for a damaged body.
    """
    header, data = _split(body)
    try:
        return _rollout(header, data)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise IntegrityError(f"rollout body does not describe a rollout: {error}") from error


def _rollout(header: dict[str, Any], data: memoryview) -> FinishedRollout:
    metadata = header.pop("__metadata__", {})
    version = metadata.get("schema_version")
    if version != str(BODY_VERSION):
        raise SchemaMismatch(f"rollout body has schema version {version}, this program reads {BODY_VERSION}")
    arrays = {name: _array(name, entry, data) for name, entry in header.items()}
    facts = json.loads(metadata["rollout"])
    session = facts["session"]
    session |= {"origin": SessionOrigin(session["origin"]), "gaps": tuple(session.get("gaps", ()))}
    return FinishedRollout(
        session=SessionRecord(**session),
        finish=FinishRecord(**facts["finish"]),
        segments=tuple(_segment(i, segment_facts, arrays) for i, segment_facts in enumerate(facts["segments"])),
        num_experts=facts["num_experts"],
        reports=facts["reports"],
        pick=_pick(facts["pick"]),
    )


def _pick(facts: Mapping[str, Any]) -> PickReport:
    return PickReport(**{**facts, "left_out": tuple(LeftOut(**left) for left in facts["left_out"])})


def _segment_arrays(rollout: FinishedRollout) -> dict[str, npt.NDArray[Any]]:
    arrays: dict[str, npt.NDArray[Any]] = {}
    for i, segment in enumerate(rollout.segments):
        prefix = f"segments.{i}."
        arrays[prefix + "token_ids"] = segment.token_ids
        arrays[prefix + "rollout_logprobs"] = segment.rollout_logprobs
        arrays[prefix + "policy_version"] = segment.policy_version
        if segment.routed_experts is not None:
            arrays[prefix + "routed_experts"] = segment.routed_experts
        arrays[prefix + "loss_mask"] = segment.loss_mask.view(np.uint8)
        arrays[prefix + "routed_valid"] = segment.routed_valid.view(np.uint8)
    # Widest items first, so that every array lies aligned in the body and can be read as a view.
    return dict(sorted(arrays.items(), key=lambda item: -item[1].itemsize))


def _metadata(rollout: FinishedRollout) -> str:
    segments = [
        {
            "segment_id": segment.segment_id,
            "logprob_kind": segment.logprob_kind.value,
            "turns": [asdict(turn) for turn in segment.turns],
        }
        for segment in rollout.segments
    ]
    facts = {
        "session": asdict(rollout.session),
        "finish": asdict(rollout.finish),
        "segments": segments,
        "num_experts": rollout.num_experts,
        "reports": dict(rollout.reports),
        "pick": asdict(rollout.pick),
    }
    # ASCII, because the header must be UTF-8 and a task's text may hold lone surrogates, which UTF-8 has no place for.
    return json.dumps(facts, separators=(",", ":"))


def _split(body: bytes | bytearray) -> tuple[dict[str, Any], memoryview]:
    if len(body) < _HEADER_LENGTH.size:
        raise IntegrityError(f"rollout body of {len(body)} bytes is too short for a safetensors header")
    (length,) = _HEADER_LENGTH.unpack_from(body)
    start = _HEADER_LENGTH.size + length
    if length > _MAX_HEADER_BYTES or start > len(body):
        raise IntegrityError(f"rollout body is cut: its header says {length} bytes, the body has {len(body)}")
    try:
        header = json.loads(body[_HEADER_LENGTH.size : start])
    except ValueError as error:
        raise IntegrityError(f"rollout body has no readable safetensors header: {error}") from error
    if not isinstance(header, dict):
        raise IntegrityError("rollout body has a header that is no JSON object")
    return header, memoryview(body).toreadonly()[start:]


def _array(name: str, entry: Mapping[str, Any], data: memoryview) -> npt.NDArray[Any]:
    begin, end = entry["data_offsets"]
    if end > len(data):
        raise IntegrityError(f"rollout body is cut inside tensor {name}: it ends at byte {end} of {len(data)}")
    return np.frombuffer(data[begin:end], dtype=_DTYPES[entry["dtype"]]).reshape(entry["shape"])


def _segment(i: int, facts: Mapping[str, Any], arrays: Mapping[str, npt.NDArray[Any]]) -> Segment:
    prefix = f"segments.{i}."
    try:
        return Segment(
            segment_id=facts["segment_id"],
            turns=tuple(TurnSpan(**{**turn, "cache_flags": tuple(turn["cache_flags"])}) for turn in facts["turns"]),
            token_ids=arrays[prefix + "token_ids"],
            loss_mask=arrays[prefix + "loss_mask"].view(np.bool_),
            rollout_logprobs=arrays[prefix + "rollout_logprobs"],
            policy_version=arrays[prefix + "policy_version"],
            routed_experts=arrays.get(prefix + "routed_experts"),
            routed_valid=arrays[prefix + "routed_valid"].view(np.bool_),
            logprob_kind=LogprobKind(facts["logprob_kind"]),
        )
    except KeyError as error:
        raise IntegrityError(f"rollout body lacks {error} of segment {i}") from error
