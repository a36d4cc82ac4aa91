"""What counts as a call in each syntax, what reasoning looks like in each style, and how both are chosen."""

from __future__ import annotations

import itertools
import json
import re
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer

from gateway.contracts.errors import ConfigurationError
from gateway.contracts.generation import Finish, FinishReason, JsonValue
from gateway.contracts.replies import ContentDelta, ParsedReply, ReplyFlag
from gateway.settings import GatewaySettings
from gateway.tito.parsing.call_ids import CallIdStyle, learn_call_ids
from gateway.tito.parsing.choice import CALL_SYNTAXES, REASONING_STYLES, choose_parsing
from gateway.tito.parsing.marked import MarkedParsing
from gateway.tito.parsing.reply import OpenMarkup, ReplyParsing
from gateway.tito.parsing.typed_values import arguments_text
from gateway.tito.template import ChatTemplate
from gateway.tito.tokenizer import ChatTokenizer

TEMPLATES = Path(__file__).parent / "test_parsing_templates"
STOPPED, CUT = Finish(FinishReason.STOP), Finish(FinishReason.LENGTH)
NO_MARKUP = ChatTemplate({"default": "{% for m in messages %}{{ m.content }}{% endfor %}"}, special_tokens={})
PROPERTIES: dict[str, JsonValue] = {
    "text": {"type": "string"},
    "count": {"type": "integer"},
    "ratio": {"type": "number"},
    "on": {"type": "boolean"},
    "nothing": {"type": "null"},
    "map": {"type": "object"},
    "list": {"type": "array"},
    "maybe_text": {"anyOf": [{"type": "string"}, {"type": "null"}]},
    "maybe_count": {"type": ["integer", "null"]},
    "flagged": {"type": "boolean", "nullable": True},
    "level": {"enum": [1, 2, None]},
    "color": {"allOf": [{"$ref": "#/$defs/Color"}]},
    "loop": {"$ref": "#/properties/loop"},
    "any": {},
}
TOOLS: tuple[JsonValue, ...] = (
    {
        "type": "function",
        "function": {
            "name": "f",
            "parameters": {"type": "object", "properties": PROPERTIES, "$defs": {"Color": {"enum": ["red", "blue"]}}},
        },
    },
)


@pytest.fixture(scope="session")
def plain(tiny_model: Path) -> Tokenizer:
    description = json.loads((tiny_model / "tokenizer.json").read_text())
    return Tokenizer.from_str(json.dumps(description | {"added_tokens": []}))


def with_tokens(plain: Tokenizer, texts: Sequence[str]) -> ChatTokenizer:
    tokenizer = Tokenizer.from_str(plain.to_str())
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in texts])
    return ChatTokenizer(tokenizer.to_str().encode())


def chosen(plain: Tokenizer, calls: str, reasoning: str = "none", *more: str) -> tuple[ReplyParsing, ChatTokenizer]:
    """A syntax over a vocabulary that has its markers as tokens."""
    bare = choose_parsing(NO_MARKUP, with_tokens(plain, ()), calls=calls, reasoning=reasoning)
    tokenizer = with_tokens(plain, [*(marker.text for marker in bare.markers), "<|im_end|>", *more])
    return choose_parsing(NO_MARKUP, tokenizer, calls=calls, reasoning=reasoning), tokenizer


def parse(
    plain: Tokenizer,
    calls: str,
    text: str,
    *,
    reasoning: str = "none",
    prompt: str = "",
    finish: Finish = STOPPED,
) -> ParsedReply:
    parsing, tokenizer = chosen(plain, calls, reasoning)
    parser = parsing.start(prompt_ids=tokenizer.encode(prompt), tools=TOOLS)
    parser.feed(tokenizer.encode(text).tolist())
    return parser.finish(finish)[1]


def calls_of(reply: ParsedReply) -> list[tuple[str, str]]:
    return [(call.name, call.arguments) for call in reply.tool_calls]


