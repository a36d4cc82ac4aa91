"""A simulated policy: samples what models write, the good and the broken, from a seed that travels with the request.

A reply depends on the seed, the prompt's end and the stop settings only, so that a run can be repeated whatever the
order in which requests arrive. Nothing here knows the gateway's parsing: replies are text in the family's own markup,
turned into tokens here, often not in the way in which a tokenizer would split them.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final

from tokenizers import Tokenizer

from benchmarks.models.families import Family, Thinking
from benchmarks.models.markup import Call
from benchmarks.models.words import ARGUMENTS, SENTENCES, THOUGHTS
from engines.scripted import ScriptedReply
from gateway.contracts.generation import Finish, FinishReason, GenerateRequest

SEED_FIELD: Final = "policy_seed"
"""The unknown field of an agent's request that carries the seed to the engine (I8)."""

STYLE_FIELD: Final = "policy_style"
"""Another one: a `Style`."""

TOOL_NAMES: Final = ("calculator", "read_file", "search")

_KINDS = {
    "text": 20,
    "thought and text": 12,
    "thought only": 4,
    "calls": 20,
    "thought and calls": 10,
    "text around calls": 6,
    "malformed call": 5,
    "cut call": 3,
    "token soup": 4,
    "nothing": 3,
    "typed markers": 5,
}


class Style(StrEnum):
    """TIDY policies write well-formed markup only, so that whole renders can be compared; WILD ones anything."""

    TIDY = "tidy"
    WILD = "wild"


_WILD_KINDS = frozenset({"malformed call", "cut call", "token soup", "typed markers", "thought only"})


@dataclass(frozen=True, slots=True)
class _Planned:
    """The whole reply to a prompt of `num_prompt_tokens`; a request that has some of it already gets the rest."""

    num_prompt_tokens: int
    token_ids: tuple[int, ...]
    finish: Finish


