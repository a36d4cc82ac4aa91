"""What prompts cost: a long conversation built turn by turn, against tokenising its final text once.

Measured in one process, in processor time, the two interleaved, medians over rounds: templates, one of them with
numbers that count the conversation, and vocabularies that faster tokenizer libraries can and cannot read. And one more
short turn behind histories of a thousand to a hundred thousand tokens, with a result of plain text, with one that shows
a control token, and with one that says what the template looks for, for which the whole conversation is rendered; and
first prompts of many conversations that begin alike.
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
from gateway.tito.backends import BackendChoice
from gateway.tito.conversation import Conversation, ParentTurn
from gateway.tito.model_files import read_eos_entries
from gateway.tito.parsing.choice import choose_parsing
from gateway.tito.parsing.reply import ReplyParsing
from gateway.tito.prompt import PromptBuilder
from gateway.tito.shapes import example_tools
from gateway.tito.template import ChatTemplate
from gateway.tito.tokenizer import ChatTokenizer

MODELS = (
    ("chatml_folds", "byte_level"),
    ("chatml_thinks", "byte_level"),
    ("counts_calls", "byte_level"),
    ("chatml_folds", "metaspace_always"),
    ("chatml_folds", "unigram"),
)
"""Two templates, one that numbers calls and results over the whole conversation, and two vocabularies with prefix
spaces, the last of which no faster library can read."""

HISTORIES = (1_000, 3_000, 10_000, 30_000, 100_000)
"""Tokens before the turn that is measured."""

_NUM_TURNS = 100
_NUM_TOKENS = 80_000
_ROUNDS = 5
_REPEATS = 50

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds are of processor time, medians over rounds, of all turns together.

    backend: the tokenizer library that was proven. encode_seconds: inside it. build_seconds: all of prompt building,
    renders and encoding included. parse_seconds: of reading the replies. upkeep_seconds: audits and what shapes in use
    asked for, which run in a thread and take at most a hundredth of a core beyond the start. full_encode_seconds:
    `tokenizers` alone, on the final text. certified_by: turns by path. turn_microseconds: tokens of history → one more
    short turn, built and its reply read; marked_microseconds: the same where what is new shows a control token;
    long_microseconds: where it says what the template looks for, empty if that is nothing. first_microseconds: path → a
    first prompt, of num_first_tokens.
    """

    model: str
    backend: str
    num_turns: int
    num_tokens: int
    encode_seconds: float
    build_seconds: float
    parse_seconds: float
    upkeep_seconds: float
    full_encode_seconds: float
    certified_by: dict[str, int]
    turn_microseconds: dict[int, float]
    marked_microseconds: dict[int, float]
    long_microseconds: dict[int, float]
    first_microseconds: dict[str, float]
    num_first_tokens: int

    @property
    def encode_ratio(self) -> float:
        """Tokenisation over all turns, in full tokenisations of the final text."""
        return self.encode_seconds / self.full_encode_seconds

    @property
    def total_ratio(self) -> float:
        """Everything, likewise."""
        total = self.build_seconds + self.parse_seconds + self.upkeep_seconds
        return total / self.full_encode_seconds

    @property
    def history_ratio(self) -> float:
        """A turn behind the longest history, in turns behind the shortest."""
        return self.turn_microseconds[HISTORIES[-1]] / self.turn_microseconds[HISTORIES[0]]

    def figures(self) -> dict[str, Any]:
        """For the results file."""
        ratios = {name: round(getattr(self, name), 2) for name in ("encode_ratio", "total_ratio", "history_ratio")}
        return asdict(self) | ratios


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
        began = time.thread_time()
        try:
            return encode()
        finally:
            self._depth -= 1
            if not self._depth:
                self.seconds += time.thread_time() - began


@dataclass(frozen=True, slots=True)
class _Round:
    encode_seconds: float
    build_seconds: float
    parse_seconds: float
    upkeep_seconds: float
    full_encode_seconds: float
    num_tokens: int
    certified_by: Counter[str]


