"""Figures of an evaluation: what counts, what does not, and the interval."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gateway.contracts.errors import ConfigurationError
from trainer.eval_main import Plan, Served, configure, evaluation_name, served_policy
from trainer.evaluation import (
    EvalRecord,
    bootstrap_interval,
    eval_figures,
    evaluation_of,
    evaluation_rollouts,
    messages_of_turns,
)
from trainer.recipes.calculator import CalculatorRecipe
from trainer.rollouts.controller import verdict_of
from trainer.rollouts.settings import RolloutSettings
from trainer.settings import EvaluationSettings, ModelSettings, RunSettings, TrainSettings

RIGHT = EvalRecord(
    session_id="s",
    task_index=0,
    task_id="test/0",
    attempt=0,
    outcome="completed",
    reward=1.0,
    verdict="correct",
    error=None,
    facts={"answer": "1"},
    reply="\\boxed{1}",
    messages=(),
    num_turns=1,
    num_tokens=10,
    seconds=2.0,
    policy_versions=(4,),
)
WRONG = replace(RIGHT, reward=0.0, verdict="wrong_answer", num_tokens=30, seconds=4.0)
CUT = replace(RIGHT, reward=0.0, verdict="truncated", outcome="truncated", num_tokens=50, seconds=6.0)
FAILED = replace(RIGHT, reward=None, verdict=None, outcome="failed", error="sandbox_lost", seconds=None, num_tokens=7)


def records(*kinds: EvalRecord, samples: int = 1) -> list[EvalRecord]:
    return [replace(kind, task_index=i // samples, attempt=i % samples) for i, kind in enumerate(kinds)]


def test_attempts_without_a_score_are_neither_right_nor_wrong_and_are_counted_by_their_error() -> None:
    figures = eval_figures(records(RIGHT, WRONG, CUT, FAILED, replace(FAILED, error="abandoned")), samples=1)
    assert (figures.num_tasks, figures.num_rollouts, figures.num_failed) == (5, 5, 2)
    assert figures.pass_at_1 is not None
    assert figures.pass_at_1.mean == pytest.approx(1 / 3)
    assert figures.verdicts == {"correct": 1, "wrong_answer": 1, "truncated": 1}
    assert figures.errors == {"sandbox_lost": 1, "abandoned": 1}
    assert figures.truncated_share == pytest.approx(1 / 3)
    assert figures.tokens_sampled == 10 + 30 + 50 + 7 + 7
    assert figures.tokens is not None
    assert (figures.tokens.mean, figures.tokens.p50, figures.tokens.p95) == (30, 30, pytest.approx(48))
    assert figures.seconds is not None
    assert (figures.seconds.p50, figures.seconds.p95) == (4, pytest.approx(5.8))


def test_of_several_attempts_each_task_counts_once_in_pass_at_1() -> None:
    figures = eval_figures(records(RIGHT, WRONG, RIGHT, FAILED, WRONG, CUT, samples=2), samples=2)
    assert figures.pass_at_1 is not None
    assert figures.pass_at_1.mean == pytest.approx((0.5 + 1.0 + 0.0) / 3)
    assert figures.pass_any == pytest.approx(2 / 3)
    assert figures.num_tasks == 3


def test_a_question_that_is_asked_twice_is_two_tasks() -> None:
    assert eval_figures(records(RIGHT, WRONG), samples=1).num_tasks == 2


def test_nothing_scored_measures_nothing() -> None:
    figures = eval_figures(records(FAILED), samples=1)
    assert (figures.reward, figures.pass_at_1, figures.pass_any, figures.truncated_share) == (None, None, None, None)
    assert (figures.tokens, figures.seconds, figures.verdicts) == (None, None, {})
    assert evaluation_of(figures, 3).reward_mean is None


def test_the_interval_is_that_of_the_binomial_and_repeats_itself() -> None:
    """83 % of 1,319: plus or minus 2 points, as the normal approximation has it."""
    values = [1.0] * 1095 + [0.0] * 224
    low, high = bootstrap_interval(values)
    mean = sum(values) / len(values)
    half = 1.96 * float(np.sqrt(mean * (1 - mean) / len(values)))
    assert (low, high) == (pytest.approx(mean - half, abs=2e-3), pytest.approx(mean + half, abs=2e-3))
    assert bootstrap_interval(values) == (low, high)
    assert bootstrap_interval([1.0] * 5) == (1.0, 1.0)


def test_the_metrics_of_a_run_keep_the_same_figures() -> None:
    kept = evaluation_of(eval_figures(records(RIGHT, WRONG, CUT, FAILED), samples=1), 7)
    assert (kept.policy_version, kept.num_tasks, kept.num_failed, kept.tokens_sampled) == (7, 4, 1, 97)
    assert kept.reward_mean == pytest.approx(1 / 3)
    assert kept.pass_at_1 == kept.reward_mean
    assert kept.ci_low is not None
    assert kept.ci_high is not None
    assert kept.ci_low <= kept.pass_at_1 <= kept.ci_high
    assert kept.truncated_share == pytest.approx(1 / 3)
    assert kept.verdicts == {"correct": 1, "wrong_answer": 1, "truncated": 1}


def test_what_was_cut_counts_as_truncated_unless_it_is_correct() -> None:
    assert verdict_of("no_answer", "truncated") == "truncated"
    assert verdict_of("correct", "truncated") == "correct"
    assert verdict_of("no_answer", "completed") == "no_answer"


def turn(turn_id: str, parent: str | None, *added: str, reply: str, continues: bool = False) -> dict[str, Any]:
    attachment = {"parent_id": parent, "continues": continues}
    return {"turn_id": turn_id, "attachment": attachment, "added_messages": [*added], "reply": reply}


def test_messages_are_those_of_the_last_turns_path() -> None:
    turns = [
        turn("a", None, "system", "user", reply="call"),
        turn("lost", "a", "tool", reply="never delivered"),
        turn("b", "a", "tool", reply="half an ans"),
        turn("c", "b", reply="half an answer", continues=True),
    ]
    assert messages_of_turns(turns) == ["system", "user", "call", "tool", "half an answer"]
    assert messages_of_turns(turns[:2]) == ["system", "user", "call", "tool", "never delivered"]
    assert messages_of_turns([]) == []


def test_an_evaluation_samples_by_its_own_settings_and_else_as_training_does() -> None:
    rollouts = RolloutSettings(recipe="calculator", max_new_tokens=40, temperature=1.0, top_p=0.9, max_turns=3)
    greedy = evaluation_rollouts(rollouts, EvaluationSettings())
    assert (greedy.temperature, greedy.top_p, greedy.max_new_tokens, greedy.max_turns) == (0.0, 1.0, 40, 3)
    assert evaluation_rollouts(rollouts, EvaluationSettings(max_new_tokens=9)).max_new_tokens == 9


SERVED = Served(model="m", policy_version=3, weight_version="w3", engines=({"model_path": "m"},))


def plan(*, temperature: float = 0.0, num_tasks: int = 4, samples: int = 1, name: str | None = None) -> Plan:
    recipe = CalculatorRecipe()
    settings = TrainSettings(
        run=RunSettings(dir=Path("runs"), name="run", steps=1),
        model=ModelSettings(path=Path("model")),
        rollouts=RolloutSettings(recipe="calculator"),
        evaluation=EvaluationSettings(num_tasks=num_tasks, samples=samples, temperature=temperature),
    )
    sampled = evaluation_rollouts(settings.rollouts, settings.evaluation)
    return Plan(settings, recipe, recipe.eval_tasks(num_tasks), sampled, name, None)


def test_evaluations_that_differ_in_anything_that_matters_have_different_sessions() -> None:
    names = [
        evaluation_name(plan(), SERVED),
        evaluation_name(plan(temperature=1.0), SERVED),
        evaluation_name(plan(num_tasks=5), SERVED),
        evaluation_name(plan(samples=2), SERVED),
        evaluation_name(plan(name="again"), SERVED),
        evaluation_name(plan(), replace(SERVED, policy_version=4)),
        evaluation_name(plan(), replace(SERVED, weight_version="other")),
        evaluation_name(plan(), replace(SERVED, engines=({"model_path": "elsewhere"},))),
    ]
    assert len(set(names)) == len(names)
    assert evaluation_name(plan(), SERVED) == names[0]
    assert names[0].startswith("run-")
    assert names[4].startswith("again-")


def engine(**facts: Any) -> dict[str, Any]:
    usual = {"engine_id": "e", "kind": "sglang", "model_path": "m", "served_model_name": "m", "weight_version": "w3"}
    return usual | {"policy_version": 3, "healthy": True, "draining": False, "one_version": True} | facts


def test_one_policy_must_answer() -> None:
    served = served_policy({"model": "m", "engines": [engine(), engine(), engine(healthy=False, policy_version=2)]})
    assert (served.policy_version, served.weight_version, len(served.engines)) == (3, "w3", 2)
    with pytest.raises(ConfigurationError, match="no engine of that gateway can answer"):
        served_policy({"model": "m", "engines": [engine(healthy=False), engine(draining=True)]})
    with pytest.raises(ConfigurationError, match="several policies"):
        served_policy({"model": "m", "engines": [engine(), engine(policy_version=4)]})
    with pytest.raises(ConfigurationError, match="several policies"):
        served_policy({"model": "m", "engines": [engine(one_version=False)]})


def test_the_help_names_every_flag() -> None:
    parser = argparse.ArgumentParser()
    configure(parser)
    for flag in ("--num-tasks", "--greedy", "--samples", "--output", "--rescore", "--name", "--set"):
        assert flag in parser.format_help()