# Typed values


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("text", "5", '"5"'),
        ("text", " {} ", '" {} "'),
        ("text", "null", '"null"'),
        ("count", "5", "5"),
        ("count", "five", '"five"'),
        ("count", "5.5", '"5.5"'),
        ("count", "true", '"true"'),
        ("count", "9" * 5000, json.dumps("9" * 5000)),
        ("ratio", "2.50", "2.50"),
        ("ratio", "1e3", "1e3"),
        ("ratio", "NaN", '"NaN"'),
        ("on", "true", "true"),
        ("on", "False", "false"),
        ("on", "yes", '"yes"'),
        ("nothing", "None", "null"),
        ("map", '{"a": 1.0}', '{"a": 1.0}'),
        ("map", "{'a': (1, None)}", '{"a": [1, null]}'),
        ("map", "{'a': 1e999}", "\"{'a': 1e999}\""),
        ("map", "[1]", '"[1]"'),
        ("list", "[1, 2", '"[1, 2"'),
        ("list", "[" * 5000, json.dumps("[" * 5000)),
        ("maybe_text", "null", "null"),
        ("maybe_text", "none", '"none"'),
        ("maybe_count", "null", "null"),
        ("maybe_count", "7", "7"),
        ("flagged", "None", "null"),
        ("level", "2", "2"),
        ("color", "red", '"red"'),
        ("loop", "1", '"1"'),
        ("any", "1", '"1"'),
        ("unknown", "1", '"1"'),
    ],
)
def test_a_bare_value_is_what_the_schema_says_or_text(key: str, text: str, value: str) -> None:
    """Arguments are typed by the tool's schema, and what does not fit stays text (I9: nothing is guessed)."""
    assert arguments_text([(key, text)], TOOLS, function="f") == f'{{"{key}": {value}}}'


def test_values_of_unknown_functions_and_odd_definitions_are_text() -> None:
    """I6: whatever tools an agent sends, nothing raises."""
    odd: tuple[JsonValue, ...] = (None, "f", {"function": 5}, {"name": "f", "parameters": [1]})
    for tools in (TOOLS, odd, ()):
        assert arguments_text([("count", "5")], tools, function="g") == '{"count": "5"}'
    assert arguments_text([("count", "5")], odd, function="f") == '{"count": "5"}'
    assert arguments_text([("a", "1"), ("a", "2")], TOOLS, function="f") is None


# Calls


@pytest.mark.parametrize(
    ("calls", "text"),
    [
        ("qwen3_coder", "<tool_call>f</tool_call>"),
        ("qwen3_coder", "<tool_call><function=f><parameter=x>1</function></tool_call>"),
        ("qwen3_coder", "<tool_call><function=f>x</function></tool_call>"),
        ("qwen3_coder", "<tool_call><function=f></function> and</tool_call>"),
        ("qwen3_coder", "<tool_call><function=></function></tool_call>"),
        ("seed_oss", "<seed:tool_call><function=f></seed:tool_call>"),
        ("minimax_m2", "<minimax:tool_call></minimax:tool_call>"),
        ("minimax_m2", '<minimax:tool_call><invoke name="f"></minimax:tool_call>'),
        ("minimax_m2", '<minimax:tool_call><invoke name="f"></invoke>x</minimax:tool_call>'),
        ("glm45", "<tool_call></tool_call>"),
        ("glm45", "<tool_call>two words</tool_call>"),
        ("glm45", "<tool_call>f<arg_key>a</arg_key></tool_call>"),
        ("glm45", "<tool_call>f<arg_key>a</arg_key>x<arg_value>1</arg_value></tool_call>"),
        ("glm45", "<tool_call>f<arg_value>1</arg_value></tool_call>"),
        ("glm45", '<tool_call>{"name": "f", "arguments": {}}</tool_call>'),
        ("deepseek_v3", "<｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n{}<｜tool▁call▁end｜>"),
        ("deepseek_v3", "<｜tool▁call▁begin｜>f<｜tool▁sep｜>f\n```json\n{}\n```<｜tool▁call▁end｜>"),
        ("deepseek_v3", "<｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n[]\n```<｜tool▁call▁end｜>"),
        ("deepseek_v31", "<｜tool▁call▁begin｜>f{}<｜tool▁call▁end｜>"),
        ("deepseek_v31", "<｜tool▁call▁begin｜><｜tool▁sep｜>{}<｜tool▁call▁end｜>"),
        ("deepseek_v31", "<｜tool▁calls▁begin｜><｜tool▁calls▁end｜>"),
        ("deepseek_v31", "<｜tool▁calls▁begin｜>text<｜tool▁calls▁end｜>"),
        ("kimi_k2", "<|tool_call_begin|>f<|tool_call_argument_begin|>{<|tool_call_end|>"),
        ("kimi_k2", "<|tool_call_begin|>two words:0<|tool_call_argument_begin|>{}<|tool_call_end|>"),
        ("llama3_json", '<|python_tag|>print("x")'),
        ("llama3_json", '{"name": "f", "parameters": {}} and more'),
        ("llama3_json", '{"name": "f", "parameters": {}'),
        ("mistral", "[TOOL_CALLS][]"),
        ("mistral", '[TOOL_CALLS][{"name": "f"}]'),
        ("mistral", '[TOOL_CALLS][{"name": "f", "arguments": {}}] and'),
        ("mistral", "[TOOL_CALLS]f[ARGS]"),
        ("mistral", "[TOOL_CALLS]f[CALL_ID][ARGS]{}"),
        ("mistral", "[TOOL_CALLS]f"),
        ("harmony", "<|channel|>commentary to=functions.f<|message|>{<|call|>"),
        ("harmony", "<|channel|>other<|message|>text"),
        ("harmony", "<|start|>user<|message|>text"),
    ],
)
def test_a_malformed_call_is_text_as_written_and_flagged(calls: str, text: str, plain: Tokenizer) -> None:
    """Malformed calls become text and are flagged, never raise; not a character is lost."""
    reply = parse(plain, calls, text + "<|im_end|>")
    assert (reply.content, reply.tool_calls, reply.flags) == (text, (), (ReplyFlag.MALFORMED_TOOL_CALL,))


