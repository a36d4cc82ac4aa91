"""OpenAI's chat completions: bytes → TurnRequest, and pieces of a turn → `chat.completion` or its chunks.

What we know is typed; unknown top-level fields go on to the engine as they are (I8), and unknown keys inside messages
and tools stay in place. No field of a request can switch off or forge what is recorded (I7): fields that would, are
left out of what the engine gets and named in `ignored_fields`.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence

from gateway.contracts.errors import InvalidRequest, VerbatimError
from gateway.contracts.experts import RoutedExperts
from gateway.contracts.generation import FinishReason, JsonValue, TokenIds, TopLogprob
from gateway.contracts.replies import ContentDelta, ReasoningDelta, ReplyDelta, ToolCallDelta
from gateway.wire import sse
from gateway.wire.errors import error_body
from gateway.wire.fields import check_nesting, flag, inside, is_shallow_text, kind_of, objects, optional, within
from gateway.wire.json_text import Base64, Spliced, dump_json, load_json_list, load_json_object, number_texts
from gateway.wire.known_texts import KnownText, KnownTexts, known_text, longer_text
from gateway.wire.media import have_parts, take_media
from gateway.wire.reply import FinishedChoice, ReplyTokens
from gateway.wire.request import PROTECTED, TurnRequest, Wanted, protected_names
from gateway.wire.sampling import SAMPLING_EXTRA, TYPED_SAMPLING, sampling_fields
from gateway.wire.token_texts import Spelling, spelling_json
from gateway.wire.tool_lists import shared_tools

_KNOWN = frozenset(
    (
        "chat_template_kwargs", "documents", "logprobs", "messages", "model", "n", "parallel_tool_calls",
        "reasoning_effort", "response_format", "return_routed_experts", "return_token_ids", "stream", "stream_options",
        "tool_choice", "tools", "top_logprobs",
    )
)  # fmt: skip

_READ_HERE = _KNOWN | TYPED_SAMPLING | SAMPLING_EXTRA | PROTECTED
"""All else goes on to the engine."""

_NUMBERS = frozenset((bool, int, float))

MAX_CHOICES = 128
"""Of one prompt, in every dialect."""

MAX_TOP_LOGPROBS = 20
"""OpenAI's, and what vLLM grants unless it was started with another limit. SGLang knows none, but each of them costs
memory for every token, in the engine's streams and in the record."""


def parse_chat_request(body: bytes, known: KnownTexts | None = None) -> TurnRequest:
    """Read a request; raises InvalidRequest naming the field that is wrong. known: earlier texts of its session."""
    if known is not None and (found := known.find(body)) is not None:
        longer = _longer_request(*found, body)
        if longer is not None:
            known.keep(longer, found[0])
            return longer.request
    fields = load_json_object(body)
    check_nesting(fields, body)
    request = chat_request(fields, body=body)
    if known is not None and (new := known_text(body, fields, request)) is not None:
        known.keep(new, None)
    return request


def _longer_request(known: KnownText, added: bytes, body: bytes) -> KnownText | None:
    """A request that adds messages to a known one; None where it must be read as a whole."""
    messages = load_json_list(b"[0" + added + b"]") if is_shallow_text(added) else None
    if not messages or len(messages) < 2:
        return None
    first = len(known.request.messages)
    new = _checked_messages(messages[1:], first)
    if have_parts(new):
        taken = take_media(new, first)
        if taken.has_media:
            return None
        new = taken.messages
    return longer_text(known, body, added, new)


def chat_request(fields: Mapping[str, JsonValue], *, body: bytes) -> TurnRequest:
    """A request from chat's fields, which other dialects are translated into; `body` is what the client sent."""
    messages, blobs, has_media = take_media(_messages(fields))
    tools = shared_tools(objects(fields, "tools"))
    for name, now in (("functions", "tools"), ("function_call", "tool_choice")):
        if fields.get(name) is not None:
            raise InvalidRequest(f"{name}: {now} has replaced it, and it is not read here")
    passthrough = {name: value for name, value in fields.items() if name not in _READ_HERE}
    return TurnRequest(
        model=optional(fields, "model", str),
        messages=messages,
        tools=tools,
        calls_tools=bool(tools) and fields.get("tool_choice") != "none",
        required_calls=required_calls(fields.get("tool_choice"), tools),
        several_calls=fields.get("parallel_tool_calls") is not False,
        template_arguments=_template_arguments(fields),
        sampling=sampling_fields(fields),
        num_choices=_num_choices(fields),
        stream=flag(fields, "stream"),
        wanted=_wanted(fields),
        passthrough=passthrough,
        ignored_fields=protected_names(fields),
        digest=hashlib.sha256(body).hexdigest(),
        num_bytes=len(body),
        blobs=blobs,
        has_media=has_media,
    )


