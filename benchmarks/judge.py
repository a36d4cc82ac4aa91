"""Holds one finished history against what the engine saw, what the agent saw and what the template says.

Every check is told from outside the gateway: prompts from the engine's door (`witness`), conversations from the agent,
templates rendered and encoded whole. What fails is a `Failure` with the invariant it breaks; nothing is raised, so that
one history shows all of its failures.
"""

from __future__ import annotations

import copy
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from benchmarks.agents import Answered, Asked, Message, Refused
from benchmarks.models.families import Family
from benchmarks.policy import SEED_FIELD
from benchmarks.witness import Sampled
from gateway.contracts.errors import TemplateRaised
from gateway.contracts.records import SegmentReason, TurnRecord
from gateway.contracts.samples import Segment
from gateway.tito.conversation import Conversation, HistoryPolicy
from gateway.tito.template import ChatTemplate

_UNSAID = "zyxunsaid"
_ROLES = ("user", "tool", "system", "assistant")
_REASONING = ("reasoning_content", "reasoning", "thinking")


@dataclass(frozen=True, slots=True)
class Failure:
    """One broken promise. `rule`: short name with the invariant; `detail`: values to look at."""

    rule: str
    detail: str


@dataclass(slots=True)
class Findings:
    """What came out of one history; `counts` are added up over a run."""

    failures: list[Failure] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def expect(self, truth: bool, rule: str, detail: str) -> bool:
        """Note a failure unless `truth`."""
        if not truth:
            self.failures.append(Failure(rule, detail))
        return truth


@dataclass(frozen=True, slots=True, eq=False)
class History:
    """One session after its end: what the agent did, what the engine saw, what the gateway kept."""

    asked: Sequence[Asked]
    sampled: Mapping[int, Sampled]
    turns: Sequence[TurnRecord]
    segments: Sequence[Segment]


