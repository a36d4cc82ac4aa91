"""A step that is not finite: its batches are kept exactly, and running them again says where it begins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.contracts.errors import ConfigurationError, IntegrityError, NonFiniteLoss, SchemaMismatch
from tests.packed_batches import a_batch
from tests.run_records import METRICS
from trainer.algorithms.objective import LiveTokens, TokenTerms, TrainedTokens
from trainer.backends.hf import HFBackend
from trainer.backends.settings import ModelSettings, OptimizerSettings
from trainer.checkpoint import CheckpointStore, RunState
from trainer.data.dump import DumpedStep, DumpOrigin, read_dump, write_dump
from trainer.data.packing import ScoredBatch
from trainer.nonfinite import BatchKeeper, replay_batch
from trainer.replay.rows import RoutingRows
from trainer.settings import ReplayMode

ORIGIN = DumpOrigin("run", 7, 3, 2, "step-000003", "[run]\nsteps = 5\n", "loss nan")


def same(left: Any, right: Any) -> bool:
    """Equal to the bit, type by type; NaN equals NaN."""
    if is_dataclass(left):
        return type(left) is type(right) and all(
            same(getattr(left, f.name), getattr(right, f.name)) for f in fields(left)
        )
    if isinstance(left, np.ndarray):
        return left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes()
    if isinstance(left, tuple):
        return type(left) is type(right) and len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)


scored_batches = st.builds(
    lambda lengths, seed, rows, old, ref: ScoredBatch(
        batch := a_batch(tuple(lengths), seed=seed, rows=rows),
        np.full(batch.layout.num_trained, np.nan, np.float32) if old else None,
        np.full(batch.layout.num_trained, -np.inf, np.float32) if ref else None,
    ),
    st.lists(st.integers(1, 9), min_size=1, max_size=4),
    st.integers(0, 2**32 - 1),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(minibatches=st.lists(st.lists(scored_batches, min_size=1, max_size=3), min_size=1, max_size=3))
def test_a_kept_step_reads_back_to_the_bit(
    tmp_path_factory: pytest.TempPathFactory, minibatches: list[list[ScoredBatch]]
) -> None:
    """I2, I10: tokens, masks, versions, log-probs, weights and routing rows with their validity."""
    file = tmp_path_factory.mktemp("dump") / "step.safetensors"
    step = DumpedStep(ORIGIN, tuple(map(tuple, minibatches)))
    write_dump(file, step)
    assert same(read_dump(file), step)
    assert [path.name for path in file.parent.iterdir()] == ["step.safetensors"]


def test_rows_that_were_never_recorded_and_padding_read_back_as_such(tmp_path: Path) -> None:
    batch = a_batch((5,))
    ids = np.broadcast_to(np.zeros(1, np.uint16), (5, 4, 2))
    shapeless = RoutingRows((ids,), (np.zeros((5, 1), np.uint8),), (True,))
    step = DumpedStep(ORIGIN, ((ScoredBatch(replace(batch, layout=replace(batch.layout, routing=shapeless))),),))
    write_dump(tmp_path / "f", step)
    assert same(read_dump(tmp_path / "f"), step)


@pytest.mark.parametrize("body", [b"", b"not a dump", None])
def test_a_file_that_is_no_dump_or_a_part_of_one_is_named(tmp_path: Path, body: bytes | None) -> None:
    file = tmp_path / "f.safetensors"
    write_dump(file, DumpedStep(ORIGIN, ((ScoredBatch(a_batch((5,))),),)))
    file.write_bytes(file.read_bytes()[:-20] if body is None else body)
    with pytest.raises(IntegrityError, match=r"f\.safetensors holds no batches of a step") as raised:
        read_dump(file)
    assert "\n" not in raised.value.message


def test_a_dump_of_another_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.data.dump.DUMP_VERSION", 99)
    write_dump(tmp_path / "f", DumpedStep(ORIGIN, ()))
    monkeypatch.undo()
    with pytest.raises(SchemaMismatch, match="99"):
        read_dump(tmp_path / "f")


class Harmful:
    """-advantage * log-prob, spoilt where `spoil` says so."""

    needs_reference = False
    needs_entropy_gradient = False

    def __init__(self, spoil: Callable[[torch.Tensor], torch.Tensor] = lambda loss: loss) -> None:
        self._spoil = spoil

    def __call__(self, live: LiveTokens, tokens: TrainedTokens) -> TokenTerms:
        return TokenTerms(self._spoil(-tokens.advantages * live.logprobs))


def spoil_third(loss: torch.Tensor) -> torch.Tensor:
    return torch.where(torch.arange(len(loss)) == 2, loss * torch.inf, loss)


def spoil_gradient_only(loss: torch.Tensor) -> torch.Tensor:
    return loss + (loss - loss).abs().sqrt()  # 0, with an infinite derivative


@pytest.fixture
def backend(tiny_model: Path) -> HFBackend:
    return HFBackend(
        ModelSettings(tiny_model, device="cpu"), OptimizerSettings(learning_rate=1e-2), replay=ReplayMode.R3, seed=0
    )


def failing(
    backend: HFBackend, folder: Path, minibatches: list[list[ScoredBatch]], objective: Harmful
) -> tuple[Path, HFBackend]:
    """What a run does: a checkpoint, updates, and the one that fails is kept."""
    checkpoints = CheckpointStore(folder / "checkpoints", keep=2)
    checkpoints.save(RunState("run", 7, 3, 2, metrics=METRICS), backend.save)
    for minibatch in minibatches[:-1]:
        backend.update(minibatch, Harmful())
    with pytest.raises(NonFiniteLoss) as raised:
        backend.update(minibatches[-1], objective)
    keeper = BatchKeeper(folder / "non-finite", checkpoints, run_name="run", seed=7, settings="[run]\n")
    return keeper(minibatches, raised.value), backend


def good(seed: int) -> ScoredBatch:
    return ScoredBatch(a_batch((6, 7), seed=seed))


def test_the_report_names_the_token_whose_loss_term_is_not_finite(backend: HFBackend, tmp_path: Path) -> None:
    objective = Harmful(spoil_third)
    file, backend = failing(backend, tmp_path, [[good(1), good(2)]], objective)
    assert file == tmp_path / "non-finite" / "step-000004.safetensors"
    report = replay_batch(backend, objective, file, checkpoints=tmp_path / "checkpoints")
    token = int(good(1).batch.layout.labels[5])
    assert (
        f"micro-batch 1 of 2 (2 samples, 13 tokens, 6 trained): the loss term is inf at token 6 (id {token})" in report
    )
    assert "; 1 of 6 tokens, in 1 samples (sessions s/0 ü)" in report
    assert "run run, seed 7, step 4, minibatch 1, on step-000003" in report
    assert "the minibatch as a whole: loss inf" in report


def test_the_report_names_what_came_with_the_batch(backend: HFBackend, tmp_path: Path) -> None:
    class OldPolicy(Harmful):
        def __call__(self, live: LiveTokens, tokens: TrainedTokens) -> TokenTerms:
            return TokenTerms(-(live.logprobs - tokens.old_logprobs).exp() * tokens.advantages)

    old = np.full(6, -1.0, np.float32)
    old[4] = np.nan
    file, backend = failing(backend, tmp_path, [[good(1), replace(good(2), old_logprobs=old)]], OldPolicy())
    report = replay_batch(backend, OldPolicy(), file, checkpoints=tmp_path / "checkpoints")
    assert "micro-batch 1 of 2 (2 samples, 13 tokens, 6 trained): all values are finite" in report
    assert "the old log-prob that came with the batch is nan at token 4" in report
    assert "segment seg-1, session s/1 ü" in report


def test_the_report_names_log_probs_of_a_spoilt_model(backend: HFBackend, tmp_path: Path) -> None:
    with torch.no_grad():
        next(p for name, p in backend._model.named_parameters() if "layers.2" in name).fill_(torch.nan)
    file, backend = failing(backend, tmp_path, [[good(1)]], Harmful())
    report = replay_batch(backend, Harmful(), file, checkpoints=tmp_path / "checkpoints")
    assert "the log-prob is nan at token 2" in report
    assert "6 of 6 tokens, in 2 samples (sessions s/0 ü, s/1 ü)" in report


def test_the_report_names_parameters_where_only_the_gradient_is_not_finite(backend: HFBackend, tmp_path: Path) -> None:
    objective = Harmful(spoil_gradient_only)
    file, backend = failing(backend, tmp_path, [[good(1)]], objective)
    report = replay_batch(backend, objective, file, checkpoints=tmp_path / "checkpoints")
    assert "the gradient is not, from the output back: lm_head.weight, model.norm.weight" in report or (
        "the gradient is not, from the output back: model.norm.weight" in report  # tied embeddings
    )
    assert " more" in report


def test_earlier_minibatches_of_the_step_are_made_again_first(
    backend: HFBackend, tiny_model: Path, tmp_path: Path
) -> None:
    """The failing one met their parameters, which no checkpoint holds."""

    class OnlyOnMovedParameters(Harmful):
        """Fails where the log-probs are not those of the checkpoint."""

        def __call__(self, live: LiveTokens, tokens: TrainedTokens) -> TokenTerms:
            moved = bool((live.logprobs - tokens.old_logprobs).abs().max() > 1e-3)
            return TokenTerms(-tokens.advantages * live.logprobs * (torch.inf if moved else 1.0))

    objective, checkpoints = OnlyOnMovedParameters(), tmp_path / "checkpoints"
    old = backend.measure([good(2).batch], replay=True).logprobs.numpy()
    file, _ = failing(backend, tmp_path, [[good(1)], [replace(good(2), old_logprobs=old)]], objective)
    other = HFBackend(
        ModelSettings(tiny_model, device="cpu"), OptimizerSettings(learning_rate=1e-2), replay=ReplayMode.R3, seed=1
    )
    report = replay_batch(other, objective, file, checkpoints=checkpoints)
    assert "minibatch 2, on step-000003" in report
    assert "the loss term is inf at token 2" in report
    step = read_dump(file)
    write_dump(tmp_path / "alone", replace(step, minibatches=step.minibatches[1:]))
    assert "The failure did not come again" in replay_batch(
        other, objective, tmp_path / "alone", checkpoints=checkpoints
    )


def test_a_checkpoint_that_was_removed_is_named(backend: HFBackend, tmp_path: Path) -> None:
    file, backend = failing(backend, tmp_path, [[good(1)]], Harmful(spoil_third))
    (tmp_path / "checkpoints" / "step-000003").rename(tmp_path / "elsewhere")
    with pytest.raises(ConfigurationError, match=r"step-000003, which the batch met, is not there"):
        replay_batch(backend, Harmful(), file, checkpoints=tmp_path / "checkpoints")
