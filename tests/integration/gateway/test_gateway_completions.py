"""Prompts without messages against a real gateway process: OpenAI's client, SGLang's /generate, /tokenize."""

from __future__ import annotations

import base64
import json
import time
from collections import Counter
from itertools import pairwise
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.contracts.codec import decode_rollout
from tests.integration.gateway.conftest import TOOLS, RunningGateway

END = "<|im_end|>"
TEXT = "<|im_start|>user\nquick<|im_end|>\n<|im_start|>assistant\n"
ANSWER = "the quick answer"


def complete(gateway: RunningGateway, session_id: str, prompt: Any, **options: Any) -> Any:
    options.setdefault("max_tokens", 100)
    return gateway.client(session_id).completions.create(model="any", prompt=prompt, **options)


def generate(gateway: RunningGateway, session_id: str, **fields: Any) -> Any:
    return gateway.post(f"/sessions/{session_id}/generate", fields)


def events(gateway: RunningGateway, path: str, body: Any) -> list[Any]:
    with httpx.stream("POST", gateway.url + path, json=body, timeout=30) as reply:
        assert reply.status_code == 200
        frames = [line.removeprefix("data: ") for line in reply.iter_lines() if line]
    assert frames[-1] == "[DONE]"
    return [json.loads(frame) for frame in frames[:-1]]


def parents(gateway: RunningGateway, session_id: str) -> list[int | None]:
    """For each turn the index of the turn that it extends."""
    turns = gateway.turns(session_id)
    at = {turn["turn_id"]: i for i, turn in enumerate(turns)}
    return [at.get(turn["attachment"]["parent_id"]) for turn in turns]


def test_text_completion_extends_recorded_tokens(gateway: RunningGateway, session_id: str) -> None:
    """I1: a text that begins with what was sent and sampled keeps the recorded ids; only the rest is encoded."""
    capture = {"return_token_ids": True}
    first = complete(gateway, session_id, TEXT, extra_body=capture).choices[0]
    assert (first.text, first.finish_reason, first.logprobs) == (ANSWER, "stop", None)
    more = "\n<|im_start|>user\nand quick again<|im_end|>\n<|im_start|>assistant\n"
    second = complete(gateway, session_id, TEXT + first.text + END + more, extra_body=capture).choices[0]
    recorded = first.prompt_token_ids + first.token_ids
    assert second.prompt_token_ids[: len(recorded)] == recorded
    turns = gateway.turns(session_id)
    assert parents(gateway, session_id) == [None, 0]
    assert [turn["meta"]["certified_by"] for turn in turns] == ["raw", "raw"]
    assert turns[1]["prompt_token_ids"] == second.prompt_token_ids[len(recorded) :]
    assert turns[1]["added_messages"] == [{"role": "prompt", "content": more}]
    assert turns[1]["experts_start"] == len(recorded) - 1
    assert all(turn["delivered_at"] for turn in turns)


def test_a_loop_over_token_ids_is_one_segment(gateway: RunningGateway, session_id: str) -> None:
    """I1, I3: prompt = last prompt + its output + own ids, twenty times; each sampled token trains once."""
    ids = gateway.post(f"/sessions/{session_id}/tokenize", {"text": TEXT})["tokens"]
    own = gateway.post(f"/sessions/{session_id}/tokenize", {"text": f"\n{TEXT}"})["tokens"]
    sampled: list[int] = []
    for turn in range(20):
        if turn % 2:
            choice = complete(gateway, session_id, ids, extra_body={"return_token_ids": True}).choices[0]
            assert choice.prompt_token_ids == ids
            output = choice.token_ids
        else:
            output = generate(gateway, session_id, input_ids=ids, sampling_params={"temperature": 0})["output_ids"]
        sampled += output
        ids = ids + output + own
    assert parents(gateway, session_id) == [None, *range(19)]
    snapshot = gateway.post(f"/sessions/{session_id}/finish", {"reward": 1.0})["snapshot"]
    body = httpx.get(f"{gateway.url}/feed/rollouts/{session_id}?snapshot={snapshot}", timeout=30).content
    [segment] = decode_rollout(body).segments
    assert segment.token_ids.tolist() == ids[: -len(own)]
    assert segment.token_ids[segment.loss_mask].tolist() == sampled
    assert bool(segment.routed_valid.all())


