"""How fast a training step is: `HFBackend` against plain transformers + AdamW on the same model and the same tokens.

The plain loops are what users write: a batch padded to its longest sample in one forward, and one sample after the
other without padding; both take the log-softmax of all logits, a clipped ratio, backward, clip, AdamW. All do the same
arithmetic on the same trained tokens. Times are of this process's CPU (its user time), the smallest of several steps,
taken in turn, as other programs share the machine.

    python -m benchmarks.train_speed [--model DIR] [--samples 16] [--longest 320] [--repeats 5]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import Tensor

from gateway.contracts.generation import TokenIds
from trainer.algorithms.objective import LiveTokens, TokenTerms, TrainedTokens
from trainer.backends.hf import HFBackend
from trainer.backends.settings import ModelSettings, OptimizerSettings
from trainer.data.assemble import TrainSample
from trainer.data.layout import TokenLayout
from trainer.data.packing import SampleWeights, ScoredBatch, pack
from trainer.settings import ReplayMode

_CLIP = (0.2, 0.28)
_LEARNING_RATE = 1e-6


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens (input positions without padding) a CPU second of one step, by way of training, and what replay adds."""

    tokens: int
    tokens_per_second: Mapping[str, float]

    @property
    def replay_cost(self) -> float:
        """Share of a step's time that replay adds."""
        rates = self.tokens_per_second
        return rates["verbatim, replay off"] / rates["verbatim"] - 1

    @property
    def ratio(self) -> float:
        """Of `verbatim` to the faster of the plain loops."""
        rates = self.tokens_per_second
        return rates["verbatim"] / max(rates["plain, padded"], rates["plain, one by one"])


def measure_speed(
    model: Path, lengths: Sequence[int], *, tokens_per_microbatch: int, repeats: int, seed: int = 0
) -> Speed:
    """Steps of all ways in turn, one to warm up and then `repeats`."""
    replayed = _backend(model, ReplayMode.R3)
    vocabulary = int(transformers.AutoConfig.from_pretrained(model).get_text_config().vocab_size)
    unrecorded = make_samples(lengths, seed=seed, vocabulary=vocabulary)
    samples = with_own_routing(unrecorded, replayed)
    ways: dict[str, Callable[[], object]] = {
        "verbatim": _our_step(replayed, samples, tokens_per_microbatch),
        "verbatim, replay off": _our_step(_backend(model, ReplayMode.OFF), unrecorded, tokens_per_microbatch),
        "plain, padded": PlainLoop(model, samples, padded=True).step,
        "plain, one by one": PlainLoop(model, samples, padded=False).step,
    }
    seconds = {name: float("inf") for name in ways}
    for turn in range(repeats + 1):
        for name, step in ways.items():
            started = time.process_time()
            step()
            if turn:
                seconds[name] = min(seconds[name], time.process_time() - started)
    return Speed(sum(lengths), {name: sum(lengths) / value for name, value in seconds.items()})


class PlainLoop:
    """transformers + AdamW as their documentation has it, with PPO's clipped loss."""

    def __init__(self, model: Path, samples: Sequence[TrainSample], *, padded: bool) -> None:
        self._model = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        self._model.train()
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=_LEARNING_RATE)
        groups = [samples] if padded else [[sample] for sample in samples]
        self._batches = [_padded(group) for group in groups]
        self._num_trained = sum(sample.layout.num_trained for sample in samples)

    def step(self) -> float:
        """One optimiser step over all samples; the loss."""
        total = 0.0
        for batch in self._batches:
            logits = self._model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            logprobs = torch.log_softmax(logits, -1).gather(-1, batch["labels"][..., None])[..., 0]
            ratio = torch.exp(logprobs - batch["old"])
            held = ratio.clamp(1 - _CLIP[0], 1 + _CLIP[1])
            terms = -torch.minimum(ratio * batch["advantages"], held * batch["advantages"])
            loss = (terms * batch["trained"]).sum() / self._num_trained
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return total


class ClippedRatio:
    """The plain loop's loss, as an objective."""

    needs_reference = False
    needs_entropy_gradient = False

    def __call__(self, live: LiveTokens, tokens: TrainedTokens) -> TokenTerms:
        """See `PlainLoop.step`."""
        ratio = torch.exp(live.logprobs - tokens.old_logprobs)
        held = ratio.clamp(1 - _CLIP[0], 1 + _CLIP[1])
        return TokenTerms(-torch.minimum(ratio * tokens.advantages, held * tokens.advantages))


def make_samples(lengths: Sequence[int], *, seed: int, vocabulary: int) -> tuple[TrainSample, ...]:
    """Random tokens, half of each sample trained, without routing rows."""
    random = np.random.default_rng(seed)
    tokens = [random.integers(vocabulary, size=length + 1, dtype=np.int32) for length in lengths]
    return tuple(TrainSample(f"s{i}", f"s{i}", _layout(ids)) for i, ids in enumerate(tokens))


