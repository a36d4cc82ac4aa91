"""Streaming and whole replies are one, for every family of markup, kind of vocabulary and split of the tokens."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, trainers

from gateway.contracts.generation import Finish, FinishReason, JsonValue
from gateway.contracts.replies import ContentDelta, ParsedReply, ReasoningDelta, ReplyDelta, ToolCallDelta
from gateway.tito.parsing.choice import CALL_SYNTAXES, choose_parsing
from gateway.tito.parsing.harmony import HarmonyParsing
from gateway.tito.parsing.reply import ReplyParsing
from gateway.tito.template import ChatTemplate
from gateway.tito.tokenizer import ChatTokenizer

# What each family's replies are made of: parts of its markup, whole and broken, and calls that are good.
PIECES: dict[str, list[str]] = {
    "none": [],
    "hermes": [
        '<tool_call>\n{"name": "f", "arguments": {"x": "é🙂"}}\n</tool_call>',
        '<tool_call>{"name": "g", "arguments": {"a": [1, 2.50]}}</tool_call>',
        '{"name": "f", "arguments": {}}',
        '{"name":',
    ],
    "qwen3_coder": [
        "<tool_call>\n<function=f>\n<parameter=x>\né\n🙂\n</parameter>\n"
        "<parameter=n>\n2.50\n</parameter>\n</function>\n</tool_call>",
        "<function=f>\n",
        "<parameter=x>\n1\n</parameter>\n",
        "</function>",
    ],
    "seed_oss": [
        "<seed:tool_call>\n<function=f>\n<parameter=x>é</parameter>\n</function>\n</seed:tool_call>",
        "<function=",
    ],
    "minimax_m2": [
        '<minimax:tool_call>\n<invoke name="f">\n<parameter name="x">é</parameter>\n</invoke>\n</minimax:tool_call>',
        '<invoke name="g">',
        '<parameter name="n">1</parameter>',
        "</invoke>",
    ],
    "glm45": [
        "<tool_call>f\n<arg_key>x</arg_key>\n<arg_value>é🙂</arg_value>\n"
        "<arg_key>n</arg_key><arg_value>1</arg_value></tool_call>",
        "<tool_call>g</tool_call>",
        "<arg_key>x</arg_key>",
        "<arg_value>1</arg_value>",
        "f",
    ],
    "deepseek_v3": [
        '<｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{"x": "é"}\n```<｜tool▁call▁end｜>',
        "<｜tool▁sep｜>",
        "function",
        "f\n```json\n{}\n```",
    ],
    "deepseek_v31": ['<｜tool▁call▁begin｜>f<｜tool▁sep｜>{"x": "é"}<｜tool▁call▁end｜>', "f<｜tool▁sep｜>{}"],
    "kimi_k2": [
        '<|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{"x": "é"}<|tool_call_end|>',
        "functions.g:1<|tool_call_argument_begin|>{}",
    ],
    "llama3_json": [
        '{"name": "f", "parameters": {"x": "é"}}',
        ' {"name": "g", "parameters": {}}',
        ";",
        '{"na',
        "{",
        " " * 300,
    ],
    "mistral": [
        '[TOOL_CALLS][{"name": "f", "arguments": {"x": "é"}}, {"name": "g", "arguments": {}}]',
        '[TOOL_CALLS]f[ARGS]{"x": 1}',
        '[TOOL_CALLS]f[CALL_ID]abc123DEF[ARGS]{"x": 1}',
        "[{",
        "f",
    ],
    "harmony": [
        "<|channel|>analysis<|message|>Hm.<|end|>",
        '<|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"x": "é"}<|call|>',
        '<|start|>assistant to=functions.f<|channel|>commentary json<|message|>{"x": 1}<|call|>',
        "<|start|>assistant",
        "<|channel|>final<|message|>",
        "<|channel|>analysis",
        " to=functions.f",
    ],
}
COMMON = ["\n", " ", "a", "Divide.", "é", "🙂", "##", "#", "<|im_end|>"]
FINISHES = st.sampled_from(
    [
        Finish(FinishReason.STOP),
        Finish(FinishReason.LENGTH),
        Finish(FinishReason.ABORT),
        Finish(FinishReason.STOP, "##"),
    ]
)
TOOLS: tuple[JsonValue, ...] = (
    {
        "type": "function",
        "function": {
            "name": "f",
            "parameters": {"type": "object", "properties": {"x": {"type": "string"}, "n": {"type": "number"}}},
        },
    },
)
SILENT_TEMPLATE = ChatTemplate({"default": "{% for m in messages %}{{ m.content }}{% endfor %}"}, special_tokens={})
KINDS = ["special marker tokens", "plain marker tokens", "text markers", "byte fallback"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("calls", [name for name in CALL_SYNTAXES if name != "auto"])
def test_deltas_join_to_the_reply_and_no_split_changes_it(calls: str, kind: str, tiny_model: Path) -> None:
    """Design: streamed and not streamed replies are the same message (I8); nothing that is sampled raises (I6)."""
    parsing, tokenizer = parsing_of(calls, kind, tiny_model)
    markers = [marker.text for marker in parsing.markers]
    broken = [text[: len(text) // 2] for text in markers] + [text[len(text) // 2 :] for text in markers]
    pieces = st.sampled_from([*markers, *markers, *broken, *COMMON, *PIECES[calls], *PIECES[calls]])
    prompts = [tokenizer.encode(text) for text in ("Go.\n", *opened_prompts(parsing))]

    @settings(max_examples=30, derandomize=True)
    @given(
        pieces=st.lists(pieces, max_size=12),
        noise=st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=6),
        splits=st.lists(st.integers(1, 7), min_size=1, max_size=8),
        finish=FINISHES,
        tools=st.sampled_from([TOOLS, TOOLS, ()]),
        prompt=st.sampled_from(range(len(prompts))),
    )
    def check(
        pieces: list[str],
        noise: list[int],
        splits: list[int],
        finish: Finish,
        tools: tuple[JsonValue, ...],
        prompt: int,
    ) -> None:
        ids = [*tokenizer.encode("".join(pieces)).tolist(), *noise]
        whole = read(parsing, prompts[prompt], ids, [len(ids) or 1], finish, tools)
        cut = read(parsing, prompts[prompt], ids, splits, finish, tools)
        assert cut == whole

    check()


@pytest.mark.parametrize("calls", [name for name in CALL_SYNTAXES if name not in ("auto", "none")])
def test_no_word_of_a_reply_is_lost_or_doubled(calls: str, tiny_model: Path) -> None:
    """Malformed and cut calls become text; every word that was sampled is somewhere in the message, once."""
    parsing, tokenizer = parsing_of(calls, "special marker tokens", tiny_model)
    markers = [marker.text for marker in parsing.markers]
    good = [re.sub(r"é🙂?|🙂", "WORD", piece) for piece in PIECES[calls]]
    pieces = st.sampled_from([*markers, *markers, *good, "WORD ", " WORD", "WORD.", "\n", "{}"])

    @settings(max_examples=100, derandomize=True)
    @given(pieces=st.lists(pieces, max_size=14), finish=FINISHES)
    def check(pieces: list[str], finish: Finish) -> None:
        text = "".join(pieces)
        if calls == "harmony":  # a kind of content, in a header, is no text
            text = re.sub(r"(<\|constrain\|>|<\|channel\|>\w+|to=[^\s<]+)\s*WORD", r"\1", text)
        words = [f"w{number}w" for number in range(text.count("WORD"))]
        for word in words:
            text = text.replace("WORD", word, 1)
        parser = parsing.start(prompt_ids=tokenizer.encode("Go.\n"), tools=TOOLS)
        parser.feed(tokenizer.encode(text).tolist())
        reply = parser.finish(finish)[1]
        shown = " ".join(
            [reply.content or "", reply.reasoning or "", *(f"{c.name} {c.arguments}" for c in reply.tool_calls)]
        )
        assert [shown.count(word) for word in words] == [1] * len(words), (text, reply)

    check()


@pytest.mark.parametrize("kind", KINDS)
def test_text_without_markup_is_the_decoded_text(kind: str, tiny_model: Path) -> None:
    """I9: whatever bytes are sampled, what is shown is what the tokenizer decodes; in every family, as none begins."""
    tokenizer = parsing_of("hermes", kind, tiny_model)[1]
    ordinary = [token_id for token_id in range(tokenizer.vocab_size) if token_id not in tokenizer.added_tokens]
    sampled = st.lists(st.sampled_from(ordinary), max_size=30)
    if kind == "byte fallback":  # of a run of bytes that is no text, its decoder drops the part that is
        sampled = st.text(st.characters(exclude_categories=["Cs"])).map(lambda t: tokenizer.encode_after(t).tolist())
    before = tokenizer.encode("a").tolist()
    parsings = [
        parsing
        for calls in CALL_SYNTAXES
        if not isinstance(parsing := choose_parsing(SILENT_TEMPLATE, tokenizer, calls=calls), HarmonyParsing)
    ]

    @settings(max_examples=25, derandomize=True)
    @given(ids=sampled)
    def check(ids: list[int]) -> None:
        # Behind other text, because some decoders take the space off the very first token.
        expected = tokenizer.decode([*before, *ids])[len(tokenizer.decode(before)) :]
        for parsing in parsings:
            parser = parsing.start(prompt_ids=[], tools=())
            parser.feed(ids)
            reply: ParsedReply = parser.finish(Finish(FinishReason.LENGTH))[1]
            assert (reply.content or "") == expected

    check()


def opened_prompts(parsing: ReplyParsing) -> list[str]:
    """Ends of prompts that leave reasoning, or a message, open."""
    if isinstance(parsing, HarmonyParsing):
        return ["<|start|>assistant", "<|start|>assistant<|channel|>analysis<|message|>", "<|end|>"]
    return [] if parsing.reasoning is None else [parsing.reasoning.opening + "\n"]


def read(
    parsing: ReplyParsing,
    prompt_ids: object,
    ids: list[int],
    splits: list[int],
    finish: Finish,
    tools: tuple[JsonValue, ...],
) -> tuple[object, ...]:
    """The reply, generated call ids left out; asserts that its deltas join to it."""
    parser = parsing.start(prompt_ids=prompt_ids, tools=tools, stop=("##",))  # type: ignore[arg-type]
    deltas: list[ReplyDelta] = []
    at = step = 0
    while at < len(ids):
        deltas += parser.feed(ids[at : at + splits[step % len(splits)]])
        at += splits[step % len(splits)]
        step += 1
    markup = parser.open_markup
    last, reply = parser.finish(finish)
    deltas += last
    assert joined(deltas) == (
        reply.content,
        reply.reasoning,
        [(c.call_id, c.name, c.arguments) for c in reply.tool_calls],
    )
    assert len({c.call_id for c in reply.tool_calls}) == len(reply.tool_calls)
    assert all(isinstance(json.loads(c.arguments), dict) and c.name for c in reply.tool_calls)
    assert tools or not reply.tool_calls
    assert reply.num_reasoning_tokens <= len(ids)
    calls = [(call.name, call.arguments) for call in reply.tool_calls]
    return reply.content, reply.reasoning, calls, reply.flags, reply.num_reasoning_tokens, markup


def joined(deltas: list[ReplyDelta]) -> tuple[str | None, str | None, list[tuple[str | None, str | None, str]]]:
    calls: list[tuple[str | None, str | None, str]] = []
    for delta in deltas:
        if isinstance(delta, ToolCallDelta):
            assert delta.index == len(calls)
            calls.append((delta.call_id, delta.name, delta.arguments))
    content = "".join(delta.text for delta in deltas if isinstance(delta, ContentDelta))
    reasoning = "".join(delta.text for delta in deltas if isinstance(delta, ReasoningDelta))
    assert all(delta.text for delta in deltas if not isinstance(delta, ToolCallDelta))
    return content or None, reasoning or None, calls


@cache
def parsing_of(calls: str, kind: str, tiny_model: Path) -> tuple[ReplyParsing, ChatTokenizer]:
    """One family over one kind of vocabulary. Reasoning is Gemma-4's for one family, `<think>` for the others."""
    tokenizer = byte_fallback_tokenizer() if kind == "byte fallback" else byte_level_tokenizer(tiny_model)
    reasoning = {"seed_oss": "seed_oss", "mistral": "mistral", "llama3_json": "gemma4"}.get(calls, "think")
    bare = choose_parsing(SILENT_TEMPLATE, ChatTokenizer(tokenizer.to_str().encode()), calls=calls, reasoning=reasoning)
    texts = ["<|im_end|>", *(marker.text for marker in bare.markers)]
    tokens = [AddedToken(text, special=True, normalized=False) for text in texts]
    if kind in ("special marker tokens", "byte fallback"):
        tokenizer.add_special_tokens(tokens)
    elif kind == "plain marker tokens":
        tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in texts])
    else:
        tokenizer.add_special_tokens(tokens[:1])
    chat = ChatTokenizer(tokenizer.to_str().encode(), eos_token="<|im_end|>")
    return choose_parsing(SILENT_TEMPLATE, chat, calls=calls, reasoning=reasoning), chat


def byte_level_tokenizer(tiny_model: Path) -> Tokenizer:
    description = json.loads((tiny_model / "tokenizer.json").read_text())
    return Tokenizer.from_str(json.dumps(description | {"added_tokens": []}))


def byte_fallback_tokenizer() -> Tokenizer:
    """SentencePiece style: spaces are a letter, bytes are tokens."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(['the answer is {"name": "f", "arguments": {}} </tool_call>'], trainer)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    description = json.loads(tokenizer.to_str())
    return Tokenizer.from_str(json.dumps(description | {"added_tokens": description["added_tokens"][:1]}))
