"""HFBackend beyond full fine-tuning of one MoE model: adapters, a reference policy, dense models, exports."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from gateway.contracts.errors import ConfigurationError
from tests.train_samples import random_samples, scored_batches
from tests.unit.test_backend_step import LENGTHS, PlainObjective
from trainer.backends.hf import HFBackend
from trainer.backends.protocol import Policy
from trainer.backends.settings import LoraSettings, ModelSettings, OptimizerSettings
from trainer.data.packing import PackedBatch, ScoredBatch
from trainer.replay.validate import RoutedLayers
from trainer.settings import ReplayMode

LORA = LoraSettings(rank=4, alpha=8.0)


def make_backend(
    path: Path,
    *,
    lora: LoraSettings | None = None,
    replay: ReplayMode = ReplayMode.R3,
    reference: Path | None = None,
    needs_reference: bool = False,
    dtype: str = "float32",
    checkpoint_activations: bool = False,
    seed: int = 0,
) -> HFBackend:
    return HFBackend(
        ModelSettings(path, reference=reference, dtype=dtype, checkpoint_activations=checkpoint_activations),
        OptimizerSettings(learning_rate=1e-2),
        replay=replay,
        seed=seed,
        lora=lora,
        num_updates=10,
        needs_reference=needs_reference,
    )


def batches_for(routed: RoutedLayers | None, *, seed: int = 1) -> tuple[ScoredBatch, ...]:
    return scored_batches(random_samples(LENGTHS, seed=seed, routed=routed), tokens=40)


def plain(batches: Sequence[ScoredBatch]) -> list[PackedBatch]:
    return [scored.batch for scored in batches]


def trained_state(backend: HFBackend) -> dict[str, Tensor]:
    return {name: values.detach().clone() for name, values in backend._model.state_dict().items()}


# Adapters


def test_only_adapters_train_and_routing_is_replayed_under_them(tiny_model: Path) -> None:
    """I10 under peft's wrapping, with layers that are computed again."""
    backend = make_backend(tiny_model, lora=LORA, checkpoint_activations=True)
    before = trained_state(backend)
    batches = batches_for(backend.routed)
    for _ in range(2):
        update = backend.update(batches, PlainObjective())
    assert update.measured.routing.verified == update.measured.routing.total > 0
    changed = {name for name, values in trained_state(backend).items() if not torch.equal(values, before[name])}
    adapters = {name for name in before if ".lora_" in name}
    assert changed == adapters
    assert len(adapters) == 4 * 4 * 2  # layers, projections, A and B


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_go_on_bit_for_bit_from_a_checkpoint_that_holds_them_only(
    tiny_model: Path, tmp_path: Path, dtype: str
) -> None:
    one = make_backend(tiny_model, lora=LORA, dtype=dtype)
    other = make_backend(tiny_model, lora=LORA, dtype=dtype, seed=7)
    batches = batches_for(one.routed)
    one.update(batches, PlainObjective())
    one.save(tmp_path)
    other.load(tmp_path)
    mine, theirs = one.update(batches, PlainObjective()), other.update(batches, PlainObjective())
    assert (mine.loss, mine.grad_norm) == (theirs.loss, theirs.grad_norm)
    expected = trained_state(other)
    assert all(torch.equal(values, expected[name]) for name, values in trained_state(one).items())
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 400_000  # the model alone has 2 MB


def test_an_export_merges_adapters_and_leaves_the_training_state_alone(tiny_model: Path, tmp_path: Path) -> None:
    backend = make_backend(tiny_model, lora=LORA)
    batches = batches_for(backend.routed)
    for _ in range(3):
        backend.update(batches, PlainObjective())
    before = trained_state(backend)
    backend.export(tmp_path / "policy")
    assert all(torch.equal(values, before[name]) for name, values in trained_state(backend).items())
    exported = make_backend(tmp_path / "policy").measure(plain(batches), replay=True)
    trained = backend.measure(plain(batches), replay=True)
    assert torch.allclose(exported.logprobs, trained.logprobs, atol=1e-5)
    base = make_backend(tiny_model).measure(plain(batches), replay=True)
    assert float((exported.logprobs - base.logprobs).abs().max()) > 0.01
    assert load_file(tmp_path / "policy" / "model.safetensors").keys() == stored(tiny_model).keys()


def test_adapters_on_modules_that_are_not_there_are_a_configuration_error(tiny_model: Path) -> None:
    with pytest.raises(ConfigurationError, match="no_such_proj"):
        make_backend(tiny_model, lora=LoraSettings(rank=2, targets=("no_such_proj",)))


