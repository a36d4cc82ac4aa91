"""The embedded engine against a plain forward pass of the same transformers model, in float32, in this process."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from engines.embedded.engine import EmbeddedEngine, EngineLimits
from engines.embedded.model import load_model
from engines.embedded.sampler import SamplingSettings
from engines.embedded.scheduler import Generation
from gateway.contracts.errors import TransportError
from gateway.contracts.generation import LogprobKind
from gateway.contracts.ports import PauseMode
from tests.waiting import until

torch.set_num_threads(1)

DEADLINE_SECONDS = 150.0
GREEDY = SamplingSettings(max_new_tokens=12, temperature=0.0, ignore_eos=True)


@dataclass(frozen=True)
class Harness:
    """An engine under test, and the same checkpoint in plain transformers."""

    engine: EmbeddedEngine
    reference: Any

    def start(
        self,
        prompt: Sequence[int],
        settings: SamplingSettings,
        *,
        rid: str = "r",
        logprob_start: int | None = None,
        routed_start: int = 0,
        num_top_logprobs: int = 0,
    ) -> tuple[Generation, threading.Event]:
        """Submit a prompt; the event is set when it ended."""
        ended = threading.Event()
        progressed = threading.Event()

        def on_progress() -> None:
            progressed.set()
            if generation.finish is not None:
                ended.set()

        generation = self.engine.generation(
            rid=rid,
            prompt=list(prompt),
            settings=settings,
            logprob_start=len(prompt) if logprob_start is None else logprob_start,
            routed_start=routed_start,
            on_progress=on_progress,
            num_top_logprobs=num_top_logprobs,
        )
        self.engine.submit(generation)
        return generation, ended

    def run(self, prompt: Sequence[int], settings: SamplingSettings = GREEDY, **wanted: Any) -> Generation:
        """Submit a prompt and wait for its end."""
        generation, ended = self.start(prompt, settings, **wanted)
        assert ended.wait(DEADLINE_SECONDS)
        return generation

    def run_together(self, prompts: Sequence[Sequence[int]], settings: SamplingSettings = GREEDY) -> list[Generation]:
        """Submit all, then wait for all."""
        started = [self.start(prompt, settings, rid=f"r{i}") for i, prompt in enumerate(prompts)]
        assert all(ended.wait(DEADLINE_SECONDS) for _, ended in started)
        return [generation for generation, _ in started]

    def assert_equal_to_reference(self, generation: Generation, *, temperature: float = 1.0) -> None:
        """Log-probs within 1e-4 and experts equal row by row, for what the engine returned."""
        logprobs, experts = forward(self.reference, generation.token_ids, temperature)
        first = generation.prompt_length
        expected = logprobs[first - 1 : len(generation.token_ids) - 1]
        assert np.abs(expected - np.array(generation.logprobs)).max() < 1e-4
        assert generation.routed_experts is not None
        assert generation.routed_start is not None
        np.testing.assert_array_equal(generation.routed_experts, experts[generation.routed_start : -1])


def forward(
    model: Any, token_ids: Sequence[int], temperature: float = 1.0
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Log-probs[T-1] of each token but the first, and experts [T, layers, top_k], by one full forward pass."""
    selected: list[torch.Tensor] = []
    hooks = [
        layer.mlp.gate.register_forward_hook(lambda _module, _inputs, output: selected.append(output[-1]))
        for layer in model.model.layers
    ]
    ids = torch.tensor([list(token_ids)])
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[0].float() / temperature
    for hook in hooks:
        hook.remove()
    logprobs = torch.log_softmax(logits[:-1], dim=-1).gather(1, ids[0, 1:, None])[:, 0]
    return logprobs.numpy(), torch.stack(selected, dim=1).numpy()


