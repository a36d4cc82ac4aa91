"""One training step without a gateway: rollouts sampled from the model itself, assembled, packed, replayed, stepped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from gateway.contracts.errors import ConfigurationError, ExpertsMismatch, IntegrityError, NonFiniteLoss
from gateway.contracts.generation import LogprobKind
from gateway.contracts.records import FinishRecord, SessionOrigin, SessionRecord
from gateway.contracts.rollouts import FinishedRollout, PickReport
from gateway.contracts.samples import Segment, TurnSpan
from trainer.algorithms.advantages import make_estimator
from trainer.algorithms.aggregation import token_weights
from trainer.algorithms.kl import k3
from trainer.algorithms.objective import LiveTokens, Objective, TokenTerms, TrainedTokens
from trainer.algorithms.policy_objective import PolicyObjective
from trainer.algorithms.settings import AdvantageSettings, LossSettings
from trainer.backends.hf import HFBackend
from trainer.backends.settings import ModelSettings, OptimizerSettings
from trainer.data.assemble import assemble
from trainer.data.batch import StepBatch, step_batch
from trainer.data.packing import PackedBatch, ScoredBatch, pack
from trainer.data.settings import BatchSettings
from trainer.replay.inject import RoutingReplay
from trainer.settings import ReplayMode

NUM_LAYERS = 4
"""Of the tiny model; each of them routes."""

PPO: Objective = PolicyObjective(LossSettings())


def make_backend(model: Path, *, replay: ReplayMode = ReplayMode.R3, seed: int = 0) -> HFBackend:
    return HFBackend(ModelSettings(model), OptimizerSettings(learning_rate=1e-3), replay=replay, seed=seed)


def sampled_segment(model_path: Path, *, seed: int, num_tokens: int, temperature: float, perturb: float) -> Segment:
    """A two-turn conversation of random tokens with log-probs and routing of the model as it is, or with its routers
    perturbed (what another engine's numerics do)."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    token_ids = torch.randint(5, 300, (num_tokens,))
    replay = RoutingReplay.install(model)
    with torch.no_grad():
        for site in replay.plan.routers:
            weight = model.get_submodule(site.path).weight
            weight += perturb * torch.randn_like(weight)
        with replay.recording() as record:
            logits = model(input_ids=token_ids[None, :-1], use_cache=False).logits[0]
    logprobs = torch.log_softmax(logits / temperature, -1).gather(1, token_ids[1:, None])[:, 0].numpy()
    sampled = np.zeros(num_tokens, dtype=np.bool_)
    half = num_tokens // 2
    spans = ((0, 4, half), (half, half + 3, num_tokens))
    for _start, output_start, stop in spans:
        sampled[output_start:stop] = True
    turns = tuple(
        TurnSpan(f"t{i}", start, out, stop, True, "stop", temperature, 1.0, -1)
        for i, (start, out, stop) in enumerate(spans)
    )
    return Segment(
        segment_id=f"seg-{seed}",
        turns=turns,
        token_ids=token_ids.numpy().astype(np.int32),
        loss_mask=sampled,
        rollout_logprobs=np.where(sampled, np.concatenate([[0.0], logprobs]), np.nan).astype(np.float32),
        policy_version=np.where(sampled, 0, -1).astype(np.int32),
        routed_experts=record.rows().chunks[0],
        routed_valid=np.ones(num_tokens - 1, dtype=np.bool_),
        logprob_kind=LogprobKind.TEMPERATURE_SCALED,
    )


def rollout_of(
    *segments: Segment, session_id: str = "s", group: str = "g", reward: float | None = 1.0, outcome: str = "completed"
) -> FinishedRollout:
    session = SessionRecord(
        session_id, group, 2, None, {}, {}, {}, None, "", SessionOrigin.CREATED, True, created_at=0.0
    )
    finish = FinishRecord(session_id, "snap", reward, outcome, {}, 1.0)
    trained = sum(int(segment.loss_mask.sum()) for segment in segments)
    return FinishedRollout(session, finish, segments, 8, {}, PickReport("all", trained, trained, ()))


def batch_of(rollouts: Sequence[FinishedRollout], backend: HFBackend) -> StepBatch:
    return step_batch(
        rollouts,
        routed=backend.routed,
        policy_version=0,
        settings=BatchSettings(max_fallback_share=1.0),
        estimator=make_estimator(AdvantageSettings()),
        aggregate=token_weights,
        seed=0,
        step=0,
    )


class Broken:
    """An objective whose loss is no number."""

    needs_reference = False
    needs_entropy_gradient = False

    def __call__(self, live: LiveTokens, tokens: TrainedTokens) -> TokenTerms:
        return TokenTerms(live.logprobs * float("nan"))


def packed(batch: StepBatch, tokens: int) -> tuple[PackedBatch, ...]:
    (minibatch,) = batch.minibatches
    return pack(minibatch.samples, minibatch.weights, tokens_per_microbatch=tokens)


def scored(batches: Sequence[PackedBatch]) -> list[ScoredBatch]:
    """The batches without old or reference log-probs: the live forward is the old policy."""
    return [ScoredBatch(batch) for batch in batches]


@pytest.fixture(scope="module")
def rollouts(tiny_model: Path) -> tuple[FinishedRollout, ...]:
    """Two groups of two, of different lengths and temperatures, from an engine with slightly other routers."""
    return tuple(
        rollout_of(
            sampled_segment(tiny_model, seed=i, num_tokens=20 + 7 * i, temperature=1.0 - 0.1 * i, perturb=0.02),
            session_id=f"s{i}",
            group=f"g{i // 2}",
            reward=float(i % 2),
        )
        for i in range(4)
    )


def test_train_logprobs_equal_the_engines_where_weights_and_numerics_are_the_same(tiny_model: Path) -> None:
    """Alignment of tokens, labels, temperatures and routes, end to end (I2, I10)."""
    backend = make_backend(tiny_model)
    segments = [
        sampled_segment(tiny_model, seed=s, num_tokens=15 + s, temperature=t, perturb=0.0)
        for s, t in ((1, 1.0), (2, 0.7))
    ]
    batch = batch_of([rollout_of(segment) for segment in segments], backend)
    measured = backend.measure(packed(batch, 10_000), replay=True)
    assert torch.allclose(measured.logprobs, measured.rollout_logprobs, atol=1e-5)
    assert measured.routing.verified == measured.routing.total == (14 + 1 + 14 + 2) * NUM_LAYERS
    assert bool((measured.entropy > 0).all())


def test_replay_brings_the_trainer_closer_to_a_perturbed_engine(
    tiny_model: Path, rollouts: tuple[FinishedRollout, ...]
) -> None:
    backend = make_backend(tiny_model)
    batches = packed(batch_of(rollouts, backend), 10_000)

    def divergence(*, replay: bool) -> float:
        measured = backend.measure(batches, replay=replay)
        return float(k3((measured.logprobs - measured.rollout_logprobs).double()).mean())

    assert divergence(replay=True) * 3 < divergence(replay=False)


def test_routing_rows_off_by_one_raise_the_gap_more_than_tenfold(tiny_model: Path) -> None:
    """The test of the alignment test: a shifted row must be seen."""
    backend = make_backend(tiny_model)
    segment = sampled_segment(tiny_model, seed=3, num_tokens=60, temperature=1.0, perturb=0.0)
    assert segment.routed_experts is not None
    shifted = replace(segment, routed_experts=np.roll(segment.routed_experts, 1, axis=0))

    def gap(one: Segment) -> float:
        measured = backend.measure(packed(batch_of([rollout_of(one)], backend), 10_000), replay=True)
        return float((measured.logprobs - measured.rollout_logprobs).abs().max())

    assert gap(shifted) > 10 * max(gap(segment), 1e-5)


def test_packing_and_microbatches_change_logprobs_loss_and_gradient_by_rounding_only(
    tiny_model: Path, rollouts: tuple[FinishedRollout, ...]
) -> None:
    updates = []
    for tokens in (1, 60, 10_000):
        backend = make_backend(tiny_model)
        batches = packed(batch_of(rollouts, backend), tokens)
        updates.append(backend.update(scored(batches), PPO))
    assert [len(packed(batch_of(rollouts, make_backend(tiny_model)), t)) for t in (1, 60, 10_000)] == [4, 2, 1]
    for update in updates[1:]:
        assert update.loss == pytest.approx(updates[0].loss, abs=1e-6)
        assert update.grad_norm == pytest.approx(updates[0].grad_norm, rel=1e-4)
        mine, first = update.measured.logprobs.sort().values, updates[0].measured.logprobs.sort().values
        assert torch.allclose(mine, first, atol=1e-5)


def test_packed_samples_do_not_see_each_other(tiny_model: Path, rollouts: tuple[FinishedRollout, ...]) -> None:
    """Block-diagonal attention with position reset, within 1e-5 of separate forwards."""
    backend = make_backend(tiny_model)
    assert backend.packs_samples
    batch = batch_of(rollouts, backend)
    together = backend.measure(packed(batch, 10_000), replay=True).logprobs
    alone = backend.measure(packed(batch, 1), replay=True).logprobs
    assert torch.allclose(together, alone, atol=1e-5)


def test_every_sampled_token_is_trained_once(tiny_model: Path, rollouts: tuple[FinishedRollout, ...]) -> None:
    """I3, groups of equal rewards included: they stay in with advantage 0."""
    backend = make_backend(tiny_model)
    equal = [replace(r, finish=replace(r.finish, reward=1.0)) if i < 2 else r for i, r in enumerate(rollouts)]
    batch = batch_of(equal, backend)
    update = backend.update(scored(packed(batch, 50)), PPO)
    assert batch.zero_variance_groups == 1
    assert [weights.advantage for weights in batch.minibatches[0].weights[:2]] == [0.0, 0.0]
    assert update.measured.logprobs.numel() == batch.tokens_sampled == sum(r.num_sampled_tokens for r in equal)


def test_corrupt_rows_fall_back_to_the_live_router_and_are_counted(tiny_model: Path) -> None:
    """I9: zero-filled and duplicated ids are found though the recorder called them valid."""
    backend = make_backend(tiny_model)
    segment = sampled_segment(tiny_model, seed=5, num_tokens=30, temperature=1.0, perturb=0.0)
    assert segment.routed_experts is not None
    rows = segment.routed_experts.copy()
    rows[3] = 0
    rows[7, 2] = 5
    valid = segment.routed_valid.copy()
    valid[11] = False
    broken = replace(segment, routed_experts=rows, routed_valid=valid)
    measured = backend.measure(packed(batch_of([rollout_of(broken)], backend), 10_000), replay=True)
    assert measured.routing.fallback == 2 * NUM_LAYERS + 1  # row 3 and 11 in all layers, row 7 in one
    assert measured.routing.verified == measured.routing.replayed == 29 * NUM_LAYERS - measured.routing.fallback
    assert torch.allclose(measured.logprobs, measured.rollout_logprobs, atol=1e-5)


def test_rollouts_without_routing_share_a_batch_with_others(tiny_model: Path) -> None:
    backend = make_backend(tiny_model)
    with_rows = sampled_segment(tiny_model, seed=6, num_tokens=20, temperature=1.0, perturb=0.0)
    without = replace(with_rows, routed_experts=None, routed_valid=np.zeros(19, dtype=np.bool_))
    batch = batch_of([rollout_of(with_rows), rollout_of(without, session_id="s2")], backend)
    measured = backend.measure(packed(batch, 10_000), replay=True)
    assert (measured.routing.replayed, measured.routing.fallback) == (19 * NUM_LAYERS, 19 * NUM_LAYERS)


def test_rows_of_another_model_are_refused(tiny_model: Path) -> None:
    backend = make_backend(tiny_model)
    segment = sampled_segment(tiny_model, seed=7, num_tokens=12, temperature=1.0, perturb=0.0)
    assert segment.routed_experts is not None
    with pytest.raises(ExpertsMismatch, match="3 layers, 2"):
        assemble(rollout_of(replace(segment, routed_experts=segment.routed_experts[:, :3])), backend.routed)


def test_a_trained_token_that_nothing_predicts_is_an_error_not_a_loss(tiny_model: Path) -> None:
    """I3: nothing vanishes silently between gateway and loss."""
    segment = sampled_segment(tiny_model, seed=8, num_tokens=12, temperature=1.0, perturb=0.0)
    mask, logprobs, versions = segment.loss_mask.copy(), segment.rollout_logprobs.copy(), segment.policy_version.copy()
    mask[0], logprobs[0], versions[0] = True, -1.0, 0
    first = replace(segment, loss_mask=mask, rollout_logprobs=logprobs, policy_version=versions)
    with pytest.raises(IntegrityError, match="stands first"):
        assemble(rollout_of(first), None)


def test_same_seed_and_batch_give_the_same_weights_bit_for_bit(
    tiny_model: Path, rollouts: tuple[FinishedRollout, ...]
) -> None:
    exports = []
    for _ in range(2):
        backend = make_backend(tiny_model)
        batches = packed(batch_of(rollouts, backend), 50)
        backend.update(scored(batches), PPO)
        backend.update(scored(batches), PPO)
        exports.append({name: p.clone() for name, p in backend._model.state_dict().items()})
    assert all(torch.equal(exports[0][name], exports[1][name]) for name in exports[0])


def test_a_loaded_checkpoint_goes_on_bit_for_bit(
    tiny_model: Path, rollouts: tuple[FinishedRollout, ...], tmp_path: Path
) -> None:
    """Parameters, optimiser moments and random state all count."""
    one = make_backend(tiny_model)
    batches = packed(batch_of(rollouts, one), 50)
    one.update(scored(batches), PPO)
    one.save(tmp_path)
    second = one.update(scored(batches), PPO)
    other = make_backend(tiny_model, seed=99)
    other.load(tmp_path)
    resumed = other.update(scored(batches), PPO)
    assert (second.loss, second.grad_norm) == (resumed.loss, resumed.grad_norm)
    mine, theirs = one._model.state_dict(), other._model.state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_an_export_is_a_hugging_face_folder_with_the_stepped_weights(
    tiny_model: Path, rollouts: tuple[FinishedRollout, ...], tmp_path: Path
) -> None:
    backend = make_backend(tiny_model)
    batches = packed(batch_of(rollouts, backend), 10_000)
    backend.update(scored(batches), PPO)
    backend.export(tmp_path / "policy")
    expected = backend.measure(batches, replay=True).logprobs
    again = make_backend(tmp_path / "policy").measure(batches, replay=True).logprobs
    assert torch.equal(expected, again)
    for file in ("tokenizer.json", "chat_template.jinja", "generation_config.json", "config.json"):
        assert (tmp_path / "policy" / file).is_file(), file
    assert (tmp_path / "policy" / "tokenizer.json").read_bytes() == (tiny_model / "tokenizer.json").read_bytes()


def test_a_loss_that_is_not_finite_stops_before_any_weight_changes(
    tiny_model: Path, rollouts: tuple[FinishedRollout, ...]
) -> None:
    backend = make_backend(tiny_model)
    batches = packed(batch_of(rollouts, backend), 10_000)
    before = backend.measure(batches, replay=True).logprobs

    with pytest.raises(NonFiniteLoss):
        backend.update(scored(batches), Broken())
    assert torch.equal(before, backend.measure(batches, replay=True).logprobs)


def test_steps_raise_the_probability_of_rewarded_rollouts(
    tiny_model: Path, rollouts: tuple[FinishedRollout, ...]
) -> None:
    backend = make_backend(tiny_model)
    batches = packed(batch_of(rollouts, backend), 1)

    def good_minus_bad() -> float:
        logprobs, rewarded = backend.measure(batches, replay=True).logprobs, []
        for batch in batches:
            rewarded.append(torch.from_numpy(batch.advantages[batch.layout.trained] > 0))
        good = torch.cat(rewarded)
        return float(logprobs[good].mean() - logprobs[~good].mean())

    before = good_minus_bad()
    for _ in range(3):
        backend.update(scored(batches), PPO)
    assert good_minus_bad() > before + 0.1


def test_with_replay_off_recorded_rows_are_left_aside(tiny_model: Path, rollouts: tuple[FinishedRollout, ...]) -> None:
    backend = make_backend(tiny_model, replay=ReplayMode.OFF)
    measured = backend.measure(packed(batch_of(rollouts, backend), 10_000), replay=True)
    assert backend.routed is None
    assert (measured.routing.total, measured.routing.replayed) == (0, 0)


def test_a_model_path_without_a_model_is_a_configuration_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"config\.json"):
        make_backend(tmp_path / "nothing")