class Judge:
    """Judges histories of one model folder."""

    def __init__(self, folder: Path, family: Family, template: ChatTemplate, history_policy: HistoryPolicy) -> None:
        self._family = family
        self._history_policy = history_policy
        self._template = template
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        added = self._tokenizer.get_added_tokens_decoder()
        self._control = frozenset(added)
        texts = sorted((token.content for token in added.values()), key=len, reverse=True)
        # Tokens that swallow space make the space around a marker part of it.
        self._lookalike = re.compile("|".join(map(re.escape, texts)))
        closes = {family.facts.stop(has_calls, role) for has_calls in (False, True) for role in _ROLES}
        self._ends = {i for i, token in added.items() if token.content in {*family.stops, *closes}}
        self._stops = {token_id: token.content for token_id, token in added.items() if token.content in family.stops}

    def judge(self, history: History) -> Findings:
        """All checks over one history."""
        findings = Findings()
        turns = {turn.meta["passthrough"][SEED_FIELD]: turn for turn in history.turns}
        by_id = {turn.turn_id: turn for turn in history.turns}
        asked_of = {turn.turn_id: asked for asked in history.asked if (turn := turns.get(asked.seed)) is not None}
        for asked in history.asked:
            self._judge_answer(asked, turns, findings)
        for turn_id, asked in asked_of.items():
            turn = by_id[turn_id]
            self._judge_tokens(turn, by_id, history.sampled.get(asked.seed), findings)
            self._judge_place(asked, turn, turns, by_id, asked_of, findings)
            self._judge_prompt(asked, turn, by_id, findings)
            self._count(turn, findings)
        self._judge_segments(history, by_id, asked_of, findings)
        return findings

    def judge_restart(self, history: History, before: Asked, after: Asked, findings: Findings) -> None:
        """I1, I4: a gateway that knows a session from the ledger only makes the same prompt of the same words."""
        one, other = history.sampled.get(before.seed), history.sampled.get(after.seed)
        if one is None or other is None:
            findings.expect(one is other, "I6 a restarted gateway refuses what it took before", f"{after.answer}")
            return
        findings.counts["restarts"] += 1
        same = np.array_equal(one.prompt_token_ids, other.prompt_token_ids)
        findings.expect(same, "I1 a restarted gateway sends the same ids", f"{before.seed} and {after.seed}")

    # ---- answers ----

    def _judge_answer(self, asked: Asked, turns: Mapping[int, TurnRecord], findings: Findings) -> None:
        """I6: an answer for each request; only the template itself may refuse, in its own words."""
        findings.counts["requests"] += 1
        answer = asked.answer
        if isinstance(answer, Answered):
            turn = turns.get(asked.seed)
            if findings.expect(turn is not None, "I4 a delivered reply is recorded", f"seed {asked.seed}"):
                same = turn is not None and turn.reply == answer.message
                findings.expect(same, "I4 the delivered reply is the recorded one", f"{answer.message}")
        elif isinstance(answer, Refused):
            own_words = self._raises(asked.body)
            if answer.status == 400 and own_words is not None and own_words in answer.message:
                findings.counts["refused by the template"] += 1
            else:
                findings.expect(False, "I6 no history is refused", f"{answer.status} {answer.message}")

    def _raises(self, body: Message) -> str | None:
        """The template's own message if it refuses the conversation of a request."""
        try:
            self._render(_conversation(body))
        except TemplateRaised as error:
            return error.message
        return None

    # ---- tokens ----

    def _judge_tokens(
        self, turn: TurnRecord, by_id: Mapping[str, TurnRecord], sampled: Sampled | None, findings: Findings
    ) -> None:
        """I1: the ids the engine was sent are the recorded path and this turn's own; the ids it gave are recorded."""
        findings.counts["turns"] += 1
        path = [*_tokens_of_path(turn, by_id), *turn.prompt_token_ids.tolist()]
        if (
            not findings.expect(sampled is not None, "I1 every recorded turn was sampled", turn.turn_id)
            or sampled is None
        ):
            return
        findings.counts["prompt tokens"] += len(path)
        findings.counts["sampled tokens"] += len(turn.output_token_ids)
        findings.counts["drifted tokens"] += self._drift(turn)
        findings.expect(
            path == sampled.prompt_token_ids.tolist(),
            "I1 the engine's prompt is the recorded path and what this turn added",
            f"{turn.turn_id}: {len(sampled.prompt_token_ids)} sent, {len(path)} recorded",
        )
        findings.expect(
            turn.output_token_ids.tolist() == sampled.output_token_ids.tolist(),
            "I1 the recorded output is what the engine gave",
            f"{turn.turn_id}: {sampled.output_token_ids.tolist()} given, {turn.output_token_ids.tolist()} recorded",
        )
        findings.expect(
            np.array_equal(turn.output_logprobs, sampled.output_logprobs, equal_nan=True),
            "I1 log-probs are the engine's",
            turn.turn_id,
        )

    def _drift(self, turn: TurnRecord) -> int:
        """How many of a turn's sampled tokens a gateway would have got wrong that decodes and encodes again."""
        ids = turn.output_token_ids.tolist()
        text = self._tokenizer.decode(ids, skip_special_tokens=False)
        again = self._tokenizer.encode("\n" + text, add_special_tokens=False).ids
        filler = self._tokenizer.encode("\n", add_special_tokens=False).ids
        again = again[len(filler) :] if again[: len(filler)] == filler else again
        start = 0
        while start < min(len(ids), len(again)) and ids[start] == again[start]:
            start += 1
        end = 0
        while end < min(len(ids), len(again)) - start and ids[-1 - end] == again[-1 - end]:
            end += 1
        return len(ids) - start - end

    # ---- where a turn stands ----

    def _judge_place(
        self,
        asked: Asked,
        turn: TurnRecord,
        turns: Mapping[int, TurnRecord],
        by_id: Mapping[str, TurnRecord],
        asked_of: Mapping[str, Asked],
        findings: Findings,
    ) -> None:
        """I3, I6: a continuation extends the turn that it continues, or there is a reason that holds."""
        parent_id, reason = turn.attachment.parent_id, turn.attachment.segment_reason
        origin = None if asked.goes_on_from is None else turns.get(asked.goes_on_from.seed)
        if parent_id is not None:
            whole = [*_messages(asked_of[parent_id].body), by_id[parent_id].reply]
            deep_enough = asked.goes_on_from is None or len(whole) >= len(asked.goes_on_from.lines) + 1
            findings.expect(
                _begins_with(_messages(asked.body), whole),
                "I1 a turn extends a conversation that its request begins with",
                f"{turn.turn_id}: {whole} is no beginning of {_messages(asked.body)}",
            )
            findings.expect(deep_enough, "I3 the deepest match wins", turn.turn_id)
            hidden = [m for m in turn.added_messages if m["role"] in self._family.facts.hidden_roles and m["content"]]
            rule = f"I3 a message that the template hides is not appended in silence: {self._family.name}"
            findings.expect(not hidden, rule, f"{turn.turn_id}: {hidden}")
            return
        if asked.goes_on_from is None or origin is None:
            return
        findings.counts[f"reason {self._family.name}: {reason}"] += 1
        candidates = _continued_turns(asked, by_id, asked_of)
        excused = any(self._excuse(reason, asked, candidate, asked_of) for candidate in candidates)
        end = f"{origin.finish}, {origin.output_token_ids[-3:].tolist()}, {origin.reply}"
        findings.expect(
            excused,
            f"I3 an appending agent stays in its segment: {self._family.name}: {reason}",
            f"{turn.turn_id} ({turn.meta['certified_by']}, {turn.attachment.tier}) after {origin.turn_id} ({end}), "
            f"then {_messages(asked.body)[len(asked.goes_on_from.lines) + 1 :]}",
        )

    def _excuse(
        self, reason: SegmentReason | None, asked: Asked, origin: TurnRecord, asked_of: Mapping[str, Asked]
    ) -> str | None:
        """Why a new segment is right behind the turn `origin`; None if it is not."""
        facts = self._family.facts
        appended = _messages(asked.body)[len(_messages(asked_of[origin.turn_id].body)) + 1 :]
        roles = [message["role"] for message in appended]
        if reason in facts.new_segments:
            return facts.new_segments[reason]
        if reason in (SegmentReason.DROPPED_MESSAGE, SegmentReason.REWRITE_OTHER) and facts.hidden_roles & {*roles}:
            return "the template does not show a message of that role in its place"
        if reason is SegmentReason.DROPPED_MESSAGE and not self._shows(asked, appended):
            return "the template does not show what a message says"
        if reason is SegmentReason.REWRITE_REASONING and self._history_policy is HistoryPolicy.TEMPLATE:
            return "the run's policy follows the template, which drops old reasoning"
        if reason is SegmentReason.STOP_MISMATCH and len(origin.output_token_ids):
            last = self._stops.get(int(origin.output_token_ids[-1]))
            has_calls = bool(origin.reply.get("tool_calls"))
            if last is not None and last != facts.stop(has_calls, roles[0] if roles else "assistant"):
                return "the model stopped at another token than history has"
        return None

    def _shows(self, asked: Asked, appended: Sequence[Message]) -> bool:
        """Whether the texts of the last messages are in the render: as they are, and a word that nobody else says."""
        conversation = _conversation(asked.body)
        rendered = self._render(conversation)
        before = conversation.messages[: len(conversation.messages) - len(appended)]
        for i, message in enumerate(appended):
            text = _said(message.get("content"))
            if not text.strip():
                continue
            worded = (*before, *appended[:i], {**message, "content": _UNSAID}, *appended[i + 1 :])
            if text.strip() not in rendered or _UNSAID not in self._render(replace(conversation, messages=worded)):
                return False
        return True

    # ---- prompts ----

    def _judge_prompt(
        self, asked: Asked, turn: TurnRecord, by_id: Mapping[str, TurnRecord], findings: Findings
    ) -> None:
        """What was added is what the template adds: the tail of a whole render, encoded whole."""
        added = turn.prompt_token_ids.tolist()
        whole = turn.attachment.parent_id is None
        if not whole and str(turn.meta["certified_by"]).startswith("close"):
            self._judge_closed(asked, turn, by_id, findings)
            return
        if turn.attachment.segment_reason is SegmentReason.STOP_MISMATCH:
            num_kept = max(_num_kept(added, other, by_id) for other in by_id.values() if other is not turn)
            findings.expect(num_kept > 0, "I1 a replaced stop token is all that is replaced", turn.turn_id)
            whole, added = False, added[num_kept + 1 :]
        variants = list(self._conversations(asked, turn, by_id))
        if any(self._has_lookalikes(conversation) for conversation in variants):
            self._judge_lookalikes(turn, variants, added, whole, findings)
            return
        rendered = [ids for c in variants if (ids := self._encoded(c)) is not None]
        if not rendered:  # nothing to hold it against; what was certified serves where the template refuses
            findings.counts["certified where the template refuses"] += 1
            return
        fits = any(ids == added if whole else ids[len(ids) - len(added) :] == added for ids in rendered)
        if turn.meta["certified_by"] == "probe_unrendered":
            refused = all(self._encoded(conversation) is None for conversation in variants)
            findings.expect(refused, "I6 only what the template refuses goes unrendered", turn.turn_id)
            findings.counts["prompts behind a refusal"] += 1
            return
        kind = "a new segment's prompt is the whole render" if whole else "what is added is the tail of the render"
        text = self._tokenizer.decode(added, skip_special_tokens=False)
        shown = f"{turn.turn_id} ({turn.meta['certified_by']}): {text!r}"
        findings.counts["prompts held against the render"] += 1
        findings.expect(fits, f"I1 {kind}: {self._family.name}", shown)
        if turn.attachment.parent_id is not None:
            missing = _unsaid_words(turn, text)
            rule = f"I3 messages are appended where the template shows them: {self._family.name}"
            findings.expect(not missing, rule, f"{missing} in {shown}")

    def _judge_closed(
        self, asked: Asked, turn: TurnRecord, by_id: Mapping[str, TurnRecord], findings: Findings
    ) -> None:
        """Behind what closes a cut turn, and the token that ends it, stands the render's tail with all new messages."""
        closed = by_id[str(turn.attachment.parent_id)]
        last = int(closed.output_token_ids[-1])
        findings.expect(last not in self._stops, "I1 never two stop tokens in a row", f"{turn.turn_id} behind {last}")
        variants = list(self._conversations(asked, turn, by_id))
        if any(self._has_lookalikes(conversation) for conversation in variants):
            return
        added = turn.prompt_token_ids.tolist()
        rendered = [ids for c in variants if (ids := self._encoded(c)) is not None]
        tails = [added[i + 1 :] for i, token_id in enumerate(added) if token_id in self._ends]
        fits = [tail for tail in tails if any(ids[len(ids) - len(tail) :] == tail for ids in rendered)]
        shown = self._tokenizer.decode(max(fits, key=len, default=[]), skip_special_tokens=False)
        missing = _unsaid_words(turn, shown)
        findings.counts["closed turns held against the render"] += 1
        findings.expect(
            bool(fits) and not missing,
            f"I1 behind a closed turn stands the tail of the render: {self._family.name}",
            f"{turn.turn_id}: {self._tokenizer.decode(added, skip_special_tokens=False)!r}",
        )

    def _judge_lookalikes(
        self, turn: TurnRecord, variants: Sequence[Conversation], added: Sequence[int], whole: bool, findings: Findings
    ) -> None:
        """Control tokens in a prompt are the template's own: the same as if the lookalikes were other words."""
        ours = [token_id for token_id in added if token_id in self._control]
        fits = []
        for conversation in variants:
            ids = self._encoded(self._harmless(conversation))
            if ids is None:
                return  # the template tells these texts apart, so nothing can be said
            theirs = [token_id for token_id in ids if token_id in self._control]
            fits.append(theirs == ours if whole else theirs[len(theirs) - len(ours) :] == ours)
        if any(self._has_markup(conversation) for conversation in variants):
            return  # what models wrote is theirs: templates may take it for markup
        findings.counts["prompts with lookalikes"] += 1
        findings.expect(
            any(fits),
            f"I7 text that looks like control tokens stays text: {self._family.name}",
            f"{turn.turn_id}: {[self._tokenizer.id_to_token(i) for i in ours]}",
        )

    def _conversations(self, asked: Asked, turn: TurnRecord, by_id: Mapping[str, TurnRecord]) -> Iterator[Conversation]:
        """As sent, and with the reasoning that a harness dropped put back: in every reply, or in the first ones only
        (a gateway knows what it recorded on the path that a request continues). Any may be what the template is given.
        """
        sent = _conversation(asked.body)
        yield sent
        dropped = [
            i
            for i, (line, message) in enumerate(zip(asked.lines, sent.messages, strict=True))
            if line.sampled and line.message.get("reasoning_content") and not any(message.get(k) for k in _REASONING)
        ]
        for num_restored in range(len(dropped), 0, -1):
            messages = list(sent.messages)
            for i in dropped[:num_restored]:
                messages[i] = {**messages[i], "reasoning_content": asked.lines[i].message["reasoning_content"]}
            yield Conversation(tuple(messages), sent.tools, sent.template_arguments)
        # Siblings that differ in dropped reasoning only cannot be told apart: the recorded one counts.
        recorded = _recorded_messages(turn.attachment.follows_id, by_id)
        if dropped and recorded:
            messages = list(sent.messages)
            for i in dropped:
                if i < len(recorded) and recorded[i].get("reasoning_content"):
                    messages[i] = {**messages[i], "reasoning_content": recorded[i]["reasoning_content"]}
            yield Conversation(tuple(messages), sent.tools, sent.template_arguments)

    def _render(self, conversation: Conversation) -> str:
        return self._template.render(conversation)

    def _encoded(self, conversation: Conversation) -> list[int] | None:
        try:
            text = self._render(conversation)
        except TemplateRaised:
            return None
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def _has_lookalikes(self, conversation: Conversation) -> bool:
        return any(self._lookalike.search(text) for text in _texts([*conversation.messages, *conversation.tools]))

    def _has_markup(self, conversation: Conversation) -> bool:
        written = [message for message in conversation.messages if message["role"] == "assistant"]
        return any(self._lookalike.search(text) for text in _texts(written))

    def _harmless(self, conversation: Conversation) -> Conversation:
        messages = [
            message if message["role"] == "assistant" else _replaced(message, self._lookalike)
            for message in conversation.messages
        ]
        return Conversation(tuple(messages), conversation.tools, conversation.template_arguments)

    # ---- segments ----

    def _judge_segments(
        self,
        history: History,
        by_id: Mapping[str, TurnRecord],
        asked_of: Mapping[str, Asked],
        findings: Findings,
    ) -> None:
        """I2, I3: arrays are the records', and each sampled token that an agent saw trains exactly once."""
        trained: Counter[tuple[str, int]] = Counter()
        findings.counts["segments"] += len(history.segments)
        for segment in history.segments:
            expected_mask = np.zeros(segment.num_tokens, dtype=np.bool_)
            for span in segment.turns:
                turn = by_id[span.turn_id]
                same = segment.token_ids[span.start : span.stop].tolist() == _own_tokens(turn)
                findings.expect(same, "I1 a segment's tokens are the recorded ones", span.turn_id)
                logprobs = segment.rollout_logprobs[span.output_start : span.stop]
                same = np.array_equal(logprobs, turn.output_logprobs, equal_nan=True)
                findings.expect(same, "I1 a segment's log-probs are the recorded ones", span.turn_id)
                if span.trained:
                    expected_mask[span.output_start : span.stop] = True
                    trained.update((span.turn_id, i) for i in range(len(turn.output_token_ids)))
            same = np.array_equal(segment.loss_mask, expected_mask)
            findings.expect(same, "I3 only sampled tokens of trained turns carry loss", segment.segment_id)
        seen = _seen_turns(by_id, asked_of)
        wanted = {(turn_id, i) for turn_id in seen for i in range(len(by_id[turn_id].output_token_ids))}
        findings.counts["trained tokens"] += sum(trained.values())
        missing, extra = wanted - trained.keys(), trained.keys() - wanted
        findings.expect(not missing, "I3 every delivered sampled token trains", f"{sorted(missing)[:5]}")
        findings.expect(not extra, "I3 nothing else trains", f"{sorted(extra)[:5]}")
        twice = [token for token, count in trained.items() if count > 1]
        findings.expect(not twice, "I3 nothing trains twice", f"{twice[:5]}")

    def _count(self, turn: TurnRecord, findings: Findings) -> None:
        findings.counts[f"tier {turn.attachment.tier}"] += 1
        findings.counts[f"certified by {turn.meta['certified_by']}"] += 1
        findings.counts[f"finish {turn.finish.reason}"] += 1
        if turn.attachment.segment_reason is not None:
            findings.counts[f"segment {turn.attachment.segment_reason}"] += 1


