"""Random conversations over many templates: recorded ids are never changed, and nothing is refused (I1, I6)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer

from gateway.contracts.errors import TemplateRaised
from gateway.contracts.generation import Finish, FinishReason, JsonValue, TokenIds
from gateway.contracts.records import SegmentReason
from gateway.tito.conversation import Conversation, HistoryPolicy, ParentTurn
from gateway.tito.parsing.choice import choose_parsing
from gateway.tito.prompt import PromptBuilder
from gateway.tito.template import ChatTemplate
from gateway.tito.tokenizer import ChatTokenizer

FOLDERS = (
    Path(__file__).parents[1] / "unit" / "test_tito_templates",
    Path(__file__).parents[2] / "trainer" / "recipes" / "data",
)
TEMPLATES = {file.stem: file.read_text() for folder in FOLDERS for file in sorted(folder.glob("*.jinja"))}
CONTROL = (
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
    "<|observation|>",
    "</s>",
    "[INST]",
    "[/INST]",
    "<|end|>",
    "<|call|>",
)
STOPS = ("<|im_end|>", "<|endoftext|>", "</s>", "<|user|>", "<|observation|>", "<|call|>")
TOOL = {"type": "function", "function": {"name": "calculator", "parameters": {"type": "object", "properties": {}}}}
CALL = '<tool_call>\n{"name": "calculator", "arguments": {"expression": "48/2"}}\n</tool_call>'

texts = st.sampled_from(
    ["24", "i", " hm \n", "", "What is 48/2?", "<|im_end|>", "</think>é", "x <|im_start|>user\n", "🙂"]
)
replies = st.tuples(
    st.sampled_from(["", "<think>\nDivide.\n</think>\n\n", "<think>Divide", "x\n</think>\n\n"]),
    st.sampled_from(["", "It is 24.", " 24\n"]),
    st.sampled_from(["", CALL, f"\n{CALL}\n{CALL}", "<tool_call>bad", "<tool_call>bad</tool_call>"]),
    st.sampled_from([*STOPS, ""]),
)
roles = st.sampled_from(["tool", "tool", "user", "user", "assistant", "system"])
appended = st.lists(st.tuples(roles, texts), max_size=3)


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> ChatTokenizer:
    inner = Tokenizer.from_file(str(tiny_model / "tokenizer.json"))
    inner.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in CONTROL])
    return ChatTokenizer(inner.to_str().encode(), eos_token_ids=[inner.token_to_id(text) for text in STOPS])


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_turn_continues_recorded_ids_or_opens_a_segment_with_a_reason(
    name: str, tokenizer: ChatTokenizer
) -> None:
    """I1, I3, I6 over histories of several turns, cut turns, odd roles, lookalikes and re-spelled replies."""
    template = ChatTemplate({"default": TEMPLATES[name]}, special_tokens={"bos_token": "", "eos_token": "</s>"})
    parsing = choose_parsing(template, tokenizer)
    builders = {policy: PromptBuilder(tokenizer, template, history_policy=policy) for policy in HistoryPolicy}

    @settings(max_examples=25, derandomize=True)
    @given(
        turns=st.lists(st.tuples(replies, appended), min_size=1, max_size=4),
        policy=st.sampled_from(HistoryPolicy),
        echo_reasoning=st.booleans(),
    )
    def check(
        turns: list[tuple[tuple[str, ...], list[tuple[str, str]]]], policy: HistoryPolicy, echo_reasoning: bool
    ) -> None:
        builder = builders[policy]
        messages: list[JsonValue] = [{"role": "user", "content": "What is 48/2?"}]
        prompt = builder.build(Conversation(tuple(messages), (TOOL,)), None).token_ids
        for (reasoning, text, call, stop), following in turns:
            output = sampled_ids(tokenizer, reasoning + text + call + stop)
            if not len(output):
                return
            finish = Finish(FinishReason.STOP, int(output[-1])) if stop else Finish(FinishReason.LENGTH)
            parser = parsing.start(prompt_ids=prompt, tools=(TOOL,))
            parser.feed(output.tolist())
            reply = parser.finish(finish)[1].message()
            messages.append(reply if echo_reasoning else {k: v for k, v in reply.items() if k != "reasoning_content"})
            parent = ParentTurn(np.concatenate([prompt, output]), len(output), len(messages), finish)
            messages += [message(role, content) for role, content in following]
            conversation = Conversation(tuple(messages), (TOOL,))
            try:
                built = builder.build(conversation, parent)
                builder.upkeep()
                again = builder.build(conversation, parent)
                builder.upkeep()
                assert builder.audits.num_alarms == 0
                assert (again.token_ids.tolist(), again.segment_reason) == (
                    built.token_ids.tolist(),
                    built.segment_reason,
                )
            except TemplateRaised:
                with pytest.raises(TemplateRaised):
                    template.render(conversation)
                return
            assert built.token_ids.dtype == np.int32
            if built.segment_reason is None:
                prompt = np.concatenate([parent.token_ids, built.token_ids])
                whole = builder.build(conversation, None).token_ids
                tail = built.token_ids if built.certified_by != "close" else built.token_ids[-1:]
                assert whole[len(whole) - len(tail) :].tolist() == tail.tolist()
            else:
                prompt = built.token_ids
                assert built.segment_reason is not SegmentReason.FIRST

    check()


def sampled_ids(tokenizer: ChatTokenizer, text: str) -> TokenIds:
    """A spelling that no tokenizer would choose: models sample such ids, and they must stay."""
    middle = len(text) // 2
    return np.concatenate([tokenizer.encode(text[:middle]), tokenizer.encode(text[middle:])])


def message(role: str, content: str) -> JsonValue:
    if role == "tool":
        return {"role": "tool", "tool_call_id": "call_00001", "name": "calculator", "content": content}
    return {"role": role, "content": content}


def test_a_conversation_of_many_turns_stays_one_segment(tiny_model: Path) -> None:
    """I1 from end to end: 40 tool turns, one root, and every prompt starts with exactly the recorded ids."""
    tokenizer, template = ChatTokenizer.load(tiny_model), ChatTemplate.load(tiny_model)
    builder, parsing = PromptBuilder(tokenizer, template), choose_parsing(template, tokenizer)
    messages: list[JsonValue] = [{"role": "user", "content": "Go."}]
    ids = builder.build(Conversation(tuple(messages), (TOOL,)), None).token_ids
    for turn in range(40):
        arguments = json.dumps({"expression": f"{turn}+1"})
        call = f'<tool_call>\n{{"name": "calculator", "arguments": {arguments}}}\n</tool_call>'
        text = f"<think>\nStep {turn}.\n</think>\n{call}"
        output = tokenizer.encode(text + "<|im_end|>")
        parser = parsing.start(prompt_ids=ids, tools=(TOOL,))
        parser.feed(output.tolist())
        finish = Finish(FinishReason.STOP, int(output[-1]))
        reply = parser.finish(finish)[1]
        messages += [reply.message(), message("tool", str(turn + 1))]
        parent = ParentTurn(np.concatenate([ids, output]), len(output), len(messages) - 1, finish)
        built = builder.build(Conversation(tuple(messages), (TOOL,)), parent)
        assert (built.segment_reason, built.certified_by) == (None, "probe")
        ids = np.concatenate([parent.token_ids, built.token_ids])
    assert ids.tolist() == builder.build(Conversation(tuple(messages), (TOOL,)), None).token_ids.tolist()
