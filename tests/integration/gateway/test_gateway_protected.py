"""Fields that agents may not set: ignored and recorded, or refused by name, whatever they are called."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from engines.echo import EchoServer
from tests.integration.gateway.conftest import RunningGateway, StartGateway
from tests.integration.gateway.field_fuzz import BODIES, QUESTION, serving_echo

FORGED: dict[str, Any] = {
    "lora_path": "x", "lora_id": "x", "weight_version": "9", "input_ids": [1], "return_logprob": False, "rid": "mine",
    "session_params": {"id": "x"}, "custom_logit_processor": "code", "http_worker_ipc": "ipc://x", "beam_width": 2,
    "trace_decode_token_ids": [5], "kv_transfer_params": {}, "bootstrap_room": 1, "routed_experts_start_len": 9,
    "sampling_params": {"temperature": 0}, "top_logprobs_num": 9, "background": True,
}  # fmt: skip
OF_GENERATE = ("input_ids", "return_logprob", "rid", "sampling_params", "routed_experts_start_len", "top_logprobs_num")
"""Which of them are `/generate`'s own fields."""

DENIED = ["seed", "max_tokens", "custom_params", "mine", "enable_thinking", "response_format"]
DENYING = ("--set", f"fields.denied={json.dumps(DENIED)}")
ALWAYS = {"/v1/messages": {"max_new_tokens"}}
"""What a dialect must have, and these gateways deny."""

REFUSING = ("--set", "fields.answer=refuse")


@pytest.fixture(scope="module")
def echo(tiny_model: Path) -> Iterator[tuple[EchoServer, str]]:
    with serving_echo(tiny_model) as served:
        yield served


@pytest.fixture(scope="module")
def ignoring(
    echo: tuple[EchoServer, str], start_gateway: StartGateway, tmp_path_factory: pytest.TempPathFactory
) -> RunningGateway:
    return start_gateway(tmp_path_factory.mktemp("ignoring"), *DENYING, engine=f"sglang={echo[1]}")


@pytest.fixture(scope="module")
def refusing(
    echo: tuple[EchoServer, str], start_gateway: StartGateway, tmp_path_factory: pytest.TempPathFactory
) -> RunningGateway:
    return start_gateway(tmp_path_factory.mktemp("refusing"), *DENYING, *REFUSING, engine=f"sglang={echo[1]}")


@pytest.fixture
def name() -> str:
    return f"protected-{time.monotonic_ns()}"


def post(gateway: RunningGateway, session: str, body: dict[str, Any], endpoint: str = "") -> httpx.Response:
    endpoint = endpoint or "/v1/chat/completions"
    return httpx.post(f"{gateway.url}/sessions/{session}{endpoint}", json={**BODIES[endpoint], **body}, timeout=30)


def message(reply: httpx.Response) -> str:
    assert reply.status_code == 400, reply.text
    return str(reply.json()["error"]["message"])


@pytest.mark.parametrize("endpoint", BODIES)
def test_what_only_the_gateway_sets_is_ignored_and_named_in_the_record(
    endpoint: str, ignoring: RunningGateway, echo: tuple[EchoServer, str], name: str
) -> None:
    """I7: at the top and among the sampling parameters of `/generate`."""
    native = endpoint == "/generate"
    forged = {k: v for k, v in FORGED.items() if not (native and k in OF_GENERATE)}
    translated = {"background"} if endpoint == "/v1/responses" else set()
    forged = {k: v for k, v in forged.items() if k not in translated}
    body = forged | ({"sampling_params": {"beam_width": 3, "lora_path": "y"}} if native else {})
    assert post(ignoring, name, body, endpoint).status_code == 200
    request = echo[0].requests[-1]
    asked = {"input_ids", "rid", "sampling_params", "return_logprob"}
    assert not (forged.keys() - asked) & request.keys()
    assert request["return_logprob"] is True
    assert not {"lora_path", "beam_width"} & request["sampling_params"].keys()
    assert request["rid"] != "mine"
    [turn] = ignoring.turns(name)
    nested = {"sampling_params.beam_width", "sampling_params.lora_path"} if native else set()
    assert set(turn["meta"]["ignored_fields"]) == forged.keys() | nested | ALWAYS.get(endpoint, set())


