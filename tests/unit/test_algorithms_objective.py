"""Corrections, and the objective composed of all parts: masks, missing log-probs, and any cut into micro-batches."""

from __future__ import annotations

import math
import pickle
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

from gateway.contracts.errors import ConfigurationError, TrainingError
from gateway.contracts.settings import build_settings
from trainer.algorithms.advantages import ESTIMATORS as ESTIMATOR_FUNCTIONS
from trainer.algorithms.aggregation import make_aggregation
from trainer.algorithms.corrections import make_correction
from trainer.algorithms.losses import make_policy_loss
from trainer.algorithms.objective import LiveTokens, Share, TokenTerms, TrainedTokens
from trainer.algorithms.policy_objective import PolicyObjective
from trainer.algorithms.settings import (
    AGGREGATIONS,
    CORRECTIONS,
    ESTIMATORS,
    KL_ESTIMATORS,
    POLICIES,
    AdvantageSettings,
    LossSettings,
    OldPolicy,
)

SAMPLES = [0, 1, 0, 1, 0, 2]
W = [1.0, 0.25, 2.0, 8.0, 0.5, 4.0]
"""Interleaved: sample 0 has w 1, 2, 0.5 (product 1); sample 1 has 0.25, 8 (product 2); sample 2 has 4.
exp(log w) is exact for all."""


def _tokens(old: Tensor, *, w: list[float] | None = None, samples: list[int] | None = None) -> TrainedTokens:
    samples = samples or [0] * len(old)
    ratios = torch.tensor(w or [1.0] * len(old), dtype=torch.float64)
    return TrainedTokens(
        rollout_logprobs=old - ratios.log(),
        old_logprobs=old,
        ref_logprobs=None,
        advantages=torch.ones_like(old),
        sample_index=torch.tensor(samples),
        num_samples=max(samples) + 1,
    )


def _live(logprobs: Tensor) -> LiveTokens:
    return LiveTokens(logprobs.clone().requires_grad_(), (-0.3 * logprobs).requires_grad_())


@pytest.mark.parametrize(
    ("loss", "factors"),
    [
        (LossSettings(correction="off"), [1, 1, 1, 1, 1, 1]),
        (LossSettings(correction="mask"), [1, 0, 1, 0, 1, 0]),  # 0.5 and 2 are inside
        (LossSettings(correction="mask", correction_low=0.25, correction_high=4.0), [1, 1, 1, 0, 1, 1]),
        (LossSettings(correction="tis"), [1, 0.25, 2, 2, 0.5, 2]),
        (LossSettings(correction="tis", correction_high=2.5), [1, 0.25, 2, 2.5, 0.5, 2.5]),
        (LossSettings(correction="icepop"), [1, 0, 2, 0, 0.5, 4]),
        (LossSettings(correction="tis-sequence", correction_high=2.5), [1, 2, 1, 2, 1, 2.5]),
        (LossSettings(correction="mis-sequence"), [1, 2, 1, 2, 1, 0]),
        (LossSettings(correction="mis-geometric", correction_high=1.5), [1, 1, 1, 1, 1, 0]),
        (LossSettings(correction="mis-geometric"), [1, 0, 1, 0, 1, 0]),  # sqrt(2) is outside 1.01
    ],
)
def test_correction_gives_its_closed_form(loss: LossSettings, factors: list[float]) -> None:
    tokens = _tokens(torch.zeros(6, dtype=torch.float64), w=W, samples=SAMPLES)
    live = _live(-torch.arange(1, 7, dtype=torch.float64))
    factor = make_correction(loss)(tokens)
    assert factor.tolist() == pytest.approx(factors, rel=1e-12)
    terms = PolicyObjective(replace(loss, policy="reinforce"))(live, tokens)
    expected = [-f * lp for f, lp in zip(factors, live.logprobs.tolist(), strict=True)]
    assert terms.loss.tolist() == pytest.approx(expected)
    assert terms.shares[Share.MASKED].tolist() == [f == 0 for f in factors]
    assert terms.shares[Share.CORRECTION_MEAN].tolist() == pytest.approx(factors)


