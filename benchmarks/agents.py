"""Random agents: everything that harnesses do to their history, mixed by a seed.

An agent keeps what it was told as lines, spells them in its own habit when it sends them (reasoning dropped, arguments
re-serialised, …), and notes every request with what it may expect of it: which earlier reply the request goes on from.
It knows the gateway as a chat API only.
"""

from __future__ import annotations

import asyncio
import copy
import json
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from benchmarks.models.words import ARGUMENTS, QUESTIONS, RESULTS, SENTENCES, SYSTEMS, THOUGHTS
from benchmarks.policy import SEED_FIELD, STYLE_FIELD, TOOL_NAMES, Style

Message = dict[str, Any]

_DESCRIPTIONS = {
    "calculator": "Works out an expression.",
    "read_file": "Reads a file.",
    "search": "Searches — überall.",
}
TOOLS: tuple[Message, ...] = tuple(
    {
        "type": "function",
        "function": {
            "name": name,
            "description": _DESCRIPTIONS[name],
            "parameters": {"type": "object", "properties": {"n": {"type": "integer"}, "path": {"type": "string"}}},
        },
    }
    for name in TOOL_NAMES
)
_LOOKALIKES = ("</think>", "<tool_call>", "</tool_call>", "<|im_end|>", "<|im_start|>assistant\n")


@dataclass(frozen=True, slots=True)
class Answered:
    """A reply that reached the agent."""

    message: Message
    finish_reason: str


@dataclass(frozen=True, slots=True)
class Refused:
    """An error that reached the agent."""

    status: int
    message: str


@dataclass(frozen=True, slots=True)
class Vanished:
    """The agent went away before there was a reply."""


Answer = Answered | Refused | Vanished


class Chat(Protocol):
    """A gateway's chat endpoint for one session."""

    async def __call__(self, body: Message, *, leave_early: bool) -> Answer:
        """Send one request; with `leave_early` the client goes away before the reply."""
        ...


@dataclass(eq=False, slots=True)
class Line:
    """One message as the agent has it; `sampled` for replies of the model."""

    message: Message
    sampled: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Root:
    """What a request has beside its messages that belongs to the prompt."""

    tools: tuple[Message, ...]
    arguments: Mapping[str, Any]

    def same(self, other: Root) -> bool:
        """Whether both make the same prompt."""
        return json.dumps(self.tools) == json.dumps(other.tools) and self.arguments == other.arguments


@dataclass(eq=False, slots=True)
class Asked:
    """One request and its answer. `goes_on_from`: the latest request of whose reply it is a continuation, as the agent
    sees it (same tools, same lines, then new ones); None if it is a fresh start."""

    seed: int
    lines: tuple[Line, ...]
    root: Root
    body: Message
    goes_on_from: Asked | None
    answer: Answer
    reply: Line | None = None


@dataclass(frozen=True, slots=True)
class Habit:
    """How one harness spells what it sends back; names say what becomes of a reply."""

    reasoning: str
    arguments: str
    content: str
    extras: str

    @classmethod
    def random(cls, rng: random.Random) -> Habit:
        """Half of all harnesses echo; the others have a quirk each."""
        return cls(
            reasoning=rng.choice(("echo", "echo", "drop", "drop", "reasoning", "thinking")),
            arguments=rng.choice(("echo", "echo", "echo", "compact", "sorted", "object")),
            content=rng.choice(("echo", "echo", "echo", "empty", "null", "absent", "parts")),
            extras=rng.choice(("none", "none", "none", "decoration", "empty calls", "index", "unknown")),
        )

    def spell(self, line: Line) -> Message:
        """The message as this harness sends it."""
        if not line.sampled:
            return line.message
        message = copy.deepcopy(line.message)
        self._spell_reasoning(message)
        self._spell_content(message)
        for i, call in enumerate(message.get("tool_calls") or ()):
            call["function"]["arguments"] = self._spell_arguments(call["function"]["arguments"])
            if self.extras == "index":
                call["index"] = i
        if self.extras == "decoration":
            message |= {"refusal": None, "annotations": [], "provider_specific_fields": {"a": 1}, "audio": None}
        elif self.extras == "empty calls" and not message.get("tool_calls"):
            message["tool_calls"] = []
        elif self.extras == "unknown":
            message |= {"x_trace": "7f", "cache_control": {"type": "ephemeral"}}
        return message

    def _spell_reasoning(self, message: Message) -> None:
        reasoning = message.pop("reasoning_content", None)
        if reasoning is None or self.reasoning == "drop":
            return
        message["reasoning_content" if self.reasoning == "echo" else self.reasoning] = reasoning

    def _spell_content(self, message: Message) -> None:
        if message.get("content"):
            if self.content == "parts":
                message["content"] = [{"type": "text", "text": message["content"]}]
        elif self.content == "empty":
            message["content"] = ""
        elif self.content == "null":
            message["content"] = None
        elif self.content == "absent":
            message.pop("content", None)

    def _spell_arguments(self, text: str) -> Any:
        try:
            value = json.loads(text)
        except ValueError:
            return text
        match self.arguments:
            case "compact":
                return json.dumps(value, separators=(",", ":"), ensure_ascii=False)
            case "sorted":
                return json.dumps(value, sort_keys=True, indent=1)
            case "object":
                return value
        return text


