"""Advantages and aggregation: closed forms, degenerate groups, order and numbering of groups."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.contracts.errors import TrainingError
from trainer.algorithms.advantages import ESTIMATORS, Estimator, has_zero_variance, make_estimator
from trainer.algorithms.aggregation import constant_weights, make_aggregation, sequence_weights, token_weights
from trainer.algorithms.settings import AdvantageSettings, LossSettings

ALL = pytest.mark.parametrize("estimate", ESTIMATORS.values(), ids=ESTIMATORS)


def _run(name: str, rewards: list[float], groups: list[int]) -> list[float]:
    estimate = make_estimator(AdvantageSettings(estimator=name))
    advantages = estimate(torch.tensor(rewards), torch.tensor(groups))
    assert advantages.dtype == torch.float32
    assert advantages.shape == (len(rewards),)
    return advantages.tolist()


REWARDS, GROUPS = [1.0, 10.0, 0.0, 30.0, 2.0], [4, 9, 4, 9, 4]
"""Two groups, interleaved: (1, 0, 2) and (10, 30)."""
DEVIATION = math.sqrt(2 / 3)
STEP_MEAN = 8.6
STEP_DEVIATION = math.sqrt(sum((r - STEP_MEAN) ** 2 for r in REWARDS) / 5)
CENTRED_DEVIATION = math.sqrt((0 + 1 + 1 + 100 + 100) / 5)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("grpo", [0.0, -1.0, -1 / DEVIATION, 1.0, 1 / DEVIATION]),
        ("dr_grpo", [0.0, -10.0, -1.0, 10.0, 1.0]),
        ("rloo", [0.0, -20.0, -1.5, 20.0, 1.5]),
        ("reinforce++", [(r - STEP_MEAN) / STEP_DEVIATION for r in REWARDS]),
        ("reinforce++-baseline", [a / CENTRED_DEVIATION for a in (0, -10, -1, 10, 1)]),
    ],
)
def test_estimator_gives_its_closed_form_over_interleaved_groups(name: str, expected: list[float]) -> None:
    assert _run(name, REWARDS, GROUPS) == pytest.approx(expected, abs=2e-6)


def test_leave_one_out_baseline_is_the_mean_of_the_other_rollouts() -> None:
    rewards = [0.3, 1.0, -2.0, 0.7]
    expected = [r - (sum(rewards) - r) / 3 for r in rewards]
    assert _run("rloo", rewards, [0] * 4) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo", "reinforce++-baseline"])
@pytest.mark.parametrize(("rewards", "groups"), [([3.0], [0]), ([0.1] * 3, [5] * 3), ([0.1, 1e6, 0.1], [1, 2, 1])])
def test_group_of_one_or_of_equal_rewards_has_exactly_zero_advantage(
    name: str, rewards: list[float], groups: list[int]
) -> None:
    assert _run(name, rewards, groups) == [0.0] * len(rewards)


@ALL
@pytest.mark.parametrize("reward", [0.1, 0.7, -1 / 3, 1e-8, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rewards_leave_no_rounding_behind(estimate: Estimator, reward: float, dtype: torch.dtype) -> None:
    for count in (1, 3, 7, 100):
        rewards = torch.full((count,), reward, dtype=dtype)
        assert not estimate(rewards, torch.zeros(count, dtype=torch.int64)).any()


def test_global_normalisation_of_equal_rewards_is_exactly_zero_and_else_needs_no_group() -> None:
    assert _run("reinforce++", [0.1, 0.1, 0.1], [0, 1, 2]) == [0.0, 0.0, 0.0]
    assert _run("reinforce++", [0.0, 2.0], [0, 1]) == pytest.approx([-1.0, 1.0], abs=1e-5)


@ALL
def test_no_rollouts_give_no_advantages(estimate: Estimator) -> None:
    assert estimate(torch.empty(0), torch.empty(0, dtype=torch.int64)).shape == (0,)


@ALL
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_reward_that_is_not_finite_is_refused_by_rollout_and_group(estimate: Estimator, bad: float) -> None:
    with pytest.raises(TrainingError, match=r"reward of rollout 1 \("):
        estimate(torch.tensor([1.0, bad, 0.0]), torch.tensor([0, 7, 7]))


@ALL
@settings(max_examples=40)
@given(data=st.data())
def test_advantages_follow_their_rollouts_whatever_order_and_numbering(
    estimate: Estimator, data: st.DataObject
) -> None:
    count = data.draw(st.integers(1, 12))
    rewards = torch.tensor(data.draw(st.lists(st.floats(-5, 5, width=32), min_size=count, max_size=count)))
    groups = torch.tensor(data.draw(st.lists(st.integers(0, 3), min_size=count, max_size=count)))
    order = torch.tensor(data.draw(st.permutations(range(count))))
    advantages = estimate(rewards, groups)
    moved = estimate(rewards[order], 100 - 7 * groups[order])
    torch.testing.assert_close(moved, advantages[order], rtol=1e-4, atol=1e-4)


def test_zero_variance_is_of_equal_rewards_only() -> None:
    assert has_zero_variance(torch.tensor([0.1, 0.1]))
    assert has_zero_variance(torch.tensor([0.1]))
    assert not has_zero_variance(torch.tensor([0.1, 0.1, 0.2]))


def test_aggregations_give_their_closed_forms() -> None:
    assert token_weights([1, 3, 0]) == (0.25, 0.25, 0.25)
    assert sequence_weights([1, 4, 0]) == (0.5, 0.125, 0.0)
    assert constant_weights([1, 4], constant_tokens=10) == (0.05, 0.05)
    assert token_weights([0, 0]) == sequence_weights([0, 0]) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (LossSettings(), (0.2, 0.2)),
        (LossSettings(policy="gspo"), (0.5, 0.125)),  # its own is the sequence
        (LossSettings(policy="gspo", aggregation="token"), (0.2, 0.2)),
        (LossSettings(aggregation="sequence"), (0.5, 0.125)),
        (LossSettings(aggregation="constant", constant_tokens=8), (0.0625, 0.0625)),
    ],
)
def test_settings_name_the_aggregation(loss: LossSettings, expected: tuple[float, ...]) -> None:
    assert make_aggregation(loss)([1, 4]) == pytest.approx(expected)