class ChatWriter:
    """`chat.completion` and its chunks; captured arrays are in them only where asked for (I7)."""

    def __init__(self, wanted: Wanted, turn_id: str, model: str) -> None:
        self._wanted = wanted
        self._head = {"id": f"chatcmpl-{turn_id}", "created": int(time.time()), "model": model}

    def whole(self, choices: Sequence[FinishedChoice]) -> JsonValue:
        """The whole reply."""
        written: list[JsonValue] = []
        for i, choice in enumerate(choices):
            written.append(self._choice(i, choice))
        body: dict[str, JsonValue] = {
            **choices[0].reply_fields,
            **self._head,
            "object": "chat.completion",
            "choices": written,
            "usage": _usage(choices),
        }
        if self._wanted.token_ids:
            body["prompt_token_ids"] = choices[0].prompt_token_ids
        return body

    def opening(self, index: int, prompt_token_ids: TokenIds) -> Iterator[bytes]:
        """The first chunk of a choice: the role, and the prompt's ids if asked for."""
        chunk = self._chunk(index, {"role": "assistant", "content": "", "refusal": None})
        if self._wanted.token_ids:
            chunk["prompt_token_ids"] = prompt_token_ids
        yield sse.event(chunk)

    def progress(self, index: int, deltas: Sequence[ReplyDelta], tokens: ReplyTokens) -> Iterator[bytes]:
        """Chunks for new text; the first carries the new tokens' arrays, alone if the text is held back yet."""
        captured = _captured(tokens, self._wanted)
        if not deltas and not captured:
            return
        for body in [_delta(delta) for delta in deltas] or [{}]:
            chunk = self._chunk(index, body)
            chunk["choices"][0] |= captured
            captured = {}
            yield sse.event(chunk)

    def closing(self, index: int, choice: FinishedChoice) -> Iterator[bytes]:
        """The last chunk of a choice: its finish reason."""
        last = self._chunk(index, {}, finish_reason=_finish_reason(choice))
        last["choices"][0] |= _closing_fields(choice, self._wanted)
        yield from sse.event_pieces({**choice.reply_fields, **last})

    def end(self, choices: Sequence[FinishedChoice]) -> Iterator[bytes]:
        """Usage where asked for, and the stream's end."""
        if self._wanted.usage_chunk:
            usage = _usage(choices)
            yield sse.event({**self._head, "object": "chat.completion.chunk", "choices": [], "usage": usage})
        yield sse.DONE

    def failure(self, error: VerbatimError) -> Iterator[bytes]:
        """An error after the first token: a frame of its own, and no end."""
        yield sse.event(error_body(error))

    def _choice(self, index: int, choice: FinishedChoice) -> dict[str, JsonValue]:
        wanted, message = self._wanted, choice.reply.message()
        message["refusal"] = None
        body: dict[str, JsonValue] = {
            "index": index,
            "message": message,
            "logprobs": None,
            "finish_reason": _finish_reason(choice),
        }
        if wanted.token_ids or wanted.logprobs:
            body |= _captured(choice.tokens, wanted)
        if wanted.routed_experts or choice.meta_info:
            body |= _closing_fields(choice, wanted)
        return body

    def _chunk(
        self, index: int, delta: Mapping[str, JsonValue], *, finish_reason: str | None = None
    ) -> dict[str, JsonValue]:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        usage = {"usage": None} if self._wanted.usage_chunk else {}  # as in OpenAI's API: its own chunk has it
        return {**self._head, "object": "chat.completion.chunk", "choices": [choice], **usage}


