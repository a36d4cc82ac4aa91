"""What a turn costs at a long history, and a conversation over its whole length: CPU of the gateway's processes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import msgspec

from benchmarks.load.contenders import Running
from benchmarks.load.script import Model, Workload, bytes_a_token
from benchmarks.load.stage import Stage
from gateway.contracts.errors import EngineUnavailable
from gateway.tito.conversation import Conversation

_SETTLE_SECONDS = 0.2
_TIMEOUT_SECONDS = 600.0


class _Body(msgspec.Struct):
    """The least that any proxy must read of a request: where its messages are."""

    messages: list[msgspec.Raw]


@dataclass(frozen=True, slots=True)
class AtLength:
    """A turn behind so long a history. parse_us: of its body by a fast parser that leaves messages unread."""

    contender: str
    history_tokens: int
    body_bytes: int
    cpu_us: float
    parse_us: float
    p50_ms: float

    @property
    def net_us(self) -> float:
        """Without what nobody can avoid."""
        return self.cpu_us - self.parse_us


def at_length(stage: Stage, contender: Running, history_tokens: int, *, sessions: int, history_turns: int) -> AtLength:
    """The stage's last turns; its first `history_turns` bring the history along, and do not count."""
    workload = replace(stage.workload, history_tokens=history_tokens, history_turns=history_turns)
    # What is said in the last of them comes with the turn behind it.
    first = history_turns + 1
    body = stage.folder / "body"
    generator = stage.generator(
        contender,
        *(
            "--sessions",
            str(sessions),
            "--conversations",
            str(sessions),
            "--wait-after",
            str(first),
            "--dump",
            str(body),
        ),
        workload=workload,
    )
    try:
        generator.wait_until_waiting()
        time.sleep(_SETTLE_SECONDS)
        before = contender.cpu_seconds()
        generator.go_on()
    except EngineUnavailable:
        generator.close()
        raise
    played = generator.result(timeout_seconds=_TIMEOUT_SECONDS)
    time.sleep(_SETTLE_SECONDS)
    cpu_seconds = contender.cpu_seconds() - before
    later = played.records[played.records["turn"] > first]
    if played.account["errors"] or len(later) != sessions * (workload.turns - first):
        raise EngineUnavailable(f"{contender.name} at {history_tokens} tokens: {played.account}")
    return AtLength(
        contender=contender.name,
        history_tokens=history_tokens,
        body_bytes=body.stat().st_size,
        cpu_us=1e6 * cpu_seconds / len(later),
        parse_us=parse_us(body.read_bytes()),
        p50_ms=1e3 * statistics.median(later["latency"]),
    )


def parse_us(body: bytes) -> float:
    """CPU microseconds of the cheapest whole parse of a body: msgspec, messages as raw JSON; median of many."""
    decoder = msgspec.json.Decoder(_Body)
    times = []
    for _ in range(50):
        began = time.perf_counter()
        decoder.decode(body)
        times.append(time.perf_counter() - began)
    return 1e6 * statistics.median(times)


@dataclass(frozen=True, slots=True)
class WholeConversation:
    """One long conversation. cpu_seconds: of the contender, for all turns. turn_us: a turn's, by tenths of its turns.

    encode_seconds: CPU of one `tokenizers` encode of its final text.
    """

    contender: str
    turns: int
    final_tokens: int
    cpu_seconds: float
    encode_seconds: float
    turn_us: Sequence[float]

    @property
    def encodes(self) -> float:
        """The whole conversation's cost in encodes of its final text."""
        return self.cpu_seconds / self.encode_seconds


def whole_conversation(
    stage: Stage, contender: Running, *, turns: int, tokens: int, sessions: int = 2, steps: int = 10
) -> WholeConversation:
    """`turns` turns that grow to about `tokens` tokens, `sessions` of them beside each other, each counted alone."""
    workload = long_workload(stage.model, stage.workload, turns=turns, tokens=tokens)
    body = stage.folder / "body"
    every = turns // steps
    generator = stage.generator(
        contender,
        *("--sessions", str(sessions), "--conversations", str(sessions), "--wait-every", str(every)),
        *("--dump", str(body)),
        workload=workload,
    )
    marks = [contender.cpu_seconds()]
    try:
        for _ in range(steps - 1):
            generator.wait_until_waiting()
            time.sleep(_SETTLE_SECONDS)
            marks.append(contender.cpu_seconds())
            generator.go_on()
    except EngineUnavailable:
        generator.close()
        raise
    played = generator.result(timeout_seconds=_TIMEOUT_SECONDS)
    time.sleep(_SETTLE_SECONDS)
    marks.append(contender.cpu_seconds())
    if played.account["errors"] or len(played.records) != sessions * turns:
        raise EngineUnavailable(f"{contender.name}, {turns} turns: {played.account}")
    final_tokens, encode_seconds = encode_cost(stage.model, body)
    each = [(after - before) / sessions for before, after in pairwise(marks)]
    return WholeConversation(
        contender=contender.name,
        turns=turns,
        final_tokens=final_tokens,
        cpu_seconds=sum(each),
        encode_seconds=encode_seconds,
        turn_us=tuple(1e6 * seconds / every for seconds in each),
    )


def long_workload(model: Model, workload: Workload, *, turns: int, tokens: int) -> Workload:
    """As the stage's, with results of such a length that all turns together come to about `tokens`."""
    wanted = tokens / turns - workload.reply_tokens - 8
    return replace(workload, turns=turns, message_bytes=max(60, round(wanted * bytes_a_token(model))))


def encode_cost(model: Model, body: Path) -> tuple[int, float]:
    """Tokens of the text that a request's messages render to, and CPU seconds of encoding it once."""
    request = msgspec.json.decode(body.read_bytes())
    text = model.template.render(Conversation(tuple(request["messages"]), tuple(request.get("tools", ()))))
    times = []
    for _ in range(5):
        began = time.process_time()
        token_ids = model.encode(text)
        times.append(time.process_time() - began)
    return len(token_ids), statistics.median(times)


def line(each: AtLength | WholeConversation) -> str:
    """One measurement, for the terminal."""
    if isinstance(each, AtLength):
        return (
            f"{each.contender:<12} {each.history_tokens:>7} tokens, {each.body_bytes:>7} bytes: "
            f"{each.cpu_us:7.0f} us CPU, {each.parse_us:5.0f} of them the parse, p50 {each.p50_ms:.2f} ms\n"
        )
    return (
        f"{each.contender:<12} {each.turns} turns, {each.final_tokens} tokens: {each.cpu_seconds:.3f} s CPU, "
        f"one encode {each.encode_seconds:.3f} s, {each.encodes:.2f} encodes\n"
    )
