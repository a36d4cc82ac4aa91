"""Several ranks against one process: same log-probs, loss, gradients and weights. gloo on CPU, no Ray."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor, nn

from gateway.contracts.errors import ConfigurationError, NonFiniteLoss
from gateway.contracts.experts import RoutingShape
from tests.rank_processes import made_batches, one_process, run_ranks, scored_batches
from trainer.algorithms.objective import LiveTokens, Objective, TokenTerms, TrainedTokens
from trainer.algorithms.policy_objective import PolicyObjective
from trainer.algorithms.settings import LossSettings
from trainer.backends.expert_parallel import expert_modules
from trainer.backends.lockstep import deal
from trainer.backends.protocol import Measured, Policy, Update
from trainer.backends.ranks import Deal, PolicySettings, RankBackend, RankScores, RankUpdate, padding_batch
from trainer.backends.settings import LoraSettings, ModelSettings, OptimizerSettings, ParallelSettings
from trainer.data.packing import PackedBatch, ScoredBatch
from trainer.replay.validate import RoutedLayers
from trainer.settings import ReplayMode

PPO: Objective = PolicyObjective(LossSettings())
BATCHES = made_batches(num_samples=9, tokens=30)
"""An odd number of micro-batches, of several lengths."""
WITH_REFERENCE: Objective = PolicyObjective(LossSettings(kl_coefficient=0.1))
ONE_BATCH = tuple(replace(scored, ref_logprobs=scored.old_logprobs) for scored in scored_batches(BATCHES[:1]))
"""Less than there are ranks, under a loss that padding has no reference for."""

LOGPROB_TOLERANCE = 5e-6
GRADIENT_TOLERANCE = 1e-6
"""The largest gradient is about 0.2."""
WEIGHT_TOLERANCE = 5e-5
"""After two steps of AdamW at a learning rate of 1e-3: it divides by gradients of any size, their rounding too."""


class Broken:
    """An objective whose loss is no number."""

    needs_reference = False
    needs_entropy_gradient = False

    def __call__(self, live: LiveTokens, tokens: TrainedTokens) -> TokenTerms:
        return TokenTerms(live.logprobs * float("nan"))


@dataclass(frozen=True)
class RankResult:
    """What one rank saw; whole gradients and weights on rank 0 only."""

    scores: RankScores
    gradients: Mapping[str, Tensor]
    updates: tuple[RankUpdate, ...]
    single: RankUpdate
    weights: Mapping[str, Tensor]
    reference: RankScores | None
    refused_non_finite: bool
    resumes_equal: bool


@dataclass(frozen=True)
class Expected:
    """The same in one process."""

    measured: Measured
    without_replay: Measured
    gradients: Mapping[str, Tensor]
    updates: tuple[Update, ...]
    single: Update
    weights: Mapping[str, Tensor]


CASES: Mapping[str, dict[str, Any]] = {
    "2 ranks": {"parallel": ParallelSettings(2, 1)},
    "2 ranks, experts spread, live routers": {"parallel": ParallelSettings(2, 2), "replay": ReplayMode.OFF},
    "2 ranks, experts spread, adapters": {
        "parallel": ParallelSettings(2, 2),
        "lora": LoraSettings(rank=4),
        "needs_reference": True,
    },
    "4 ranks, experts spread, layers computed again": {"parallel": ParallelSettings(4, 2)},
}


def settings_of(case: str, model: Path) -> PolicySettings:
    default = PolicySettings(
        model=ModelSettings(model, device="cpu", checkpoint_activations="computed again" in case),
        optimizer=OptimizerSettings(learning_rate=1e-3, grad_clip=0.5),
        parallel=ParallelSettings(),
        replay=ReplayMode.R3,
        seed=0,
        lora=LoraSettings(),
        num_updates=4,
        needs_reference=False,
    )
    return replace(default, **CASES[case])


def run_case(rank: int, settings: PolicySettings, folder: Path) -> None:
    """In each rank's process: two steps, a step of one micro-batch, a checkpoint on the way."""
    backend = RankBackend(settings)
    dealt = Deal(BATCHES, settings.parallel.processes)
    mine, scored = dealt.of(BATCHES)[rank], dealt.of(scored_batches(BATCHES))[rank]
    rounds = dealt.num_rounds
    before = backend.measure(mine, rounds, replay=True, policy=Policy.ACTOR)
    gradients = gradients_of(backend, scored, rounds)
    refused = False
    try:
        backend.update(scored, rounds, Broken())
    except NonFiniteLoss:
        again = backend.measure(mine, rounds, replay=True, policy=Policy.ACTOR)
        refused = bool((again.logprobs == before.logprobs).all())

    first = backend.update(scored, rounds, PPO)
    if rank == 0:
        (folder / "checkpoint").mkdir()
    torch.distributed.barrier()
    backend.save(folder / "checkpoint")
    second = backend.update(scored, rounds, PPO)
    weights = whole_weights(backend)
    reference = None
    if settings.needs_reference:
        reference = backend.measure(mine, rounds, replay=False, policy=Policy.REFERENCE)
    alone = Deal(BATCHES[:1], settings.parallel.processes)
    single = backend.update(alone.of(ONE_BATCH)[rank], alone.num_rounds, WITH_REFERENCE)

    other = RankBackend(replace(settings, seed=99))
    other.load(folder / "checkpoint")
    resumed = other.update(scored, rounds, PPO)
    equal = (resumed.loss, resumed.grad_norm) == (second.loss, second.grad_norm)
    resumed_weights = whole_weights(other)
    equal &= all(torch.equal(weights[name], resumed_weights[name]) for name in weights)
    result = RankResult(before, gradients, (first, second), single, weights, reference, refused, equal)
    torch.save(result, folder / f"rank-{rank}.pt")