def _delta(delta: ReplyDelta) -> dict[str, JsonValue]:
    """More text, or more of one tool call; a call's id, type and name come with its first delta only."""
    if isinstance(delta, ContentDelta):
        return {"content": delta.text}
    if isinstance(delta, ReasoningDelta):
        return {"reasoning_content": delta.text}
    return {"tool_calls": [_call_delta(delta)]}


def _call_delta(delta: ToolCallDelta) -> dict[str, JsonValue]:
    function = (
        {"arguments": delta.arguments} if delta.name is None else {"name": delta.name, "arguments": delta.arguments}
    )
    call: dict[str, JsonValue] = {"index": delta.index, "function": function}
    return call if delta.call_id is None else call | {"id": delta.call_id, "type": "function"}


def _finish_reason(choice: FinishedChoice) -> str:
    if choice.finish.reason is not FinishReason.STOP:
        return "length"
    return "tool_calls" if choice.reply.tool_calls else "stop"


def _usage(choices: Sequence[FinishedChoice]) -> dict[str, JsonValue]:
    """Their prompt is one, and counts once."""
    prompt_tokens, cached_tokens = choices[0].usage.prompt_tokens, choices[0].usage.cached_tokens
    completion_tokens = reasoning_tokens = 0
    for choice in choices:
        completion_tokens += choice.usage.completion_tokens
        reasoning_tokens += choice.usage.reasoning_tokens
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": reasoning_tokens},
    }


def experts_body(experts: RoutedExperts) -> dict[str, JsonValue]:
    """Routing rows as `{data, dtype, shape, start}`: `data` is base64 of the stored small integers in C order.

    It stands there as `Base64`, for the rows of a long turn are hundreds of megabytes.
    """
    return {
        "data": Base64(experts.ids, experts.ids.dtype.newbyteorder("<")),
        "dtype": experts.ids.dtype.name,
        "shape": list(experts.ids.shape),
        "start": experts.start,
    }


def _captured(tokens: ReplyTokens, wanted: Wanted) -> dict[str, JsonValue]:
    fields: dict[str, JsonValue] = {}
    if not len(tokens.token_ids):
        return fields
    if wanted.token_ids:
        fields["token_ids"] = tokens.token_ids
    if wanted.logprobs:
        fields["logprobs"] = {"content": logprob_entries(tokens), "refusal": None}
    return fields


def logprob_entries(tokens: ReplyTokens) -> list[JsonValue]:
    """One entry a token, as OpenAI spells them; needs the tokens' texts.

    They are JSON text already: as objects, those of a long reply cost more than all else about it.
    """
    numbers = number_texts(tokens.logprobs)  # I9: missing stays missing
    ids = tokens.token_ids.tolist()
    return [
        Spliced(b'{%b,"top_logprobs":[%b]}' % (_entry(text, tokens.spell(token_id), number), _tops(tokens, tops)))
        for text, token_id, number, tops in zip(tokens.texts, ids, numbers, tokens.top_rows, strict=True)
    ]


def _tops(tokens: ReplyTokens, row: Sequence[TopLogprob]) -> bytes:
    if not row:
        return b""
    spelled = [tokens.spell(top.token_id) for top in row]
    numbers = dump_json([top.logprob for top in row])[1:-1].split(b",")
    return b",".join([b"{%b}" % _entry(one.text, one, number) for one, number in zip(spelled, numbers, strict=True)])


def _entry(text: str, spelled: Spelling, logprob: bytes) -> bytes:
    """A token, and its bytes also where they are only a part of a character, which no text can show."""
    shown = spelling_json(text, spelled.raw)
    return b'"token":%b,"logprob":%b,"bytes":%b' % (shown.text, logprob, shown.raw)


def _closing_fields(choice: FinishedChoice, wanted: Wanted) -> dict[str, JsonValue]:
    fields: dict[str, JsonValue] = {}
    if wanted.routed_experts:
        fields["routed_experts"] = None if choice.experts is None else experts_body(choice.experts)
    if choice.meta_info:
        fields["meta_info"] = choice.meta_info
    return fields