# Reference


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "adapters"])
def test_the_reference_stays_the_policy_that_training_started_from(tiny_model: Path, lora: LoraSettings | None) -> None:
    """And is never replayed: foreign rows do not reach it."""
    backend = make_backend(tiny_model, lora=lora, needs_reference=True)
    batches = batches_for(backend.routed)
    start = make_backend(tiny_model, replay=ReplayMode.OFF).measure(plain(batches), replay=False)
    for _ in range(2):
        measured = backend.measure(plain(batches), replay=True, policy=Policy.REFERENCE)
        assert torch.equal(measured.logprobs, start.logprobs)
        assert measured.routing.total == 0
        backend.update(batches, PlainObjective())
    moved = backend.measure(plain(batches), replay=False)
    assert float((moved.logprobs - start.logprobs).abs().max()) > 1e-3


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "adapters"])
def test_another_folder_may_be_the_reference(tiny_model: Path, tmp_path: Path, lora: LoraSettings | None) -> None:
    teacher = make_backend(tiny_model)
    batches = batches_for(teacher.routed)
    teacher.update(batches, PlainObjective())
    teacher.export(tmp_path / "teacher")
    backend = make_backend(tiny_model, lora=lora, reference=tmp_path / "teacher", needs_reference=True)
    expected = teacher.measure(plain(batches), replay=False)
    measured = backend.measure(plain(batches), replay=True, policy=Policy.REFERENCE)
    assert torch.equal(measured.logprobs, expected.logprobs)


def test_a_reference_with_another_vocabulary_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    config = Qwen3Config(
        vocab_size=99, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, head_dim=8
    )
    Qwen3ForCausalLM(config).save_pretrained(tmp_path / "other")
    with pytest.raises(ConfigurationError, match="vocabulary"):
        make_backend(tiny_model, reference=tmp_path / "other", needs_reference=True)


def test_a_reference_that_was_not_asked_for_is_not_loaded(tiny_model: Path) -> None:
    backend = make_backend(tiny_model)
    with pytest.raises(ConfigurationError, match="needs_reference"):
        backend.measure(plain(batches_for(None)), replay=False, policy=Policy.REFERENCE)


# Dense models


@pytest.mark.parametrize("mode", list(ReplayMode))
def test_a_dense_model_trains_in_every_replay_mode(
    dense_model: Path, mode: ReplayMode, caplog: pytest.LogCaptureFixture
) -> None:
    """There is nothing to replay, which the log says once where replay was asked for."""
    with caplog.at_level(logging.INFO, logger="trainer.backends.hf"):
        backend = make_backend(dense_model, replay=mode)
    assert [record.getMessage().endswith("nothing to replay") for record in caplog.records] == (
        [] if mode is ReplayMode.OFF else [True]
    )
    assert backend.routed is None
    batches = batches_for(None)
    recorded, _ = backend.record(plain(batches))
    assert all(batch.layout.routing is None for batch in recorded)
    update = backend.update(batches, PlainObjective())
    assert update.measured.routing.total == 0
    assert update.grad_norm > 0


# Exports


def stored(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's safetensors files."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("which", ["tiny_model", "dense_model"])
def test_an_untrained_export_is_the_checkpoint_it_came_from(
    which: str, dtype: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """The same tensors by the same names in the same dtypes, and every other file byte for byte, whatever forwards
    compute in."""
    source: Path = request.getfixturevalue(which)
    make_backend(source, dtype=dtype).export(tmp_path / "policy")
    mine, theirs = stored(tmp_path / "policy"), stored(source)
    assert mine.keys() == theirs.keys()
    assert all(mine[name].dtype == theirs[name].dtype and torch.equal(mine[name], theirs[name]) for name in theirs)
    others = {file.name for file in source.iterdir() if file.suffix != ".safetensors"}
    assert {file.name for file in (tmp_path / "policy").iterdir() if file.suffix != ".safetensors"} == others
    for name in others:
        assert (tmp_path / "policy" / name).read_bytes() == (source / name).read_bytes(), name


def test_an_export_keeps_the_names_of_the_original_config(tiny_model: Path, tmp_path: Path) -> None:
    """`num_experts`, which engines read; transformers 5 would write `num_local_experts`."""
    backend = make_backend(tiny_model)
    backend.update(batches_for(backend.routed), PlainObjective())
    backend.export(tmp_path / "policy")
    assert json.loads((tmp_path / "policy" / "config.json").read_text())["num_experts"] == 8
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    theirs = dict(again.named_parameters())
    assert all(torch.equal(parameter, theirs[name]) for name, parameter in backend._model.named_parameters())