@pytest.mark.parametrize("field", FORGED)
def test_what_only_the_gateway_sets_is_refused_by_name_where_that_is_asked_for(
    field: str, refusing: RunningGateway, name: str
) -> None:
    assert message(post(refusing, name, {field: FORGED[field]})).startswith(f"{field}: only the gateway")
    assert post(refusing, name, {field: None}).status_code == 200
    if field not in OF_GENERATE:
        nested = post(refusing, name, {"sampling_params": {field: FORGED[field]}}, "/generate")
        assert message(nested).startswith(f"sampling_params.{field}: only the gateway")


DISGUISED: list[tuple[str, str, dict[str, Any]]] = [
    ("seed", "/v1/chat/completions", {"seed": 5}),
    ("seed", "/v1/chat/completions", {"sampling_seed": 5}),
    ("seed", "/generate", {"sampling_params": {"sampling_seed": 5}}),
    ("max_new_tokens", "/v1/chat/completions", {"max_completion_tokens": 5}),
    ("max_new_tokens", "/v1/chat/completions", {"max_new_tokens": 5}),
    ("max_new_tokens", "/v1/completions", {"max_tokens": 5}),
    ("max_new_tokens", "/v1/responses", {"max_output_tokens": 5}),
    ("max_new_tokens", "/generate", {"sampling_params": {"max_new_tokens": 5}}),
    ("custom_params", "/v1/chat/completions", {"custom_params": {"a": 1}}),
    ("vllm_xargs", "/v1/chat/completions", {"vllm_xargs": {"a": 1}}),
    ("extra_args", "/generate", {"sampling_params": {"extra_args": {"a": 1}}}),
    ("mine", "/v1/chat/completions", {"mine": [1]}),
    ("mine", "/generate", {"sampling_params": {"mine": 1}}),
    ("mine", "/v1/completions", {"mine": 0}),
    ("mine", "/v1/responses", {"mine": None}),
    ("enable_thinking", "/v1/chat/completions", {"chat_template_kwargs": {"enable_thinking": False}}),
    ("json_schema", "/v1/chat/completions", {"response_format": {"type": "json_object"}}),
    ("json_schema", "/v1/chat/completions", {"json_schema": "{}"}),
    ("json_schema", "/v1/responses", {"text": {"format": {"type": "json_object"}}}),
]


@pytest.mark.parametrize(("called", "endpoint", "body"), DISGUISED, ids=str)
def test_what_the_operator_denies_does_not_reach_the_engine_under_any_name(
    called: str, endpoint: str, body: dict[str, Any], ignoring: RunningGateway, refusing: RunningGateway,
    echo: tuple[EchoServer, str], name: str,
) -> None:  # fmt: skip
    assert post(ignoring, name, body, endpoint).status_code == 200
    sent = echo[0].requests[-1]
    reached = {**sent, **sent["sampling_params"]}
    assert reached.pop("max_new_tokens") != 5
    assert not {called, "mine", "sampling_seed", "custom_params", "json_schema"} & reached.keys()
    [turn] = ignoring.turns(name)
    assert turn["meta"]["ignored_fields"] == [called]
    assert message(post(refusing, name, body, endpoint)).startswith(called)


def test_fields_that_merely_hold_denied_names_stay_what_they_are(
    refusing: RunningGateway, echo: tuple[EchoServer, str], name: str
) -> None:
    """Nothing opens an `extra_body`: neither the gateway nor an engine, so what is in it sets nothing."""
    body = {"extra_body": {"seed": 5, "lora_path": "x"}, "logit_bias": {"5": 1}}
    assert post(refusing, name, body).status_code == 200
    sent = echo[0].requests[-1]
    assert sent["extra_body"] == body["extra_body"]
    assert not {"seed", "lora_path"} & sent.keys()
    assert "sampling_seed" not in sent["sampling_params"]