def _seen_turns(by_id: Mapping[str, TurnRecord], asked_of: Mapping[str, Asked]) -> set[str]:
    """Turns whose reply reached the agent, and turns that a later turn goes on from. Of an agent that went away, the
    gateway alone can say whether it was gone before the last byte."""
    seen = {turn_id for turn_id, asked in asked_of.items() if isinstance(asked.answer, Answered)}
    seen |= {turn_id for turn_id, turn in by_id.items() if turn.delivered_at is not None}
    for turn in by_id.values():
        seen |= {turn.attachment.parent_id, turn.attachment.follows_id} - {None}  # type: ignore[arg-type]
    return seen


def _continued_turns(asked: Asked, by_id: Mapping[str, TurnRecord], asked_of: Mapping[str, Asked]) -> list[TurnRecord]:
    """Turns that a request may be said to go on from, and that reach at least as far as the agent says: siblings that
    said the same cannot be told apart in a replay, and what an agent inserts may be what a model said elsewhere."""
    if asked.goes_on_from is None:
        return []
    found: list[TurnRecord] = []
    for turn_id, other in asked_of.items():
        whole = [*_messages(other.body), by_id[turn_id].reply]
        deep = len(whole) >= len(asked.goes_on_from.lines) + 1
        if deep and other is not asked and other.root.same(asked.root) and _begins_with(_messages(asked.body), whole):
            found.append(by_id[turn_id])
    return found


