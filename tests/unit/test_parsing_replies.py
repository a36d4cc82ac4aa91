"""Replies read from token ids: reasoning, text, tool calls; nothing lost, nothing raised (I1, I9)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, trainers

from gateway.contracts.generation import Finish, FinishReason, JsonValue
from gateway.contracts.replies import ContentDelta, ParsedReply, ReasoningDelta, ReplyFlag, ToolCallDelta
from gateway.tito.parsing.choice import choose_parsing
from gateway.tito.parsing.hermes import hermes_calls
from gateway.tito.parsing.marked import MarkedParsing
from gateway.tito.template import ChatTemplate
from gateway.tito.tokenizer import ChatTokenizer

CALL = '<tool_call>\n{"name": "calculator", "arguments": {"expression": "48/2"}}\n</tool_call>'
TOOLS: tuple[JsonValue, ...] = ({"type": "function", "function": {"name": "calculator", "parameters": {}}},)
STOPPED = Finish(FinishReason.STOP)
CUT = Finish(FinishReason.LENGTH)


@pytest.fixture(scope="session")
def parsing(tiny_model: Path) -> MarkedParsing:
    return choose_parsing(ChatTemplate.load(tiny_model), ChatTokenizer.load(tiny_model))


@pytest.fixture(scope="session")
def text_markers(tiny_model: Path) -> MarkedParsing:
    """The same template over a vocabulary in which no marker is a token."""
    description = json.loads((tiny_model / "tokenizer.json").read_text())
    description["added_tokens"] = [token for token in description["added_tokens"] if token["special"]]
    tokenizer = ChatTokenizer(json.dumps(description).encode())
    return choose_parsing(ChatTemplate.load(tiny_model), tokenizer)


def parse(
    parsing: MarkedParsing,
    text: str,
    *,
    finish: Finish = STOPPED,
    tools: bool = True,
    reasoning_open: bool = False,
    stop: tuple[str, ...] = (),
) -> ParsedReply:
    prompt = parsing.tokenizer.encode("<think>\n" if reasoning_open else "\n")
    parser = parsing.start(prompt_ids=prompt, tools=TOOLS if tools else (), stop=stop)
    parser.feed(parsing.tokenizer.encode(text).tolist())
    return parser.finish(finish)[1]


def calls_of(reply: ParsedReply) -> list[tuple[str, str]]:
    return [(call.name, call.arguments) for call in reply.tool_calls]


@pytest.mark.parametrize("kind", ["parsing", "text_markers"])
def test_reasoning_text_and_parallel_calls_are_told_apart(kind: str, request: pytest.FixtureRequest) -> None:
    """One reply with everything, markers as tokens and as text."""
    text = f"<think>\nHm.\n\nDivide.\n</think>\n\nLet me see.\n{CALL}\n{CALL}<|im_end|>"
    reply = parse(request.getfixturevalue(kind), text)
    assert reply.reasoning == "Hm.\n\nDivide."
    assert reply.content == "Let me see."
    assert calls_of(reply) == [("calculator", '{"expression": "48/2"}')] * 2
    assert len({call.call_id for call in reply.tool_calls}) == 2
    assert reply.flags == ()
    assert reply.message()["tool_calls"][0]["id"].startswith("call_")


def test_plain_text_is_content_as_written(parsing: MarkedParsing) -> None:
    """White space is layout beside markup only."""
    reply = parse(parsing, "\n The answer is 24. \n<|im_end|>")
    assert (reply.content, reply.reasoning, reply.tool_calls) == ("\n The answer is 24. \n", None, ())


def test_an_empty_reply_has_no_content(parsing: MarkedParsing) -> None:
    """None means no text at all."""
    assert parse(parsing, "<|im_end|>") == ParsedReply(None, None, (), (), 0)


def test_a_prompt_that_opened_reasoning_is_continued(parsing: MarkedParsing) -> None:
    """The opener stands in the prompt, or is repeated by the model."""
    for text in ("Divide.\n</think>\n\n24.", "<think>\nDivide.\n</think>\n\n24."):
        reply = parse(parsing, text, reasoning_open=True)
        assert (reply.reasoning, reply.content) == ("Divide.", "24.")


def test_reasoning_tokens_are_counted_with_their_markers(parsing: MarkedParsing) -> None:
    """Usage tells how many output tokens were reasoning."""
    num_tokens = len(parsing.tokenizer.encode("<think>Divide.</think>"))
    assert parse(parsing, "<think>Divide.</think>24.").num_reasoning_tokens == num_tokens


def test_text_around_calls_is_joined(parsing: MarkedParsing) -> None:
    """Text before, between and after calls is one content."""
    reply = parse(parsing, f"First.\n{CALL}\nThen.\n\n{CALL}\n\nDone.")
    assert reply.content == "First.\nThen.\nDone."
    assert len(reply.tool_calls) == 2


def test_a_call_inside_reasoning_is_not_a_call(parsing: MarkedParsing) -> None:
    """What a model considers is not what it does."""
    reply = parse(parsing, f"<think>\nMaybe {CALL}?\n</think>\n\nNo.")
    assert (reply.reasoning, reply.content, reply.tool_calls) == (f"Maybe {CALL}?", "No.", ())


def test_call_markup_is_text_when_no_tools_were_offered(parsing: MarkedParsing) -> None:
    """A call that nobody asked for is what the model said."""
    assert parse(parsing, f"See {CALL}", tools=False).content == f"See {CALL}"


def test_markers_spelled_in_ordinary_tokens_are_text(parsing: MarkedParsing) -> None:
    """Markers are recognised by id where they are tokens."""
    parser = parsing.start(prompt_ids=[], tools=TOOLS)
    parser.feed(parsing.tokenizer.encode_plain(CALL + "<think>").tolist())
    reply = parser.finish(STOPPED)[1]
    assert (reply.content, reply.tool_calls, reply.reasoning) == (CALL + "<think>", (), None)


@pytest.mark.parametrize(
    "body",
    [
        "",
        "not json",
        '{"name": "calculator"}',
        '{"name": "calculator", "arguments": [1]}',
        '{"name": "calculator", "arguments": "48/2"}',
        '{"name": 7, "arguments": {}}',
        '{"name": "", "arguments": {}}',
        '{"name": "a", "name": "b", "arguments": {}}',
        '{"name": "a", "arguments": {}} and more',
        '{"name": "a", "arguments": {}',
        '{"name": "a", "arguments": {"x": NaN}}',
        '{"name": "\\ud800", "arguments": {}}',
        '{"name": "a", "arguments": {"x": "line\nbreak"}}',
        '[{"name": "a", "arguments": {}}]',
        '{"name": "a", "arguments": ' + '{"a":' * 5000 + "}" * 5000 + "}",
        '{"name": "a", "arguments": {"x": ' + "9" * 5000 + "}}",
    ],
)
def test_a_malformed_call_becomes_text_and_is_flagged(body: str, parsing: MarkedParsing) -> None:
    """I9: nothing is guessed, nothing is lost, nothing raises."""
    reply = parse(parsing, f"Try: <tool_call>{body}</tool_call> ok")
    assert reply.content == f"Try: <tool_call>{body}</tool_call> ok"
    assert (reply.tool_calls, reply.flags) == ((), (ReplyFlag.MALFORMED_TOOL_CALL,))


@pytest.mark.parametrize(
    ("body", "arguments"),
    [
        ('{"arguments": {"b": 1, "a": [2.50]}, "name": "calculator"}', '{"b": 1, "a": [2.50]}'),
        ('{"name":"calculator","parameters":{}}', "{}"),
        ('{"name":"calculator","arguments":"{\\"b\\":1}"}', '{"b":1}'),
        (
            '{"name":"calculator","arguments":{ "x" : "é </think> \\u00e9" },"id":null}',
            '{ "x" : "é </think> \\u00e9" }',
        ),
    ],
)
def test_arguments_stay_as_the_model_wrote_them(body: str, arguments: str, parsing: MarkedParsing) -> None:
    """I8: numbers, order of keys and white space of a call are the model's."""
    assert calls_of(parse(parsing, f"<tool_call>{body}</tool_call>")) == [("calculator", arguments)]


