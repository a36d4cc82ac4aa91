"""samples.jsonl: tokens of a few rollouts, each with its text, its kind and its log-probs, in a bounded file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.contracts.errors import SchemaMismatch
from tests.packed_batches import a_batch
from trainer.data.packing import PackedBatch, SampleOrigin
from trainer.samples import PieceKind, RolloutSample, SampleLog, read_samples, tokenizer_decode


def as_words(ids: Sequence[int]) -> str:
    return "".join(f"<{i}>" for i in ids)


def logprobs_of(batch: PackedBatch, *, gap: float = 0.0) -> npt.NDArray[np.float32]:
    """Train log-probs that differ from the engine's by `gap` at each sample's last trained token."""
    layout = batch.layout
    logprobs = layout.rollout_logprobs.copy()
    for sample in range(len(batch.sample_starts)):
        positions = np.flatnonzero((batch.sample_index == sample) & layout.trained)
        logprobs[positions[-1]] += gap * (sample + 1)
    return logprobs[layout.trained]


def named(batch: PackedBatch, *sessions: str) -> PackedBatch:
    return replace(batch, origins=tuple(SampleOrigin(session, f"seg-{session}") for session in sessions))


def test_every_token_stands_with_its_own_text_kind_version_and_log_probs(tmp_path: Path) -> None:
    """I1, I2: what is shown is what was trained, position by position."""
    first, second = named(a_batch((9, 6), seed=1), "a", "b"), named(a_batch((7,), seed=2), "c")
    log = SampleLog(tmp_path / "samples.jsonl", as_words)
    logprobs = np.concatenate([logprobs_of(first), logprobs_of(second, gap=0.5)])
    log.write(4, [first, second], logprobs, rewards={"a": 1.0, "b": 0.0})
    samples = {sample.session_id: sample for sample in read_samples(tmp_path / "samples.jsonl")}
    assert {name: sample.why for name, sample in samples.items()} == {
        "a": "highest reward",
        "b": "lowest reward",
        "c": "largest gap",
    }
    for batch, index, name in ((first, 0, "a"), (first, 1, "b"), (second, 0, "c")):
        start = batch.sample_starts[index]
        stop = start + int((batch.sample_index == index).sum())
        ids = [batch.layout.input_ids[start], *batch.layout.labels[start:stop]]
        sample = samples[name]
        assert (sample.step, sample.num_tokens) == (4, len(ids))
        assert "".join(piece.text for piece in sample.pieces) == as_words(ids)
        trained = [piece for piece in sample.pieces if piece.kind is PieceKind.TRAINED]
        assert [piece.text for piece in trained] == [
            as_words([i]) for i in batch.layout.labels[start:stop][batch.layout.trained[start:stop]]
        ]
        rollout = batch.layout.rollout_logprobs[start:stop][batch.layout.trained[start:stop]]
        assert [piece.rollout_logprob for piece in trained] == pytest.approx(rollout.tolist(), rel=1e-5)
        gaps = [piece.train_logprob - piece.rollout_logprob for piece in trained]  # type: ignore[operator]
        assert gaps == pytest.approx([0.0] * (len(trained) - 1) + [0.5 if name == "c" else 0.0], abs=1e-5)
    assert samples["a"].reward == 1.0
    assert samples["c"].reward is None


def test_sampled_tokens_without_loss_are_told_from_context(tmp_path: Path) -> None:
    batch = a_batch((8,))
    layout = replace(batch.layout, trained=np.arange(8) == 3)
    layout = replace(layout, policy_version=np.array([-1, 5, -1, 6, -1, -1, 6, 6], np.int32))
    layout = replace(layout, rollout_logprobs=np.where(layout.policy_version >= 0, -1.0, np.nan).astype(np.float32))
    batch = replace(batch, layout=layout)
    log = SampleLog(tmp_path / "samples.jsonl", as_words)
    log.write(1, [batch], logprobs_of(batch), rewards={})
    (sample,) = read_samples(tmp_path / "samples.jsonl")
    assert [(piece.kind.value, piece.num_tokens, piece.policy_version) for piece in sample.pieces] == [
        ("context", 2, None),
        ("sampled", 1, 5),
        ("context", 1, None),
        ("trained", 1, 6),
        ("context", 2, None),
        ("sampled", 1, 6),
        ("sampled", 1, 6),
    ]


def test_a_long_sample_loses_its_middle_and_says_how_much(tmp_path: Path) -> None:
    batch = a_batch((3000,))
    log = SampleLog(tmp_path / "samples.jsonl", as_words)
    log.write(1, [batch], logprobs_of(batch), rewards={})
    (sample,) = read_samples(tmp_path / "samples.jsonl")
    assert sum(piece.num_tokens for piece in sample.pieces) == sample.num_tokens == 3001
    (omitted,) = [piece for piece in sample.pieces if piece.kind is PieceKind.OMITTED]
    assert omitted.num_tokens == 3001 - 1024
    last = [piece for piece in sample.pieces if piece.kind is PieceKind.TRAINED][-1]
    assert last.train_logprob == pytest.approx(float(batch.layout.rollout_logprobs[2999]), rel=1e-5)


def test_the_file_is_bounded_keeps_the_newest_and_each_step_once(tmp_path: Path) -> None:
    batch = a_batch((3,))
    log = SampleLog(tmp_path / "samples.jsonl", as_words)
    for step in range(1, 400):
        log.write(step, [batch], logprobs_of(batch), rewards={})
    log.write(399, [batch], logprobs_of(batch), rewards={})
    steps = [sample.step for sample in read_samples(tmp_path / "samples.jsonl")]
    assert steps == sorted(set(steps))
    assert 32 <= len(steps) <= 64
    assert steps[-1] == 399
    assert min(steps) < 20, "the beginning of a run is still there"


def test_a_line_of_a_long_sample_takes_little(tmp_path: Path) -> None:
    """64 steps of three such samples are the most that a run keeps."""
    batch, file = a_batch((3000,)), tmp_path / "samples.jsonl"
    SampleLog(file, as_words).write(1, [batch], logprobs_of(batch), rewards={})
    assert file.stat().st_size < 64 * 1024


def test_a_run_that_goes_back_drops_later_samples_and_torn_lines(tmp_path: Path) -> None:
    batch, file = a_batch((3,)), tmp_path / "samples.jsonl"
    log = SampleLog(file, as_words)
    for step in (1, 2, 3):
        log.write(step, [batch], logprobs_of(batch), rewards={})
    with file.open("a") as stream:
        stream.write('{"step": 4, "w')
    log.resume(step=2)
    assert [sample.step for sample in read_samples(file)] == [1, 2]


def test_samples_of_another_version_are_refused_with_the_file_named(tmp_path: Path) -> None:
    file = tmp_path / "samples.jsonl"
    file.write_text(json.dumps({"step": 1, "pieces": []}) + "\n")
    with pytest.raises(SchemaMismatch, match=str(file)):
        read_samples(file)


def text_of(samples: Sequence[RolloutSample]) -> str:
    return "".join(piece.text for piece in samples[0].pieces)


@settings(max_examples=40)
@given(text=st.text(st.characters(codec="utf-8"), min_size=1, max_size=40))
def test_characters_of_several_tokens_are_whole_in_the_text(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, text: str
) -> None:
    """By the model's own tokenizer: what it decodes at once is what its tokens spell one behind the other."""
    from transformers import AutoTokenizer

    ids = np.array(AutoTokenizer.from_pretrained(tiny_model)(text)["input_ids"], np.int32)
    if len(ids) < 3:
        return
    batch = a_batch((len(ids) - 1,))
    layout = replace(batch.layout, input_ids=ids[:-1], labels=ids[1:])
    batch = replace(batch, layout=layout)
    file = tmp_path_factory.mktemp("text") / "samples.jsonl"
    decode = tokenizer_decode(tiny_model)
    SampleLog(file, decode).write(1, [batch], logprobs_of(batch), rewards={})
    assert text_of(read_samples(file)) == decode(ids.tolist())