def _messages(fields: Mapping[str, JsonValue]) -> tuple[JsonValue, ...]:
    """Messages of any shape that a template might read (I6); what it cannot read, it refuses in its own words."""
    messages = objects(fields, "messages")
    if not messages:
        raise InvalidRequest("messages: at least one message is needed")
    return _checked_messages(messages, 0)


def _checked_messages(messages: Sequence[JsonValue], first: int) -> tuple[JsonValue, ...]:
    """Messages from index `first` on."""
    for i, message in enumerate(messages, start=first):
        if not isinstance(message, dict):
            raise InvalidRequest(f"messages[{i}]: expected an object, got {kind_of(message)}")
        role, content = message.get("role"), message.get("content")
        if type(role) is not str:
            raise InvalidRequest(f"messages[{i}].role: expected a string, got {kind_of(role)}")
        if type(content) in _NUMBERS:
            raise InvalidRequest(f"messages[{i}].content: expected text or parts, got {kind_of(content)}")
    return tuple(messages)


def required_calls(tool_choice: JsonValue, tools: Sequence[JsonValue]) -> tuple[str, ...]:
    """Names of the functions of which `tool_choice` wants one called; raises InvalidRequest for what it cannot mean.

    `allowed_tools` in mode auto only advises: every tool stays in the prompt, or its tokens would have to start anew.
    """
    if tool_choice in (None, "auto", "none"):
        return ()
    functions = [tool.get("function") for tool in tools]
    names = tuple(str(function["name"]) for function in functions if isinstance(function, dict) and "name" in function)
    if tool_choice == "required":
        if not names:
            raise InvalidRequest("tool_choice: is required, but there are no tools")
        return names
    match tool_choice:
        case {"type": "allowed_tools", "allowed_tools": {"mode": "auto" | "required" as mode, "tools": list(allowed)}}:
            chosen = tuple(_chosen_function(choice, names) for choice in allowed)
            return chosen if mode == "required" else ()
        case {"type": "allowed_tools"}:
            raise InvalidRequest("tool_choice.allowed_tools: expected a mode (auto, required) and a list of tools")
    return (_chosen_function(tool_choice, names),)


def _chosen_function(choice: JsonValue, names: Sequence[str]) -> str:
    function = choice.get("function") if isinstance(choice, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        raise InvalidRequest("tool_choice: expected none, auto, required, allowed_tools, or a function by name")
    if name not in names:
        raise InvalidRequest(f"tool_choice: {name!r} is none of the tools ({', '.join(names) or 'there are none'})")
    return name


def _template_arguments(fields: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    arguments = fields.get("chat_template_kwargs")
    if not isinstance(arguments, dict | None):
        raise InvalidRequest(f"chat_template_kwargs: expected an object, got {kind_of(arguments)}")
    named = {name: fields[name] for name in ("reasoning_effort", "documents") if fields.get(name) is not None}
    return named | (arguments or {})


def _wanted(fields: Mapping[str, JsonValue]) -> Wanted:
    options = fields.get("stream_options")
    if not isinstance(options, dict | None):
        raise InvalidRequest(f"stream_options: expected an object, got {kind_of(options)}")
    usage_chunk = False
    if options:
        with inside("stream_options"):
            usage_chunk = flag(options, "include_usage")
    token_ids = flag(fields, "return_token_ids")
    refuses_logprobs = fields.get("logprobs") is False
    logprobs = flag(fields, "logprobs") or (token_ids and not refuses_logprobs)
    num_top_logprobs = within(fields, "top_logprobs", 0, MAX_TOP_LOGPROBS) or 0
    if num_top_logprobs and not logprobs:
        raise InvalidRequest("top_logprobs: come with log-probs only; set logprobs to true")
    return Wanted(
        token_ids=token_ids,
        routed_experts=flag(fields, "return_routed_experts"),
        logprobs=logprobs,
        usage_chunk=usage_chunk,
        num_top_logprobs=num_top_logprobs,
    )


def _num_choices(fields: Mapping[str, JsonValue]) -> int:
    number = optional(fields, "n", int)
    number = 1 if number is None else number
    if not 1 <= number <= MAX_CHOICES:
        raise InvalidRequest(f"n: expected 1 to {MAX_CHOICES}, got {number}")
    return number