def run_loads(rank: int, settings: PolicySettings, saved: Path, folder: Path) -> None:
    """In each rank's process: what another number of ranks saved."""
    backend = RankBackend(settings)
    backend.load(saved)
    dealt = Deal(BATCHES, settings.parallel.processes)
    update = backend.update(dealt.of(scored_batches(BATCHES))[rank], dealt.num_rounds, PPO)
    torch.save((update.loss, update.grad_norm, whole_weights(backend)), folder / f"loaded-{rank}.pt")


def gradients_of(backend: RankBackend, scored: tuple[ScoredBatch, ...], rounds: int) -> dict[str, Tensor]:
    padding = [ScoredBatch(batch) for batch in backend._fill(scored, rounds)]
    backend._backend.accumulate([*scored, *padding], PPO)
    masters = backend._backend._masters.by_name
    return {name: backend._sharding.whole(grad_of(parameter)) for name, parameter in masters.items()}


def grad_of(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def whole_weights(backend: RankBackend) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in backend._backend.policy_state().items()}


def expected_of(settings: PolicySettings) -> Expected:
    backend = one_process(settings)
    measured, without_replay = (backend.measure(BATCHES, replay=replay) for replay in (True, False))
    backend.accumulate(scored_batches(BATCHES), PPO)
    gradients = {name: grad_of(parameter).clone() for name, parameter in backend._masters.by_name.items()}
    updates = tuple(backend.update(scored_batches(BATCHES), PPO) for _ in range(2))
    weights = {name: tensor.clone() for name, tensor in backend.policy_state().items()}
    single = backend.update(ONE_BATCH, WITH_REFERENCE)
    return Expected(measured, without_replay, gradients, updates, single, weights)


@dataclass(frozen=True)
class Outcome:
    """A case in ranks and in one process."""

    ranks: tuple[RankResult, ...]
    dealt: Deal
    expected: Expected
    folder: Path