@pytest.mark.parametrize(
    ("calls", "text", "expected"),
    [
        ("qwen3_coder", "<tool_call><function=f></function></tool_call>", [("f", "{}")]),
        (
            "qwen3_coder",
            "<tool_call>\n<function=f>\n<parameter=text>\n\na</parameter>\n\n</parameter>\n</function>\n</tool_call>",
            [("f", '{"text": "\\na</parameter>\\n"}')],
        ),
        ("glm45", "<tool_call>f</tool_call><tool_call>g\n</tool_call>", [("f", "{}"), ("g", "{}")]),
        (
            "glm45",
            "<tool_call>f<arg_key>text</arg_key><arg_value>\n 5 </arg_value></tool_call>",
            [("f", '{"text": "\\n 5 "}')],
        ),
        ("deepseek_v31", '<｜tool▁call▁begin｜>f<｜tool▁sep｜>{"a":  1.0}<｜tool▁call▁end｜>', [("f", '{"a":  1.0}')]),
        ("kimi_k2", "<|tool_call_begin|>a.b:12<|tool_call_argument_begin|> {} <|tool_call_end|>", [("a.b", "{}")]),
        ("llama3_json", '\n{"type": "function", "name": "f", "parameters": {"a": 1.0}}', [("f", '{"a": 1.0}')]),
        (
            "llama3_json",
            '<|python_tag|>{"name": "f", "arguments": {}}; {"name": "g", "parameters": {}}',
            [("f", "{}"), ("g", "{}")],
        ),
        ("mistral", '[TOOL_CALLS] {"name": "f", "arguments": "{\\"a\\": 1}"}', [("f", '{"a": 1}')]),
        ("mistral", "[TOOL_CALLS]f[ARGS]{}[TOOL_CALLS]g[ARGS]{}", [("f", "{}"), ("g", "{}")]),
        ("harmony", "<|channel|>analysis to=functions.f code<|message|>{}<|call|>", [("f", "{}")]),
        ("harmony", " to=functions.f<|channel|>commentary json<|message|>{}", [("f", "{}")]),
        (
            "harmony",
            "<|channel|>commentary to=browser.open <|constrain|>json<|message|>{}<|call|>",
            [("browser.open", "{}")],
        ),
    ],
)
def test_a_good_call_is_read_as_written(
    calls: str, text: str, expected: list[tuple[str, str]], plain: Tokenizer
) -> None:
    """Arguments in JSON stay as the model wrote them; calls may stand side by side."""
    prompt = "<|start|>assistant" if calls == "harmony" else ""
    reply = parse(plain, calls, text, prompt=prompt)
    assert (calls_of(reply), reply.content, reply.flags) == (expected, None, ())