def test_raw_prompts_and_chats_share_a_session(gateway: RunningGateway, session_id: str) -> None:
    """I1: the ids of a chat go on as a raw prompt; the chat itself goes on from its own turns."""
    question = {"role": "user", "content": "What is 48/2?"}
    client = gateway.client(session_id)
    chat: Any = client.chat.completions.create(
        model="any",
        messages=[question],  # type: ignore[list-item]
        tools=TOOLS,  # type: ignore[arg-type]
        extra_body={"return_token_ids": True},
    )
    ids = chat.prompt_token_ids + chat.choices[0].token_ids
    generate(gateway, session_id, input_ids=[*ids, 5, 6])
    message = chat.choices[0].message
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "24"}
    client.chat.completions.create(model="any", messages=[question, message, result], tools=TOOLS)  # type: ignore[list-item, arg-type]
    assert parents(gateway, session_id) == [None, 0, 0]
    report = gateway.get(f"/sessions/{session_id}/report")
    assert report["certified_by"]["raw"] == 1
    assert report["drift"]["num_raised_turns"] == 0


def test_several_prompts_are_turns_in_order(gateway: RunningGateway, session_id: str) -> None:
    reply = complete(gateway, session_id, ["quick", "so"], n=2, echo=True)
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in reply.choices] == [f"quick{ANSWER}"] * 2 + ["sohello"] * 2
    ids = gateway.post("/tokenize", {"prompt": ["quick", "so"]})["tokens"]
    again = complete(gateway, session_id, ids)
    assert [choice.text for choice in again.choices] == [ANSWER, "hello"]
    assert reply.usage.prompt_tokens == sum(map(len, ids))
    assert len(gateway.turns(session_id)) == 6


def test_log_probs_are_the_legacy_object_with_offsets_into_the_text(gateway: RunningGateway, session_id: str) -> None:
    """I9: log-probs of an echoed prompt are not known, and null."""
    choice = complete(gateway, session_id, "quick", logprobs=1, echo=True).choices[0]
    [turn] = gateway.turns(session_id)
    num_prompt = len(turn["prompt_token_ids"])
    logprobs = choice.logprobs
    assert logprobs.token_logprobs[:num_prompt] == [None] * num_prompt
    assert logprobs.token_logprobs[num_prompt:] == pytest.approx(turn["output_logprobs"])
    assert "".join(logprobs.tokens) == choice.text + END
    for token, offset in zip(logprobs.tokens[:-1], logprobs.text_offset[:-1], strict=True):
        assert choice.text[offset : offset + len(token)] == token


def test_markup_in_a_completion_is_text(gateway: RunningGateway, session_id: str) -> None:
    choice = complete(gateway, session_id, "What is 48/2?", max_tokens=500).choices[0]
    assert choice.text.startswith("<think>\nlet me see\n</think>\n<tool_call>")
    [turn] = gateway.turns(session_id)
    assert turn["reply"] == {"role": "assistant", "content": choice.text}


