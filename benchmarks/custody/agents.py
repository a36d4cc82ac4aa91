"""The agents of a chaos run: plain clients that only know how to ask again.

An agent opens a session, has a few turns (streamed or not, with calls of a tool), leaves now and then in the middle of
a reply and asks the same again, and ends its session with a reward; then it takes the next one. A request that fails
is sent again as the SDKs do it, unchanged and without a header that says so: on a lost connection, a client's own
timeout, 408, 409, 429 and 5xx, with growing pauses. What an agent still sees fail after that is a failure.

Every reply that an agent accepted goes to a journal, with the ids that it was told; a prompt that is not the last one
with its reply and what the template adds (told independently) is a failure too.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from benchmarks.custody.oracle import Script
from benchmarks.custody.place import TOOL, Place, Spelling

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": TOOL,
            "description": "",
            "parameters": {"type": "object", "properties": {"expression": {"type": "string"}}},
        },
    }
]
_PASSING = frozenset((408, 409, 429, 500, 502, 503, 504))
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.25, 4.0
_WORDS = [
    "look",
    "again",
    "at",
    "the",
    "next",
    "file",
    "and",
    "count",
    "the",
    "lines",
    "then",
    "add",
    "them",
    "up",
    "please",
    "before",
    "you",
    "answer",
]


@dataclass(frozen=True, slots=True)
class Habits:
    """How agents are. leaves: share of requests that are left in the middle. max_retries: as of an SDK's client.

    timeout_seconds: of one attempt, their client's own.
    """

    fewest_turns: int = 2
    most_turns: int = 6
    streams: float = 0.5
    leaves: float = 0.05
    max_retries: int = 12
    timeout_seconds: float = 30.0
    thinks_seconds: float = 1.0


@dataclass(slots=True)
class Account:
    """What all agents saw. recoveries are read from `replies`: (start of the attempt, end)."""

    counts: Counter[str] = field(default_factory=Counter)
    retries: Counter[str] = field(default_factory=Counter)
    failures: list[dict[str, Any]] = field(default_factory=list)
    replies: list[tuple[float, float]] = field(default_factory=list)

    def fail(self, session_id: str, kind: str, detail: str) -> None:
        """Something that no agent should see."""
        self.failures.append({"at": time.time(), "session": session_id, "kind": kind, "detail": detail[:2000]})


class AgentsFailure(Exception):
    """An agent's request that failed for good."""


@dataclass(frozen=True, slots=True)
class Reply:
    """A reply as its agent got it."""

    message: Mapping[str, Any]
    finish_reason: str
    prompt_ids: Sequence[int]
    token_ids: Sequence[int]


class Lost(Exception):
    """An attempt that may be repeated; the text says why."""


class Witness:
    """Holds every reply that was accepted against what it must be, and writes it to the journal of what was seen."""

    def __init__(self, place: Place, account: Account) -> None:
        self._account = account
        self._spelling = Spelling(place)
        self._script = Script.load(place.script)
        self._seen = place.seen.open("a", buffering=1)

    def close(self) -> None:
        """Close the journal."""
        self._seen.close()

    def next_prompt(self, reply: Reply, answer: Mapping[str, Any]) -> list[int]:
        """The ids of the prompt that follows a reply and the message that answers it."""
        return [*reply.prompt_ids, *reply.token_ids, *self._spelling.appended(answer["role"], answer["content"])]

    def accept(self, session_id: str, step: int, reply: Reply, expected: Sequence[int] | None) -> None:
        """The prompt is what it must be, and the reply is one that the engine could give to it."""
        prompt, token_ids = list(reply.prompt_ids), list(reply.token_ids)
        if expected is not None and prompt != expected:
            self._account.fail(session_id, "prompt", f"turn {step}: expected {expected}, got {prompt}")
        if len(token_ids) < 2 or self._script.reply(prompt, token_ids[:2]) != token_ids:
            self._account.fail(session_id, "reply", f"turn {step}: {token_ids} is no reply to {prompt}")
        wanted = "tool_calls" if reply.message.get("tool_calls") else "stop"
        if reply.finish_reason != wanted:
            self._account.fail(session_id, "finish", f"turn {step}: {reply.finish_reason!r}, expected {wanted!r}")
        self._account.counts["turns"] += 1
        self._account.counts["tokens"] += len(token_ids)
        self.write(session_id, reply)

    def write(self, session_id: str, reply: Reply) -> None:
        """A reply that was read, whether or not it was made use of."""
        line = {"at": time.time(), "session": session_id, "prompt": reply.prompt_ids, "ids": reply.token_ids}
        self._seen.write(json.dumps(line, separators=(",", ":")) + "\n")

    def write_left(self, session_id: str) -> None:
        """An agent left a request of a session: nobody knows what of it arrived."""
        self._seen.write(json.dumps({"left": session_id}) + "\n")


