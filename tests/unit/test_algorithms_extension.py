"""Functions of the user's, named as FILE.py:NAME: the README's example, and one clear line for each mistake."""

from __future__ import annotations

import math
import pickle
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gateway.contracts.errors import ConfigurationError, NonFiniteLoss
from trainer.algorithms.advantages import make_estimator
from trainer.algorithms.aggregation import make_aggregation
from trainer.algorithms.objective import LiveTokens, Share, TrainedTokens
from trainer.algorithms.policy_objective import PolicyObjective
from trainer.algorithms.settings import AdvantageSettings, LossSettings

README = Path(__file__).resolve().parents[2] / "trainer/algorithms/README.md"


def _write(folder: Path, text: str) -> Path:
    path = folder / "mine.py"
    path.write_text(text)
    return path


def _live() -> LiveTokens:
    logprobs = torch.tensor([math.log(0.9), math.log(0.3), math.log(0.2)], requires_grad=True)
    return LiveTokens(logprobs, torch.zeros(3))


def _tokens() -> TrainedTokens:
    rollout = torch.tensor([0.5, 0.2, 0.1]).log()
    return TrainedTokens(rollout, rollout, None, torch.tensor([1.0, 1.0, -2.0]), torch.tensor([0, 0, 1]), 2)


def test_readme_example_trains_as_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    _write(tmp_path, example)
    monkeypatch.chdir(tmp_path)
    objective = PolicyObjective(LossSettings(policy="mine.py:dppo"))
    live = _live()
    terms = objective(live, _tokens())
    # Token 0 rose by 0.4 and is good: masked. Token 1 by 0.1. Token 2 rose and is bad: trains.
    assert terms.loss.tolist() == pytest.approx([0.0, -1.5, 4.0])
    (gradient,) = torch.autograd.grad(terms.loss.sum(), live.logprobs)
    assert gradient.tolist() == pytest.approx([0.0, -1.5, 4.0])
    assert terms.shares[Share.MASKED].tolist() == [False] * 3
    again = pickle.loads(pickle.dumps(objective))
    assert torch.equal(again(_live(), _tokens()).loss, terms.loss)


def test_own_advantage_correction_and_aggregation_are_used_and_shares_of_ones_own_come_back(tmp_path: Path) -> None:
    path = _write(
        tmp_path,
        "from trainer.algorithms.objective import TokenTerms\n"
        "def best(rewards, groups): return (rewards == rewards.max()).double() + groups\n"
        "def even(tokens): return (tokens.sample_index == 0).float() * 0.5\n"
        "def mean(tokens_of_rollout): return [1 / n for n in tokens_of_rollout]\n"
        "def plain(live, tokens): return TokenTerms(-live.logprobs, {'seen': live.logprobs < -1.0})\n",
    )
    estimate = make_estimator(AdvantageSettings(estimator=f"{path}:best"))
    assert estimate(torch.tensor([0.0, 3.0]), torch.tensor([0, 1])).tolist() == [0.0, 2.0]
    loss = LossSettings(policy=f"{path}:plain", correction=f"{path}:even", aggregation=f"{path}:mean")
    assert make_aggregation(loss)([2, 4]) == (0.5, 0.25)
    live = _live()
    terms = PolicyObjective(loss)(live, _tokens())
    assert terms.loss.tolist() == pytest.approx([-0.5 * math.log(0.9), -0.5 * math.log(0.3), 0.0])
    assert terms.shares["seen"].tolist() == [0.0, 1.0, 0.0]
    assert terms.shares[Share.MASKED].tolist() == [False, False, True]


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ("def f(live): return 0", "f", r"must be callable as f\(live, tokens\): too many positional"),
        ("def g(live, tokens): return 0", "f", "has no 'f'; functions there: g"),
        ("f = 3", "f", "f is a int, not a function"),
        ("def f(:", "f", "does not run: SyntaxError"),
        ("import no_such_module_here", "f", "does not run: ModuleNotFoundError: No module named"),
    ],
)
def test_file_that_cannot_be_used_is_named_at_start(tmp_path: Path, text: str, name: str, message: str) -> None:
    path = _write(tmp_path, text)
    with pytest.raises(ConfigurationError, match=message) as refused:
        PolicyObjective(LossSettings(policy=f"{path}:{name}"))
    assert str(refused.value).startswith("loss.policy")
    assert "\n" not in str(refused.value)