def test_stream_adds_up_to_the_record_and_is_real(gateway: RunningGateway, session_id: str) -> None:
    started = time.monotonic()
    arrivals, chunks = [], []
    options = {"stream_options": {"include_usage": True}, "extra_body": {"return_token_ids": True}}
    for chunk in complete(gateway, session_id, "count slowly", stream=True, logprobs=0, **options):
        arrivals.append(time.monotonic() - started)
        chunks.append(chunk)
    choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
    [turn] = gateway.turns(session_id)
    assert "".join(choice.text for choice in choices) == "one two three four five six" == turn["reply"]["content"]
    assert choices[0].prompt_token_ids == turn["prompt_token_ids"]
    assert [i for choice in choices[1:-1] for i in choice.token_ids] == turn["output_token_ids"]
    offsets = [at for choice in choices if choice.logprobs for at in choice.logprobs.text_offset]
    assert len(offsets) == len(turn["output_token_ids"])
    assert offsets == sorted(offsets)
    assert choices[-1].finish_reason == "stop"
    assert chunks[-1].usage.completion_tokens == len(turn["output_token_ids"])
    assert arrivals[-1] - arrivals[1] > 0.3


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"prompt": [5, 99_999]}, "99999"),
        ({"prompt": [5, 2**40]}, "prompt[1]"),
        ({"prompt": [[5], [5, -1]]}, "prompt[1][1]"),
        ({"prompt": [5, "x"]}, "prompt[1]"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({}, "prompt"),
        ({"prompt": "x", "suffix": "y"}, "suffix"),
        ({"prompt": "x", "best_of": 3}, "best_of"),
        ({"prompt": "x", "n": 0}, "n:"),
        ({"prompt": "x", "logprobs": True}, "logprobs"),
        ({"prompt": "x", "max_tokens": 100_000}, "maximum context length"),
    ],
)
def test_an_impossible_completion_is_a_400_that_names_it(
    gateway: RunningGateway, session_id: str, fields: Any, named: str
) -> None:
    reply = httpx.post(f"{gateway.url}/sessions/{session_id}/v1/completions", json=fields, timeout=30)
    assert reply.status_code == 400
    assert named in reply.json()["error"]["message"]


def test_one_bad_prompt_of_several_starts_no_turn(gateway: RunningGateway, session_id: str) -> None:
    with pytest.raises(openai.BadRequestError, match="99999"):
        complete(gateway, session_id, [[5, 6], [99_999]])
    assert gateway.turns(session_id) == []


def test_a_prompt_too_long_among_others_refuses_the_call_and_nothing_counts_as_seen(
    gateway: RunningGateway, session_id: str
) -> None:
    """I3: what the other prompts sampled is recorded as not delivered."""
    body = {"prompt": ["count slowly", [5] * 5000], "max_tokens": 50}
    reply = httpx.post(f"{gateway.url}/sessions/{session_id}/v1/completions", json=body, timeout=30)
    assert reply.json()["error"]["code"] == "context_length_exceeded"
    gateway.post(f"/sessions/{session_id}/finish", {"reward": 0.0})
    for turn in gateway.turns(session_id):
        assert turn["delivered_at"] is None


def test_generate_answers_in_sglangs_shape(gateway: RunningGateway, session_id: str) -> None:
    reply = generate(
        gateway,
        session_id,
        text="quick",
        sampling_params={"max_new_tokens": 50, "temperature": 0.5, "skip_special_tokens": False, "min_new_tokens": 2},
        return_logprob=True,
        return_text_in_logprobs=True,
        return_routed_experts=True,
        return_prompt_token_ids=True,
        rid="mine",
    )
    [turn] = gateway.turns(session_id)
    meta = reply["meta_info"]
    assert reply["text"] == ANSWER
    assert reply["output_ids"] == turn["output_token_ids"]
    assert reply["prompt_token_ids"] == turn["prompt_token_ids"]
    assert (meta["id"], meta["finish_reason"]["type"]) == ("mine", "stop")
    assert meta["prompt_tokens"] == len(turn["prompt_token_ids"])
    assert meta["completion_tokens"] == len(reply["output_ids"])
    assert [triple[1] for triple in meta["output_token_logprobs"]] == reply["output_ids"]
    assert [triple[0] for triple in meta["output_token_logprobs"]] == pytest.approx(turn["output_logprobs"])
    assert "".join(triple[2] for triple in meta["output_token_logprobs"]) == ANSWER + END
    rows = np.frombuffer(base64.b64decode(meta["routed_experts"]), dtype="<i4").reshape(-1, 4, 2)
    assert len(rows) == meta["prompt_tokens"] + meta["completion_tokens"] - 1
    assert meta["weight_versions"] == [{"version": meta["weight_version"], "start": 0, "end": len(reply["output_ids"])}]
    assert turn["sampling"]["extra"] == {"min_new_tokens": 2}
    assert turn["meta"]["ignored_fields"] == ["sampling_params.skip_special_tokens"]