def test_factors_are_constants_also_where_old_is_the_live_forward_itself() -> None:
    live = torch.tensor([-1.0, -2.0], dtype=torch.float64, requires_grad=True)
    tokens = replace(_tokens(live.detach(), w=[1.5, 0.5]), old_logprobs=live)
    for name in CORRECTIONS:
        assert not make_correction(LossSettings(correction=name))(tokens).requires_grad, name


@pytest.mark.parametrize("name", [name for name in CORRECTIONS if name != "off"])
@pytest.mark.parametrize("logw", [-1000.0, 1000.0])
def test_gap_beyond_float32_gives_a_finite_factor(name: str, logw: float) -> None:
    tokens = TrainedTokens(
        rollout_logprobs=torch.tensor([-logw]),
        old_logprobs=torch.tensor([0.0]),
        ref_logprobs=None,
        advantages=torch.ones(1),
        sample_index=torch.zeros(1, dtype=torch.int64),
        num_samples=1,
    )
    factor = make_correction(LossSettings(correction=name))(tokens)
    assert torch.isfinite(factor).all()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("poison", [math.nan, -math.inf, 500.0])
def test_masked_token_contributes_exactly_nothing_whatever_its_values(policy: str, poison: float) -> None:
    """The step is the same as without the token: loss, gradient, KL and entropy, GSPO's ratio too."""
    loss = LossSettings(policy=policy, kl_coefficient=0.1, entropy_coefficient=0.01)
    objective = PolicyObjective(loss)
    old = torch.tensor([-1.0, -2.0, -0.5, -3.0], dtype=torch.float64)
    tokens = replace(_tokens(old, w=[1.0, 100.0, 1.2, 0.9], samples=[0, 0, 1, 0]), ref_logprobs=old + 0.1)
    live = _live(old + torch.tensor([0.0001, 0.0, -0.1, 0.0002], dtype=torch.float64))
    with torch.no_grad():
        live.logprobs[1], live.entropy[1] = poison, poison
    terms = objective(live, tokens)
    others = torch.tensor([0, 2, 3])
    alone = _live(live.logprobs.detach()[others])
    object.__setattr__(alone, "entropy", live.entropy.detach()[others].requires_grad_())
    expected = objective(alone, tokens.only(others))
    assert terms.loss[1].item() == 0.0
    assert torch.equal(terms.loss[others], expected.loss)
    gradients = torch.autograd.grad(terms.loss.sum(), (live.logprobs, live.entropy))
    wanted = torch.autograd.grad(expected.loss.sum(), (alone.logprobs, alone.entropy))
    for gradient, want in zip(gradients, wanted, strict=True):
        assert gradient[1].item() == 0.0
        assert torch.equal(gradient[others], want)
    assert terms.shares[Share.MASKED].tolist() == [False, True, False, False]
    assert all(torch.isfinite(values.float()).all() for values in terms.shares.values())


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("policy", POLICIES)
def test_token_without_rollout_logprob_trains_only_where_nothing_asks_for_one(policy: str, correction: str) -> None:
    old = torch.tensor([-1.0, -2.0], dtype=torch.float64)
    tokens = replace(_tokens(old), rollout_logprobs=torch.tensor([math.nan, -2.0], dtype=torch.float64))
    live = _live(old)
    terms = PolicyObjective(LossSettings(policy=policy, correction=correction))(live, tokens)
    (gradient,) = torch.autograd.grad(terms.loss.sum(), live.logprobs)
    assert torch.isfinite(terms.loss).all()
    if correction == "off":
        assert Share.UNRECORDED not in terms.shares
        assert gradient.tolist() == [-1.0, -1.0]
    else:
        assert terms.shares[Share.UNRECORDED].tolist() == [True, False]
        assert terms.shares[Share.MASKED].tolist() == [True, False]
        assert gradient.tolist() == [0.0, -1.0]