def test_file_that_is_not_there_is_named_at_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"there is no file nowhere\.py"):
        PolicyObjective(LossSettings(correction="nowhere.py:f"))
    with pytest.raises(ConfigurationError, match=r"there is no file nowhere\.py"):
        make_estimator(AdvantageSettings(estimator="nowhere.py:f"))
    with pytest.raises(ConfigurationError, match=r"there is no file nowhere\.py"):
        make_aggregation(LossSettings(aggregation="nowhere.py:f"))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("(-live.logprobs).sum()", r"returned shape \[\]; \[3\] was expected"),
        ("(-live.logprobs)[:2]", r"returned shape \[2\]; \[3\] was expected"),
        ("1.0", r"returned a float; a floating tensor of shape \[3\] was expected"),
        ("tokens.sample_index", "returned a tensor of torch.int64"),
        ("-live.logprobs.detach()", "has no gradient"),
        ("TokenTerms(-live.logprobs, {'odd': live.logprobs[:1]})", r"share odd, returned shape \[1\]"),
    ],
)
def test_loss_of_a_wrong_shape_is_named_at_its_first_call(tmp_path: Path, body: str, message: str) -> None:
    text = f"from trainer.algorithms.objective import TokenTerms\ndef f(live, tokens): return {body}"
    objective = PolicyObjective(LossSettings(policy=f"{_write(tmp_path, text)}:f", correction="off"))
    with pytest.raises(ConfigurationError, match=message):
        objective(_live(), _tokens())


def test_loss_that_is_not_finite_is_the_functions_fault_only_where_its_inputs_are(tmp_path: Path) -> None:
    path = _write(tmp_path, "def f(live, tokens): return -live.logprobs / (tokens.advantages - 1.0)")
    objective = PolicyObjective(LossSettings(policy=f"{path}:f", correction="off"))
    with pytest.raises(NonFiniteLoss, match=r"mine.py:f returned inf at \[0\], from inputs that are finite"):
        objective(_live(), _tokens())
    live = LiveTokens(torch.tensor([math.nan, -1.0, -1.0], requires_grad=True), torch.zeros(3))
    assert torch.isnan(objective(live, _tokens()).loss[0]), "the backend stops at it and saves the batch"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("tokens.advantages", r"returned -2.0 at \[2\]; a factor is not negative"),
        ("tokens.advantages[:1]", r"returned shape \[1\]"),
    ],
)
def test_correction_that_gives_no_factors_is_named(tmp_path: Path, body: str, message: str) -> None:
    path = _write(tmp_path, f"def f(tokens): return {body}")
    with pytest.raises(ConfigurationError, match=message):
        PolicyObjective(LossSettings(correction=f"{path}:f"))(_live(), _tokens())


def test_own_factors_are_constants_even_where_they_are_computed_from_live_values(tmp_path: Path) -> None:
    path = _write(tmp_path, "def f(tokens): return (tokens.old_logprobs - tokens.rollout_logprobs).exp()")
    live = _live()
    tokens = replace(_tokens(), old_logprobs=live.logprobs)
    terms = PolicyObjective(LossSettings(policy="reinforce", correction=f"{path}:f"))(live, tokens)
    (gradient,) = torch.autograd.grad(terms.loss.sum(), live.logprobs)
    assert gradient.tolist() == pytest.approx([-0.9 / 0.5, -0.3 / 0.2, 2 * 0.2 / 0.1])
    assert not any(values.requires_grad for values in terms.shares.values())


def test_own_functions_are_never_called_without_a_token(tmp_path: Path) -> None:
    loss = "def f(live, tokens): return -live.logprobs / live.logprobs.max()"
    correction = "def g(tokens): return 0 * tokens.advantages * tokens.advantages.max()"
    path = _write(tmp_path, f"{loss}\n{correction}")
    objective = PolicyObjective(LossSettings(policy=f"{path}:f", correction=f"{path}:g"))
    live, tokens = _live(), _tokens()
    masked = objective(live, tokens)
    assert masked.loss.tolist() == [0.0, 0.0, 0.0]
    nothing = torch.empty(0, dtype=torch.int64)
    empty = objective(live.only(nothing), tokens.only(nothing))
    assert empty.loss.shape == (0,)
    empty.loss.sum().backward()


def test_estimator_and_aggregation_of_a_wrong_length_are_named(tmp_path: Path) -> None:
    path = _write(
        tmp_path, "def f(rewards, groups): return rewards[:1]\ndef g(tokens): return [1.0]\ndef h(t): return [-1]"
    )
    with pytest.raises(ConfigurationError, match=r"mine.py:f returned shape \[1\]; \[2\] was expected"):
        make_estimator(AdvantageSettings(estimator=f"{path}:f"))(torch.ones(2), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ConfigurationError, match=r"mine\.py:g returned 1 weights for 2 rollouts"):
        make_aggregation(LossSettings(aggregation=f"{path}:g"))([1, 2])
    with pytest.raises(ConfigurationError, match=r"mine.py:h returned -1.0 for rollout 0"):
        make_aggregation(LossSettings(aggregation=f"{path}:h"))([1])