def test_a_model_that_repeats_itself_inside_a_call_costs_no_more_than_its_length(plain: Tokenizer) -> None:
    """Reading a body is linear whatever is in it: one call of a broken model must not hold up all other agents."""
    bodies = [unit * 100_000 for unit in (" ", "\n", "```", "</parameter>", "{", "[", "a", '{"a":')]
    for calls in CALL_SYNTAXES:
        if calls in ("auto", "none", "harmony"):
            continue
        parsing = chosen(plain, calls)[0]
        assert isinstance(parsing, MarkedParsing)
        assert parsing.calls is not None
        inner = parsing.calls.frame.inner
        heads = ("", "f", "function", "<function=f><parameter=map>")
        for head, start, body in itertools.product(heads, ("", "{", "f\n```json\n"), bodies):
            begun = time.process_time()
            parsing.calls.read([head, *inner, start + body + "x"], TOOLS)
            parsing.calls.read([head, *inner[:1], start + body, "</parameter></function>"], TOOLS)
            assert time.process_time() - begun < 1.0, (calls, head, start, body[:20])


@pytest.mark.parametrize("calls", ["deepseek_v31", "kimi_k2"])
def test_text_before_between_and_after_the_calls_of_a_section_stays(calls: str, plain: Tokenizer) -> None:
    """Sections are layout, the text around them is not."""
    opener, closer, begin, end, inner = (marker.text for marker in chosen(plain, calls)[0].markers)
    text = f"A.\n{opener}{begin}f{inner}{{}}{end}\nB.\n{begin}g{inner}{{}}{end}{closer}\nC."
    reply = parse(plain, calls, text)
    assert ([call.name for call in reply.tool_calls], reply.content, reply.flags) == (["f", "g"], "A.\nB.\nC.", ())
    led = parse(plain, calls, f"{opener}Word{begin}f{inner}{{}}{end}{closer}")
    assert ([call.name for call in led.tool_calls], led.content) == (["f"], f"{opener}Word\n{closer}")
    half = parse(plain, calls, f"{opener}{begin}f{inner}{{}}{end}{begin}g{inner}{{", finish=CUT)
    assert ([call.name for call in half.tool_calls], half.content) == (["f"], f"{begin}g{inner}{{")
    assert half.flags == (ReplyFlag.UNCLOSED_TOOL_CALL,)
    first = parse(plain, calls, f"{opener}{begin}f{inner}{{", finish=CUT)
    assert (first.content, first.flags) == (f"{opener}{begin}f{inner}{{", (ReplyFlag.UNCLOSED_TOOL_CALL,))


def test_an_answer_in_json_is_no_call_and_streams(plain: Tokenizer) -> None:
    """Llama: only what begins as a call waits, and JSON that is none is not flagged."""
    parsing, tokenizer = chosen(plain, "llama3_json")
    parser = parsing.start(prompt_ids=(), tools=TOOLS)
    deltas = parser.feed(tokenizer.encode('{"answer": 4').tolist())
    assert "".join(delta.text for delta in deltas if isinstance(delta, ContentDelta)) == '{"answer": 4'
    reply = parse(plain, "llama3_json", '{"name": "Ada", "age": 36}')
    assert (reply.content, reply.flags) == ('{"name": "Ada", "age": 36}', ())
    later = parse(plain, "llama3_json", 'So: {"name": "f", "parameters": {}}')
    assert (later.content, later.tool_calls) == ('So: {"name": "f", "parameters": {}}', ())


def test_markers_spelled_in_ordinary_tokens_are_no_calls(plain: Tokenizer) -> None:
    """Literal markers that a user or a tool result made the model repeat are text: markers count by id."""
    for calls in CALL_SYNTAXES:
        if calls in ("auto", "none", "llama3_json"):
            continue
        parsing, tokenizer = chosen(plain, calls, "think")
        text = "Write " + "".join(marker.text for marker in parsing.markers)
        parser = parsing.start(prompt_ids=(), tools=TOOLS)
        parser.feed(tokenizer.encode_plain(text).tolist())
        reply = parser.finish(STOPPED)[1]
        assert (reply.content, reply.reasoning, reply.flags) == (text, None, ())


