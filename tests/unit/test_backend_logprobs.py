"""Log-probs of the sampled distribution: temperature, kept sets, chunks, and their gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trainer.backends import logprobs
from trainer.backends.logprobs import Sampled, kept_set, token_scores


def random_case(num_positions: int = 12, vocabulary: int = 37, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(num_positions, vocabulary, generator=generator)
    return logits, torch.randint(vocabulary, (num_positions,), generator=generator)


def test_scores_are_those_of_a_plain_softmax_bit_for_bit() -> None:
    logits, labels = random_case()
    scores = token_scores(logits, Sampled(labels))
    plain = torch.log_softmax(logits, -1)
    assert torch.equal(scores.logprobs, plain.gather(1, labels[:, None])[:, 0])
    assert torch.allclose(scores.entropy, -(plain.exp() * plain).sum(-1), atol=1e-6)


def test_a_kept_set_of_the_whole_vocabulary_changes_no_bit() -> None:
    """Rows without limits beside rows with some are as if no row had any."""
    logits, labels = random_case()
    top_p, top_k = torch.ones(12), torch.zeros(12, dtype=torch.int64)
    top_p[3], top_k[5] = 0.4, 2
    limited = token_scores(logits, Sampled(labels, None, top_p, top_k))
    plain = token_scores(logits, Sampled(labels))
    free = torch.tensor([i not in (3, 5) for i in range(12)])
    assert torch.equal(limited.logprobs[free], plain.logprobs[free])
    assert torch.equal(limited.entropy[free], plain.entropy[free])
    assert bool((limited.logprobs[~free] > plain.logprobs[~free]).all())


@pytest.mark.parametrize("limits", [False, True], ids=["whole vocabulary", "kept sets"])
def test_chunks_change_no_bit_of_scores_or_gradients(monkeypatch: pytest.MonkeyPatch, limits: bool) -> None:
    results = []
    for elements in (1, 5 * 37, 1 << 20):
        monkeypatch.setattr(logprobs, "_CHUNK_ELEMENTS", elements)
        logits, labels = random_case()
        logits.requires_grad_()
        sampled = Sampled(labels, torch.linspace(0.5, 1.5, 12))
        if limits:
            sampled = sampled._replace(top_p=torch.linspace(0.3, 1.0, 12), top_k=torch.arange(12))
        scores = token_scores(logits, sampled, entropy_gradient=True)
        (scores.logprobs * torch.arange(12.0) + scores.entropy).sum().backward()
        results.append((scores.logprobs.detach(), scores.entropy.detach(), logits.grad))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("limits", [False, True], ids=["whole vocabulary", "kept sets"])
def test_gradients_are_those_of_autograd(limits: bool) -> None:
    logits, labels = random_case(seed=3)
    temperature = torch.linspace(0.5, 2.0, 12)
    sampled = Sampled(labels, temperature)
    if limits:
        sampled = sampled._replace(top_p=torch.full((12,), 0.7), top_k=torch.full((12,), 9))
    mine, theirs = logits.clone().requires_grad_(), logits.double().requires_grad_()
    weights = torch.linspace(-1, 1, 12)

    scores = token_scores(mine, sampled, entropy_gradient=True)
    (scores.logprobs * weights + scores.entropy * weights.flip(0)).sum().backward()

    scaled = theirs / temperature.double()[:, None]
    if limits:
        scaled = scaled.masked_fill(~kept_set(logits / temperature[:, None], sampled), -1e30)
    all_logprobs = torch.log_softmax(scaled, -1)
    entropy = -(all_logprobs.exp() * all_logprobs).sum(-1)
    chosen = all_logprobs.gather(1, labels[:, None])[:, 0]
    (chosen * weights + entropy * weights.flip(0)).sum().backward()
    assert mine.grad is not None
    assert theirs.grad is not None
    assert torch.allclose(scores.logprobs.double(), chosen, atol=1e-5)
    assert torch.allclose(mine.grad.double(), theirs.grad, atol=1e-6)


def test_entropy_has_a_gradient_only_where_it_is_asked_for() -> None:
    logits, labels = random_case()
    logits.requires_grad_()
    assert not token_scores(logits, Sampled(labels)).entropy.requires_grad
    scores = token_scores(logits, Sampled(labels), entropy_gradient=True)
    scores.entropy.sum().backward()
    assert logits.grad is not None
    assert bool(logits.grad.abs().max() > 0)


def test_no_trained_token_gives_no_score_and_a_gradient_of_zero() -> None:
    """A process without trained tokens still takes part in the backward pass."""
    hidden = torch.ones(1, requires_grad=True)
    logits = torch.zeros(0, 9) * hidden
    scores = token_scores(logits, Sampled(torch.zeros(0, dtype=torch.int64)))
    scores.logprobs.sum().backward()
    assert scores.logprobs.shape == (0,)
    assert hidden.grad is not None
    assert float(hidden.grad) == 0.0


def reference_kept_set(probs: list[float], top_p: float, top_k: int, label: int) -> set[int]:
    """By hand, one position at a time."""
    order = sorted(range(len(probs)), key=lambda i: -probs[i])
    if top_k:
        smallest = probs[order[min(top_k, len(order)) - 1]]
        order = [i for i in order if probs[i] >= smallest]
    total = sum(probs[i] for i in order)
    kept, mass = set(), 0.0
    for i in order:
        if mass / total < top_p:
            kept.add(i)
        mass += probs[i]
    return kept | {label}


@given(
    counts=st.lists(st.integers(1, 40), min_size=2, max_size=12, unique=True),
    top_p=st.sampled_from([0.05, 0.31, 0.73, 0.97, 1.0]),
    top_k=st.integers(0, 14),
    data=st.data(),
)
@settings(max_examples=150)
def test_the_kept_set_is_top_k_then_top_p_and_the_sampled_token(
    counts: list[int], top_p: float, top_k: int, data: st.DataObject
) -> None:
    label = data.draw(st.integers(0, len(counts) - 1))
    probs = np.array(counts) / sum(counts)
    kept = kept_set(
        torch.tensor(np.log(probs), dtype=torch.float32)[None],
        Sampled(torch.tensor([label]), None, torch.tensor([top_p]), torch.tensor([top_k])),
    )
    assert set(torch.nonzero(kept[0])[:, 0].tolist()) == reference_kept_set(probs.tolist(), top_p, top_k, label)


def test_log_probs_of_a_kept_set_are_those_of_sampling_from_it() -> None:
    """Against closed form: the chosen of three equal tokens among many small ones."""
    logits = torch.full((1, 50), -5.0)
    logits[0, :3] = 4.0
    scores = token_scores(logits, Sampled(torch.tensor([1]), None, None, torch.tensor([3])))
    assert float(scores.logprobs) == pytest.approx(-np.log(3), abs=1e-6)
    assert float(scores.entropy) == pytest.approx(np.log(3), abs=1e-6)