def _tokens_of_path(turn: TurnRecord, by_id: Mapping[str, TurnRecord]) -> list[int]:
    """All recorded ids before a turn."""
    parts: list[list[int]] = []
    parent_id = turn.attachment.parent_id
    while parent_id is not None:
        parent = by_id[parent_id]
        parts.append(_own_tokens(parent))
        parent_id = parent.attachment.parent_id
    return [token_id for part in reversed(parts) for token_id in part]


def _unsaid_words(turn: TurnRecord, text: str) -> list[str]:
    """The longest word of each message that a turn added, if `text` does not have it."""
    new = [_said(message.get("content")) for message in turn.added_messages]
    words = [max(re.findall(r"\w+", said), key=len, default="") for said in new]
    return [word for word in words if word not in text]


def _num_kept(prompt: Sequence[int], turn: TurnRecord, by_id: Mapping[str, TurnRecord]) -> int:
    """How many recorded tokens a prompt keeps of a turn's path if it replaces the last one; 0 if that does not hold."""
    recorded = [*_tokens_of_path(turn, by_id), *_own_tokens(turn)]
    return len(recorded) - 1 if list(prompt[: len(recorded) - 1]) == recorded[:-1] else 0


def _recorded_messages(turn_id: str | None, by_id: Mapping[str, TurnRecord]) -> list[Message]:
    """The conversation of a turn as recorded, its reply included."""
    parts: list[list[Message]] = []
    while turn_id is not None:
        turn = by_id[turn_id]
        parts.append([*turn.added_messages, turn.reply])
        turn_id = turn.attachment.parent_id
    return [message for part in reversed(parts) for message in part]


