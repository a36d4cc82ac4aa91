"""The OpenAPI document is true: replies conform to it, statuses are those it names, and nothing in it leads to a 500.

Schemathesis makes requests from the document, right ones and wrong ones, and judges what a live gateway answers.
"""

from __future__ import annotations

import json
import uuid
from contextlib import suppress
from typing import Any
from urllib.parse import quote

import httpx
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi import checks

from engines.launch import free_port
from tests.integration.gateway.conftest import TOOLS, RunningGateway, StartGateway

KEY = "operator-secret"
OPERATOR = {"Authorization": f"Bearer {KEY}"}
QUESTION = {"role": "user", "content": "What is 48/2?"}
TAGS = ("status", "sessions", "feed", "admin", "agents")
CHECKS = [
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
]
BY_HAND = {"POST /admin/engines", "POST /admin/generation/pause"}
"""Routes that would have the gateway connect to made-up addresses, or wait."""


@pytest.fixture(scope="module")
def guarded(start_gateway: StartGateway, tmp_path_factory: pytest.TempPathFactory) -> RunningGateway:
    """A gateway with an operator's key."""
    folder = tmp_path_factory.mktemp("openapi")
    return start_gateway(folder, environment={"VERBATIM_OPERATOR_KEY": KEY})


@pytest.fixture(scope="module")
def document(guarded: RunningGateway) -> Any:
    """The document as Schemathesis reads it."""
    return schemathesis.openapi.from_dict(guarded.get("/openapi.json"))


def operations(document: Any, tag: str) -> list[Any]:
    found = [result.ok() for result in document.get_all_operations()]
    return [operation for operation in found if tag in operation.tags]