class _Agent:
    """A conversation that grows by calls and their results; as the gateway would, it builds, parses and audits."""

    def __init__(self, builder: PromptBuilder, parsing: ReplyParsing, family: Family, plain: Tokenizer) -> None:
        self._builder, self._parsing, self.family, self._plain = builder, parsing, family, plain
        self.messages: list[Message] = [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": QUESTIONS[1]},
        ]
        self.certified_by: Counter[str] = Counter()
        self.build_seconds = self.parse_seconds = self.upkeep_seconds = 0.0
        self._num_turns = 0
        self._parent: ParentTurn | None = None

    @property
    def num_tokens(self) -> int:
        """All that is recorded."""
        return 0 if self._parent is None else self._parent.num_tokens

    def turn(self, result: str) -> None:
        """A call, and its result."""
        prompt = self.build()
        call = Call("read_file", {"path": f"part_{self._num_turns}.py"})
        output = self._plain.encode(self.family.write_calls([call]) + self.family.stops[0], add_special_tokens=False)
        finish = Finish(FinishReason.STOP, output.ids[-1])
        self.parse(prompt, output.ids, finish)
        began = time.thread_time()
        if self._builder.upkeep_due:
            self._builder.upkeep()
        self.upkeep_seconds += time.thread_time() - began
        call_id = f"call_{self._num_turns:05}"
        self.messages += [_called(call, call_id), {"role": "tool", "tool_call_id": call_id, "content": result}]
        ids = np.concatenate([prompt, np.asarray(output.ids, dtype=np.int32)])
        self._parent = ParentTurn(ids, len(output.ids), len(self.messages) - 1, finish)
        self._num_turns += 1

    def build(self) -> TokenIds:
        """The prompt of the next turn."""
        conversation = Conversation(tuple(self.messages), TOOLS)
        began = time.thread_time()
        built = self._builder.build(conversation, self._parent)
        self.build_seconds += time.thread_time() - began
        self.certified_by[built.certified_by] += 1
        if self._parent is None or built.segment_reason is not None:
            return built.token_ids
        return np.concatenate([self._parent.token_ids, built.token_ids])

    def parse(self, prompt: TokenIds, output: list[int], finish: Finish) -> None:
        """Read a reply that came at once."""
        began = time.thread_time()
        parser = self._parsing.start(prompt_ids=prompt, tools=TOOLS)
        parser.feed(output)
        parser.finish(finish)
        self.parse_seconds += time.thread_time() - began


def _measure(family: Family, vocabulary: str, num_turns: int, num_tokens: int, rounds: int) -> Cost:
    with tempfile.TemporaryDirectory(prefix="verbatim-bench-") as place:
        folder = write_model(Path(place), family=family, vocabulary=vocabulary)
        tokenizer = _TimedTokenizer((folder / "tokenizer.json").read_bytes(), eos_token_ids=read_eos_entries(folder))
        template = ChatTemplate.load(folder)
        parsing = choose_parsing(template, tokenizer)
        builder = PromptBuilder(tokenizer, template, parsing=parsing, backend=BackendChoice.AUTO)
        builder.prepare()
        plain = Tokenizer.from_file(str(folder / "tokenizer.json"))

        def new_agent() -> _Agent:
            return _Agent(builder, parsing, family, plain)

        measured = [_play(tokenizer, template, plain, new_agent(), num_turns, num_tokens) for _ in range(rounds)]
        results = ["42", f"It ends with {family.stops[0]}.", *(f"It says {text}." for text in template.looked_for[:1])]
        turns, marked, *long = (
            {history: _turn_behind(plain, new_agent(), history, result) for history in HISTORIES} for result in results
        )
        first, num_first_tokens = _first_prompts(plain, builder)
    return Cost(
        model=f"{family.name}-{vocabulary}",
        backend=tokenizer.backend.name,
        num_turns=num_turns,
        num_tokens=measured[0].num_tokens,
        encode_seconds=statistics.median(r.encode_seconds for r in measured),
        build_seconds=statistics.median(r.build_seconds for r in measured),
        parse_seconds=statistics.median(r.parse_seconds for r in measured),
        upkeep_seconds=statistics.median(r.upkeep_seconds for r in measured),
        full_encode_seconds=statistics.median(r.full_encode_seconds for r in measured),
        certified_by=dict(measured[0].certified_by),
        turn_microseconds=turns,
        marked_microseconds=marked,
        long_microseconds=long[0] if long else {},
        first_microseconds=first,
        num_first_tokens=num_first_tokens,
    )