def _own_tokens(turn: TurnRecord) -> list[int]:
    return [*turn.prompt_token_ids.tolist(), *turn.output_token_ids.tolist()]


def _messages(body: Message) -> list[Message]:
    return list(body["messages"])


def _conversation(body: Message) -> Conversation:
    arguments = dict(body.get("chat_template_kwargs") or {})
    if "reasoning_effort" in body:
        arguments["reasoning_effort"] = body["reasoning_effort"]
    return Conversation(tuple(body["messages"]), tuple(body.get("tools") or ()), arguments)


def _begins_with(messages: Sequence[Message], whole: Sequence[Message]) -> bool:
    return len(whole) <= len(messages) and all(
        _meaning(one) == _meaning(other) for one, other in zip(whole, messages, strict=False)
    )


def _meaning(message: Message) -> Any:
    """What a message says, whatever its spelling; reasoning aside."""
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(part["text"] for part in content)
    calls = [
        (call["function"]["name"], _value(call["function"]["arguments"])) for call in message.get("tool_calls") or ()
    ]
    return (message["role"], content or "", calls, message.get("name"))


def _value(arguments: Any) -> Any:
    if not isinstance(arguments, str):
        return arguments
    try:
        return json.loads(arguments)
    except ValueError:
        return arguments


def _said(content: Any) -> str:
    """The text of a message, also where it comes in parts."""
    if isinstance(content, list):
        return "\n".join(part["text"] for part in content if part.get("type") == "text")
    return content if isinstance(content, str) else ""


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from _texts(entry)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _texts(entry)


def _replaced(message: Message, pattern: re.Pattern[str]) -> Message:
    changed = copy.deepcopy(message)
    if isinstance(changed.get("content"), str):
        changed["content"] = pattern.sub("x", changed["content"])
    elif isinstance(changed.get("content"), list):
        for part in changed["content"]:
            part["text"] = pattern.sub("x", part["text"])
    return changed