def judge(document: Any, gateway: RunningGateway, tag: str, mode: GenerationMode, *, num_examples: int) -> int:
    """Send requests for every route of a tag; the number of replies that were judged."""
    judged = 0
    with requests.Session() as session:
        for operation in operations(document, tag):
            if operation.label in BY_HAND:
                continue

            @settings(
                max_examples=num_examples,
                derandomize=True,
                database=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            @given(case=operation.as_strategy(generation_mode=mode))
            def holds(case: Any) -> None:
                nonlocal judged
                shorten_wait(case)
                response = case.call(base_url=gateway.url, headers=OPERATOR, session=session, timeout=30)
                assert response.status_code != 500, f"{case.as_curl_command()}\n{response.text}"
                case.validate_response(response, checks=CHECKS)
                judged += 1

            with suppress(Unsatisfiable):  # nothing of the request can be wrong
                holds()
    return judged


def shorten_wait(case: Any) -> None:
    """Nobody waits here for rollouts that do not come."""
    if isinstance(case.body, dict) and isinstance(case.body.get("wait_seconds"), int | float):
        case.body["wait_seconds"] = min(case.body["wait_seconds"], 0.01)


@pytest.mark.parametrize("tag", TAGS)
def test_right_requests_are_answered_as_documented(document: Any, guarded: RunningGateway, tag: str) -> None:
    assert judge(document, guarded, tag, GenerationMode.POSITIVE, num_examples=6) > 0


@pytest.mark.parametrize("tag", [tag for tag in TAGS if tag != "status"])
def test_wrong_requests_are_answered_as_documented(document: Any, guarded: RunningGateway, tag: str) -> None:
    assert judge(document, guarded, tag, GenerationMode.NEGATIVE, num_examples=6) > 0


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("tag", TAGS)
@pytest.mark.parametrize("mode", list(GenerationMode))
def test_many_requests_are_answered_as_documented(
    document: Any, guarded: RunningGateway, tag: str, mode: GenerationMode
) -> None:
    if (tag, mode) != ("status", GenerationMode.NEGATIVE):
        assert judge(document, guarded, tag, mode, num_examples=80) > 0


def send(document: Any, gateway: RunningGateway, method: str, path: str, **options: Any) -> httpx.Response:
    """A request by hand whose reply is judged too; `path` is the document's, its parameters under `at`."""
    filled = path
    for name, value in options.pop("at", {}).items():
        filled = filled.replace("{" + name + "}", quote(value, safe=""))
    reply = httpx.request(method, gateway.url + filled, headers=OPERATOR, timeout=30, **options)
    document[path][method].validate_response(reply)
    return reply


def test_every_route_answers_well_as_documented(document: Any, guarded: RunningGateway) -> None:
    """A session's whole life, every call of which is in the document."""
    labels = {"life": uuid.uuid4().hex}  # other tests finish sessions of this gateway too
    wish = {"session_id": f"a/ü-{uuid.uuid4()}", "group": labels["life"], "labels": labels}
    made = send(document, guarded, "POST", "/sessions", json=wish)
    assert made.status_code == 201
    session_id = made.json()["session_id"]
    at = {"session_id": session_id}
    own = "/sessions/{session_id}"
    chat = {"messages": [QUESTION], "tools": TOOLS, "return_token_ids": True, "return_routed_experts": True}
    calls: list[tuple[str, str, dict[str, Any]]] = [
        ("POST", "/v1/chat/completions", chat),
        ("POST", "/v1/completions", {"prompt": ["a", "b"], "logprobs": 1, "return_token_ids": True}),
        ("POST", "/generate", {"input_ids": [5, 6], "return_logprob": True}),
        ("POST", "/v1/responses", {"input": "What is 48/2?"}),
        ("POST", "/v1/messages", {"max_tokens": 40, "messages": [QUESTION]}),
        ("POST", "/v1/messages/count_tokens", {"messages": [QUESTION]}),
        ("POST", "/tokenize", {"messages": [QUESTION]}),
        ("POST", "/detokenize", {"tokens": [[5], [6, 7]]}),
    ]
    for method, path, body in calls:
        for prefix, where in (("", {}), (own, at)):
            assert send(document, guarded, method, prefix + path, json=body, at=where).status_code == 200, path
            if "v1" in path and "count" not in path:
                streamed = send(document, guarded, method, prefix + path, json={**body, "stream": True}, at=where)
                assert streamed.headers["content-type"].startswith("text/event-stream"), path
    response = send(document, guarded, "POST", own + "/v1/responses", json={"input": "x"}, at=at).json()
    for method in ("GET", "DELETE"):
        path = own + "/v1/responses/{response_id}"
        assert send(document, guarded, method, path, at={**at, "response_id": response["id"]}).status_code == 200
    for path in ("", "/turns", "/segments", "/report", "/v1/models"):
        assert send(document, guarded, "GET", own + path, at=at).status_code == 200
    finished = send(document, guarded, "POST", own + "/finish", json={"reward": 1}, at=at)
    assert finished.status_code == 200
    lease = {"consumer": "c", "limit": 1, "labels": labels}
    leased = send(document, guarded, "POST", "/feed/leases", json=lease)
    assert leased.status_code == 200
    assert send(document, guarded, "POST", "/feed/leases", json=lease).status_code == 204
    snapshot = {"snapshot": finished.json()["snapshot"]}
    assert send(document, guarded, "GET", "/feed/rollouts/{session_id}", at=at, params=snapshot).status_code == 200
    lease_at = {"lease_id": leased.json()["lease_id"]}
    assert send(document, guarded, "POST", "/feed/leases/{lease_id}/ack", at=lease_at).status_code == 200
    assert send(document, guarded, "GET", "/feed/counts", params={"consumer": "c"}).status_code == 200
    assert send(document, guarded, "GET", "/feed/picks").status_code == 200
    assert send(document, guarded, "GET", "/sessions").status_code == 200
    for path in ("/admin/engines", "/admin/identity", "/health", "/ready", "/metrics"):
        assert send(document, guarded, "GET", path).status_code == 200


def test_engines_and_pauses_answer_as_documented(document: Any, guarded: RunningGateway) -> None:
    nowhere = f"http://127.0.0.1:{free_port()}"
    bodies: list[Any] = [{"url": nowhere}, {"url": nowhere, "kind": "vllm"}, {"url": "x"}, {"url": ""}, {"url": 3}]
    bodies += [{"url": nowhere, "kind": "none"}, {"url": "http://[::1"}, {"url": "http://127.0.0.1:99999"}, {}]
    for body in bodies:
        reply = send(document, guarded, "POST", "/admin/engines", json=body)
        assert reply.status_code in (400, 502, 503), (body, reply.text)
    try:
        for mode in ("keep", "abort", "drain"):
            assert send(document, guarded, "POST", "/admin/generation/pause", json={"mode": mode}).status_code == 200
        assert send(document, guarded, "POST", "/admin/generation/pause", json={"mode": ["x"]}).status_code == 400
    finally:
        assert send(document, guarded, "POST", "/admin/generation/resume").status_code == 200


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/admin/policy", {"policy_version": 2**70, "weight_version": "x"}),
        ("/sessions", {"group_size": 2**70}),
        ("/sessions", {"ttl_seconds": 10**400}),
        ("/sessions", {"session_id": "x" * 513}),
        ("/sessions", {"labels": {"a": 1}}),
        ("/sessions", {"sampling": {"top_k": "x"}}),
        ("/feed/leases", {"consumer": "c", "limit": 2**70}),
        ("/feed/leases", {"consumer": "c", "limit": 1, "lease_seconds": 10**400}),
        ("/sessions/s/finish", {"reward": 10**400}),
        ("/sessions", {"metadata": {"x": json.loads("[" * 500 + "]" * 500)}}),
        ("/sessions/s/finish", {"metadata": {"x": json.loads("[" * 500 + "]" * 500)}}),
        ("/sessions/s/finish", {"outcome": 5}),
    ],
)
def test_what_no_store_can_hold_is_refused_by_name(guarded: RunningGateway, path: str, body: dict[str, Any]) -> None:
    reply = httpx.post(guarded.url + path, json=body, headers=OPERATOR)
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["param"].split(".")[0] in body