# Ids


def test_call_ids_are_of_the_style_that_the_template_accepts() -> None:
    """Mistral's templates refuse others; history is never refused (I6)."""

    def learned(name: str) -> CallIdStyle:
        text = (TEMPLATES / f"{name}.jinja").read_text()
        return learn_call_ids(ChatTemplate({"default": text}, special_tokens={}))

    assert learned("mistral_array") is CallIdStyle.NINE_ALPHANUMERICS
    assert {learned(name) for name in ("hermes", "mistral_args", "llama3_json", "gemma4")} == {CallIdStyle.CALL_HEX}
    assert re.fullmatch(r"[0-9A-Za-z]{9}", CallIdStyle.NINE_ALPHANUMERICS.new_id())
    assert re.fullmatch(r"call_[0-9a-f]{32}", CallIdStyle.CALL_HEX.new_id())


def test_the_models_own_ids_are_kept_and_stay_unique(plain: Tokenizer) -> None:
    """Kimi writes ids that its template prints back; two calls of one reply never share one."""
    written = "<|tool_call_begin|>functions.f:3<|tool_call_argument_begin|>{}<|tool_call_end|>"
    reply = parse(plain, "kimi_k2", written + written)
    assert reply.tool_calls[0].call_id == "functions.f:3"
    assert reply.tool_calls[1].call_id.startswith("call_")
    assert parse(plain, "mistral", "[TOOL_CALLS]f[CALL_ID]abc-1[ARGS]{}").tool_calls[0].call_id == "abc-1"


# Reasoning

REASONED = [
    ("think", "<think>\n", "\n</think>\n\n"),
    ("mistral", "[THINK]", "[/THINK]"),
    ("seed_oss", "<seed:think>", "</seed:think>\n"),
    ("gemma4", "<|channel>thought\n", "<channel|>"),
]


@pytest.mark.parametrize(("reasoning", "opening", "closing"), REASONED)
def test_reasoning_is_told_from_text_whoever_opened_it(
    reasoning: str, opening: str, closing: str, plain: Tokenizer
) -> None:
    """Opened by the model, or by the prompt; a call inside is none."""
    inside = "Hm.\n<tool_call>{}</tool_call>\nSo."
    expected = (inside, "4.")
    by_model = parse(plain, "hermes", f"{opening}{inside}{closing}4.", reasoning=reasoning)
    by_prompt = parse(plain, "hermes", f"{inside}{closing}4.", reasoning=reasoning, prompt=f"Go.{opening}")
    again = parse(plain, "hermes", f"{opening}{inside}{closing}4.", reasoning=reasoning, prompt=f"Go.{opening}")
    assert (by_model.reasoning, by_model.content) == expected
    assert (by_prompt.reasoning, by_prompt.content) == expected
    assert (again.content, by_model.tool_calls) == ("4.", ())
    closed = parse(plain, "hermes", "4.", reasoning=reasoning, prompt=f"Go.{opening}{closing}")
    assert (closed.reasoning, closed.content) == (None, "4.")
    unclosed = parse(plain, "hermes", "Hm.", reasoning=reasoning, prompt=f"Go.{opening}", finish=CUT)
    assert (unclosed.reasoning, unclosed.content, unclosed.flags) == ("Hm.", None, (ReplyFlag.UNCLOSED_REASONING,))


def test_reasoning_that_only_ends_is_reasoning_where_it_is_said_to_begin_every_reply(plain: Tokenizer) -> None:
    """`think_from_start` is for models whose prompt does not show that they think; else a lone closer is text."""
    reply = parse(plain, "none", "Hm.</think>4.", reasoning="think_from_start")
    assert (reply.reasoning, reply.content) == ("Hm.", "4.")
    assert parse(plain, "none", "Hm.</think>4.", reasoning="think").content == "Hm.</think>4."