def softmax_tops(
    model: Any, token_ids: Sequence[int], number: int, temperature: float
) -> list[list[tuple[int, float]]]:
    """For each token but the first the likeliest at its position, by one full forward pass."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([list(token_ids)]), use_cache=False).logits[0, :-1].float() / temperature
    values, ids = torch.log_softmax(logits, dim=-1).topk(number)
    return [list(zip(*row, strict=True)) for row in zip(ids.tolist(), values.tolist(), strict=True)]


def make_engine(model: Path, **limits: int) -> EmbeddedEngine:
    sizes = {"context_length": 512, "max_running": 8, "num_slots": 12, "chunk_tokens": 64, "stream_interval": 1}
    return EmbeddedEngine(
        load_model(model, torch.float32),
        limits=EngineLimits(**(sizes | limits)),
        weight_version="default",
        seed=0,
        logprob_kind=LogprobKind.TEMPERATURE_SCALED,
    )


def started(model: Path, **limits: int) -> Iterator[Harness]:
    engine = make_engine(model, **limits)
    engine.start(on_failure=lambda: None)
    yield Harness(engine, AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval())
    engine.stop()
    assert engine.failure is None


@pytest.fixture(scope="module")
def harness(tiny_model: Path) -> Iterator[Harness]:
    yield from started(tiny_model)


@pytest.fixture
def fresh(tiny_model: Path) -> Iterator[Harness]:
    yield from started(tiny_model)


def prompt_of(length: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, 300, length).tolist()


def test_logprobs_and_experts_equal_a_plain_forward_pass(harness: Harness) -> None:
    """I2, I10: what the engine reports is what the model computes."""
    generation = harness.run(prompt_of(20, seed=1))
    harness.assert_equal_to_reference(generation)
    assert generation.routed_experts is not None
    assert generation.routed_experts.dtype == np.dtype("<i4")
    assert len(generation.routed_experts) == 20 + 12 - 1


def test_a_prompt_longer_than_a_chunk_is_computed_in_parts_with_equal_results(harness: Harness) -> None:
    """I2 under chunked prefill, beside other sequences that decode meanwhile."""
    generations = harness.run_together([prompt_of(length, seed=length) for length in (150, 7, 64, 65, 200)])
    for generation in generations:
        harness.assert_equal_to_reference(generation)


def test_more_requests_than_slots_are_all_answered_with_equal_results(harness: Harness) -> None:
    """I2 under concurrency: sequences come and go, slots are reused."""
    generations = harness.run_together([prompt_of(5 + 3 * i, seed=100 + i) for i in range(24)])
    for generation in generations:
        harness.assert_equal_to_reference(generation)


def test_a_next_turn_finds_its_prefix_and_its_rows_start_where_it_asked(harness: Harness) -> None:
    """I2: the last token of a turn gets its row from the next turn's prefill; earlier rows come from the slot."""
    tokens = prompt_of(40, seed=2)
    for turn in range(3):
        start = max(0, len(tokens) - 20)
        generation = harness.run(tokens, routed_start=start, rid=f"turn-{turn}")
        harness.assert_equal_to_reference(generation)
        if turn:
            assert generation.cached_tokens == len(tokens) - 1 - 15  # all but the sampled tail's last token
        tokens = generation.token_ids + prompt_of(15, seed=30 + turn)


def test_siblings_share_the_prefix_of_a_sequence_that_still_runs(fresh: Harness) -> None:
    """A copied prefix carries its routing rows along (I2)."""
    tokens = prompt_of(60, seed=3)
    first = fresh.run(tokens)
    together = fresh.run_together([[*first.token_ids, i, i + 1] for i in range(6)])
    assert all(generation.cached_tokens == len(first.token_ids) - 1 for generation in together)
    for generation in together:
        fresh.assert_equal_to_reference(generation)


def test_prompt_logprobs_come_from_where_they_were_asked_for(harness: Harness) -> None:
    """I9: the first wanted token has none, all others are those of a forward pass."""
    tokens = prompt_of(90, seed=4)
    harness.run(tokens)
    generation = harness.run(tokens, logprob_start=30)
    expected, _ = forward(harness.reference, tokens)
    assert generation.cached_tokens <= 30
    assert np.abs(np.array(generation.input_logprobs) - expected[30:]).max() < 1e-4
    harness.assert_equal_to_reference(generation)