def test_old_policy_of_the_rollout_puts_the_engines_logprobs_below_the_ratio_and_masks_what_has_none() -> None:
    old = torch.tensor([-1.0, -1.0, -1.0], dtype=torch.float64)
    rollout = torch.tensor([-1.0 - math.log(1.5), -1.1, math.nan], dtype=torch.float64)
    tokens = replace(_tokens(old), rollout_logprobs=rollout)
    loss = LossSettings(old_policy=OldPolicy.ROLLOUT, correction="off")
    terms = PolicyObjective(loss)(_live(old), tokens)
    assert terms.loss.tolist() == pytest.approx([-1.28, -math.exp(0.1), 0.0])
    assert terms.shares[Share.CLIPPED_HIGH].tolist() == [True, False, False]
    assert terms.shares[Share.RATIO_MEAN].tolist() == pytest.approx([1.5, math.exp(0.1), 1.0])


def test_nan_of_the_trainers_own_forward_is_seen_not_masked() -> None:
    old = torch.tensor([-1.0, -2.0], dtype=torch.float64)
    live = torch.tensor([math.nan, -2.0], dtype=torch.float64)
    for name in CORRECTIONS:
        tokens = replace(_tokens(old), old_logprobs=live, rollout_logprobs=old)
        terms = PolicyObjective(LossSettings(correction=name))(_live(live), tokens)
        assert torch.isnan(terms.loss[0]), name


@pytest.mark.parametrize("policy", [policy for policy in POLICIES if policy != "reinforce"])
def test_micro_batch_that_is_masked_whole_still_has_a_gradient_of_zero(policy: str) -> None:
    old = torch.tensor([-1.0, -2.0], dtype=torch.float64)
    live = _live(old)
    terms = PolicyObjective(LossSettings(policy=policy))(live, _tokens(old, w=[9.0, 9.0]))
    terms.loss.sum().backward()
    assert terms.loss.tolist() == [0.0, 0.0]
    assert terms.shares[Share.RATIO_MEAN].tolist() == [1.0, 1.0]
    assert live.logprobs.grad is not None
    assert live.logprobs.grad.tolist() == [0.0, 0.0]


def test_objective_is_factor_times_policy_plus_kl_minus_entropy() -> None:
    old = torch.tensor([-1.0, -2.0], dtype=torch.float64)
    tokens = replace(_tokens(old, w=[2.0, 0.5]), ref_logprobs=old - 0.5)
    live = _live(old)
    loss = LossSettings(correction="tis", kl_coefficient=0.3, kl_estimator="k2", entropy_coefficient=0.2)
    objective = PolicyObjective(loss)
    assert objective.needs_reference
    assert objective.needs_entropy_gradient
    terms = objective(live, tokens)
    expected = [-2.0 + 0.3 * 0.125 - 0.2 * 0.3, -0.5 + 0.3 * 0.125 - 0.2 * 0.6]
    assert terms.loss.tolist() == pytest.approx(expected)
    assert terms.shares[Share.KL_REFERENCE].tolist() == pytest.approx([0.125, 0.125])
    gradients = torch.autograd.grad(terms.loss.sum(), (live.logprobs, live.entropy))
    assert gradients[0].tolist() == pytest.approx([-2.0 + 0.3 * 0.5, -0.5 + 0.3 * 0.5])
    assert gradients[1].tolist() == pytest.approx([-0.2, -0.2])


def test_defaults_need_no_reference_and_with_one_update_are_the_policy_gradient() -> None:
    objective = PolicyObjective(LossSettings())
    assert not objective.needs_reference
    assert not objective.needs_entropy_gradient
    live = _live(torch.tensor([-1.0, -2.0]))
    tokens = replace(_tokens(live.logprobs.detach(), w=[1.4, 0.6]), advantages=torch.tensor([2.0, -3.0]))
    (gradient,) = torch.autograd.grad(objective(live, tokens).loss.sum(), live.logprobs)
    assert gradient.tolist() == [-2.0, 3.0]


def test_missing_reference_is_named() -> None:
    old = torch.tensor([-1.0])
    with pytest.raises(TrainingError, match="kl_coefficient is set"):
        PolicyObjective(LossSettings(kl_coefficient=0.1))(_live(old), _tokens(old))