def test_good_calls_beside_a_malformed_one_are_calls(parsing: MarkedParsing) -> None:
    """One bad call spoils no other."""
    reply = parse(parsing, f"{CALL}\n<tool_call>bad</tool_call>\n{CALL}")
    assert reply.content == "<tool_call>bad</tool_call>"
    assert (len(reply.tool_calls), reply.flags) == (2, (ReplyFlag.MALFORMED_TOOL_CALL,))


@pytest.mark.parametrize("finish", [CUT, STOPPED, Finish(FinishReason.ABORT)])
def test_a_cut_call_becomes_text_and_is_flagged(finish: Finish, parsing: MarkedParsing) -> None:
    """Even with complete JSON: the model did not end the call."""
    text = CALL.removesuffix("\n</tool_call>")
    reply = parse(parsing, f"So.\n{text}", finish=finish)
    assert (reply.content, reply.flags) == (f"So.\n{text}", (ReplyFlag.UNCLOSED_TOOL_CALL,))


def test_a_call_opened_inside_a_call_leaves_the_first_as_text(parsing: MarkedParsing) -> None:
    """The second one is whole."""
    reply = parse(parsing, f'<tool_call>{{"name": \n{CALL}')
    assert reply.content == '<tool_call>{"name":'
    assert (len(reply.tool_calls), reply.flags) == (1, (ReplyFlag.UNCLOSED_TOOL_CALL,))