class Agents:
    """All agents of a run: `run` one of them. Sessions come in groups of `group_size`."""

    def __init__(
        self,
        place: Place,
        gateway_url: str,
        http: aiohttp.ClientSession,
        *,
        group_size: int,
        habits: Habits,
        prefix: str = "",
    ) -> None:
        self.account = Account()
        self._url = gateway_url
        self._http = http
        self._group_size = group_size
        self._habits = habits
        self._prefix = prefix
        self._witness = Witness(place, self.account)
        self._sessions = 0

    def close(self) -> None:
        """Close the journal."""
        self._witness.close()

    async def run(self, seed: int, *, enough: asyncio.Event) -> None:
        """One agent: session after session until it is `enough`, and then as many as its group lacks."""
        rng = random.Random(seed)
        while not enough.is_set() or self._sessions % self._group_size:
            number = self._sessions
            self._sessions += 1
            try:
                await self._session(number, rng)
            except AgentsFailure as error:
                self.account.fail(self._name(number), "request", str(error))

    def _name(self, number: int) -> str:
        return f"{self._prefix}s-{number:05d}"

    async def _session(self, number: int, rng: random.Random) -> None:
        session_id = self._name(number)
        group = f"{self._prefix}g-{number // self._group_size:05d}"
        body = {"session_id": session_id, "group": group, "group_size": self._group_size}
        await self._control("POST", "/sessions", body, rng)
        await self._converse(session_id, rng)
        end = {"reward": round(rng.random(), 3), "outcome": "completed"}
        await self._control("POST", f"/sessions/{session_id}/finish", end, rng)
        self.account.counts["sessions"] += 1

    async def _converse(self, session_id: str, rng: random.Random) -> None:
        messages = first_messages(session_id, rng)
        expected: list[int] | None = None
        for step in range(rng.randint(self._habits.fewest_turns, self._habits.most_turns)):
            reply = await self._turn(session_id, messages, rng)
            self._witness.accept(session_id, step, reply, expected)
            answer = next_message(reply, rng)
            messages += [reply.message, answer]
            expected = self._witness.next_prompt(reply, answer)
            await asyncio.sleep(rng.random() * 2 * self._habits.thinks_seconds)

    async def _turn(self, session_id: str, messages: Sequence[Any], rng: random.Random) -> Reply:
        """One reply; the same body as often as it takes."""
        body = {"messages": messages, "tools": TOOLS, "return_token_ids": True}
        if rng.random() < self._habits.streams:
            body |= {"stream": True}
        url = f"{self._url}/sessions/{session_id}/v1/chat/completions"
        if rng.random() < self._habits.leaves:
            await self._leave(session_id, url, body, rng)
        for attempt in range(self._habits.max_retries + 1):
            began = time.time()
            try:
                reply = await self._ask(url, body)
            except Lost as lost:
                await self._pause(attempt, lost, rng, session_id)
            else:
                self.account.replies.append((began, time.time()))
                return reply
        raise AssertionError("unreachable")  # `_pause` raises on the last attempt

    async def _leave(self, session_id: str, url: str, body: Mapping[str, Any], rng: random.Random) -> None:
        """Ask, go away in the middle, and come back a little later."""
        self.account.counts["left"] += 1
        try:
            async with asyncio.timeout(0.02 + rng.random()):
                self._witness.write(session_id, await self._ask(url, body))
                # The reply came before the agent left: for the gateway it is delivered, and the next one is a new one.
                self.account.counts["left_too_late"] += 1
        except (TimeoutError, Lost):
            self._witness.write_left(session_id)
            await asyncio.sleep(rng.random() * 2)

    async def _ask(self, url: str, body: Mapping[str, Any]) -> Reply:
        timeout = aiohttp.ClientTimeout(total=self._habits.timeout_seconds)
        try:
            async with self._http.post(url, json=body, timeout=timeout) as answer:
                if answer.status != 200:
                    raise refused(answer.status, await answer.text())
                return await gathered_reply(answer) if body.get("stream") else whole_reply(await answer.json())
        except TimeoutError as error:
            raise Lost("timeout") from error
        except aiohttp.ClientPayloadError as error:
            raise Lost("broken off") from error
        except aiohttp.ClientError as error:
            raise Lost(type(error).__name__) from error

    async def _control(self, method: str, path: str, body: Mapping[str, Any], rng: random.Random) -> Any:
        """A call of the agents' harness, repeated like any other."""
        for attempt in range(self._habits.max_retries + 1):
            try:
                timeout = aiohttp.ClientTimeout(total=self._habits.timeout_seconds)
                async with self._http.request(method, self._url + path, json=body, timeout=timeout) as answer:
                    if answer.status < 300:
                        return await answer.json()
                    raise refused(answer.status, await answer.text())
            except (aiohttp.ClientError, TimeoutError) as error:
                await self._pause(attempt, Lost(type(error).__name__), rng, path)
            except Lost as lost:
                await self._pause(attempt, lost, rng, path)
        raise AssertionError("unreachable")

    async def _pause(self, attempt: int, lost: Lost, rng: random.Random, what: str) -> None:
        self.account.retries[str(lost)[:60]] += 1
        if attempt == self._habits.max_retries:
            raise AgentsFailure(f"{what}: {lost} after {attempt} retries") from lost
        pause = min(_FIRST_PAUSE_SECONDS * 2**attempt, _LONGEST_PAUSE_SECONDS)
        await asyncio.sleep(pause * (1 - 0.25 * rng.random()))


