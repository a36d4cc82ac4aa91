"""What prompts cost: a long conversation built turn by turn, against tokenising its final text once.

Measured in one process, the two interleaved, medians over rounds; a certified fast path and a template whose suffixes
depend on the conversation (probe) are measured each.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tokenizers import Tokenizer

from benchmarks.agents import TOOLS, Message
from benchmarks.models.families import FAMILIES, Family, write_model
from benchmarks.models.markup import Call
from benchmarks.models.words import QUESTIONS, SENTENCES
from gateway.contracts.generation import Finish, FinishReason, TokenIds
from gateway.tito.conversation import Conversation, ParentTurn
from gateway.tito.model_files import read_eos_entries
from gateway.tito.prompt import PromptBuilder
from gateway.tito.template import ChatTemplate
from gateway.tito.tokenizer import ChatTokenizer

MODELS = (("chatml_folds", "byte_level"), ("counts_calls", "byte_level"), ("chatml_folds", "metaspace_always"))
"""A fast path, a template that numbers calls over the whole conversation, and a fast path with prefix spaces."""

_NUM_TURNS = 100
_NUM_TOKENS = 100_000
_ROUNDS = 5

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds are medians over rounds, of all turns together.

    encode_seconds: inside the tokenizer. build_seconds: all of prompt building, renders included.
    full_encode_seconds: `tokenizers` alone, on the final text. certified_by: turns by path.
    """

    model: str
    num_turns: int
    num_tokens: int
    encode_seconds: float
    build_seconds: float
    full_encode_seconds: float
    certified_by: dict[str, int]

    @property
    def encode_ratio(self) -> float:
        """Tokenisation over all turns, in full tokenisations of the final text."""
        return self.encode_seconds / self.full_encode_seconds

    @property
    def build_ratio(self) -> float:
        """The whole of prompt building, likewise."""
        return self.build_seconds / self.full_encode_seconds

    def figures(self) -> dict[str, Any]:
        """For the results file."""
        return asdict(self) | {"encode_ratio": round(self.encode_ratio, 2), "build_ratio": round(self.build_ratio, 2)}


def measure_costs(*, num_turns: int = _NUM_TURNS, num_tokens: int = _NUM_TOKENS, rounds: int = _ROUNDS) -> list[Cost]:
    """Each of `MODELS`; some seconds of work."""
    return [_measure(FAMILIES[family], vocabulary, num_turns, num_tokens, rounds) for family, vocabulary in MODELS]


class _TimedTokenizer(ChatTokenizer):
    """Counts the time inside encoding; calls inside calls count once."""

    seconds = 0.0
    _depth = 0

    def encode(self, text: str) -> TokenIds:
        """Timed."""
        return self._timed(lambda: super(_TimedTokenizer, self).encode(text))

    def encode_plain(self, text: str) -> TokenIds:
        """Timed."""
        return self._timed(lambda: super(_TimedTokenizer, self).encode_plain(text))

    def encode_after(self, text: str, *, plain: bool = False) -> TokenIds:
        """Timed."""
        return self._timed(lambda: super(_TimedTokenizer, self).encode_after(text, plain=plain))

    def _timed(self, encode: Callable[[], T]) -> T:
        self._depth += 1
        began = time.perf_counter()
        try:
            return encode()
        finally:
            self._depth -= 1
            if not self._depth:
                self.seconds += time.perf_counter() - began


@dataclass(frozen=True, slots=True)
class _Round:
    encode_seconds: float
    build_seconds: float
    full_encode_seconds: float
    num_tokens: int
    certified_by: Counter[str]


def _measure(family: Family, vocabulary: str, num_turns: int, num_tokens: int, rounds: int) -> Cost:
    with tempfile.TemporaryDirectory(prefix="verbatim-bench-") as place:
        folder = write_model(Path(place), family=family, vocabulary=vocabulary)
        measured = [_play(folder, family, num_turns, num_tokens) for _ in range(rounds)]
    return Cost(
        model=f"{family.name}-{vocabulary}",
        num_turns=num_turns,
        num_tokens=measured[0].num_tokens,
        encode_seconds=statistics.median(r.encode_seconds for r in measured),
        build_seconds=statistics.median(r.build_seconds for r in measured),
        full_encode_seconds=statistics.median(r.full_encode_seconds for r in measured),
        certified_by=dict(measured[0].certified_by),
    )


def _play(folder: Path, family: Family, num_turns: int, num_tokens: int) -> _Round:
    """One conversation from its first turn to its last, then its final text at once."""
    content = (folder / "tokenizer.json").read_bytes()
    tokenizer = _TimedTokenizer(content, eos_token_ids=read_eos_entries(folder))
    template = ChatTemplate.load(folder)
    builder = PromptBuilder(tokenizer, template)
    builder.prepare()
    plain = Tokenizer.from_file(str(folder / "tokenizer.json"))
    result = _text_of(plain, num_tokens // num_turns - 60)
    messages: list[Message] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": QUESTIONS[1]}]
    parent: ParentTurn | None = None
    certified_by: Counter[str] = Counter()
    build_seconds, tokenizer.seconds = 0.0, 0.0
    for turn in range(num_turns):
        conversation = Conversation(tuple(messages), TOOLS)
        began = time.perf_counter()
        built = builder.build(conversation, parent)
        build_seconds += time.perf_counter() - began
        certified_by[built.certified_by] += 1
        prompt = built.token_ids if parent is None else np.concatenate([parent.token_ids, built.token_ids])
        call = Call("read_file", {"path": f"part_{turn}.py"})
        output = plain.encode(family.write_calls([call]) + family.stops[0], add_special_tokens=False).ids
        messages += [_called(call, turn), {"role": "tool", "tool_call_id": f"call_{turn:05}", "content": result}]
        ids = np.concatenate([prompt, np.asarray(output, dtype=np.int32)])
        parent = ParentTurn(ids, len(output), len(messages) - 1, Finish(FinishReason.STOP, output[-1]))
    text = template.render(Conversation(tuple(messages), TOOLS))
    began = time.perf_counter()
    full = plain.encode(text, add_special_tokens=False)
    full_encode_seconds = time.perf_counter() - began
    return _Round(tokenizer.seconds, build_seconds, full_encode_seconds, len(full.ids), certified_by)


def _called(call: Call, turn: int) -> Message:
    function = {"name": call.name, "arguments": json.dumps(call.arguments)}
    return {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": f"call_{turn:05}", "type": "function", "function": function}],
    }


def _text_of(tokenizer: Tokenizer, num_tokens: int) -> str:
    """Ordinary text of about so many tokens."""
    block = "\n".join(SENTENCES)
    length = len(tokenizer.encode(block, add_special_tokens=False).ids)
    return "\n".join([block] * max(1, round(num_tokens / length)))