PINS: list[tuple[dict[str, Any], str, str, dict[str, Any]]] = [
    ({"temperature": 0.5}, "temperature", "/v1/chat/completions", {"temperature": 0.7}),
    ({"min_tokens": 2}, "min_new_tokens", "/v1/chat/completions", {"min_new_tokens": 3}),
    ({"min_new_tokens": 2}, "min_new_tokens", "/generate", {"sampling_params": {"min_tokens": 3}}),
    ({"ignore_eos": False}, "ignore_eos", "/v1/chat/completions", {"ignore_eos": True}),
    ({"regex": "a+"}, "ebnf", "/v1/chat/completions", {"ebnf": "b"}),
    ({"regex": "a+"}, "regex", "/v1/completions", {"regex": "b+"}),
    ({"top_p": 0.5}, "top_p", "/v1/messages", {"top_p": 0.9}),
    ({"top_k": 5}, "top_k", "/v1/responses", {"top_k": 7}),
    ({"stop": "x"}, "stop", "/v1/messages", {"stop_sequences": ["y"]}),
]


@pytest.mark.parametrize(("pinned", "called", "endpoint", "body"), PINS, ids=str)
def test_what_a_session_pins_counts_whatever_the_agent_sends(
    pinned: dict[str, Any], called: str, endpoint: str, body: dict[str, Any], ignoring: RunningGateway,
    refusing: RunningGateway, echo: tuple[EchoServer, str], name: str,
) -> None:  # fmt: skip
    for gateway in (ignoring, refusing):
        gateway.post("/sessions", {"session_id": name, "sampling": pinned})
    assert post(ignoring, name, body, endpoint).status_code == 200
    [turn] = ignoring.turns(name)
    assert set(turn["meta"]["ignored_fields"]) - ALWAYS.get(endpoint, set()) == {called}
    assert called in pinned or called not in turn["sampling"]["extra"] or called == "min_new_tokens"
    [(pin, value)] = pinned.items()
    recorded = turn["sampling"] | turn["sampling"]["extra"]
    assert recorded[{"min_tokens": "min_new_tokens"}.get(pin, pin)] == ([value] if pin == "stop" else value)
    assert ignoring.get(f"/sessions/{name}")["sampling"] == pinned
    if endpoint not in ALWAYS:
        assert message(post(refusing, name, body, endpoint)).startswith(called)
        assert "this session pins it" in message(post(refusing, name, body, endpoint))


def test_a_value_that_equals_the_pinned_one_is_fine_and_so_is_none(refusing: RunningGateway, name: str) -> None:
    """A dialect's own default is nothing that the agent asked for."""
    refusing.post("/sessions", {"session_id": name, "sampling": {"temperature": 1, "max_tokens": 9}})
    for endpoint in BODIES:
        if endpoint != "/v1/messages":  # which has to say how long a reply may be
            assert post(refusing, name, {}, endpoint).status_code == 200
    assert post(refusing, name, {"temperature": 1.0}).status_code == 200
    assert {turn["sampling"]["max_new_tokens"] for turn in refusing.turns(name)} == {9}


def test_a_pin_that_nobody_knows_is_refused_with_the_nearest_name(ignoring: RunningGateway) -> None:
    for pins, hint in (({"temprature": 1}, "did you mean temperature"), ({"lora_path": "x"}, "known are")):
        reply = httpx.post(f"{ignoring.url}/sessions", json={"sampling": pins}, timeout=30)
        assert hint in message(reply)


@pytest.mark.parametrize(
    ("setting", "hint"),
    [
        ("fields.denyed=[]", "did you mean 'denied'"),
        ("fields.answer=mumble", "ignore, refuse"),
        ('fields.denied=["messages"]', "messages cannot be denied"),
    ],
)
def test_settings_that_mean_nothing_are_refused(setting: str, hint: str, tmp_path: Path) -> None:
    from gateway.contracts.errors import ConfigurationError
    from gateway.contracts.settings import load_settings
    from gateway.settings import GatewaySettings

    with pytest.raises(ConfigurationError, match=hint):
        load_settings(GatewaySettings, file=None, overrides=[setting])


def test_the_conversation_goes_on_whatever_was_ignored(ignoring: RunningGateway, name: str) -> None:
    """I6: a field that an agent may not set is no other conversation."""
    first = post(ignoring, name, {"lora_path": "x"}).json()["choices"][0]["message"]
    more = {"messages": [QUESTION, first, {"role": "user", "content": "and?"}], "seed": 3}
    assert post(ignoring, name, more).status_code == 200
    turns = ignoring.turns(name)
    assert turns[1]["attachment"]["parent_id"] == turns[0]["turn_id"]
    assert json.dumps(turns[1]["meta"]["ignored_fields"]) == '["seed"]'
