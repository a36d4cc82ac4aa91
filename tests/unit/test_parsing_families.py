"""Every family of call syntax and of reasoning: chosen from its template, and read back as the template wrote it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer

from gateway.contracts.generation import Finish, FinishReason, JsonValue
from gateway.contracts.replies import ParsedReply, ReplyFlag
from gateway.tito.conversation import Conversation
from gateway.tito.parsing.choice import choose_parsing
from gateway.tito.parsing.reply import ReplyParsing
from gateway.tito.template import ChatTemplate
from gateway.tito.tokenizer import ChatTokenizer

TEMPLATES = Path(__file__).parent / "test_parsing_templates"
STOPPED, CUT = Finish(FinishReason.STOP), Finish(FinishReason.LENGTH)
TOOLS: tuple[JsonValue, ...] = (
    {
        "type": "function",
        "function": {
            "name": "edit_file",
            "parameters": {
                "type": "object",
                "$defs": {"Mode": {"type": "integer"}},
                "properties": {
                    "path": {"type": "string"},
                    "line": {"type": "integer"},
                    "ratio": {"type": ["number", "null"]},
                    "force": {"type": "boolean"},
                    "options": {"type": "object"},
                    "lines": {"anyOf": [{"type": "array"}, {"type": "null"}]},
                    "mode": {"$ref": "#/$defs/Mode"},
                    "note": {"type": ["string", "null"]},
                },
            },
        },
    },
    {"type": "function", "function": {"name": "list-files_2", "parameters": {"type": "object", "properties": {}}}},
)
ARGUMENTS = {
    "path": 'a "b"\n\tc\\d é🙂 </parameter> {5}',
    "line": 48,
    "ratio": 2.5,
    "force": True,
    "options": {"deep": [1, {"x": None}]},
    "lines": ["one", "two"],
    "mode": 3,
    "note": "12",
}


@dataclass(frozen=True)
class Family:
    """header: what stands before a reply. control: tokens besides the parser's own markers."""

    name: str
    chosen: str
    header: str
    control: tuple[str, ...]
    num_calls: int = 2

    @property
    def template(self) -> ChatTemplate:
        text = (TEMPLATES / f"{self.name}.jinja").read_text()
        return ChatTemplate({"default": text}, special_tokens={"bos_token": "<s>", "eos_token": "</s>"})


CHATML = ("<|im_start|>", "<|im_end|>")
DEEPSEEK = ("<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>")
FAMILIES = [
    Family("hermes", "hermes + <think>", "<|im_start|>assistant\n", CHATML),
    Family("qwen3_coder", "qwen3_coder", "<|im_start|>assistant\n", CHATML),
    Family("seed_oss", "seed_oss + <seed:think>", "<seed:bos>assistant\n", ("<seed:bos>", "<seed:eos>")),
    Family("minimax_m2", "minimax_m2 + <think>", "]~b]ai\n", ("]~b]", "[e~[")),
    Family("glm45", "glm45 + <think>", "<|assistant|>\n", ("<|user|>", "<|assistant|>", "<|observation|>")),
    Family("glm47", "glm45 + <think>", "<|assistant|>\n", ("<|user|>", "<|assistant|>", "<|observation|>")),
    Family("deepseek_v3", "deepseek_v3 + <think>", "<｜Assistant｜>", DEEPSEEK),
    Family("deepseek_v31", "deepseek_v31 + <think>", "<｜Assistant｜></think>", DEEPSEEK),
    Family("kimi_k2", "kimi_k2 + <think>", "<|im_assistant|>assistant<|im_middle|>", ("<|im_middle|>", "<|im_end|>")),
    Family("llama3_json", "llama3_json", "assistant<|end_header_id|>\n\n", ("<|end_header_id|>", "<|eot_id|>"), 1),
    Family("mistral_array", "mistral", "[/INST]", ("[INST]", "[/INST]", "</s>")),
    Family("mistral_args", "mistral + [THINK]", "[/INST]", ("[INST]", "[/INST]", "</s>")),
    Family("harmony", "harmony", "<|start|>assistant", ()),
]
BY_NAME = {family.name: family for family in FAMILIES}


@pytest.fixture(scope="session", params=["marker tokens", "text markers"])
def vocabulary(request: pytest.FixtureRequest, tiny_model: Path) -> Vocabulary:
    return Vocabulary(tiny_model, has_tokens=request.param == "marker tokens")


class Vocabulary:
    """A byte-level vocabulary, with the markers of a family as tokens or without."""

    def __init__(self, tiny_model: Path, *, has_tokens: bool) -> None:
        description = json.loads((tiny_model / "tokenizer.json").read_text())
        description["added_tokens"] = []
        self._plain = json.dumps(description)
        self.has_tokens = has_tokens

    @cache  # noqa: B019 - lives as long as the test session
    def parsing(self, family: Family) -> tuple[ReplyParsing, ChatTokenizer]:
        tokenizer = Tokenizer.from_str(self._plain)
        template = family.template
        tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in family.control])
        chat = ChatTokenizer(tokenizer.to_str().encode())
        if self.has_tokens:
            markers = [marker.text for marker in choose_parsing(template, chat).markers]
            markers += ["<|channel|>", "<|message|>", "<|end|>"] if family.name == "harmony" else []
            tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in markers])
            chat = ChatTokenizer(tokenizer.to_str().encode())
        return choose_parsing(template, chat), chat