def test_a_stop_string_that_closes_a_call_ends_a_good_call(parsing: MarkedParsing) -> None:
    """Harnesses stop at the closing marker so that one call is made at a time."""
    text = CALL.removesuffix("</tool_call>")
    assert len(parse(parsing, text, finish=Finish(FinishReason.STOP, "</tool_call>")).tool_calls) == 1


def test_unclosed_reasoning_is_flagged(parsing: MarkedParsing) -> None:
    """Its text is reasoning, not content."""
    reply = parse(parsing, "<think>\nDivide", finish=CUT)
    assert (reply.reasoning, reply.content, reply.flags) == ("Divide", None, (ReplyFlag.UNCLOSED_REASONING,))


def test_a_closer_that_closes_nothing_is_text(parsing: MarkedParsing) -> None:
    """Nothing sampled vanishes."""
    assert parse(parsing, "a</think>b</tool_call>c").content == "a</think>b</tool_call>c"


def test_stop_tokens_and_special_tokens_are_not_text(parsing: MarkedParsing) -> None:
    """They build turns, they say nothing."""
    assert parse(parsing, "24<|endoftext|>.<|im_end|>").content == "24."


@pytest.mark.parametrize("text", ["The answer is 24.##", "The answer is 24.## and", "The answer is 24.#", "a## b##"])
def test_a_stop_string_is_trimmed_only_where_it_ended_the_reply(text: str, parsing: MarkedParsing) -> None:
    """Text is held back just as long as it may be the stop string."""
    ids = parsing.tokenizer.encode(text).tolist()
    parser = parsing.start(prompt_ids=[], tools=(), stop=("##",))
    deltas = parser.feed(ids)
    ended = text.endswith("##")
    last, reply = parser.finish(Finish(FinishReason.STOP, "##") if ended else CUT)
    assert reply.content == (text.removesuffix("##") if ended else text)
    assert "".join(d.text for d in [*deltas, *last] if isinstance(d, ContentDelta)) == reply.content


