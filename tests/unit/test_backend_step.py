"""HFBackend's step: no cut of it matters, nothing half-done on bad numbers, bfloat16, recomputation, schedules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gateway.contracts.errors import ConfigurationError, NonFiniteLoss, TrainingError
from tests.train_samples import random_samples, scored_batches, sequence_mean_weights, token_mean_weights
from trainer.algorithms.objective import LiveTokens, TokenTerms, TrainedTokens
from trainer.algorithms.policy_objective import PolicyObjective
from trainer.algorithms.settings import LossSettings
from trainer.backends.hf import HFBackend
from trainer.backends.settings import LoraSettings, ModelSettings, OptimizerSettings
from trainer.data.packing import ScoredBatch
from trainer.settings import ReplayMode

LENGTHS = (9, 23, 14, 31, 6)


def make_backend(
    model: Path, *, replay: ReplayMode = ReplayMode.R3, optimizer: OptimizerSettings | None = None, **settings: Any
) -> HFBackend:
    return HFBackend(
        ModelSettings(model, **settings),
        optimizer or OptimizerSettings(learning_rate=1e-3),
        replay=replay,
        seed=0,
        num_updates=10,
    )


def gradients(backend: HFBackend, batches: Sequence[ScoredBatch], objective: Any) -> tuple[float, dict[str, Tensor]]:
    """The step's loss and gradients before clipping."""
    loss = float(backend.accumulate(batches, objective).loss)
    found = {name: p.grad.clone() for name, p in backend._masters.by_name.items() if p.grad is not None}
    backend._zero_gradients()
    return loss, found


def parameters(backend: HFBackend) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in backend._model.named_parameters()}


class SequenceObjective:
    """Looks at whole sequences, as GSPO does, and at the entropy."""

    needs_reference = False
    needs_entropy_gradient = True

    def __call__(self, live: LiveTokens, tokens: TrainedTokens) -> TokenTerms:
        zeros = torch.zeros(tokens.num_samples)
        counts = zeros.index_add(0, tokens.sample_index, torch.ones_like(live.logprobs))
        means = zeros.index_add(0, tokens.sample_index, live.logprobs - tokens.old_logprobs) / counts.clamp(min=1)
        ratio = means.exp()[tokens.sample_index]
        return TokenTerms(-ratio * tokens.advantages - 0.01 * live.entropy, {"ratio": ratio.detach()})


class PlainObjective:
    """The plainest: minus log-prob times advantage."""

    needs_reference = False
    needs_entropy_gradient = False

    def __call__(self, live: LiveTokens, tokens: TrainedTokens) -> TokenTerms:
        return TokenTerms(-live.logprobs * tokens.advantages)


OBJECTIVES = {
    **{name: PolicyObjective(LossSettings(policy=name)) for name in ("ppo", "gspo", "cispo", "reinforce")},
    "ppo, mis-geometric": PolicyObjective(LossSettings(correction="mis-geometric")),
    "ppo, entropy bonus": PolicyObjective(LossSettings(entropy_coefficient=0.01)),
    "sequence ratio": SequenceObjective(),
    "policy gradient": PlainObjective(),
}


@pytest.mark.parametrize("weights_of", [token_mean_weights, sequence_mean_weights])
@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_packing_accumulation_and_order_change_loss_and_gradients_by_rounding_only(
    tiny_model: Path, objective: Any, weights_of: Any
) -> None:
    backend = make_backend(tiny_model)
    samples = random_samples(LENGTHS, seed=1, routed=backend.routed)
    weights = weights_of(samples)
    loss, expected = gradients(backend, scored_batches(samples, weights), objective)
    cuts = {
        "one a micro-batch": scored_batches(samples, weights, tokens=1),
        "some": scored_batches(samples, weights, tokens=40),
        "backwards": scored_batches(samples[::-1], weights[::-1], tokens=30),
    }
    for name, batches in cuts.items():
        other_loss, found = gradients(backend, batches, objective)
        assert other_loss == pytest.approx(loss, abs=1e-6), name
        for parameter, gradient in expected.items():
            assert torch.allclose(found[parameter], gradient, atol=2e-6, rtol=1e-4), (name, parameter)