def test_logprobs_are_of_the_temperature_scaled_distribution(harness: Harness) -> None:
    """SGLang's meaning of a log-prob, also when only part of the vocabulary may be sampled."""
    settings = SamplingSettings(max_new_tokens=20, temperature=0.5, top_p=0.8, top_k=20, ignore_eos=True)
    generation = harness.run(prompt_of(10, seed=5), settings)
    harness.assert_equal_to_reference(generation, temperature=0.5)


def test_a_seed_decides_the_tokens_whatever_runs_beside_it(harness: Harness) -> None:
    seeded = SamplingSettings(max_new_tokens=24, temperature=1.0, seed=7, ignore_eos=True)
    alone = harness.run(prompt_of(12, seed=6), seeded)
    crowd = [harness.start(prompt_of(9 + i, seed=60 + i), GREEDY, rid=f"c{i}") for i in range(5)]
    again = harness.run(prompt_of(12, seed=6), seeded)
    assert all(ended.wait(DEADLINE_SECONDS) for _, ended in crowd)
    other = harness.run(prompt_of(12, seed=6), SamplingSettings(max_new_tokens=24, seed=8, ignore_eos=True))
    assert alone.token_ids == again.token_ids
    assert alone.token_ids != other.token_ids


def test_stop_tokens_end_a_sequence_and_stay_in_it(harness: Harness) -> None:
    """I1: the stop token was sampled, so it is part of the record."""
    free = harness.run(prompt_of(11, seed=8), SamplingSettings(max_new_tokens=30, seed=1, ignore_eos=True))
    stop = free.token_ids[free.prompt_length + 9]
    stopping = SamplingSettings(max_new_tokens=30, seed=1, stop_token_ids=frozenset([stop]))
    stopped = harness.run(prompt_of(11, seed=8), stopping)
    assert stopped.finish == {"type": "stop", "matched": stop}
    assert stopped.token_ids == free.token_ids[: len(stopped.token_ids)]
    assert stopped.token_ids[-1] == stop
    patient = SamplingSettings(max_new_tokens=30, seed=1, stop_token_ids=frozenset([stop]), min_new_tokens=12)
    assert stop not in harness.run(prompt_of(11, seed=8), patient).token_ids[free.prompt_length :][:12]


def test_a_stop_string_ends_a_sequence(harness: Harness) -> None:
    tokenizer = harness.engine.model.tokenizer
    assert tokenizer is not None
    free = harness.run(prompt_of(11, seed=9), SamplingSettings(max_new_tokens=30, seed=2, ignore_eos=True))
    output = free.token_ids[free.prompt_length :]
    at = next(
        i
        for i, token in enumerate(output)
        if i > 3 and len(tokenizer.decode([token]).strip("\N{REPLACEMENT CHARACTER}"))
    )
    stop = tokenizer.decode([output[at]])
    settings = SamplingSettings(max_new_tokens=30, seed=2, stop=(stop,), ignore_eos=True)
    stopped = harness.run(prompt_of(11, seed=9), settings)
    assert stopped.finish == {"type": "stop", "matched": stop}
    assert len(stopped.token_ids) <= free.prompt_length + at + 1


def wait_for_tokens(generation: Generation, count: int) -> None:
    until(lambda: generation.num_output >= count)


LONG = SamplingSettings(max_new_tokens=300, temperature=1.0, seed=3, ignore_eos=True)


def test_paused_in_place_a_sequence_goes_on_with_its_cache(fresh: Harness) -> None:
    """I2: nothing of it is lost or computed twice; new requests wait."""
    generation, ended = fresh.start(prompt_of(20, seed=10), LONG)
    wait_for_tokens(generation, 5)
    fresh.engine.pause(PauseMode.IN_PLACE).result(DEADLINE_SECONDS)
    count = generation.num_output
    _, waiting_ended = fresh.start(prompt_of(5, seed=11), GREEDY, rid="waiting")
    assert not fresh.engine.flush().result(DEADLINE_SECONDS)
    assert not waiting_ended.wait(0.1)
    assert generation.num_output == count
    fresh.engine.resume().result(DEADLINE_SECONDS)
    assert ended.wait(DEADLINE_SECONDS)
    assert waiting_ended.wait(DEADLINE_SECONDS)
    assert generation.num_retractions == 0
    fresh.assert_equal_to_reference(generation)