def test_a_prompts_opener_counts_however_much_follows_it_and_past_turns_do_not(plain: Tokenizer) -> None:
    """A control token behind the opener (a thinking budget) changes nothing; a turn that ended does."""
    parsing, tokenizer = chosen(plain, "none", "seed_oss", "<budget>")
    ended = ChatTokenizer(
        with_tokens(plain, ["<seed:think>", "</seed:think>", "<|im_end|>"]).json, eos_token="<|im_end|>"
    )
    assert parsing.opens_reasoning(tokenizer.encode("Go.<seed:think><budget>" + "word " * 3000))
    assert not parsing.opens_reasoning(tokenizer.encode("Go.<seed:think>a</seed:think>"))
    assert not parsing.opens_reasoning([])
    with_end = choose_parsing(NO_MARKUP, ended, reasoning="seed_oss")
    assert not with_end.opens_reasoning(ended.encode("<seed:think>Hm.<|im_end|>Go."))


def test_harmony_channels_are_reasoning_and_content(plain: Tokenizer) -> None:
    """Analysis is reasoning; commentary for nobody and final are content; a reply may hold several of each."""
    text = (
        "<|channel|>analysis<|message|>One.<|end|><|start|>assistant<|channel|>commentary<|message|>Look.<|end|>"
        "<|start|>assistant<|channel|>analysis<|message|>Two.<|end|>"
        "<|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}<|call|>"
    )
    reply = parse(plain, "harmony", text, prompt="Go.<|end|><|start|>assistant")
    assert (reply.reasoning, reply.content, calls_of(reply)) == ("One.\nTwo.", "Look.", [("f", "{}")])
    final = parse(plain, "harmony", "<|channel|>final<|message|> 4. \n<|return|>", prompt="<|start|>assistant")
    assert (final.reasoning, final.content, final.flags) == (None, " 4. \n", ())
    opened = parse(plain, "harmony", "Hm.<|end|>", prompt="<|start|>assistant<|channel|>analysis<|message|>")
    assert (opened.reasoning, opened.flags) == ("Hm.", ())
    typed = parse(plain, "harmony", "<|channel|>final<|constrain|>json<|message|>{}", prompt="<|start|>assistant")
    assert (typed.content, typed.flags) == ("{}", ())
    loose = parse(plain, "harmony", "Just text.", prompt="<|start|>assistant")
    assert (loose.content, loose.flags) == ("Just text.", ())
    thinking = parse(plain, "harmony", "<|channel|>analysis<|message|>Hm.", prompt="<|start|>assistant", finish=CUT)
    assert (thinking.reasoning, thinking.flags) == ("Hm.", (ReplyFlag.UNCLOSED_REASONING,))
    cut = parse(plain, "harmony", "<|channel|>final", prompt="<|start|>assistant", finish=CUT)
    assert (cut.content, cut.flags) == (None, ())


# What is open