class NotANumberBackwards(torch.autograd.Function):
    """Nothing to see in the loss; its gradient is NaN."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return values.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * float("nan")


class BadGradient(PlainObjective):
    """As PlainObjective, but not a number in gradients only."""

    def __call__(self, live: LiveTokens, tokens: TrainedTokens) -> TokenTerms:
        return TokenTerms(NotANumberBackwards.apply(-live.logprobs * tokens.advantages))


class BadLoss(PlainObjective):
    """Infinite in one token."""

    def __call__(self, live: LiveTokens, tokens: TrainedTokens) -> TokenTerms:
        loss = -live.logprobs * tokens.advantages
        return TokenTerms(loss + torch.where(torch.arange(len(loss)) == 0, torch.inf, 0.0))


@pytest.mark.parametrize("bad", [BadGradient(), BadLoss()], ids=["gradient", "loss"])
def test_a_step_that_is_not_finite_leaves_parameters_optimiser_and_schedule_as_they_were(
    tiny_model: Path, bad: Any
) -> None:
    """The next good step is bit for bit the one without the bad one before it."""
    optimizer = OptimizerSettings(learning_rate=1e-3, schedule="linear")
    one, other = make_backend(tiny_model, optimizer=optimizer), make_backend(tiny_model, optimizer=optimizer)
    batches = scored_batches(random_samples(LENGTHS, seed=1, routed=one.routed), tokens=40)
    one.update(batches, PlainObjective())
    other.update(batches, PlainObjective())
    before = parameters(one)
    with pytest.raises(NonFiniteLoss):
        one.update(batches, bad)
    assert all(torch.equal(values, before[name]) for name, values in parameters(one).items())
    mine, theirs = one.update(batches, PlainObjective()), other.update(batches, PlainObjective())
    assert (mine.loss, mine.grad_norm, mine.learning_rate) == (theirs.loss, theirs.grad_norm, theirs.learning_rate)
    expected = parameters(other)
    assert all(torch.equal(values, expected[name]) for name, values in parameters(one).items())


def test_a_step_without_a_trained_token_is_refused(tiny_model: Path) -> None:
    backend = make_backend(tiny_model)
    (sample,) = random_samples([8], seed=0, routed=backend.routed)
    layout = sample.layout
    idle = replace(sample, layout=replace(layout, trained=layout.trained & False))
    batches = scored_batches([idle], sequence_mean_weights([sample]))
    with pytest.raises(TrainingError, match="no token"):
        backend.update(batches, PlainObjective())


def test_micro_batches_without_a_trained_token_add_nothing(tiny_model: Path) -> None:
    """They run forward and backward, for the sake of processes that wait for theirs."""
    backend = make_backend(tiny_model)
    first, second = random_samples([12, 8], seed=0, routed=backend.routed)
    idle = replace(second, layout=replace(second.layout, trained=second.layout.trained & False))
    (weights,) = token_mean_weights([first])
    loss, expected = gradients(backend, scored_batches([first], [weights]), SequenceObjective())
    with_idle = scored_batches([first, idle], [weights, weights], tokens=1)
    assert len(with_idle) == 2
    other_loss, found = gradients(backend, with_idle, SequenceObjective())
    assert other_loss == loss
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


def test_layers_that_are_computed_again_give_the_same_bits_under_replay(tiny_model: Path) -> None:
    """Each micro-batch's recomputation sees its own rows (I10), and its routers are compared again."""
    plain, again = make_backend(tiny_model), make_backend(tiny_model, checkpoint_activations=True)
    batches = scored_batches(random_samples(LENGTHS, seed=2, routed=plain.routed), tokens=40)
    loss, expected = gradients(plain, batches, SequenceObjective())
    other_loss, found = gradients(again, batches, SequenceObjective())
    assert other_loss == loss
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())
    report = again.accumulate(batches, SequenceObjective()).measured.routing
    assert report.verified == report.replayed == report.total > 0


def test_bfloat16_forwards_are_those_of_the_rounded_checkpoint_and_masters_stay_float32(tiny_model: Path) -> None:
    """Small steps are not lost to rounding: masters move where bfloat16 parameters cannot."""
    backend = make_backend(tiny_model, dtype="bfloat16", optimizer=OptimizerSettings(learning_rate=1e-6))
    exact = make_backend(tiny_model)
    batches = scored_batches(random_samples(LENGTHS, seed=1, routed=exact.routed), tokens=40)
    for (name, master), parameter in zip(backend._masters.by_name.items(), exact._model.parameters(), strict=True):
        assert torch.equal(master, parameter), name
    loss, expected = gradients(exact, batches, PlainObjective())
    other_loss, found = gradients(backend, batches, PlainObjective())
    assert other_loss == pytest.approx(loss, rel=0.02)
    for name, gradient in expected.items():
        assert found[name].dtype == torch.float32
        assert torch.nn.functional.cosine_similarity(found[name].flatten(), gradient.flatten(), dim=0) > 0.98, name
    masters = {name: master.detach().clone() for name, master in backend._masters.by_name.items()}
    update = backend.update(batches, PlainObjective())
    assert update.device_bytes is None
    for name, parameter in backend._model.named_parameters():
        master = backend._masters.by_name[name]
        assert not torch.equal(master, masters[name]) or not bool(expected[name].abs().max() > 0), name
        assert torch.equal(parameter, master.to(torch.bfloat16)), name