def test_generate_passes_unknown_fields(gateway: RunningGateway, session_id: str) -> None:
    """I8, I7."""
    unknown = {"priority": 2**70, "extra_key": {"a": [None, 1.0]}, "lora_path": "x"}
    generate(gateway, session_id, input_ids=[5, 6], sampling_params={"unheard_of": [1.0, None]}, **unknown)
    [turn] = gateway.turns(session_id)
    assert turn["meta"]["passthrough"] == {"priority": 2**70, "extra_key": {"a": [None, 1.0]}}
    assert turn["meta"]["ignored_fields"] == ["lora_path"]
    assert turn["sampling"]["extra"] == {"unheard_of": [1.0, None]}


def test_generate_in_batches_is_a_list(gateway: RunningGateway, session_id: str) -> None:
    replies = generate(gateway, session_id, text=["quick", "so"], sampling_params={"n": 2})
    assert [reply["text"] for reply in replies] == [ANSWER, ANSWER, "hello", "hello"]
    [alone] = generate(gateway, session_id, input_ids=[[5, 6]])
    assert alone["text"] == "hello"
    names = [reply["meta_info"]["id"] for reply in replies]
    assert len(set(names)) == 4


def test_generate_streams_everything_so_far(gateway: RunningGateway, session_id: str) -> None:
    body = {"text": ["count slowly", "quick"], "stream": True, "return_logprob": True}
    frames = events(gateway, f"/sessions/{session_id}/generate", body)
    assert Counter(frame["index"] for frame in frames)[0] > 10
    for index, turn in enumerate(sorted(gateway.turns(session_id), key=lambda turn: -len(turn["output_token_ids"]))):
        own = [frame for frame in frames if frame["index"] == index]
        for earlier, later in pairwise(own):
            assert later["text"].startswith(earlier["text"])
            assert later["output_ids"][: len(earlier["output_ids"])] == earlier["output_ids"]
        assert all(frame["meta_info"]["finish_reason"] is None for frame in own[:-1])
        assert own[-1]["output_ids"] == turn["output_token_ids"]
        assert own[-1]["meta_info"]["finish_reason"]["type"] == "stop"
        assert len(own[-2]["meta_info"]["output_token_logprobs"]) == len(turn["output_token_ids"])


def test_generate_without_a_session_makes_one(gateway: RunningGateway) -> None:
    reply = httpx.post(gateway.url + "/generate", json={"text": "quick"}, timeout=30)
    assert reply.json()["text"] == ANSWER
    assert len(gateway.turns(reply.headers["x-session-id"])) == 1


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"input_ids": [5, 99_999]}, "99999"),
        ({"text": "x", "input_ids": [5]}, "input_ids"),
        ({}, "input_ids"),
        ({"input_ids": "x"}, "input_ids"),
        ({"text": [["x"]]}, "text"),
        ({"text": "x", "sampling_params": 5}, "sampling_params"),
        ({"text": ["x", "y"], "sampling_params": [{}]}, "sampling_params"),
        ({"text": "x", "rid": ["a", "b"]}, "rid"),
    ],
)
def test_an_impossible_generation_is_a_400_that_names_it(
    gateway: RunningGateway, session_id: str, fields: Any, named: str
) -> None:
    reply = httpx.post(f"{gateway.url}/sessions/{session_id}/generate", json=fields, timeout=30)
    assert reply.status_code == 400
    assert named in reply.json()["error"]["message"]