def with_own_routing(samples: Sequence[TrainSample], backend: HFBackend) -> tuple[TrainSample, ...]:
    """The samples with the rows that the live routers choose: other rows would load experts otherwise, and compare
    steps of different work."""
    alone = [pack([sample], [SampleWeights(0.0, 0.0)], tokens_per_microbatch=1)[0] for sample in samples]
    recorded, _ = backend.record(alone)
    return tuple(
        replace(sample, layout=replace(sample.layout, routing=batch.layout.routing))
        for sample, batch in zip(samples, recorded, strict=True)
    )


def _layout(tokens: TokenIds) -> TokenLayout:
    length = len(tokens) - 1
    trained = np.arange(length) >= length // 2
    return TokenLayout(
        input_ids=tokens[:-1],
        labels=tokens[1:],
        position_ids=np.arange(length, dtype=np.int32),
        trained=trained,
        rollout_logprobs=np.where(trained, -6.0, np.nan).astype(np.float32),
        policy_version=np.where(trained, 0, -1).astype(np.int32),
        temperature=np.ones(length, dtype=np.float32),
        top_p=np.ones(length, dtype=np.float32),
        top_k=np.zeros(length, dtype=np.int32),
        routing=None,
    )


def _backend(model: Path, replay: ReplayMode) -> HFBackend:
    return HFBackend(
        ModelSettings(model, device="cpu"), OptimizerSettings(learning_rate=_LEARNING_RATE), replay=replay, seed=0
    )


def _our_step(backend: HFBackend, samples: Sequence[TrainSample], tokens: int) -> Callable[[], object]:
    num_trained = sum(sample.layout.num_trained for sample in samples)
    weights = [SampleWeights(_advantage(i), 1 / num_trained) for i in range(len(samples))]

    def step() -> object:
        batches = pack(samples, weights, tokens_per_microbatch=tokens)
        old = [batch.layout.rollout_logprobs[batch.layout.trained] for batch in batches]
        scored = [ScoredBatch(batch, logprobs) for batch, logprobs in zip(batches, old, strict=True)]
        return backend.update(scored, ClippedRatio())

    return step


def _padded(samples: Sequence[TrainSample]) -> dict[str, Tensor]:
    longest = max(sample.layout.num_positions for sample in samples)

    def column(values: Callable[[TokenLayout], np.ndarray]) -> Tensor:  # type: ignore[type-arg]
        rows = [values(sample.layout) for sample in samples]
        return torch.from_numpy(np.stack([np.pad(row, (0, longest - len(row))) for row in rows]))

    advantages = torch.tensor([_advantage(i) for i in range(len(samples))])
    return {
        "input_ids": column(lambda layout: layout.input_ids.astype(np.int64)),
        "labels": column(lambda layout: layout.labels.astype(np.int64)),
        "attention_mask": column(lambda layout: np.ones(layout.num_positions, dtype=np.int64)),
        "trained": column(lambda layout: layout.trained.astype(np.float32)),
        "old": column(lambda layout: np.nan_to_num(layout.rollout_logprobs)),
        "advantages": advantages[:, None],
    }


def _advantage(index: int) -> float:
    return 1.0 - 2.0 * (index % 2)


def _lengths(count: int, longest: int) -> list[int]:
    """From a quarter of the longest up to it, evenly."""
    return [int(length) for length in np.linspace(longest // 4, longest, count)]


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="a Hugging Face folder; without it a random one of 2 M parameters")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--longest", type=int, default=320)
    parser.add_argument("--tokens-per-microbatch", type=int, help="without it, the longest sample's")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        speed = measure_speed(
            arguments.model or _random_model(Path(folder)),
            _lengths(arguments.samples, arguments.longest),
            tokens_per_microbatch=arguments.tokens_per_microbatch or arguments.longest,
            repeats=arguments.repeats,
        )
    rates = {name: round(rate) for name, rate in speed.tokens_per_second.items()}
    figures = {"tokens": speed.tokens, "tokens_per_second": rates}
    shares = {"ratio_to_plain": round(speed.ratio, 3), "replay_cost": round(speed.replay_cost, 4)}
    sys.stdout.write(json.dumps(figures | shares, indent=1) + "\n")


def _random_model(folder: Path) -> Path:
    from trainer.recipes.checkpoint import TinyMoeShape, make_checkpoint

    make_checkpoint(folder / "model", corpus=["one two three"] * 3, seed=0, shape=TinyMoeShape())
    return folder / "model"


if __name__ == "__main__":
    main()
