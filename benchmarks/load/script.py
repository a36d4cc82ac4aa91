"""What engine and agents say to each other: a workload as the two files that engine.c and generator.c read.

Every reply is given as tokens (for `/generate`) and as a chat message (for `/v1/chat/completions`), made with the
model's own tokenizer and markup, so a gateway that parses tokens and a proxy that passes chats tell agents the same.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, pairwise
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from benchmarks.models.families import FAMILIES, write_model
from benchmarks.models.markup import Call, WriteCalls
from benchmarks.models.words import SENTENCES
from gateway.contracts.errors import ConfigurationError
from gateway.tito.conversation import Conversation
from gateway.tito.template import ChatTemplate

NUMBER = "@@@@@@@@"
"""Both programs put a number of their own in its place."""

_FAMILY = "chatml_folds"
_PLAIN = tuple(sentence for sentence in SENTENCES if sentence.isascii() and "def " not in sentence)
_TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "calculator",
            "description": "Works out an expression.",
            "parameters": {
                "type": "object",
                "properties": {"expression": {"type": "string"}},
                "required": ["expression"],
            },
        },
    }
]


@dataclass(frozen=True, slots=True)
class Workload:
    """What a conversation is like.

    turns: calls of the model. reply_tokens: of each reply, at least what a call takes. message_bytes: of what a tool
    (or, without tools, the user) says each turn. history_tokens: about so many more, in the first message, or where
    history_turns is not 0 in what is said in the first so many turns. delta_tokens: tokens that one event of a streamed
    chat of the bare engine holds.
    """

    turns: int = 10
    reply_tokens: int = 34
    message_bytes: int = 60
    history_tokens: int = 0
    tools: bool = True
    history_turns: int = 0
    delta_tokens: int = 8


@dataclass(frozen=True, slots=True)
class Model:
    """A model folder, and how the model writes calls and ends a turn."""

    folder: Path
    tokenizer: Tokenizer
    template: ChatTemplate
    write_calls: WriteCalls
    stop: str

    @classmethod
    def made(cls, place: Path, *, family: str = _FAMILY, vocabulary: str = "byte_level") -> Model:
        """One of the benchmarks' own families, written to `place`."""
        known = FAMILIES[family]
        folder = write_model(place, family=known, vocabulary=vocabulary)
        return cls._of(folder, known.write_calls, known.stops[0])

    @classmethod
    def at(cls, folder: Path, *, family: str = _FAMILY) -> Model:
        """A folder of your own whose model writes calls as `family` does; its first end token ends a turn."""
        known = FAMILIES[family]
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        stop = next((text for text in known.stops if tokenizer.token_to_id(text) is not None), None)
        if stop is None:
            raise ConfigurationError(f"{folder}: its tokenizer has none of {family}'s end tokens {known.stops}")
        return cls._of(folder, known.write_calls, stop)

    @classmethod
    def _of(cls, folder: Path, write_calls: WriteCalls, stop: str) -> Model:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        return cls(folder, tokenizer, ChatTemplate.load(folder), write_calls, stop)

    def encode(self, text: str) -> list[int]:
        """Token ids, control tokens read as such."""
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def marker(self) -> list[int]:
        """The ids that open every reply in a prompt."""
        question = Conversation(({"role": "user", "content": "?"},))
        without = self.template.render(question, add_generation_prompt=False)
        opened = self.template.render(question)
        if not opened.startswith(without) or opened == without:
            raise ConfigurationError(f"{self.folder}: its template does not open replies behind the last message")
        return self.encode(opened[len(without) :])


class Reply(NamedTuple):
    """One reply of the model, as tokens and as a message."""

    text: str
    token_ids: list[int]
    calls: Sequence[Call]


def replies(model: Model, workload: Workload) -> list[Reply]:
    """Tool calls in all turns but the last, then text; without tools text only."""
    called = workload.tools
    return [
        _reply(model, workload, turn, calls=called and turn < workload.turns) for turn in range(1, workload.turns + 1)
    ]


def write_script(file: Path, model: Model, workload: Workload) -> Path:
    """The engine's side; the format is described in engine.c."""
    lines = ["marker " + ",".join(map(str, model.marker()))]
    for reply in replies(model, workload):
        stop_id = reply.token_ids[-1]
        lines += [
            "reply",
            "ids " + " ".join(map(str, reply.token_ids)),
            "finish " + _json({"type": "stop", "matched": stop_id}),
            "message " + _json(_message(reply)),
            "reason " + ("tool_calls" if reply.calls else "stop"),
            *("delta " + _json(delta) for delta in _deltas(model, reply, workload.delta_tokens)),
        ]
    file.write_text("\n".join(lines) + "\n")
    return file