def test_bfloat16_goes_on_bit_for_bit_from_a_checkpoint(tiny_model: Path, tmp_path: Path) -> None:
    one, other = (make_backend(tiny_model, dtype="bfloat16") for _ in range(2))
    batches = scored_batches(random_samples(LENGTHS, seed=1, routed=one.routed), tokens=40)
    one.update(batches, PlainObjective())
    one.save(tmp_path)
    other.load(tmp_path)
    one.update(batches, PlainObjective())
    other.update(batches, PlainObjective())
    mine, theirs = one._masters.by_name, other._masters.by_name
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_the_learning_rate_follows_its_schedule_across_a_checkpoint(tiny_model: Path, tmp_path: Path) -> None:
    settings = OptimizerSettings(learning_rate=1.0e-3, schedule="linear", warmup_steps=2)
    one, other = make_backend(tiny_model, optimizer=settings), make_backend(tiny_model, optimizer=settings)
    batches = scored_batches(random_samples([9], seed=1, routed=one.routed))
    rates = [one.update(batches, PlainObjective()).learning_rate for _ in range(4)]
    one.save(tmp_path)
    other.load(tmp_path)
    rates += [other.update(batches, PlainObjective()).learning_rate for _ in range(2)]
    assert rates == pytest.approx([0.0, 5e-4, 1e-3, 8.75e-4, 7.5e-4, 6.25e-4])


@pytest.mark.parametrize("schedule", ["cosine", "constant", "polynomial", "inverse_sqrt", "cosine_with_restarts"])
def test_schedules_of_transformers_are_there_with_warm_up(tiny_model: Path, schedule: str) -> None:
    settings = OptimizerSettings(learning_rate=1e-3, schedule=schedule, warmup_steps=1)
    backend = make_backend(tiny_model, optimizer=settings)
    batches = scored_batches(random_samples([9], seed=1, routed=backend.routed))
    rates = [backend.update(batches, PlainObjective()).learning_rate for _ in range(2)]
    assert rates == pytest.approx([0.0, 1e-3])


@pytest.mark.parametrize("schedule", ["cosin", "reduce_lr_on_plateau", "warmup_stable_decay"])
def test_schedules_that_cannot_be_followed_are_configuration_errors(tiny_model: Path, schedule: str) -> None:
    with pytest.raises(ConfigurationError, match="schedule"):
        make_backend(tiny_model, optimizer=OptimizerSettings(schedule=schedule))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_implementations_agree_under_packing(tiny_model: Path, attention: str) -> None:
    backend, plain = make_backend(tiny_model, attention=attention), make_backend(tiny_model)
    assert backend.packs_samples
    batches = [scored.batch for scored in scored_batches(random_samples(LENGTHS, seed=4, routed=plain.routed))]
    mine, theirs = (one.measure(batches, replay=True).logprobs for one in (backend, plain))
    assert torch.allclose(mine, theirs, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"device": "cuda:0"}, "model.device"),
        ({"device": "abacus"}, "model.device"),
        ({"attention": "none_such"}, "model.path"),
        ({"attention": "flex_attention"}, "model.attention"),
        ({"experts": "none_such"}, "model.path"),
    ],
)
def test_settings_that_do_not_fit_are_one_clear_line(tiny_model: Path, settings: dict[str, str], named: str) -> None:
    if named in ("model.device", "model.attention") and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ConfigurationError, match=named):
        make_backend(tiny_model, **settings)


def test_recorded_routing_is_what_the_live_router_chose(tiny_model: Path) -> None:
    """r2: the same policy under its own recorded rows has the same log-probs, bit for bit."""
    backend = make_backend(tiny_model, replay=ReplayMode.R2)
    batches = [scored.batch for scored in scored_batches(random_samples(LENGTHS, seed=1, routed=None), tokens=40)]
    recorded, measured = backend.record(batches)
    replayed = backend.measure(recorded, replay=True)
    assert torch.equal(measured.logprobs, replayed.logprobs)
    assert replayed.routing.verified == replayed.routing.total > 0


def test_a_live_router_is_compared_with_what_was_recorded(tiny_model: Path) -> None:
    """I10: the flip rate is 0 against its own choices, and most rows against random ones."""
    backend = make_backend(tiny_model)
    foreign = [scored.batch for scored in scored_batches(random_samples(LENGTHS, seed=1, routed=backend.routed))]
    recorded, _ = backend.record(foreign)
    rows = sum(LENGTHS) * 4
    own = backend.measure(recorded, replay=False).routing
    assert (own.total, own.replayed, own.fallback, own.compared, own.flipped) == (rows, 0, rows, rows, 0)
    other = backend.measure(foreign, replay=False).routing
    assert other.compared == rows
    assert other.flipped > rows / 2


def test_a_checkpoint_of_other_adapters_is_a_configuration_error(tiny_model: Path, tmp_path: Path) -> None:
    make_backend(tiny_model).save(tmp_path)
    adapted = HFBackend(
        ModelSettings(tiny_model), OptimizerSettings(), replay=ReplayMode.OFF, seed=0, lora=LoraSettings(rank=2)
    )
    with pytest.raises(ConfigurationError, match="lora"):
        adapted.load(tmp_path)
