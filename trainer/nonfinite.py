"""A step whose loss or gradients were not finite: its batches are kept, and run again to find where that begins.

    NonFiniteLoss ──▶ BatchKeeper ──▶ RUN/non-finite/step-000004.safetensors ──▶ replay_batch ──▶ a report

The run stops; its newest checkpoint is the state that the batches met, so the same values come again (bit for bit on
CPU). The replay runs in one process, however many the run had.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from gateway.contracts.errors import ConfigurationError, NonFiniteLoss
from trainer.algorithms.objective import LiveTokens, Objective, TrainedTokens
from trainer.backends.protocol import Measured, TrainBackend
from trainer.checkpoint import CheckpointStore
from trainer.data.dump import DumpedStep, DumpOrigin, Minibatches, read_dump, write_dump
from trainer.data.packing import PackedBatch, ScoredBatch

_MOST_NAMES = 6


class InspectedBackend(TrainBackend, Protocol):
    """A backend whose gradients can be looked at."""

    def nonfinite_gradients(self, batch: ScoredBatch, objective: Objective) -> tuple[str, ...]:
        """Names of the parameters whose gradient of this micro-batch is not finite, in the model's order; parameters
        and optimiser stay as they are."""
        ...


class BatchKeeper:
    """Keeps a failed step's batches in the run folder. settings: of the run, as TOML."""

    def __init__(self, folder: Path, checkpoints: CheckpointStore, *, run_name: str, seed: int, settings: str) -> None:
        self._folder = folder
        self._checkpoints = checkpoints
        self._run_name = run_name
        self._seed = seed
        self._settings = settings

    def __call__(self, minibatches: Minibatches, error: NonFiniteLoss) -> Path:
        """Keep the step's minibatches, to the one that failed; returns the file."""
        latest = self._checkpoints.latest()
        state = None if latest is None else latest[0]
        step = 0 if state is None else state.step
        origin = DumpOrigin(
            run_name=self._run_name,
            seed=self._seed,
            step=step,
            policy_version=0 if state is None else state.policy_version,
            checkpoint=None if latest is None else latest[1].name,
            settings=self._settings,
            error=error.message,
        )
        file = self._folder / f"step-{step + 1:06d}.safetensors"
        write_dump(file, DumpedStep(origin, tuple(tuple(minibatch) for minibatch in minibatches)))
        return file


def replay_batch(backend: InspectedBackend, objective: Objective, file: Path, *, checkpoints: Path) -> str:
    """Run a kept step again on the checkpoint that it met, and say for each micro-batch of the minibatch that failed
    where the first value that is not finite appears: what went in, a log-prob, the loss term, or a gradient.

    checkpoints: the run's folder of them. Raises ConfigurationError where the checkpoint is no longer there,
    IntegrityError for a file that is no such dump.
    """
    step = read_dump(file)
    _load(backend, step.origin, checkpoints)
    *earlier, failed = step.minibatches
    for minibatch in earlier:
        backend.update(minibatch, objective)
    lines = [*_heading(step, file)]
    for number, scored in enumerate(failed, start=1):
        found = next(_first_nonfinite(backend, objective, scored), "all values are finite")
        lines.append(f"micro-batch {number} of {len(failed)} ({_size(scored.batch)}): {found}")
    return "\n".join([*lines, _as_a_whole(backend, objective, failed)]) + "\n"


def _load(backend: TrainBackend, origin: DumpOrigin, checkpoints: Path) -> None:
    if origin.checkpoint is None:
        return
    folder = checkpoints / origin.checkpoint
    if not folder.is_dir():
        raise ConfigurationError(
            f"{folder}, which the batch met, is not there any more; raise checkpoint.keep or set checkpoint.keep_every"
        )
    backend.load(folder)


def _heading(step: DumpedStep, file: Path) -> Iterator[str]:
    origin, number = step.origin, len(step.minibatches)
    met = origin.checkpoint or "the model as it was loaded"
    yield f"{file}: run {origin.run_name}, seed {origin.seed}, step {origin.step + 1}, minibatch {number}, on {met}"
    yield f"kept because: {origin.error} (policy {origin.policy_version})"


