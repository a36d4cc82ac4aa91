"""samples.jsonl: a few rollouts of each step as text, token by token, with what the trainer makes of each token.

Of every step the samples with the highest reward, the lowest one and the largest log-prob gap; long ones lose their
middle, and of many steps every second, fourth, … stays, so that the file is bounded however long a run is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from enum import StrEnum
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gateway.contracts.errors import SchemaMismatch
from gateway.contracts.versions import NOT_SAMPLED
from trainer.data.packing import PackedBatch
from trainer.json_lines import JsonLines

Decode = Callable[[Sequence[int]], str]
"""Token ids as text, special tokens included."""

_MOST_TOKENS = 1024
_MOST_STEPS = 64
_LOOK_BACK = 4
_LONGEST_CHARACTER = 8
"""Tokens that one character may take; a longer run of what is no text is shown as it is."""


class PieceKind(StrEnum):
    """`context`: not sampled here; `sampled`: without loss; `trained`; `omitted`: what was left out of the middle."""

    CONTEXT = "context"
    SAMPLED = "sampled"
    TRAINED = "trained"
    OMITTED = "omitted"


@dataclass(frozen=True, slots=True)
class Piece:
    """One sampled token, or a run of context. policy_version: that sampled it, None for context. rollout_logprob: the
    engine's; train_logprob: the trainer's before the update, None where it carries no loss; both to six digits.

    In the file a piece is the list of its fields, in this order: there are many.
    """

    text: str
    kind: PieceKind
    num_tokens: int
    policy_version: int | None = None
    rollout_logprob: float | None = None
    train_logprob: float | None = None


@dataclass(frozen=True, slots=True)
class RolloutSample:
    """One segment as it was trained in `step`. `why`: it was chosen."""

    step: int
    why: str
    session_id: str
    segment_id: str
    reward: float | None
    advantage: float
    num_tokens: int
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True, eq=False)
class _Candidate:
    """Where a sample lies: positions [start, stop) of a batch, and the train log-probs of its trained tokens."""

    batch: PackedBatch
    index: int
    start: int
    stop: int
    train_logprobs: npt.NDArray[np.float32]

    @property
    def session_id(self) -> str:
        return self.batch.origins[self.index].session_id

    @property
    def gap(self) -> float:
        trained = self.batch.layout.trained[self.start : self.stop]
        rollout = self.batch.layout.rollout_logprobs[self.start : self.stop][trained]
        return float(np.abs(self.train_logprobs - rollout).max(initial=0.0))


class SampleLog:
    """The file of one run."""

    def __init__(self, file: Path, decode: Decode) -> None:
        self._lines = JsonLines(file)
        self._decode = decode
        self._steps = {int(line["step"]) for line in self._lines.read()}

    def resume(self, *, step: int) -> None:
        """Drop what is of later steps than the checkpoint that the run goes on from."""
        kept = list(takewhile(lambda line: line["step"] <= step, self._lines.read()))
        self._lines.replace(kept)
        self._steps = {int(line["step"]) for line in kept}

    def write(
        self,
        step: int,
        batches: Sequence[PackedBatch],
        logprobs_S: npt.NDArray[np.float32],
        *,
        rewards: Mapping[str, float],
    ) -> None:
        """Add a step's samples, each step once. logprobs_S: of the trained tokens of all `batches` before the step's
        first update; rewards: by session."""
        if step in self._steps:
            return
        candidates = list(_candidates(batches, logprobs_S))
        samples = [self._sample(step, why, each, rewards) for why, each in _chosen(candidates, rewards).items()]
        self._lines.append(*map(_line, samples))
        self._steps.add(step)
        if len(self._steps) > _MOST_STEPS:
            self._thin(newest=step)

    def _sample(self, step: int, why: str, chosen: _Candidate, rewards: Mapping[str, float]) -> RolloutSample:
        batch, origin = chosen.batch, chosen.batch.origins[chosen.index]
        trained = batch.layout.trained[chosen.start : chosen.stop]
        advantages = batch.advantages[chosen.start : chosen.stop][trained]
        return RolloutSample(
            step=step,
            why=why,
            session_id=origin.session_id,
            segment_id=origin.segment_id,
            reward=rewards.get(origin.session_id),
            advantage=float(advantages.mean()) if len(advantages) else 0.0,
            num_tokens=chosen.stop - chosen.start + 1,
            pieces=tuple(_pieces(chosen, self._decode)),
        )

    def _thin(self, *, newest: int) -> None:
        """Half as many steps, evenly."""
        stride = 1
        while sum(step % stride == 0 for step in self._steps) > _MOST_STEPS // 2:
            stride *= 2
        self._steps = {step for step in self._steps if step % stride == 0} | {newest}
        self._lines.replace(line for line in self._lines.read() if line["step"] in self._steps)


def read_samples(file: Path) -> list[RolloutSample]:
    """All samples of a run, oldest first; none without a file. Raises SchemaMismatch for another version's."""
    try:
        return [
            RolloutSample(**(line | {"pieces": tuple(_piece(*values) for values in line["pieces"])}))
            for line in JsonLines(file).read()
        ]
    except (TypeError, KeyError, ValueError) as error:
        raise SchemaMismatch(f"{file} was written by another version of this program: {error}") from error


