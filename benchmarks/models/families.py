"""Model families in miniature: a template with its control tokens, and how models that were trained on it write.

Structures are those of real families, all words are our own. `facts` of each family are what the judge holds the
gateway to: which token history has behind a turn, which messages the template does not show, and why a purely appending
agent may still get a new segment.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from benchmarks.models import markup
from benchmarks.models.vocabularies import make_tokenizer
from gateway.contracts.records import SegmentReason

_TEMPLATES = Path(__file__).parent / "templates"
_OWN = Path(__file__).parents[2] / "trainer" / "recipes" / "data" / "chat_template.jinja"
_CHATML = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
_THINK = ("<think>", "</think>")
_CALL = ("<tool_call>", "</tool_call>")
_RESPONSE = ("<tool_response>", "</tool_response>")


class Thinking(Enum):
    """How reasoning is written. NEVER: not at all. WRITTEN: the model writes the opener. OPENED: the prompt did."""

    NEVER = "never"
    WRITTEN = "written"
    OPENED = "opened"


@dataclass(frozen=True, slots=True)
class Facts:
    """What is true of a template, told independently of the gateway.

    stop: (has calls, role that follows) → the token history has behind the turn; None where no token is.
    hidden_roles: messages of these roles that are not the first are dropped or hoisted.
    new_segments: reasons for which an agent that only appends may get a new segment, with why that is so.
    """

    stop: Callable[[bool, str], str | None]
    hidden_roles: frozenset[str] = frozenset()
    new_segments: dict[SegmentReason, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Family:
    """One family. `stops`: the end tokens of its generation_config.json, the usual one first.

    thinking: as written by its models, between `reasoning`'s two markers. max_calls: what its markup can say in a turn.
    """

    name: str
    special: tuple[str, ...]
    stops: tuple[str, ...]
    write_calls: markup.WriteCalls
    facts: Facts
    markup: tuple[str, ...] = ()
    thinking: Thinking = Thinking.NEVER
    reasoning: tuple[str, str] = ("<think>\n", "\n</think>\n\n")
    text_opening: str = ""
    max_calls: int = 4
    bos: str = ""
    file: Path | None = None

    @property
    def template(self) -> str:
        """The template's text."""
        return (self.file or _TEMPLATES / f"{self.name}.jinja").read_text()


def _always(text: str | None) -> Callable[[bool, str], str | None]:
    return lambda has_calls, next_role: text


def _opener(has_calls: bool, next_role: str) -> str | None:
    openers = {"tool": "<|observation|>", "assistant": "<|assistant|>"}
    openers |= dict.fromkeys(("system", "developer"), "<|system|>")
    return openers.get(next_role, "<|user|>")


_PROMPT_MOVES = "the tools (or the system text) stand before the last question, so a new question moves them"