def _first_nonfinite(backend: InspectedBackend, objective: Objective, scored: ScoredBatch) -> Iterator[str]:
    """What is not finite, in the order in which a step computes it."""
    trained = scored.batch.layout.trained
    for name, given in (
        ("rollout log-prob", scored.batch.layout.rollout_logprobs[trained]),
        ("advantage", scored.batch.advantages[trained]),
        ("weight", scored.batch.weights[trained]),
        ("old log-prob", scored.old_logprobs),
        ("reference log-prob", scored.ref_logprobs),
    ):
        if given is not None:
            yield from _tokens(f"the {name} that came with the batch", scored.batch, given)
    measured = backend.measure([scored.batch], replay=True)
    yield from _tokens("the log-prob", scored.batch, measured.logprobs.numpy())
    yield from _tokens("the entropy", scored.batch, measured.entropy.numpy())
    yield from _tokens("the loss term", scored.batch, _loss(objective, scored, measured))
    if names := backend.nonfinite_gradients(scored, objective):
        backwards = ", ".join(names[::-1][:_MOST_NAMES])
        more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
        yield f"log-probs and loss are finite, the gradient is not, from the output back: {backwards}{more}"


def _tokens(what: str, batch: PackedBatch, values_S: npt.NDArray[np.float32]) -> Iterator[str]:
    wrong = np.flatnonzero(~np.isfinite(values_S))
    if not len(wrong):
        return
    position = int(np.flatnonzero(batch.layout.trained)[wrong[0]])
    sample = int(batch.sample_index[position])
    origin = batch.origins[sample]
    samples = np.unique(batch.sample_index[np.flatnonzero(batch.layout.trained)[wrong]])
    sessions = ", ".join(dict.fromkeys(batch.origins[int(i)].session_id for i in samples[:_MOST_NAMES]))
    yield (
        f"{what} is {values_S[wrong[0]]} at token {position - batch.sample_starts[sample] + 1} "
        f"(id {batch.layout.labels[position]}) of segment {origin.segment_id}, session {origin.session_id}; "
        f"{len(wrong)} of {len(values_S)} tokens, in {len(samples)} samples (sessions {sessions})"
    )


def _loss(objective: Objective, scored: ScoredBatch, measured: Measured) -> npt.NDArray[np.float32]:
    batch, trained = scored.batch, scored.batch.layout.trained
    old, reference = scored.old_logprobs, scored.ref_logprobs
    terms = objective(
        LiveTokens(measured.logprobs, measured.entropy),
        TrainedTokens(
            rollout_logprobs=torch.from_numpy(batch.layout.rollout_logprobs[trained]),
            old_logprobs=measured.logprobs if old is None else torch.from_numpy(old),
            ref_logprobs=None if reference is None else torch.from_numpy(reference),
            advantages=torch.from_numpy(batch.advantages[trained]),
            sample_index=torch.from_numpy(batch.sample_index[trained].astype(np.int64)),
            num_samples=len(batch.sample_starts),
        ),
    )
    loss: npt.NDArray[np.float32] = terms.loss.detach().numpy()
    return loss


def _size(batch: PackedBatch) -> str:
    return (
        f"{len(batch.sample_starts)} samples, {batch.layout.num_positions} tokens, {batch.layout.num_trained} trained"
    )


def _as_a_whole(backend: TrainBackend, objective: Objective, minibatch: tuple[ScoredBatch, ...]) -> str:
    try:
        update = backend.update(minibatch, objective)
    except NonFiniteLoss as error:
        return f"the minibatch as a whole: {error.message}"
    return (
        f"the minibatch as a whole: loss {update.loss:g}, gradient norm {update.grad_norm:g}. The failure did not come "
        "again: compare device, dtype and number of processes with the run's"
    )