def first_messages(session_id: str, rng: random.Random) -> list[Any]:
    """What a conversation begins with; it names its session."""
    return [
        {"role": "system", "content": "You are careful."},
        {"role": "user", "content": f"This is {session_id}: {_sentence(rng)}"},
    ]


def next_message(reply: Reply, rng: random.Random) -> dict[str, Any]:
    """What an agent says to a reply: a tool's result where it was a call."""
    if calls := reply.message.get("tool_calls"):
        return {"role": "tool", "tool_call_id": calls[0]["id"], "content": str(rng.randrange(100))}
    return {"role": "user", "content": _sentence(rng)}


def refused(status: int, text: str) -> Exception:
    """What another status than 200 is to an agent: something to repeat, or a failure."""
    if status in _PASSING:
        return Lost(f"{status} {text[:300]}")
    return AgentsFailure(f"{status} {text[:1000]}")


def whole_reply(body: Mapping[str, Any]) -> Reply:
    """A reply that came in one piece."""
    choice = body["choices"][0]
    message = {name: value for name, value in choice["message"].items() if value is not None}
    return Reply(message, choice["finish_reason"], body["prompt_token_ids"], choice["token_ids"])


async def gathered_reply(answer: aiohttp.ClientResponse, *, on_piece: Callable[[], None] = lambda: None) -> Reply:
    """A streamed reply as one; raises Lost for one without an end. What comes behind the end nobody waits for."""
    content, finish_reason, ended = "", None, False
    calls: list[Any] = []
    token_ids: list[int] = []
    prompt_ids: Sequence[int] = []
    async for line in answer.content:
        if not line.startswith(b"data: "):
            continue
        if line.strip() == b"data: [DONE]":
            ended = True
            break
        on_piece()
        event = json.loads(line[6:])
        if "error" in event:
            raise Lost(f"error in the stream: {event['error'].get('message')}")
        prompt_ids = event.get("prompt_token_ids") or prompt_ids
        for choice in event["choices"]:
            finish_reason = choice["finish_reason"] or finish_reason
            token_ids += choice.get("token_ids") or ()
            content += choice["delta"].get("content") or ""
            for delta in choice["delta"].get("tool_calls") or ():
                if "id" in delta:
                    function = {"name": delta["function"]["name"], "arguments": ""}
                    calls.append({"id": delta["id"], "type": "function", "function": function})
                calls[delta["index"]]["function"]["arguments"] += delta["function"].get("arguments") or ""
    if not ended or finish_reason is None:
        raise Lost("stream without an end")
    with suppress(aiohttp.ClientError, TimeoutError):
        await answer.read()
    message: dict[str, Any] = {"role": "assistant", "content": content}
    if calls:
        message["tool_calls"] = calls
    return Reply(message, finish_reason, prompt_ids, token_ids)


def _sentence(rng: random.Random) -> str:
    return " ".join(rng.choice(_WORDS) for _ in range(rng.randint(4, 16)))