def test_a_stop_token_of_the_request_is_not_text(parsing: MarkedParsing) -> None:
    """`stop_token_ids` may name ordinary tokens."""
    ids = parsing.tokenizer.encode("ok!").tolist()
    parser = parsing.start(prompt_ids=[], tools=(), stop_token_ids=ids[-1:])
    parser.feed(ids)
    assert parser.finish(Finish(FinishReason.STOP, ids[-1]))[1].content == "ok"


def test_text_streams_before_the_reply_ends(parsing: MarkedParsing) -> None:
    """Streaming is real: each token's text leaves as soon as it is certain."""
    parser = parsing.start(prompt_ids=parsing.tokenizer.encode("<think>"), tools=TOOLS)
    seen = [
        type(delta) for token_id in parsing.tokenizer.encode(f"ab</think>cd{CALL}") for delta in parser.feed([token_id])
    ]
    assert seen[0] is ReasoningDelta
    assert ContentDelta in seen
    assert seen[-1] is ToolCallDelta


def test_half_characters_wait_and_broken_ones_do_not_raise(parsing: MarkedParsing) -> None:
    """A delta never ends inside a character."""
    ids = parsing.tokenizer.encode("é🙂").tolist()
    parser = parsing.start(prompt_ids=[], tools=TOOLS)
    texts = [d.text for token_id in ids for d in parser.feed([token_id]) if isinstance(d, ContentDelta)]
    assert "�" not in "".join(texts)
    assert parser.finish(STOPPED)[1].content == "é🙂"
    cut = parsing.start(prompt_ids=[], tools=TOOLS)
    cut.feed(ids[:-1])
    assert cut.finish(CUT)[1].content == "é�"


def test_a_model_without_markup_gives_text(tiny_model: Path) -> None:
    """Nothing is parsed that the template does not write."""
    template = ChatTemplate({"default": "{% for m in messages %}{{ m.content }}{% endfor %}"}, special_tokens={})
    description = json.loads((tiny_model / "tokenizer.json").read_text())
    description["added_tokens"] = [token for token in description["added_tokens"] if token["special"]]
    parsing = choose_parsing(template, ChatTokenizer(json.dumps(description).encode()))
    assert (parsing.reasoning, parsing.calls) == (None, None)
    assert parse(parsing, f"<think>a</think>{CALL}").content == f"<think>a</think>{CALL}"


def test_a_sentencepiece_style_vocabulary_streams_its_bytes() -> None:
    """Byte-fallback tokens are joined to characters, and word pieces keep their spaces."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(["the answer is"], trainer)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    description = json.loads(tokenizer.to_str())
    description["added_tokens"] = description["added_tokens"][:1]
    chat = ChatTokenizer(json.dumps(description).encode())
    parser = MarkedParsing("text", chat, None, None).start(prompt_ids=[], tools=())
    pieces = [d.text for token_id in chat.encode("the é is 🙂").tolist() for d in parser.feed([token_id])]  # type: ignore[union-attr]
    assert "".join(pieces) == " the é is 🙂"


def test_a_decoder_that_does_not_work_by_bytes_streams_too() -> None:
    """WordPiece-like vocabularies join pieces by rules of their own."""
    vocabulary = {"[UNK]": 0, "the": 1, "answer": 2, "##s": 3, "is": 4}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    chat = ChatTokenizer(tokenizer.to_str().encode())
    parser = MarkedParsing("text", chat, None, None).start(prompt_ids=[], tools=())
    parser.feed([1, 2, 3, 4])
    assert parser.finish(STOPPED)[1].content == "the answers is"


def test_call_json_is_read_without_white_space_and_with_it(parsing: MarkedParsing) -> None:
    """Any JSON spelling of the object counts."""
    calls = hermes_calls(parsing.tokenizer)
    for body in ('{"name":"a","arguments":{}}', ' \n{ "name" : "a" ,\n "arguments" : {} } \n'):
        written = calls.read([body], ())
        assert written is not None
        assert [(call.name, json.loads(call.arguments)) for call in written] == [("a", {})]