def reply_text(family: Family, message: JsonValue, **template_arguments: JsonValue) -> tuple[str, str]:
    """What the template writes before a reply, and for it."""
    conversation = Conversation(({"role": "user", "content": "Go."}, message), TOOLS, template_arguments)
    head, header, reply = family.template.render(conversation, add_generation_prompt=False).partition(family.header)
    assert header
    return head + header, reply


def parse(
    vocabulary: Vocabulary, family: Family, text: str, *, prompt: str = "", finish: Finish = STOPPED, tools: bool = True
) -> ParsedReply:
    parsing, tokenizer = vocabulary.parsing(family)
    parser = parsing.start(prompt_ids=tokenizer.encode(prompt), tools=TOOLS if tools else ())
    parser.feed(tokenizer.encode(text).tolist())
    return parser.finish(finish)[1]


def call(family: Family, arguments: JsonValue, *, name: str = "edit_file", number: int = 0) -> JsonValue:
    call_id = f"functions.{name}:{number}" if family.name == "kimi_k2" else f"abcdEF12{number}"
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}


def calls_of(reply: ParsedReply) -> list[tuple[str, JsonValue]]:
    return [(written.name, json.loads(written.arguments)) for written in reply.tool_calls]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_template_names_its_syntax(family: Family, vocabulary: Vocabulary) -> None:
    """Design: choosing by name, with `auto` from the template."""
    assert vocabulary.parsing(family)[0].name == family.chosen


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_what_the_template_writes_for_calls_is_read_back(family: Family, vocabulary: Vocabulary) -> None:
    """I1's other side: the agent sees the calls that the tokens are."""
    calls = [
        call(family, ARGUMENTS),
        call(family, {}, name="list-files_2", number=1),
    ][: family.num_calls]
    content = "Let me see." if family.name not in ("llama3_json", "mistral_array") else ""
    prompt, text = reply_text(family, {"role": "assistant", "content": content, "tool_calls": calls})
    reply = parse(vocabulary, family, text, prompt=prompt)
    assert calls_of(reply) == [("edit_file", ARGUMENTS), ("list-files_2", {})][: family.num_calls]
    stops = [control for control in family.control if control in (reply.content or "")]
    assert (reply.content or "", reply.flags, stops) == (content, (), [])
    if family.name in ("kimi_k2", "mistral_array"):
        assert [written.call_id for written in reply.tool_calls] == [wanted["id"] for wanted in calls]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_call_markup_is_content_where_no_tools_were_offered(family: Family, vocabulary: Vocabulary) -> None:
    """Nothing of what was sampled disappears."""
    prompt, text = reply_text(family, {"role": "assistant", "content": "", "tool_calls": [call(family, {"line": 5})]})
    reply = parse(vocabulary, family, text, prompt=prompt, tools=False)
    assert reply.tool_calls == ()
    assert "edit_file" in (reply.content or "")
    assert "line" in (reply.content or "")
    assert reply.flags == ()


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_call_that_is_cut_anywhere_becomes_text_and_is_flagged(family: Family, vocabulary: Vocabulary) -> None:
    """I9: no call is made up of half of one, and no text of it is lost."""
    _, tokenizer = vocabulary.parsing(family)
    arguments = {"path": "/tmp/x", "line": 48}
    prompt, text = reply_text(family, {"role": "assistant", "content": "", "tool_calls": [call(family, arguments)]})
    text = text.removesuffix(family.control[-1] if family.control else "")
    ids = tokenizer.encode(text).tolist()
    parsing, _ = vocabulary.parsing(family)
    whole_from = next(n for n in range(len(ids) + 1) if calls_after(parsing, ids[:n], tokenizer, prompt))
    for num_sampled in range(whole_from):
        parser = parsing.start(prompt_ids=tokenizer.encode(prompt), tools=TOOLS)
        parser.feed(ids[:num_sampled])
        reply = parser.finish(CUT)[1]
        assert reply.tool_calls == ()
        shown = tokenizer.decode(ids[:num_sampled]).removeprefix("<think></think>")
        assert (reply.content or "").strip() == shown.replace("\r", "").strip() or not reply.content
        if "edit_file" in shown and reply.content != shown.strip():
            assert set(reply.flags) & {ReplyFlag.UNCLOSED_TOOL_CALL, ReplyFlag.MALFORMED_TOOL_CALL}
        if "edit_file" in shown:
            assert "edit_file" in (reply.content or "")
    assert calls_after(parsing, ids, tokenizer, prompt) == [("edit_file", arguments)]


def calls_after(
    parsing: ReplyParsing, ids: list[int], tokenizer: ChatTokenizer, prompt: str
) -> list[tuple[str, JsonValue]]:
    parser = parsing.start(prompt_ids=tokenizer.encode(prompt), tools=TOOLS)
    parser.feed(ids)
    return calls_of(parser.finish(CUT)[1])
