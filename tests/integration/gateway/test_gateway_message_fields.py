"""Keys that nobody here knows inside messages, tools and calls: kept in the record, given to the template, for good."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from tokenizers import Tokenizer

from engines.echo import EchoServer
from tests.integration.gateway.conftest import RunningGateway, StartGateway
from tests.integration.gateway.field_fuzz import NAMED_CASES, QUESTION, nested, sent, serving_echo, values

PRINTS_EVERYTHING = """
{%- for tool in tools or [] -%}<tools>{{ tool | tojson }}</tools>{%- endfor -%}
{%- for m in messages -%}
<|im_start|>{{ m.role }}
{{ m.content if m.content is string else (m.content or '') | tojson }}
{%- for call in m.tool_calls or [] %}{{ call | tojson }}{% endfor -%}
{%- for key in m if key.startswith('x_') %}[{{ key }}={{ m[key] | tojson }}]{% endfor -%}
<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}
"""
ODD = {"x_note": {**{k: v for k, v in NAMED_CASES.items() if k != "x_deep"}, "null": None}}
CALL = {
    "id": "call_1", "type": "function", "x_call": ODD,
    "function": {"name": "f", "arguments": '{"a": 1}', "x_function": [1, 1.0, None]},
}  # fmt: skip
FUNCTION = {"name": "f", "x_inner": ODD, "parameters": {"x_deep": nested(40)}}
TOOL = {"type": "function", "x_tool": ODD, "function": FUNCTION}
CONVERSATION = [
    {"role": "system", "content": "Be brief.", **ODD},
    {**QUESTION, **ODD},
    {"role": "assistant", "content": None, "tool_calls": [CALL], **ODD},
    {"role": "tool", "tool_call_id": "call_1", "content": "24", **ODD},
]


@pytest.fixture(scope="module")
def printing_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, whose template shows every key that a message has."""
    folder = tmp_path_factory.mktemp("printing") / "tiny"
    shutil.copytree(tiny_model, folder)
    (folder / "chat_template.jinja").write_text(PRINTS_EVERYTHING)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 100_000}))
    return folder


@pytest.fixture(scope="module")
def echo(tiny_model: Path) -> Iterator[tuple[EchoServer, str]]:
    with serving_echo(tiny_model, context_length=200_000) as served:
        yield served


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ledger")


def flags(model: Path) -> list[str]:
    return ["--model", str(model), "--set", "tool_call_parser=hermes", "--set", "reasoning_parser=none"]


@pytest.fixture(scope="module")
def gateway(
    echo: tuple[EchoServer, str], printing_model: Path, start_gateway: StartGateway, data: Path
) -> RunningGateway:
    return start_gateway(data, *flags(printing_model), engine=f"sglang={echo[1]}")


def prompt(echo: tuple[EchoServer, str], model: Path) -> str:
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    return str(tokenizer.decode(echo[0].requests[-1]["input_ids"], skip_special_tokens=False))


def shown(value: Any) -> str:
    """As the template prints it."""
    return json.dumps(value, ensure_ascii=False)


def ask(gateway: RunningGateway, session: str, body: dict[str, Any]) -> dict[str, Any]:
    url = f"{gateway.url}/sessions/{session}/v1/chat/completions"
    reply = httpx.post(url, content=json.dumps(body), timeout=60)
    assert reply.status_code == 200, reply.text
    return dict(json.loads(reply.content))


def recorded(gateway: RunningGateway, session: str) -> list[dict[str, Any]]:
    content = httpx.get(f"{gateway.url}/sessions/{session}/turns", timeout=30).content
    return list(json.loads(content)["turns"])


def test_unknown_keys_stay_in_the_record_and_reach_the_template_across_turns_and_a_restart(
    gateway: RunningGateway, echo: tuple[EchoServer, str], printing_model: Path, start_gateway: StartGateway, data: Path
) -> None:
    """I8: on every role, on tools and their functions, on calls and theirs; numbers, order of keys and nulls."""
    reply = ask(gateway, "keys", {"messages": CONVERSATION, "tools": [TOOL]})
    [turn] = recorded(gateway, "keys")
    assert sent(turn["added_messages"]) == sent(CONVERSATION)
    assert sent(turn["root"]["tools"]) == sent([TOOL])
    text = prompt(echo, printing_model)
    assert text.count(f"[x_note={shown(ODD['x_note'])}]") == 4
    assert shown(TOOL) in text
    assert f'"x_call": {shown(ODD)}' in text
    assert '"x_function": [1, 1.0, null]' in text

    again = {"role": "user", "content": "and?", "x_note": {"b": 2**80, "a": -0.0}}
    more = [*CONVERSATION, reply["choices"][0]["message"], again]
    ask(gateway, "keys", {"messages": more, "tools": [TOOL]})
    later = recorded(gateway, "keys")[1]
    assert later["attachment"]["tier"] == "exact"
    assert sent(later["added_messages"][-1]) == sent(again)
    before = prompt(echo, printing_model)
    assert f"[x_note={shown(again['x_note'])}]" in before

    gateway.stop()
    restarted = start_gateway(data, *flags(printing_model), engine=f"sglang={echo[1]}")
    last = {"role": "user", "content": "once more", "x_last": [None, 1.0]}
    answer = {"role": "assistant", "content": "It is 24."}
    ask(restarted, "keys", {"messages": [*more, answer, last], "tools": [TOOL]})
    turns = recorded(restarted, "keys")
    assert sent(turns[0]["added_messages"]) == sent(CONVERSATION)
    assert turns[2]["attachment"]["tier"] == "exact"
    text = prompt(echo, printing_model)
    assert text.count("[x_note=") == 5
    assert "[x_last=[null, 1.0]]" in text
    check_any_value(restarted, echo, printing_model)