def tokenizer_decode(model: Path) -> Decode:
    """By the tokenizer of a Hugging Face folder."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)

    def decode(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    return decode


def _piece(text: str, kind: str, *rest: Any) -> Piece:
    return Piece(text, PieceKind(kind), *rest)


def _line(sample: RolloutSample) -> dict[str, Any]:
    return asdict(sample) | {"pieces": [astuple(piece) for piece in sample.pieces]}


def _candidates(batches: Sequence[PackedBatch], logprobs: npt.NDArray[np.float32]) -> Iterator[_Candidate]:
    used = 0
    for batch in batches:
        bounds = (*batch.sample_starts, batch.layout.num_positions)
        for index, (start, stop) in enumerate(pairwise(bounds)):
            num_trained = int(batch.layout.trained[start:stop].sum())
            if num_trained:  # alignment padding has none
                yield _Candidate(batch, index, start, stop, logprobs[used : used + num_trained])
            used += num_trained


def _chosen(candidates: Sequence[_Candidate], rewards: Mapping[str, float]) -> dict[str, _Candidate]:
    """By why; each sample once, ties by session so that a repeated step chooses the same."""
    ordered = sorted(candidates, key=lambda each: each.batch.origins[each.index])
    chosen: dict[str, _Candidate] = {}
    for why, measure in (
        ("highest reward", lambda each: rewards.get(each.session_id, -np.inf)),
        ("lowest reward", lambda each: -rewards.get(each.session_id, np.inf)),
        ("largest gap", lambda each: each.gap),
    ):
        left = [each for each in ordered if each not in chosen.values()]
        if left:
            chosen[why] = max(left, key=measure)
    return chosen


def _pieces(chosen: _Candidate, decode: Decode) -> Iterator[Piece]:
    """The segment's tokens: its first input, then the label of every position; the middle of a long one left out."""
    layout, start, stop = chosen.batch.layout, chosen.start, chosen.stop
    ids = [int(layout.input_ids[start]), *layout.labels[start:stop].tolist()]
    trained = [False, *layout.trained[start:stop].tolist()]
    versions = [NOT_SAMPLED, *layout.policy_version[start:stop].tolist()]
    rollout = [None, *map(_six_digits, layout.rollout_logprobs[start:stop].tolist())]
    train_logprobs = iter(map(_six_digits, chosen.train_logprobs.tolist()))
    train = [next(train_logprobs) if each else None for each in trained]
    half = _MOST_TOKENS // 2
    parts = [range(len(ids))] if len(ids) <= _MOST_TOKENS else [range(half), range(len(ids) - half, len(ids))]
    for number, part in enumerate(parts):
        if number:
            yield Piece("", PieceKind.OMITTED, len(ids) - 2 * half)
        run: list[str] = []
        for i, text in zip(part, _texts([ids[i] for i in part], decode), strict=True):
            if versions[i] == NOT_SAMPLED:
                run.append(text)
                continue
            if run:
                yield Piece("".join(run), PieceKind.CONTEXT, len(run))
                run = []
            kind = PieceKind.TRAINED if trained[i] else PieceKind.SAMPLED
            yield Piece(text, kind, 1, versions[i], rollout[i], train[i])
        if run:
            yield Piece("".join(run), PieceKind.CONTEXT, len(run))


def _six_digits(value: float) -> float:
    return float(f"{value:.6g}")


def _texts(ids: Sequence[int], decode: Decode) -> list[str]:
    """The text of each token; what is part of a character has none, its last token has all of it.

    Each is decoded behind the few before it, as tokenizers treat the first token of a text otherwise.
    """
    texts: list[str] = []
    begin = 0
    for i in range(len(ids)):
        context = ids[max(begin - _LOOK_BACK, 0) : begin]
        text = decode([*context, *ids[begin : i + 1]])[len(decode(context)) :]
        if text.endswith("\N{REPLACEMENT CHARACTER}") and i + 1 - begin < _LONGEST_CHARACTER and i + 1 < len(ids):
            texts.append("")
            continue
        texts.append(text)
        begin = i + 1
    return texts