def test_retracted_sequences_are_computed_anew_and_end_as_if_nothing_had_been(fresh: Harness) -> None:
    """I2: after a retraction every row and log-prob still lines up; the cache can be flushed meanwhile."""
    generation, ended = fresh.start(prompt_of(20, seed=10), LONG)
    wait_for_tokens(generation, 5)
    fresh.engine.pause(PauseMode.RETRACT).result(DEADLINE_SECONDS)
    assert fresh.engine.flush().result(DEADLINE_SECONDS)
    fresh.engine.resume().result(DEADLINE_SECONDS)
    assert ended.wait(DEADLINE_SECONDS)
    assert generation.num_retractions == 1
    fresh.assert_equal_to_reference(generation)


def test_paused_by_abort_sequences_end_with_what_they_have(fresh: Harness) -> None:
    """I3: sampled tokens of an aborted request are handed out with their rows."""
    generation, ended = fresh.start(prompt_of(20, seed=10), LONG)
    wait_for_tokens(generation, 5)
    fresh.engine.pause(PauseMode.ABORT).result(DEADLINE_SECONDS)
    assert ended.wait(DEADLINE_SECONDS)
    assert generation.finish is not None
    assert generation.finish["type"] == "abort"
    fresh.assert_equal_to_reference(generation)
    later, later_ended = fresh.start(prompt_of(5, seed=11), GREEDY, rid="later")
    assert not later_ended.wait(0.1)
    fresh.engine.resume().result(DEADLINE_SECONDS)
    assert later_ended.wait(DEADLINE_SECONDS)
    assert later.num_output == GREEDY.max_new_tokens