_NEVER_CERTIFIED = (SegmentReason.UNCERTIFIED, SegmentReason.TRUNCATED)

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family(
            "own",
            _CHATML,
            ("<|im_end|>", "<|endoftext|>"),
            markup.hermes_calls,
            Facts(_always("<|im_end|>")),
            markup=(*_THINK, *_CALL),
            thinking=Thinking.WRITTEN,
            reasoning=("<think>\n", "\n</think>\n"),
            file=_OWN,
        ),
        Family(
            "chatml_folds",
            _CHATML,
            ("<|im_end|>", "<|endoftext|>"),
            markup.hermes_calls,
            Facts(_always("<|im_end|>")),
            markup=_CALL,
        ),
        Family(
            "chatml_thinks",
            _CHATML,
            ("<|im_end|>", "<|endoftext|>"),
            markup.hermes_calls,
            Facts(_always("<|im_end|>")),
            markup=(*_THINK, *_CALL, *_RESPONSE),
            thinking=Thinking.WRITTEN,
        ),
        Family(
            "chatml_opens_think",
            _CHATML,
            ("<|im_end|>", "<|endoftext|>"),
            markup.hermes_calls,
            Facts(_always("<|im_end|>")),
            markup=(*_THINK, *_CALL, *_RESPONSE),
            thinking=Thinking.OPENED,
        ),
        Family(
            "xml_calls",
            _CHATML,
            ("<|im_end|>", "<|endoftext|>"),
            markup.xml_calls,
            Facts(_always("<|im_end|>")),
            markup=(*_CALL, *_RESPONSE),
        ),
        Family(
            "openers",
            ("[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|system|>", "<|observation|>", "<|endoftext|>"),
            ("<|user|>", "<|observation|>", "<|endoftext|>"),
            markup.key_value_calls,
            Facts(_opener),
            markup=(*_THINK, *_CALL, *_RESPONSE, "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
            thinking=Thinking.WRITTEN,
            reasoning=("\n<think>", "</think>"),
            text_opening="\n",
        ),
        Family(
            "inst_strict",
            (
                "<s>",
                "</s>",
                "[INST]",
                "[/INST]",
                "[TOOL_CALLS]",
                "[AVAILABLE_TOOLS]",
                "[/AVAILABLE_TOOLS]",
                "[TOOL_RESULTS]",
                "[/TOOL_RESULTS]",
            ),
            ("</s>",),
            markup.list_calls,
            Facts(_always("</s>"), new_segments={SegmentReason.REWRITE_OTHER: _PROMPT_MOVES}),
            bos="<s>",
            text_opening=" ",
        ),
        Family(
            "inst_loose",
            (
                "<s>",
                "</s>",
                "[INST]",
                "[/INST]",
                "[TOOL_CALLS]",
                "[ARGS]",
                "[AVAILABLE_TOOLS]",
                "[/AVAILABLE_TOOLS]",
                "[TOOL_RESULTS]",
                "[/TOOL_RESULTS]",
                "[SYSTEM_PROMPT]",
                "[/SYSTEM_PROMPT]",
            ),
            ("</s>",),
            markup.named_calls,
            Facts(_always("</s>")),
            bos="<s>",
        ),
        Family(
            "between_turns",
            _CHATML,
            ("<|im_end|>", "<|endoftext|>"),
            markup.hermes_calls,
            Facts(_always("<|im_end|>")),
            markup=_CALL,
        ),
        Family(
            "counts_calls",
            (
                "<|im_user|>",
                "<|im_assistant|>",
                "<|im_system|>",
                "<|im_middle|>",
                "<|im_end|>",
                "[EOS]",
                "<|tool_calls_section_begin|>",
                "<|tool_calls_section_end|>",
                "<|tool_call_begin|>",
                "<|tool_call_argument_begin|>",
                "<|tool_call_end|>",
            ),
            ("<|im_end|>", "[EOS]"),
            markup.section_calls,
            Facts(_always("<|im_end|>")),
        ),
        Family(
            "results_inside",
            (
                "<bos>",
                "<eos>",
                "<|turn>",
                "<turn|>",
                "<|tool_call>",
                "<tool_call|>",
                "<|tool_response>",
                "<tool_response|>",
                "<|channel>",
                "<channel|>",
            ),
            ("<turn|>", "<|tool_response>", "<eos>"),
            markup.braced_calls,
            Facts(lambda has_calls, next_role: "<|tool_response>" if has_calls and next_role == "tool" else "<turn|>"),
            thinking=Thinking.WRITTEN,
            reasoning=("<|channel>thought\n", "<channel|>"),
            bos="<bos>",
        ),
        Family(
            "content_after_results",
            (
                "<bos>",
                "<eos>",
                "<|turn>",
                "<turn|>",
                "<|tool_call>",
                "<tool_call|>",
                "<|tool_response>",
                "<tool_response|>",
            ),
            ("<turn|>", "<|tool_response>", "<eos>"),
            markup.braced_calls,
            Facts(lambda has_calls, next_role: "<|tool_response>" if has_calls and next_role == "tool" else "<turn|>"),
            bos="<bos>",
        ),
        Family(
            "hoists_system",
            (
                "<｜begin▁of▁sentence｜>",
                "<｜end▁of▁sentence｜>",
                "<｜User｜>",
                "<｜Assistant｜>",
                "<｜tool▁calls▁begin｜>",
                "<｜tool▁calls▁end｜>",
                "<｜tool▁call▁begin｜>",
                "<｜tool▁call▁end｜>",
                "<｜tool▁sep｜>",
                "<｜tool▁output▁begin｜>",
                "<｜tool▁output▁end｜>",
            ),
            ("<｜end▁of▁sentence｜>",),
            markup.separated_calls,
            Facts(_always("<｜end▁of▁sentence｜>"), hidden_roles=frozenset({"system", "developer"})),
            markup=_THINK,
            bos="<｜begin▁of▁sentence｜>",
        ),
        Family(
            "drops_system",
            ("[sys]", "[usr]", "[bot]", "[tool]", "[tools]", "[e]"),
            ("[e]",),
            markup.line_calls,
            Facts(_always("[e]"), hidden_roles=frozenset({"system", "developer"})),
            markup=(*_THINK, "<calls>", "</calls>"),
            thinking=Thinking.WRITTEN,
        ),
        Family(
            "raises",
            ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>"),
            ("<|eot_id|>", "<|eom_id|>"),
            markup.bare_calls,
            Facts(_always("<|eot_id|>")),
            max_calls=1,
            bos="<|begin_of_text|>",
        ),
        Family(
            "channels",
            (
                "<|start|>",
                "<|end|>",
                "<|message|>",
                "<|channel|>",
                "<|constrain|>",
                "<|return|>",
                "<|call|>",
                "<|endoftext|>",
            ),
            ("<|return|>", "<|call|>", "<|endoftext|>"),
            markup.channel_calls,
            Facts(
                lambda has_calls, next_role: "<|call|>" if has_calls else "<|end|>",
                hidden_roles=frozenset({"system", "developer"}),
                new_segments={SegmentReason.REWRITE_OTHER: "text beside a call is analysis, gone behind a final text"},
            ),
            thinking=Thinking.WRITTEN,
            reasoning=("<|channel|>analysis<|message|>", "<|end|><|start|>assistant"),
            text_opening="<|channel|>final<|message|>",
            max_calls=1,
        ),
        Family(
            "eats_space",
            ("<s>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "<|endoftext|>"),
            ("<|end|>", "<|endoftext|>"),
            markup.hermes_calls,
            Facts(_always("<|end|>")),
            markup=_CALL,
            bos="<s>",
        ),
        Family(
            "plain_text",
            ("<|endoftext|>",),
            ("<|endoftext|>",),
            markup.hermes_calls,
            Facts(_always(None), new_segments=dict.fromkeys(_NEVER_CERTIFIED, "no token ends a turn")),
        ),
    )
}
"""name → family"""


def write_model(folder: Path, *, family: Family, vocabulary: str) -> Path:
    """A model folder as `ServedModel.load` and engines read it: tokenizer, template, configuration, no weights."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(vocabulary, special=family.special, markup=family.markup)
    stop_ids = [tokenizer.token_to_id(text) for text in family.stops]
    named = {"eos_token": family.stops[0]} | ({"bos_token": family.bos} if family.bos else {})
    config = {"model_type": "simulated", "vocab_size": tokenizer.get_vocab_size(), "eos_token_id": stop_ids[0]}
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(family.template)
    for name, content in {
        "tokenizer_config.json": named,
        "config.json": config,
        "generation_config.json": {"eos_token_id": stop_ids},
    }.items():
        (folder / name).write_text(json.dumps(content))
    return folder