def test_micro_batch_without_a_token_needs_no_reference() -> None:
    """A rank that was dealt fewer micro-batches than others fills up with padding, of which nothing was measured."""
    none = torch.zeros(0, dtype=torch.int64)
    live, tokens = _live(torch.zeros(1)).only(none), _tokens(torch.zeros(1)).only(none)
    assert PolicyObjective(LossSettings(kl_coefficient=0.1))(live, tokens).loss.shape == (0,)


def test_objective_survives_pickling() -> None:
    old = torch.tensor([-1.0, -2.0], dtype=torch.float64)
    tokens = _tokens(old, w=[1.5, 0.1])
    objective = PolicyObjective(LossSettings(policy="cispo", correction="icepop"))
    again = pickle.loads(pickle.dumps(objective))
    assert torch.equal(again(_live(old), tokens).loss, objective(_live(old), tokens).loss)


def _loss_and_gradient(
    objective: PolicyObjective, live: LiveTokens, tokens: TrainedTokens, weights: Tensor, parts: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Accumulated over micro-batches, each with samples of its own numbering, as a backend does it."""
    logprobs = live.logprobs.detach().clone().requires_grad_()
    entropy = live.entropy.detach().clone().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for at in parts:
        part = tokens.only(at)
        own, index = torch.unique(part.sample_index, return_inverse=True)
        part = replace(part, sample_index=index, num_samples=len(own))
        terms: TokenTerms = objective(LiveTokens(logprobs[at], entropy[at]), part)
        loss = (terms.loss * weights[at]).sum()
        loss.backward()
        total = total + loss.detach()
    assert logprobs.grad is not None
    return total, logprobs.grad, torch.zeros_like(entropy) if entropy.grad is None else entropy.grad


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("policy", POLICIES)
@hypothesis_settings(max_examples=6)
@given(data=st.data())
def test_no_cut_into_micro_batches_changes_loss_or_gradient(
    policy: str, correction: str, aggregation: str, data: st.DataObject
) -> None:
    """Rollouts of several samples, tokens of samples interleaved, any assignment of samples to parts (ranks too)."""
    lengths = data.draw(st.lists(st.integers(1, 5), min_size=2, max_size=6), label="tokens of each sample")
    rollout_of = data.draw(st.lists(st.integers(0, 2), min_size=len(lengths), max_size=len(lengths)), label="rollout")
    part_of = data.draw(st.lists(st.integers(0, 3), min_size=len(lengths), max_size=len(lengths)), label="part")
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31), label="seed"))

    def noise(scale: float) -> Tensor:
        return scale * torch.randn(sum(lengths), generator=generator, dtype=torch.float64)

    samples = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    samples = samples[torch.randperm(len(samples), generator=generator)]
    rollouts = torch.tensor(rollout_of)[samples]
    tokens_of_rollout = torch.bincount(rollouts, minlength=3)
    constant = 7 if aggregation == "constant" else 0
    loss = LossSettings(
        policy=policy,
        correction=correction,
        aggregation=aggregation,
        constant_tokens=constant,
        kl_coefficient=0.05,
        entropy_coefficient=0.01,
    )
    weights = torch.tensor(make_aggregation(loss)(tokens_of_rollout.tolist()), dtype=torch.float64)[rollouts]
    old = noise(1.0) - 3
    logw = noise(0.4 if "sequence" not in correction and correction != "mis-geometric" else 0.01)
    tokens = TrainedTokens(
        old - logw, old, old + noise(0.1), torch.randn(3, generator=generator).double()[rollouts], samples, len(lengths)
    )
    live = LiveTokens(old + noise(0.3 if policy != "gspo" else 4e-4), noise(1.0).abs())
    objective = PolicyObjective(loss)
    whole = _loss_and_gradient(objective, live, tokens, weights, [torch.arange(len(samples))])
    cut = [(torch.tensor(part_of)[samples] == part).nonzero()[:, 0] for part in set(part_of)]
    pieces = _loss_and_gradient(objective, live, tokens, weights, cut)
    for one, other in zip(whole, pieces, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-12, atol=1e-13)


def test_settings_know_the_names_of_what_there_is() -> None:
    assert set(ESTIMATORS) == set(ESTIMATOR_FUNCTIONS)
    for policy in POLICIES:
        make_policy_loss(LossSettings(policy=policy))
    for correction in CORRECTIONS:
        make_correction(LossSettings(correction=correction))
    for aggregation in AGGREGATIONS:
        make_aggregation(LossSettings(aggregation=aggregation, constant_tokens=9 * (aggregation == "constant")))
    for estimator in KL_ESTIMATORS:
        PolicyObjective(LossSettings(kl_estimator=estimator))


@pytest.mark.parametrize(
    ("loss", "clip", "bounds"),
    [
        (LossSettings(), (0.2, 0.28), (0.5, 2.0)),
        (LossSettings(policy="gspo", correction="tis"), (3e-4, 4e-4), (0.0, 2.0)),
        (LossSettings(policy="gspo", clip_high=1e-3), (3e-4, 1e-3), (0.5, 2.0)),
        (LossSettings(policy="cispo", correction="icepop"), (1.0, 4.0), (0.5, 5.0)),
        (LossSettings(policy="reinforce", correction="off"), None, (0.0, math.inf)),
        (LossSettings(clip_high=0.2, correction_low=0.1), (0.2, 0.2), (0.1, 2.0)),
    ],
)
def test_open_values_are_the_algorithms_own(
    loss: LossSettings, clip: tuple[float, float] | None, bounds: tuple[float, float]
) -> None:
    assert loss.clip == clip
    assert loss.correction_bounds == bounds


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"policy": "gpso"}, r"loss.policy 'gpso' is unknown; did you mean 'gspo'\?"),
        ({"policy": "zzz"}, "known: ppo, gspo, cispo, reinforce, or FILE.py:NAME"),
        ({"correction": "iccpop"}, "did you mean 'icepop'"),
        ({"aggregation": "tokens"}, "did you mean 'token'"),
        ({"kl_estimator": "k4"}, "loss.kl_estimator 'k4' is unknown"),
        ({"kl_estimator": "mine.py:kl"}, "loss.kl_estimator 'mine.py:kl' is unknown"),
        ({"policy": "reinforce", "clip_low": 0.1}, "loss.clip_low would have no effect: reinforce does not clip"),
        ({"clip_low": 0.0}, "clip_low is 0.0"),
        ({"clip_low": 1.5}, "clip_low is 1.5"),
        ({"clip_high": math.nan}, "clip_high is nan"),
        ({"clip_dual": 1.0}, "clip_dual is 1.0"),
        ({"policy": "gspo", "clip_dual": 3.0}, "clip_dual belongs to ppo"),
        ({"aggregation": "constant"}, "constant_tokens is 0"),
        ({"constant_tokens": 9}, "constant_tokens is 9"),
        ({"correction": "tis", "correction_low": 0.5}, "loss.correction_low would have no effect on tis"),
        ({"correction": "off", "correction_high": 3.0}, "loss.correction_high would have no effect on off"),
        ({"correction_low": 1.5}, "must have 1 between them"),
        ({"correction_low": 1.0, "correction_high": 1.0}, "must have 1 between them"),
        ({"correction_low": math.nan}, "must have 1 between them"),
        ({"correction": "tis", "old_policy": "rollout"}, "the ratio holds already"),
        ({"kl_coefficient": -1.0}, "loss.kl_coefficient is -1.0"),
        ({"entropy_coefficient": math.inf}, "loss.entropy_coefficient is inf"),
    ],
)
def test_settings_that_make_no_sense_are_refused_in_one_line(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message) as refused:
        build_settings(LossSettings, values, where="recipe.toml")
    assert "\n" not in str(refused.value)


def test_unknown_estimator_names_the_nearest() -> None:
    with pytest.raises(ConfigurationError, match="did you mean 'rloo'"):
        AdvantageSettings(estimator="rlo")