def test_any_text_can_name_a_session(guarded: RunningGateway) -> None:
    for name in ("nul\0", "\ufffe", "a/../b", "%2F", "?x#y", " ", "😀" * 100):
        made = httpx.post(guarded.url + "/sessions", json={"session_id": name}, headers=OPERATOR)
        assert made.status_code == 201, (name, made.text)
        shown = httpx.get(f"{guarded.url}/sessions/{quote(name, safe='')}", headers=OPERATOR)
        assert shown.json()["session_id"] == name


def test_every_route_is_described(document: Any, guarded: RunningGateway) -> None:
    """Each has its request, its reply and its errors; each operation has an id of its own."""
    paths = guarded.get("/openapi.json")["paths"]
    ids = [operation["operationId"] for operations in paths.values() for operation in operations.values()]
    assert len(ids) == len(set(ids))
    for path, operations in paths.items():
        for method, operation in operations.items():
            content = operation["responses"]["200"]["content"]
            assert content, (method, path)
            assert content.get("application/json", {"schema": True})["schema"], (method, path)
            assert {"400", "401", "404"} <= operation["responses"].keys()
            has_body = method == "post" and not path.endswith(("/ack", "/release", "/resume"))
            assert has_body == ("requestBody" in operation), (method, path)


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(junk=st.binary(max_size=30))
def test_any_bytes_as_a_body_are_a_4xx(guarded: RunningGateway, junk: bytes) -> None:
    with httpx.Client(base_url=guarded.url, headers=OPERATOR, verify=False) as client:
        for path in ("/v1/chat/completions", "/v1/messages", "/generate", "/feed/leases", "/admin/policy"):
            reply = client.post(path, content=junk)
            assert reply.status_code == 400, (path, reply.text)