def write_conversation(file: Path, model: Model, workload: Workload, *, served_name: str, stream: bool = False) -> Path:
    """The agents' side; the format is described in generator.c."""
    first = [
        {"role": "system", "content": "You are a helpful assistant that uses tools."},
        {
            "role": "user",
            "content": f"Question {NUMBER}: how much is 3 apples and 4 pears? " + _first_history(model, workload),
        },
    ]
    fields: dict[str, Any] = {"temperature": 1.0}
    if workload.tools:
        fields["tools"] = _TOOLS
    if stream:
        fields["stream"] = True
    lines = [
        "head " + _json({"model": served_name})[:-1] + ',"messages":[',
        "messages " + ",".join(map(_json, first)),
        "tail ]," + _json(fields)[1:-1],
        *("result " + _json(result)[1:-1] for result in _results(model, workload)),
    ]
    file.write_text("\n".join(lines) + "\n")
    return file


def bytes_a_token(model: Model) -> float:
    """Of the text that tools and users say."""
    text = _words(20_000)
    return len(text.encode()) / len(model.encode(text))


def _words(num_bytes: int) -> str:
    """Ordinary text of at least so many bytes."""
    text, sentences = "", cycle(_PLAIN)
    while len(text) < num_bytes:
        text += next(sentences) + "\n"
    return text


def _reply(model: Model, workload: Workload, turn: int, *, calls: bool) -> Reply:
    called = [Call("calculator", {"expression": f"{turn} * {turn + 3} + {turn % 7}"})] if calls else []
    end = model.write_calls(called) + model.stop if called else model.stop
    text = "" if called else f"The answer to question {turn} is {turn + 42}."
    words = cycle(_PLAIN[turn % len(_PLAIN) :] + _PLAIN[: turn % len(_PLAIN)])
    while len(model.encode(text + end)) < workload.reply_tokens:
        text += (" " if text else "") + next(words).strip()
    return Reply(text, model.encode(text + ("\n" if text and called else "") + end), called)


def _message(reply: Reply) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": reply.text or None}
    if reply.calls:
        message["tool_calls"] = [
            {
                "id": f"call_{NUMBER}",
                "type": "function",
                "function": {"name": call.name, "arguments": call.json},
            }
            for call in reply.calls
        ]
    return message


def _deltas(model: Model, reply: Reply, delta_tokens: int) -> list[dict[str, Any]]:
    """As vLLM and SGLang cut a reply: its role, pieces of its text, then each call's name and arguments."""
    deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}]
    deltas += [{"content": piece} for piece in _pieces(model, reply.text, delta_tokens)]
    for index, call in enumerate(reply.calls):
        named = {"index": index, "id": f"call_{NUMBER}", "type": "function"}
        deltas.append({"tool_calls": [named | {"function": {"name": call.name, "arguments": ""}}]})
        deltas += [
            {"tool_calls": [{"index": index, "function": {"arguments": piece}}]}
            for piece in _pieces(model, call.json, delta_tokens)
        ]
    return deltas


def _pieces(model: Model, text: str, tokens: int) -> list[str]:
    ends = [stop for _, stop in model.tokenizer.encode(text, add_special_tokens=False).offsets][tokens - 1 :: tokens]
    cuts = [0, *(end for end in ends if end < len(text)), len(text)]
    return [text[start:stop] for start, stop in pairwise(cuts) if stop > start]


def _results(model: Model, workload: Workload) -> list[str]:
    """What the tool says, another text each turn, each of the wanted number of bytes."""
    texts = []
    history_bytes = 0
    if workload.history_turns:
        history_bytes = round(workload.history_tokens / workload.history_turns * bytes_a_token(model))
    for turn in range(1, workload.turns + 1):
        text = f"result {NUMBER}.{turn} of the tool is {turn * 42 % 97}. "
        wanted = workload.message_bytes + (history_bytes if turn <= workload.history_turns else 0)
        text += _words(wanted - len(text))
        texts.append(text[: max(wanted, len(NUMBER) + 8)])
    return texts


def _first_history(model: Model, workload: Workload) -> str:
    """Ordinary text of about `history_tokens` tokens."""
    if workload.history_turns or not workload.history_tokens:
        return ""
    wanted = round(workload.history_tokens * bytes_a_token(model))
    return _words(wanted)[:wanted]


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