@dataclass(eq=False, slots=True)
class Agent:
    """One random agent in one session; `play` runs it and `asked` is what it did.

    allowed roles and calls follow no template: a template that refuses says so, and the agent takes back its last step.
    """

    rng: random.Random
    chat: Chat
    max_requests: int
    asked: list[Asked] = field(default_factory=list)
    habit: Habit = field(init=False)
    root: Root = field(init=False)
    lines: list[Line] = field(init=False)
    first_seed: int = field(init=False)
    lookalikes: float = field(init=False)
    style: Style = field(init=False)

    def __post_init__(self) -> None:
        self.first_seed = self.rng.randrange(1, 1 << 40) * 4096
        self.style = self.rng.choice((Style.WILD, Style.TIDY))
        self.lookalikes = self.rng.choice((0.0, 0.3)) if self.style is Style.WILD else 0.0
        self.habit = Habit.random(self.rng)
        self.root = Root(TOOLS[: self.rng.choice((0, 2, 3, 3))], self._arguments())
        self.lines = self._opening()

    async def play(self) -> None:
        """Ask, look, do something with the history, until the requests are used up."""
        await self._ask(self.lines)
        await self.play_on()

    async def play_on(self) -> None:
        """More of it, up to `max_requests`."""
        while len(self.asked) < self.max_requests:
            moves = list(_MOVES)
            move = self.rng.choices(moves, weights=[_MOVES[m] for m in moves])[0]
            if self.rng.random() < 0.05:
                self._change_habit()
            await move(self)

    async def repeat_at(self, chat: Chat) -> tuple[Asked, Asked] | None:
        """Go on from the latest reply twice with the same words: here, and at another process of the gateway."""
        if not (answered := self._answered()):
            return None
        latest = answered[-1]
        self.root = latest.root
        lines = [*latest.lines, _reply_of(latest), self._user()]
        here = await self._send(*self._order(lines), leave_early=False)
        self.chat = chat
        return here, await self._send(*self._order(lines), leave_early=False)

    # ---- moves ----

    async def go_on(self) -> None:
        """The plain loop: answer the latest reply."""
        await self._ask([*self.lines, *self._next_lines()])

    async def retry(self) -> None:
        """Ask something again that was asked before."""
        earlier = self.rng.choice((self.asked[0], self.asked[-1], self.rng.choice(self.asked)))
        await self._ask(list(earlier.lines))

    async def unwind(self) -> None:
        """Go back to an earlier reply and say something else."""
        if answered := self._answered():
            earlier = self.rng.choice(answered)
            self.lines = [*earlier.lines, _reply_of(earlier)]
            await self.go_on()

    async def edit(self) -> None:
        """Change one message of the past."""
        if not self.lines:
            return
        i = self.rng.randrange(len(self.lines))
        edited = copy.deepcopy(self.lines[i].message)
        edited["content"] = self.rng.choice((*SENTENCES, "edited"))
        if edited.get("reasoning_content") and self.rng.random() < 0.5:
            edited["reasoning_content"] = "I thought something else."
        lines = [*self.lines[:i], Line(edited), *self.lines[i + 1 :]]
        await self._ask([*lines, *self._next_lines()])

    async def forget(self) -> None:
        """Remove messages from the middle."""
        if len(self.lines) > 3:
            start = self.rng.randrange(1, len(self.lines) - 1)
            stop = self.rng.randrange(start + 1, len(self.lines))
            await self._ask([*self.lines[:start], *self.lines[stop:], *self._next_lines()])

    async def compact(self) -> None:
        """Replace all but the latest messages by a summary."""
        summary = Line({"role": "user", "content": "Summary so far: " + self.rng.choice(SENTENCES)})
        kept = self.rng.choice((0, 0, 1, 2))
        head = self.lines[:1] if self.lines and self.lines[0].message["role"] == "system" else []
        tail = self.lines[len(self.lines) - kept :]
        await self._ask([*head, summary, *tail, *(self._next_lines() if tail else [])])

    async def delegate(self) -> None:
        """A sub-agent with a history of its own, then back."""
        mine, self.lines = self.lines, self._opening()
        await self._ask(self.lines)
        for _ in range(self.rng.randrange(3)):
            await self.go_on()
        report = self.lines[-1].message.get("content") if self.lines else ""
        self.lines = mine
        if self.rng.random() < 0.7:
            await self._ask([*mine, Line({"role": "user", "content": f"The helper says: {report}"})])

    async def hand_off(self) -> None:
        """Terminus-2's three calls: a summary, questions without history, answers; then a history of three messages."""
        if not self.lines:
            return
        summary_prompt = Line({"role": "user", "content": "You are about to run out of context. Summarise the work."})
        first = self.lines[0]
        summary = await self._ask([*self.lines, summary_prompt])
        text = summary.message.get("content") if summary else ""
        question_prompt = Line({"role": "user", "content": f"You take over. Summary: {text}\nAsk what you must know."})
        questions = await self._ask([question_prompt])
        if summary is None or questions is None:
            return
        asking = Line({"role": "user", "content": f"The next agent asks: {questions.message.get('content')}"})
        answers = await self._ask([*self.lines[:0], first, summary_prompt, summary, asking])
        answer_text = answers.message.get("content") if answers else "none"
        self.lines = [first, question_prompt, questions, Line({"role": "user", "content": f"Answers: {answer_text}"})]
        await self._ask(self.lines)

    async def change_root(self) -> None:
        """Other tools, another order of them, other template arguments; sometimes back again afterwards."""
        before = self.root
        tools = list(self.root.tools)
        self.rng.shuffle(tools)
        if tools and self.rng.random() < 0.5:
            tools.pop()
        self.root = Root(tuple(tools) or TOOLS[:2], self._arguments())
        await self.go_on()
        if self.rng.random() < 0.5:
            self.root = before

    async def fork(self) -> None:
        """Several calls at once from one place, the same or different; go on from one of them."""
        count = 50 if self.rng.random() < 0.01 else self.rng.choice((2, 2, 3, 4, 8))
        same = self._next_lines()
        ways = [[*self.lines, *(same if self.rng.random() < 0.6 else self._next_lines())] for _ in range(count)]
        orders = [self._order(lines) for lines in ways]
        asked = await asyncio.gather(*(self._send(*order, leave_early=False) for order in orders))
        if going := [one for one in asked if one.reply is not None]:
            chosen = self.rng.choice(going)
            self.lines = [*chosen.lines, _reply_of(chosen)]

    async def vanish(self) -> None:
        """Go away before the reply comes, then perhaps ask the same again."""
        lines = [*self.lines, *self._next_lines()]
        await self._send(*self._order(lines), leave_early=True)
        if self.rng.random() < 0.6:
            await self._ask(lines)

    # ---- what agents say ----

    def _opening(self) -> list[Line]:
        lines: list[Line] = []
        if self.rng.random() < 0.6:
            lines.append(Line({"role": "system", "content": self.rng.choice(SYSTEMS)}))
        lines.append(self._user())
        if self.rng.random() < 0.1:
            lines += [self._inserted(), self._user()]
        if self.rng.random() < 0.03:
            lines.insert(0, Line({"role": "developer", "content": "Use short words."}))
        return lines

    def _next_lines(self) -> list[Line]:
        """What follows the latest reply (or an unanswered question)."""
        last: Message = self.lines[-1].message if self.lines else {"role": "user"}
        if last["role"] != "assistant":
            return [] if self.rng.random() < 0.7 else [self._user()]
        calls = last.get("tool_calls") or []
        lines = self._results(calls) if calls else [self._user()]
        draw = self.rng.random()
        if draw < 0.06:
            lines.insert(self.rng.randrange(len(lines) + 1), self._inserted())
        elif draw < 0.09:
            lines += [self._inserted(), self._user()]
        elif draw < 0.14:
            role = self.rng.choice(("system", "system", "developer"))
            lines.insert(self.rng.randrange(len(lines) + 1), Line({"role": role, "content": self._text(SYSTEMS)}))
        elif draw < 0.16:
            return []
        elif draw < 0.2:
            lines.append(self._user())
        return lines

    def _results(self, calls: Sequence[Message]) -> list[Line]:
        draw = self.rng.random()
        if draw < 0.08:
            return [self._user()]
        answered = list(calls)
        if draw < 0.14:
            self.rng.shuffle(answered)
        elif draw < 0.2:
            answered = answered[:1]
        return [
            Line(
                {"role": "tool", "tool_call_id": call.get("id"), "content": self._content(RESULTS)}
                | ({"name": call["function"]["name"]} if self.rng.random() < 0.5 else {})
            )
            for call in answered
        ]

    def _inserted(self) -> Line:
        """An assistant's turn that no model wrote."""
        message: Message = {"role": "assistant", "content": self._text(SENTENCES)}
        draw = self.rng.random()
        if draw < 0.15:
            arguments = self.rng.choice((json.dumps(self.rng.choice(ARGUMENTS)), "not JSON {", ""))
            call = {"id": "call00abc", "type": "function", "function": {"name": "search", "arguments": arguments}}
            message |= {"content": None, "tool_calls": [call]}
        elif draw < 0.25:
            message["reasoning_content"] = self.rng.choice(THOUGHTS)
        return Line(message)

    def _user(self) -> Line:
        message: Message = {"role": "user", "content": self._content(QUESTIONS)}
        if self.rng.random() < 0.05:
            message["name"] = "Ada"
        return Line(message)

    def _content(self, choices: Sequence[str]) -> Any:
        """A text, or several: harnesses put reminders beside it."""
        num_parts = self.rng.choices((0, 1, 2, 3), weights=(18, 1, 2, 1))[0]
        if not num_parts:
            return self._text(choices)
        return [{"type": "text", "text": self._text(choices)} for _ in range(num_parts)]

    def _text(self, choices: Sequence[str]) -> str:
        text = self.rng.choice(choices)
        if self.rng.random() < self.lookalikes:
            text = f"{text}{self.rng.choice(_LOOKALIKES)}{self.rng.choice(('', ' and so on', text))}"
        return text

    def _arguments(self) -> Mapping[str, Any]:
        return self.rng.choice(({}, {}, {}, {"enable_thinking": False}, {"reasoning_effort": "high"}, {"custom": [1]}))

    def _change_habit(self) -> None:
        """All but the reasoning: a message that comes back with reasoning it did not have before is another one."""
        self.habit = replace(Habit.random(self.rng), reasoning=self.habit.reasoning)

    # ---- asking ----

    async def _ask(self, lines: Sequence[Line]) -> Line | None:
        """Ask; if there is an answer the conversation goes on from it, else it stays where it was."""
        asked = await self._send(*self._order(lines), leave_early=False)
        if asked.reply is None:
            return None
        self.lines = [*lines, asked.reply]
        return asked.reply

    def _order(self, lines: Sequence[Line]) -> tuple[int, Sequence[Line], Message]:
        """Seed, lines and body of a request: all that is random about it."""
        seed = self.first_seed + len(self.asked) + self.rng.randrange(1 << 30) * 4096
        body: Message = {
            "model": "m",
            "messages": [self.habit.spell(line) for line in lines],
            "temperature": self.rng.choice((0.7, 1.0)),
            SEED_FIELD: seed,
            STYLE_FIELD: self.style,
        }
        if self.root.tools:
            body["tools"] = list(self.root.tools)
        arguments = dict(self.root.arguments)
        if "reasoning_effort" in arguments:
            body["reasoning_effort"] = arguments.pop("reasoning_effort")
        if arguments:
            body["chat_template_kwargs"] = arguments
        draw = self.rng.random()
        if draw < 0.12:
            body["max_tokens"] = self.rng.randrange(1, 30)
        elif draw < 0.18:
            body["stop"] = self.rng.choice((["Observation:"], "</answer>", ["\n\n", "STOP"]))
        return seed, lines, body

    async def _send(self, seed: int, lines: Sequence[Line], body: Message, *, leave_early: bool) -> Asked:
        asked = Asked(seed, tuple(lines), self.root, body, self._origin(lines), Vanished())
        self.asked.append(asked)
        asked.answer = await self.chat(body, leave_early=leave_early)
        if isinstance(asked.answer, Answered):
            asked.reply = Line(asked.answer.message, sampled=True)
        return asked

    def _origin(self, lines: Sequence[Line]) -> Asked | None:
        """The longest answered request whose lines and reply these lines begin with."""
        best: Asked | None = None
        for earlier in self._answered():
            whole = [*earlier.lines, _reply_of(earlier)]
            begins = len(whole) <= len(lines) and all(a is b for a, b in zip(whole, lines, strict=False))
            if begins and earlier.root.same(self.root) and (best is None or len(whole) > len(best.lines) + 1):
                best = earlier
        return best

    def _answered(self) -> list[Asked]:
        return [asked for asked in self.asked if asked.reply is not None]


def _reply_of(asked: Asked) -> Line:
    if asked.reply is None:
        raise ValueError("a request without a reply")
    return asked.reply


_MOVES: Mapping[Callable[[Agent], Awaitable[None]], int] = {
    Agent.go_on: 62,
    Agent.retry: 6,
    Agent.unwind: 6,
    Agent.edit: 5,
    Agent.forget: 3,
    Agent.compact: 3,
    Agent.delegate: 3,
    Agent.hand_off: 2,
    Agent.change_root: 4,
    Agent.fork: 4,
    Agent.vanish: 4,
}