def _play(
    tokenizer: _TimedTokenizer, template: ChatTemplate, plain: Tokenizer, agent: _Agent, num_turns: int, num_tokens: int
) -> _Round:
    """One conversation from its first turn to its last, then its final text at once."""
    result = _text_of(plain, num_tokens // num_turns - 60)
    tokenizer.seconds = 0.0
    for _ in range(num_turns):
        agent.turn(result)
    encode_seconds = tokenizer.seconds
    text = template.render(Conversation(tuple(agent.messages), TOOLS))
    began = time.thread_time()
    full = plain.encode(text, add_special_tokens=False)
    full_encode_seconds = time.thread_time() - began
    return _Round(
        encode_seconds,
        agent.build_seconds,
        agent.parse_seconds,
        agent.upkeep_seconds,
        full_encode_seconds,
        len(full.ids),
        agent.certified_by,
    )


def _turn_behind(plain: Tokenizer, agent: _Agent, num_tokens: int, result: str) -> float:
    """Microseconds of one more short turn behind so many tokens and a result; the median of some."""
    agent.turn(_text_of(plain, max(1, num_tokens // 2)))
    while agent.num_tokens < num_tokens:
        agent.turn(_text_of(plain, min(1_000, num_tokens - agent.num_tokens)))
    agent.turn(result)
    call = Call("read_file", {"path": "part.py"})
    output = plain.encode(agent.family.write_calls([call]) + agent.family.stops[0], add_special_tokens=False).ids
    prompt = agent.build()
    taken: list[float] = []
    for _ in range(_REPEATS):
        before = agent.build_seconds + agent.parse_seconds
        agent.build()
        agent.parse(prompt, output, Finish(FinishReason.STOP, output[-1]))
        taken.append(agent.build_seconds + agent.parse_seconds - before)
    return round(statistics.median(taken) * 1e6, 1)


def _first_prompts(plain: Tokenizer, builder: PromptBuilder) -> tuple[dict[str, float], int]:
    """Microseconds of a first prompt by path, medians, behind one long system message and ten tools; tokens of each."""
    system: Message = {"role": "system", "content": _text_of(plain, 1_500)}
    tools = example_tools(10)
    taken: dict[str, list[float]] = {}
    num_tokens = 0
    for number in range(2 * _REPEATS):
        question: Message = {"role": "user", "content": f"{number}. {QUESTIONS[1]}"}
        conversation = Conversation((system, question), tools)
        began = time.thread_time()
        built = builder.build(conversation, None)
        taken.setdefault(built.certified_by, []).append(time.thread_time() - began)
        num_tokens = len(built.token_ids)
        if builder.upkeep_due:
            builder.upkeep()
    return {path: round(statistics.median(times) * 1e6, 1) for path, times in taken.items()}, num_tokens


def _called(call: Call, call_id: str) -> Message:
    function = {"name": call.name, "arguments": json.dumps(call.arguments)}
    return {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": call_id, "type": "function", "function": function}],
    }


def _text_of(tokenizer: Tokenizer, num_tokens: int) -> str:
    """Ordinary text of about so many tokens."""
    block = "\n".join(SENTENCES)
    length = len(tokenizer.encode(block, add_special_tokens=False).ids)
    return "\n".join([block] * max(1, round(num_tokens / length)))