@pytest.fixture(scope="module")
def other_model(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """The tiny model with other weights."""
    folder = tmp_path_factory.mktemp("other") / "model"
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return folder


def test_new_weights_during_a_pause_split_the_versions_of_a_turn(fresh: Harness, other_model: Path) -> None:
    """I5: versions are per token; after a retraction the rest is exactly what the new weights compute."""
    generation, ended = fresh.start(prompt_of(20, seed=10), LONG)
    wait_for_tokens(generation, 5)
    fresh.engine.pause(PauseMode.RETRACT).result(DEADLINE_SECONDS)
    split = generation.num_output
    update = fresh.engine.update_weights(other_model, weight_version="v1", flush_cache=True)
    assert "v1" in update.result(DEADLINE_SECONDS)
    fresh.engine.resume().result(DEADLINE_SECONDS)
    assert ended.wait(DEADLINE_SECONDS)
    assert generation.version_starts == [("default", 0), ("v1", split)]
    new = AutoModelForCausalLM.from_pretrained(other_model, dtype=torch.float32).eval()
    after, _ = forward(new, generation.token_ids)
    before, _ = forward(fresh.reference, generation.token_ids)
    first = generation.prompt_length - 1
    reported = np.array(generation.logprobs)
    assert np.abs(after[first + split :] - reported[split:]).max() < 1e-4
    assert np.abs(before[first : first + split] - reported[:split]).max() < 1e-4
    assert np.abs(before[first + split :] - reported[split:]).max() > 1e-2


def test_new_weights_wait_for_running_requests_unless_paused(fresh: Harness, other_model: Path) -> None:
    """I5: without a pause no turn mixes versions; requests that come later are served by the new weights."""
    generation, ended = fresh.start(prompt_of(20, seed=10), LONG)
    wait_for_tokens(generation, 5)
    update = fresh.engine.update_weights(other_model, weight_version="v1", flush_cache=True)
    later, later_ended = fresh.start(prompt_of(6, seed=12), GREEDY, rid="later")
    update.result(DEADLINE_SECONDS)
    assert ended.is_set()
    assert later_ended.wait(DEADLINE_SECONDS)
    assert generation.version_starts == [("default", 0)]
    assert later.version_starts == [("v1", 0)]


def test_weights_that_cannot_be_read_change_nothing(fresh: Harness, tmp_path: Path) -> None:
    """The engine lives on with what it had."""
    before = fresh.run(prompt_of(9, seed=13))
    with pytest.raises(TransportError, match="no checkpoint"):
        fresh.engine.update_weights(tmp_path / "none", weight_version="v", flush_cache=True).result(DEADLINE_SECONDS)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(TransportError, match="cannot read"):
        fresh.engine.update_weights(tmp_path, weight_version="v", flush_cache=True).result(DEADLINE_SECONDS)
    after = fresh.run(prompt_of(9, seed=13))
    assert before.token_ids == after.token_ids
    assert fresh.engine.weight_version == "default"


def test_aborting_an_id_ends_those_that_begin_with_it(fresh: Harness) -> None:
    """SGLang's prefix matching, which is why our ids have a fixed length."""
    started_ones = [fresh.start(prompt_of(8, seed=14), LONG, rid=rid) for rid in ("req-1", "req-10", "req-2")]
    for generation, _ in started_ones:
        wait_for_tokens(generation, 2)
    fresh.engine.abort("req-1").result(DEADLINE_SECONDS)
    fresh.engine.abort("unknown").result(DEADLINE_SECONDS)
    finishes = []
    for generation, ended in started_ones:
        assert ended.wait(DEADLINE_SECONDS)
        assert generation.finish is not None
        finishes.append(generation.finish["type"])
    assert finishes == ["abort", "abort", "length"]


def test_a_sequence_ends_at_the_context_length(tiny_model: Path) -> None:
    for tight in started(tiny_model, context_length=32):
        settings = SamplingSettings(max_new_tokens=100, temperature=0.0, ignore_eos=True)
        generation = tight.run(prompt_of(20, seed=15), settings)
        assert len(generation.token_ids) == 32
        assert generation.finish == {"type": "length", "length": 12}
        tight.assert_equal_to_reference(generation)


def test_a_dense_model_is_served_without_routing(tmp_path: Path) -> None:
    """The engine is not tied to one architecture; a dense model has no rows (I9: none are made up)."""
    config = Qwen3Config(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
    )
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).save_pretrained(tmp_path)
    engine = make_engine(tmp_path, context_length=128)
    engine.start(on_failure=lambda: None)
    harness = Harness(engine, AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval())
    generation = harness.run([t % 128 for t in prompt_of(30, seed=16)])
    engine.stop()
    ids = torch.tensor([generation.token_ids])
    with torch.no_grad():
        logprobs = torch.log_softmax(harness.reference(input_ids=ids).logits[0, 29:-1], dim=-1)
    expected = logprobs.gather(1, ids[0, 30:, None])[:, 0].numpy()
    assert np.abs(expected - np.array(generation.logprobs)).max() < 1e-4
    assert generation.routed_experts is None


@pytest.mark.parametrize("temperature", [0.0, 1.0, 0.6])
def test_likeliest_tokens_are_those_of_the_models_own_softmax(harness: Harness, temperature: float) -> None:
    """As the log-probs: of the temperature-scaled distribution, also of tokens computed by a batch and from a cache."""
    settings = SamplingSettings(max_new_tokens=8, temperature=temperature, ignore_eos=True, top_k=3)
    prompt = list(range(20, 40))
    generation = harness.run(prompt, settings, num_top_logprobs=6, logprob_start=0)
    expected = softmax_tops(harness.reference, generation.token_ids, 6, temperature or 1.0)
    assert len(generation.top_logprobs) == generation.num_output == 8
    for row, want in zip(generation.top_logprobs, expected[len(prompt) - 1 :], strict=True):
        assert [top.logprob for top in row] == pytest.approx([logprob for _, logprob in want], abs=1e-4)
        assert dict(row) == pytest.approx(dict(want), abs=1e-4)
    unscaled = softmax_tops(harness.reference, generation.token_ids, 6, 1.0)[: len(prompt) - 1]
    for row, want in zip(generation.input_top_logprobs, unscaled, strict=True):
        assert [top.logprob for top in row] == pytest.approx([logprob for _, logprob in want], abs=1e-4)