CALLS: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "so", "max_tokens": 3},
    "/generate": {"text": "so", "sampling_params": {"max_new_tokens": 3}},
    "/tokenize": {"prompt": "so"},
    "/detokenize": {"tokens": [5]},
}
FIELDS = (
    "add_generation_prompt", "add_special_tokens", "best_of", "chat_template_kwargs", "echo", "input_ids", "logit_bias",
    "logprobs", "max_tokens", "messages", "n", "prompt", "response_format", "return_logprob", "return_routed_experts",
    "return_text_in_logprobs", "return_token_ids", "return_token_strs", "rid", "routed_experts_start_len",
    "sampling_params", "seed", "skip_special_tokens", "stop", "stop_token_ids", "stream", "stream_options", "suffix",
    "temperature", "text", "tokens", "tools", "top_k",
)  # fmt: skip
NUMBERS = st.one_of(st.integers(-5, 500), st.integers(-(2**70), 2**70), st.floats(allow_nan=False))
ANYTHING = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=5)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["n", "stop", "top_k", "sampling_seed", "content", "x"]), inner, max_size=2),
    ),
    max_leaves=6,
)


@pytest.mark.parametrize("path", CALLS)
def test_no_value_of_a_field_is_an_error_of_ours(path: str, gateway: RunningGateway) -> None:
    with httpx.Client(timeout=60) as client:

        @settings(max_examples=60)
        @given(changed=st.dictionaries(st.sampled_from(FIELDS), ANYTHING, max_size=3))
        def check(changed: dict[str, Any]) -> None:
            body = json.dumps({**CALLS[path], **changed}, allow_nan=True)
            reply = client.post(f"{gateway.url}/sessions/any{path}", content=body)
            assert reply.status_code in (200, 400), reply.text

        check()


def test_tokenize_shows_what_a_chat_would_send(gateway: RunningGateway, session_id: str) -> None:
    """I1: also where the session has recorded ids already; nothing is recorded by asking."""
    messages: list[Any] = [{"role": "user", "content": "quick"}]
    conversation = {"messages": messages, "tools": TOOLS}
    path = f"/sessions/{session_id}/tokenize"
    for _ in range(2):
        shown = gateway.post(path, conversation)
        chat: Any = gateway.client(session_id).chat.completions.create(
            model="any", extra_body={"return_token_ids": True}, **conversation
        )
        assert shown["tokens"] == chat.prompt_token_ids
        assert shown["count"] == len(shown["tokens"])
        messages += [chat.choices[0].message.model_dump(), {"role": "user", "content": "quick again"}]
    assert parents(gateway, session_id) == [None, 0]


def test_tokenize_and_detokenize_are_inverse_in_both_shapes(gateway: RunningGateway) -> None:
    text = "so <|im_start|>it is 🙂"
    vllm = gateway.post("/tokenize", {"model": "any", "prompt": text, "return_token_strs": True})
    sglang = gateway.post("/v1/tokenize", {"text": [text, "so"]})
    assert sglang["tokens"][0] == vllm["tokens"]
    assert sglang["count"] == [vllm["count"], len(sglang["tokens"][1])]
    assert len(vllm["token_strs"]) == vllm["count"]
    assert vllm["max_model_len"] > 0
    back = gateway.post("/detokenize", {"tokens": vllm["tokens"]})
    assert back == {"text": text, "prompt": text}
    plain = gateway.post("/detokenize", {"tokens": [vllm["tokens"]], "skip_special_tokens": True})
    assert plain["text"] == ["so it is 🙂"]
    refused = httpx.post(gateway.url + "/detokenize", json={"tokens": [5, 99_999]}, timeout=30)
    assert refused.status_code == 400
    assert "99999" in refused.json()["error"]["message"]