def check_any_value(gateway: RunningGateway, echo: tuple[EchoServer, str], model: Path) -> None:
    @settings(max_examples=25, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(value=values)
    def check(value: Any) -> None:
        message = {**QUESTION, "x_any": value}
        ask(gateway, "any", {"messages": [message]})
        turn = recorded(gateway, "any")[-1]
        assert sent(turn["added_messages"] or turn["reply"]) == sent([message])
        if value is not None:  # absent and null are one to templates
            assert f"[x_any={shown(value)}]" in prompt(echo, model)

    check()


@pytest.mark.parametrize("dialect", ["messages", "responses"])
def test_unknown_keys_of_other_dialects_messages_are_kept_too(
    dialect: str, echo: tuple[EchoServer, str], printing_model: Path, start_gateway: StartGateway, tmp_path: Path
) -> None:
    """I8."""
    gateway = start_gateway(tmp_path, *flags(printing_model), engine=f"sglang={echo[1]}")
    if dialect == "messages":
        body: dict[str, Any] = {
            "messages": [{**QUESTION, "x_note": [1.0, 2**70]}], "max_tokens": 9,
            "tools": [{"name": "f", "input_schema": {}, "x_tool": {"b": 1, "a": 1.0}}],
        }  # fmt: skip
    else:
        body = {
            "input": [{"type": "message", **QUESTION, "x_note": [1.0, 2**70]}],
            "tools": [{"type": "function", "name": "f", "parameters": {}, "x_tool": {"b": 1, "a": 1.0}}],
        }
    reply = httpx.post(f"{gateway.url}/sessions/s/v1/{dialect}", content=json.dumps(body), timeout=60)
    assert reply.status_code == 200, reply.text
    [turn] = recorded(gateway, "s")
    assert sent(turn["added_messages"][-1]["x_note"]) == sent([1.0, 2**70])
    text = prompt(echo, printing_model)
    assert f"[x_note={shown([1.0, 2**70])}]" in text
    assert '"x_tool": {"b": 1, "a": 1.0}' in text


def test_halves_of_surrogate_pairs_become_replacement_characters_everywhere(
    echo: tuple[EchoServer, str], printing_model: Path, start_gateway: StartGateway, tmp_path: Path
) -> None:
    """No UTF-8 holds them: engine, record and reply have U+FFFD in their place, and whole pairs stay."""
    gateway = start_gateway(tmp_path, *flags(printing_model), engine=f"sglang={echo[1]}")
    body = r'{"messages": [{"role": "user", "content": "a\ud800b", "x_k": "\udc00"}], "x_top": "\ud83e\udd89 \ud83e"}'
    reply = httpx.post(f"{gateway.url}/sessions/s/v1/chat/completions", content=body, timeout=60).json()
    assert reply["x_top"] == "🦉 \ufffd" == echo[0].requests[-1]["x_top"]
    [message] = recorded(gateway, "s")[0]["added_messages"]
    assert (message["content"], message["x_k"]) == ("a\ufffdb", "\ufffd")


def test_fields_that_only_earlier_events_of_an_engine_have_are_not_lost(
    echo: tuple[EchoServer, str], printing_model: Path, start_gateway: StartGateway, tmp_path: Path
) -> None:
    """I8: at the top of a reply and in its meta_info; the latest value counts."""
    gateway = start_gateway(tmp_path, *flags(printing_model), engine=f"sglang={echo[1]}")
    echo[0].event_fields = {"x_first": {"big": 2**70}}
    try:
        reply = ask(gateway, "s", {"messages": [QUESTION]})
    finally:
        echo[0].event_fields = {}
    assert sent(reply["x_first"]) == sent({"big": 2**70})
    assert sent(reply["choices"][0]["meta_info"]["x_first"]) == sent({"big": 2**70})