class Outcomes:
    """Cases, each run when it is first asked for."""

    def __init__(self, model: Path, folder: Path) -> None:
        self._model = model
        self._folder = folder
        self._done: dict[str, Outcome] = {}

    def __getitem__(self, case: str) -> Outcome:
        if case not in self._done:
            settings = settings_of(case, self._model)
            folder = self._folder / str(len(self._done))
            folder.mkdir()
            num_ranks = settings.parallel.processes
            run_ranks(num_ranks, run_case, settings, folder)
            ranks = tuple(torch.load(folder / f"rank-{rank}.pt", weights_only=False) for rank in range(num_ranks))
            self._done[case] = Outcome(ranks, Deal(BATCHES, num_ranks), expected_of(settings), folder)
        return self._done[case]


@pytest.fixture(scope="module")
def outcomes(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    return Outcomes(tiny_model, tmp_path_factory.mktemp("ranks"))


each_case = pytest.mark.parametrize("case", list(CASES))


@each_case
def test_ranks_measure_what_one_process_measures(outcomes: Outcomes, case: str) -> None:
    """I10: recorded rows are verified on every rank, and padding is counted nowhere."""
    outcome = outcomes[case]
    measured = outcome.dealt.measured([result.scores for result in outcome.ranks])
    expected = outcome.expected.measured
    assert torch.allclose(measured.logprobs, expected.logprobs, atol=LOGPROB_TOLERANCE, rtol=0.0)
    assert torch.allclose(measured.entropy, expected.entropy, atol=LOGPROB_TOLERANCE, rtol=0.0)
    assert torch.equal(measured.rollout_logprobs, expected.rollout_logprobs)
    assert measured.routing == expected.routing


@each_case
def test_gradients_are_sums_over_ranks(outcomes: Outcomes, case: str) -> None:
    """Of experts, which fewer ranks share, and of all other weights."""
    outcome = outcomes[case]
    gradients, expected = outcome.ranks[0].gradients, outcome.expected.gradients
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.allclose(gradients[name], gradient, atol=GRADIENT_TOLERANCE, rtol=0.0), name


@each_case
def test_two_clipped_steps_end_at_the_weights_of_one_process(outcomes: Outcomes, case: str) -> None:
    outcome = outcomes[case]
    for step, expected in enumerate(outcome.expected.updates):
        update = outcome.dealt.update([result.updates[step] for result in outcome.ranks])
        assert update.loss == pytest.approx(expected.loss, abs=1e-6)
        assert update.grad_norm == pytest.approx(expected.grad_norm, rel=1e-5)
        assert update.learning_rate == expected.learning_rate
        assert dict(update.shares) == pytest.approx(dict(expected.shares))
        assert update.measured.routing == expected.measured.routing
        assert expected.grad_norm > 0.5, "the step must be one that is clipped"
    for name, weight in outcome.expected.weights.items():
        assert torch.allclose(outcome.ranks[0].weights[name], weight, atol=WEIGHT_TOLERANCE, rtol=0.0), name


@each_case
def test_ranks_without_a_microbatch_take_part_in_a_step(outcomes: Outcomes, case: str) -> None:
    outcome = outcomes[case]
    losses = {result.single.loss for result in outcome.ranks}
    assert len(losses) == 1
    assert losses.pop() == pytest.approx(outcome.expected.single.loss, abs=1e-5)
    assert sum(len(result.single.scores.logprobs) for result in outcome.ranks) == BATCHES[0].layout.num_trained


@each_case
def test_a_loss_that_is_not_finite_is_refused_by_all_ranks_before_any_weight_changes(
    outcomes: Outcomes, case: str
) -> None:
    assert all(result.refused_non_finite for result in outcomes[case].ranks)


@each_case
def test_ranks_go_on_from_their_checkpoint_bit_for_bit(outcomes: Outcomes, case: str) -> None:
    assert all(result.resumes_equal for result in outcomes[case].ranks)


def test_the_reference_of_adapters_is_the_sharded_model_without_them(outcomes: Outcomes) -> None:
    outcome = outcomes["2 ranks, experts spread, adapters"]
    scores = [result.reference for result in outcome.ranks if result.reference is not None]
    reference = outcome.dealt.measured(scores).logprobs
    untrained = outcome.expected.without_replay
    assert torch.allclose(reference, untrained.logprobs, atol=LOGPROB_TOLERANCE, rtol=0.0)


def test_a_checkpoint_of_four_ranks_is_taken_up_by_two(outcomes: Outcomes, tiny_model: Path, tmp_path: Path) -> None:
    outcome = outcomes["4 ranks, experts spread, layers computed again"]
    settings = settings_of("2 ranks", tiny_model)
    run_ranks(2, run_loads, settings, outcome.folder / "checkpoint", tmp_path)
    loss, grad_norm, weights = torch.load(tmp_path / "loaded-0.pt", weights_only=False)
    assert loss == pytest.approx(outcome.expected.updates[1].loss, abs=1e-6)
    assert grad_norm == pytest.approx(outcome.expected.updates[1].grad_norm, rel=1e-5)
    for name, weight in outcome.expected.weights.items():
        assert torch.allclose(weights[name], weight, atol=WEIGHT_TOLERANCE, rtol=0.0), name


def test_a_checkpoint_of_four_ranks_is_taken_up_by_one_process(outcomes: Outcomes, tiny_model: Path) -> None:
    """As `--replay-batch` does, which runs in one process whatever the run had."""
    outcome = outcomes["4 ranks, experts spread, layers computed again"]
    backend = one_process(settings_of("2 ranks", tiny_model))
    backend.load(outcome.folder / "checkpoint")
    update = backend.update(scored_batches(BATCHES), PPO)
    assert update.loss == pytest.approx(outcome.expected.updates[1].loss, abs=1e-6)
    assert update.learning_rate == outcome.expected.updates[1].learning_rate
    for name, weight in outcome.expected.weights.items():
        assert torch.allclose(backend.policy_state()[name], weight, atol=WEIGHT_TOLERANCE, rtol=0.0), name


@given(sizes=st.lists(st.integers(1, 1000), max_size=40), num_ranks=st.integers(1, 8))
def test_every_microbatch_is_dealt_once_and_all_ranks_run_as_many(sizes: list[int], num_ranks: int) -> None:
    dealt = deal(sizes, num_ranks)
    assert {len(members) for members in dealt} == {-(-len(sizes) // num_ranks)}
    assert sorted(index for members in dealt for index in members if index is not None) == list(range(len(sizes)))
    for members in dealt:
        assert None not in members[:-1], "padding stands in the last round only"


@given(sizes=st.lists(st.integers(1, 1000), min_size=1, max_size=40), num_ranks=st.integers(1, 8))
def test_a_rank_has_at_most_one_longest_microbatch_more_than_another(sizes: list[int], num_ranks: int) -> None:
    loads = [sum(sizes[index] for index in members if index is not None) for members in deal(sizes, num_ranks)]
    assert max(loads) - min(loads) <= max(sizes)


def test_padding_gives_each_expert_parallel_rank_the_same_load() -> None:
    shape = RoutingShape(4, 8, 2)
    for num_ranks in (1, 2, 4, 8):
        batch: PackedBatch = padding_batch(RoutedLayers(shape, (0, 1, 2, 3)), num_ranks)
        assert batch.layout.num_trained == 0
        assert batch.layout.routing is not None
        owners = batch.layout.routing.layer(0).ids // (8 // num_ranks)
        assert torch.bincount(torch.from_numpy(owners).flatten(), minlength=num_ranks).unique().numel() == 1


class Listed(nn.Module):
    """Experts as single modules."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(2, 2) for _ in range(4)])


def test_experts_that_cannot_be_spread_are_refused_in_one_line(tiny_model: Path) -> None:
    model = one_process(settings_of("2 ranks", tiny_model))._model
    with pytest.raises(ConfigurationError, match=r"expert_parallel 3 does not divide the 8 experts"):
        expert_modules(model, num_ranks=3)
    with pytest.raises(ConfigurationError, match=r"single modules, not stacked weights; set it to 1"):
        expert_modules(Listed(), num_ranks=2)
    with pytest.raises(ConfigurationError, match=r"no experts to spread"):
        expert_modules(nn.Linear(2, 2), num_ranks=2)