class Policy:
    """Plans replies for one model folder; pass `reply` to a ScriptedEngine."""

    def __init__(self, folder: Path, family: Family) -> None:
        self._family = family
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._vocab_size = self._tokenizer.get_vocab_size()
        added = self._tokenizer.get_added_tokens_decoder()
        self._added = re.compile(
            "|".join(sorted((re.escape(t.content) for t in added.values()), key=len, reverse=True))
        )
        self._control = tuple(added)
        self._id_of = {token.content: token_id for token_id, token in added.items()}
        self._stops = tuple(self._id_of[text] for text in family.stops)
        self._filler = self._tokenizer.encode("\n", add_special_tokens=False).ids
        self._planned: dict[int, _Planned] = {}

    def reply(self, request: GenerateRequest) -> ScriptedReply:
        """What is sampled for one engine request; the second one of an interrupted turn gets what is left."""
        seed = int(request.passthrough[SEED_FIELD])
        planned = self._planned.pop(seed, None) or self._plan(request, random.Random(seed))
        have = len(request.token_ids) - planned.num_prompt_tokens
        rest, rng = planned.token_ids[have:], random.Random(seed + have)
        if have == 0 and len(rest) > 2 and rng.random() < 0.02:
            self._planned[seed] = planned
            return ScriptedReply(rest[: rng.randrange(1, len(rest))], Finish(FinishReason.ABORT), chunk_size=4)
        return ScriptedReply(rest, planned.finish, chunk_size=rng.choice((1, 7, 64, 64)))

    def _plan(self, request: GenerateRequest, rng: random.Random) -> _Planned:
        kind = rng.choices(list(_KINDS), weights=list(_KINDS.values()))[0]
        if kind in _WILD_KINDS and request.passthrough[STYLE_FIELD] == Style.TIDY:
            kind = "thought and text"
        token_ids = self._body(kind, rng)
        stop_string = rng.choice(request.sampling.stop) if request.sampling.stop and rng.random() < 0.6 else None
        if stop_string is not None:
            token_ids = [*token_ids, *self._tokens(stop_string, rng, split=False)]
            finish = Finish(FinishReason.STOP, stop_string)
        else:
            token_ids.append(self._stop(kind, rng))
            finish = Finish(FinishReason.STOP, token_ids[-1])
        ended = self._ended(token_ids, request.sampling.stop_token_ids)
        if len(ended) < len(token_ids):
            finish = Finish(FinishReason.STOP, ended[-1])
        return _Planned(len(request.token_ids), tuple(ended), finish)

    def _body(self, kind: str, rng: random.Random) -> list[int]:
        if kind == "token soup":
            return self._soup(rng)
        pieces = list(self._pieces(kind, rng))
        split = rng.random() < 0.3
        ids: list[int] = []
        for text, is_typed in pieces:
            ids += self._typed(text) if is_typed else self._tokens(text, rng, split=split)
        return ids

    def _pieces(self, kind: str, rng: random.Random) -> list[tuple[str, bool]]:
        """(text, whether markers in it are spelled in ordinary tokens)."""
        family, text = self._family, rng.choice(SENTENCES)
        opening, closing = family.reasoning
        thought = rng.choice(THOUGHTS)
        begin: list[tuple[str, bool]] = []
        if family.thinking is Thinking.OPENED:
            begin = [((thought if "thought" in kind else "") + closing, False)]
        elif family.thinking is Thinking.WRITTEN and "thought" in kind:
            begin = [(opening + thought + closing, False)]
        calls = family.write_calls(self._calls(rng))
        match kind:
            case "thought only":
                # Never closed, or closed with nothing behind it.
                cut = [((opening if family.thinking is Thinking.WRITTEN else "") + thought, False)]
                return begin if rng.random() < 0.5 and begin else cut
            case "calls" | "thought and calls":
                return [*begin, (calls, False)]
            case "text around calls":
                return [*begin, (f"{family.text_opening}{text}\n{calls}", False), (rng.choice(("", "\nDone.")), False)]
            case "malformed call":
                broken = calls.replace('"', "'", 3) if rng.random() < 0.5 else calls.replace("}", "", 1)
                return [*begin, (broken, False)]
            case "cut call":
                return [*begin, (calls[: rng.randrange(1, len(calls))], False)]
            case "nothing":
                return []
            case "typed markers":
                marker = rng.choice((*family.special, *family.markup, "</think>", "<tool_call>"))
                return [*begin, (family.text_opening + text, False), (f" {marker} ", True), ("so it is.", False)]
        return [*begin, (family.text_opening + text, False)]

    def _calls(self, rng: random.Random) -> list[Call]:
        count = min(self._family.max_calls, rng.choices((1, 2, 3, 4), weights=(12, 4, 2, 1))[0])
        return [Call(rng.choice(TOOL_NAMES), rng.choice(ARGUMENTS)) for _ in range(count)]

    def _soup(self, rng: random.Random) -> list[int]:
        ids = [rng.randrange(self._vocab_size) for _ in range(rng.randrange(1, 25))]
        return [rng.choice(self._control) if rng.random() < 0.1 else token_id for token_id in ids]

    def _stop(self, kind: str, rng: random.Random) -> int:
        if rng.random() < 0.06:
            return rng.choice(self._stops)
        usual = self._family.facts.stop("calls" in kind, "tool" if "calls" in kind else "user")
        token_id = self._stops[0] if usual is None else self._id_of[usual]
        return token_id if token_id in self._stops else self._stops[0]

    def _ended(self, token_ids: Sequence[int], stop_token_ids: Sequence[int]) -> list[int]:
        """Up to the first stop token: engines never sample past one."""
        ends = {*stop_token_ids, *self._stops}
        for i, token_id in enumerate(token_ids):
            if token_id in ends:
                return list(token_ids[: i + 1])
        return list(token_ids)

    def _tokens(self, text: str, rng: random.Random, *, split: bool) -> list[int]:
        """Markers as their tokens; the text between them as the tokenizer has it, or cut at random places first."""
        ids: list[int] = []
        at = 0
        for match in self._added.finditer(text):
            ids += self._language(text[at : match.start()], rng, split=split)
            ids.append(self._id_of[match.group()])
            at = match.end()
        return ids + self._language(text[at:], rng, split=split)

    def _language(self, text: str, rng: random.Random, *, split: bool) -> list[int]:
        if not text:
            return []
        if not split:
            return self._continued(text)
        cuts = sorted(rng.sample(range(1, len(text)), k=min(len(text) - 1, max(1, len(text) // 6)))) if text[1:] else []
        return [i for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True) for i in self._continued(text[a:b])]

    def _continued(self, text: str) -> list[int]:
        """Ids of text that does not begin a string (no prefix space)."""
        ids = self._tokenizer.encode("\n" + text, add_special_tokens=False).ids
        if ids[: len(self._filler)] == self._filler:
            return list(ids[len(self._filler) :])
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def _typed(self, text: str) -> list[int]:
        """Every character on its own, so that no marker is one token."""
        return [token_id for character in text for token_id in self._continued(character)]
