"""A step's batches in one safetensors file, to be run again elsewhere; read back, every array is what it was.

tensors  MINIBATCH/MICROBATCH/NAME       arrays of layout, batch and scores; routing.0, valid_bits.0, … by chunk
header   verbatim                        everything else as JSON, with `schema_version`
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from gateway.contracts.errors import IntegrityError, SchemaMismatch
from trainer.data.layout import TokenLayout
from trainer.data.packing import PackedBatch, SampleOrigin, ScoredBatch
from trainer.durable import write_file
from trainer.replay.rows import RoutingRows

DUMP_VERSION = 1
_HEADER = "verbatim"
_ARRAYS = tuple(f.name for f in fields(TokenLayout) if f.name != "routing")

Minibatches = Sequence[Sequence[ScoredBatch]]
"""Micro-batches by optimiser step."""


@dataclass(frozen=True, slots=True)
class DumpOrigin:
    """Whose batches these are. step, policy_version, checkpoint: where the run stood before the step (checkpoint: the
    folder's name, None before the first). settings: of the run, as TOML. error: why they were kept."""

    run_name: str
    seed: int
    step: int
    policy_version: int
    checkpoint: str | None
    settings: str
    error: str


@dataclass(frozen=True, slots=True, eq=False)
class DumpedStep:
    """minibatches: of one step, in order, to the one that failed."""

    origin: DumpOrigin
    minibatches: tuple[tuple[ScoredBatch, ...], ...]


def write_dump(file: Path, step: DumpedStep) -> None:
    """Write the file; it exists under its name only when all of it is on disk."""
    tensors: dict[str, npt.NDArray[Any]] = {}
    described: list[list[dict[str, Any]]] = []
    for i, minibatch in enumerate(step.minibatches):
        described.append([])
        for j, scored in enumerate(minibatch):
            arrays, description = _taken_apart(scored)
            tensors |= {f"{i}/{j}/{name}": np.ascontiguousarray(array) for name, array in arrays.items()}
            described[-1].append(description)
    header = {"schema_version": DUMP_VERSION, "origin": asdict(step.origin), "minibatches": described}
    write_file(file, lambda partial: save_file(tensors, partial, metadata={_HEADER: json.dumps(header)}))


def read_dump(file: Path) -> DumpedStep:
    """Read what `write_dump` wrote; raises IntegrityError for another file, SchemaMismatch for another version."""
    try:
        with safe_open(file, framework="np") as tensors:
            header = json.loads((tensors.metadata() or {})[_HEADER])
            _check_version(file, header)
            return DumpedStep(
                DumpOrigin(**header["origin"]),
                tuple(
                    tuple(_put_together(tensors, f"{i}/{j}", about) for j, about in enumerate(minibatch))
                    for i, minibatch in enumerate(header["minibatches"])
                ),
            )
    except (OSError, SafetensorError, KeyError, json.JSONDecodeError, TypeError) as error:
        raise IntegrityError(f"{file} holds no batches of a step, or a part of them: {error}") from error


def _check_version(file: Path, header: Mapping[str, Any]) -> None:
    if header["schema_version"] != DUMP_VERSION:
        raise SchemaMismatch(f"{file} has version {header['schema_version']}, this program reads {DUMP_VERSION}")


def _taken_apart(scored: ScoredBatch) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
    batch, rows = scored.batch, scored.batch.layout.routing
    arrays: dict[str, npt.NDArray[Any]] = {name: getattr(batch.layout, name) for name in _ARRAYS}
    arrays |= {"sample_index": batch.sample_index, "advantages": batch.advantages, "weights": batch.weights}
    for name, scores in (("old_logprobs", scored.old_logprobs), ("ref_logprobs", scored.ref_logprobs)):
        if scores is not None:
            arrays[name] = scores
    if rows is not None:
        arrays |= {f"routing.{c}": chunk for c, chunk in enumerate(rows.chunks)}
        arrays |= {f"valid_bits.{c}": bits for c, bits in enumerate(rows.valid_bits)}
    return arrays, {
        "sample_starts": batch.sample_starts,
        "origins": batch.origins,
        "num_chunks": None if rows is None else len(rows.chunks),
        "padding": [] if rows is None else list(rows.padding),
        "scores": [name for name in ("old_logprobs", "ref_logprobs") if name in arrays],
    }


def _put_together(tensors: Any, prefix: str, about: Mapping[str, Any]) -> ScoredBatch:
    def array(name: str) -> Any:
        return tensors.get_tensor(f"{prefix}/{name}")

    routing = None
    if about["num_chunks"] is not None:
        chunks = range(about["num_chunks"])
        routing = RoutingRows(
            tuple(array(f"routing.{c}") for c in chunks),
            tuple(array(f"valid_bits.{c}") for c in chunks),
            tuple(about["padding"]),
        )
    batch = PackedBatch(
        layout=TokenLayout(**{name: array(name) for name in _ARRAYS}, routing=routing),
        sample_starts=tuple(about["sample_starts"]),
        sample_index=array("sample_index"),
        advantages=array("advantages"),
        weights=array("weights"),
        origins=tuple(SampleOrigin(*origin) for origin in about["origins"]),
    )
    return ScoredBatch(batch, **{name: array(name) for name in about["scores"]})