@pytest.mark.parametrize(
    ("calls", "text", "closing"),
    [
        ("hermes", "So <tool_call>{", "</tool_call>"),
        ("qwen3_coder", "<tool_call>\n<function=f>\n<parameter=a>", "</tool_call>"),
        ("glm45", "<tool_call>f<arg_key>", "</tool_call>"),
        ("deepseek_v31", "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
        ("deepseek_v31", "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f", "<｜tool▁call▁end｜><｜tool▁calls▁end｜>"),
        (
            "kimi_k2",
            "<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0",
            "<|tool_call_end|><|tool_calls_section_end|>",
        ),
        ("mistral", "[TOOL_CALLS]f[ARGS]{", ""),
        ("llama3_json", '{"name": "f"', ""),
        ("harmony", "<|channel|>commentary to=functions.f", "<|message|>"),
        ("harmony", "<|channel|>commentary to=functions.f<|message|>{", ""),
        ("harmony", "<|channel|>final<|message|>Hm.", ""),
    ],
)
def test_a_cut_reply_says_what_would_close_it(calls: str, text: str, closing: str, plain: Tokenizer) -> None:
    """Turns that were cut are closed with masked tokens (design 4): every opener, in order."""
    parsing, tokenizer = chosen(plain, calls)
    parser = parsing.start(prompt_ids=tokenizer.encode("<|start|>assistant" if calls == "harmony" else ""), tools=TOOLS)
    parser.feed(tokenizer.encode(text).tolist())
    assert parser.open_markup == OpenMarkup(in_reasoning=False, closing_text=closing)
    if closing:
        parser.feed(tokenizer.encode(closing).tolist())
        assert parser.open_markup == OpenMarkup(in_reasoning=False, closing_text="")


# Choosing


def test_an_unknown_name_is_refused_with_the_names_that_there_are() -> None:
    """Configuration errors say what to write instead."""
    with pytest.raises(ConfigurationError, match="kimi_k2, llama3_json"):
        GatewaySettings(tool_call_parser="kimi")
    with pytest.raises(ConfigurationError, match="auto, none, think_from_start, think"):
        GatewaySettings(reasoning_parser="deepseek")


def test_every_name_can_be_chosen(plain: Tokenizer) -> None:
    """A name overrides what the template shows."""
    tokenizer = with_tokens(plain, ["<think>", "</think>"])
    template = ChatTemplate({"default": (TEMPLATES / "hermes.jinja").read_text()}, special_tokens={})
    for calls in CALL_SYNTAXES:
        assert choose_parsing(template, tokenizer, calls=calls).name.startswith(
            {"auto": "hermes", "none": "text"}.get(calls, calls)
        )
    for reasoning in REASONING_STYLES:
        found = choose_parsing(template, tokenizer, reasoning=reasoning).reasoning
        assert (found is None) is (reasoning == "none")


@pytest.mark.parametrize(
    ("tokens", "name"),
    [
        (("<tool_call>", "</tool_call>"), "hermes"),
        (("<tool_call>", "</tool_call>", "<arg_key>", "<arg_value>"), "glm45"),
        (("<｜tool▁calls▁begin｜>", "<｜tool▁sep｜>"), "deepseek_v3"),
        (("<|tool_call_begin|>", "<|tool_call_argument_begin|>"), "kimi_k2"),
        (("[TOOL_CALLS]",), "mistral"),
        (("<|python_tag|>",), "llama3_json"),
        (("<|channel|>", "<|message|>", "<|call|>"), "harmony"),
        ((), "text"),
    ],
)
def test_a_template_without_calls_leaves_it_to_the_vocabulary(
    tokens: tuple[str, ...], name: str, plain: Tokenizer
) -> None:
    """`auto` falls back to the markers that the model has tokens for."""
    assert choose_parsing(NO_MARKUP, with_tokens(plain, tokens)).name == name


def test_a_template_that_only_describes_calls_names_their_syntax(plain: Tokenizer) -> None:
    """Some templates tell the model how to call and print no calls of history."""
    text = 'Call as <tool_call>\\n{\\"name\\": ...}\\n</tool_call>{% for m in messages %}{{ m.content }}{% endfor %}'
    template = ChatTemplate({"default": text}, special_tokens={})
    assert choose_parsing(template, with_tokens(plain, ())).name == "hermes"


# Cost


@pytest.mark.parametrize(
    ("calls", "start", "unit"),
    [
        ("hermes", "", "word "),
        ("hermes", "", "\n"),
        ("hermes", "x", "<think></think>"),
        ("hermes", "<tool_call>", "word "),
        ("hermes", "", "<tool_call>"),
        ("deepseek_v31", "<｜tool▁calls▁begin｜>", " "),
        ("llama3_json", "{", " "),
        ("mistral", "", "[TOOL_CALLS]"),
        ("harmony", "<|channel|>final", "<|channel|>"),
        ("harmony", "<|channel|>commentary to=f<|message|>", "word "),
    ],
)
def test_a_token_costs_the_same_however_long_the_reply_is(calls: str, start: str, unit: str, plain: Tokenizer) -> None:
    """Feeding is on the path of every token: ten times the tokens take about ten times the time."""
    parsing, tokenizer = chosen(plain, calls, "none" if calls == "harmony" else "think")
    ids = tokenizer.encode(start).tolist() + tokenizer.encode(unit * 20_000).tolist()

    def seconds(num_tokens: int) -> float:
        parser = parsing.start(prompt_ids=(), tools=TOOLS)
        begun = time.process_time()
        for token_id in ids[:num_tokens]:
            parser.feed((token_id,))
        parser.finish(CUT)
        return time.process_time() - begun

    assert min(seconds(20_000) for _ in range(2)) < 30 * min(seconds(2_000) for _ in range(3)) + 0.01
