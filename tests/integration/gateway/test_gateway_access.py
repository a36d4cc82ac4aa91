"""Who reaches what: an agent its own session's model endpoints and nothing else; strangers and web pages nothing."""

from __future__ import annotations

import json
import re
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from gateway.contracts.errors import SandboxUnavailable
from gateway.contracts.ports import NetworkAccess, SandboxSpec
from sandbox.local.driver import LocalDriver
from sandbox.plain import PlainProcessDriver
from tests.integration.gateway.conftest import RunningGateway, StartGateway

KEYS = ("first-operator-key", "second-operator-key")
QUESTION = {"role": "user", "content": "quick"}
SECRET = "the-other-agents-secret"
OPEN = {"/health", "/ready"}
BODIES: dict[str, Any] = {
    "/v1/chat/completions": {"messages": [QUESTION]},
    "/v1/completions": {"prompt": "a"},
    "/generate": {"text": "a"},
    "/v1/responses": {"input": "quick"},
    "/v1/messages": {"max_tokens": 40, "messages": [QUESTION]},
    "/v1/messages/count_tokens": {"messages": [QUESTION]},
    "/tokenize": {"prompt": "a"},
    "/detokenize": {"tokens": [5]},
}


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


OPERATOR = bearer(KEYS[0])


@dataclass(frozen=True)
class Guarded:
    """A gateway with operators' keys and three sessions: an agent's own, another's with a secret in it, and one that is
    finished."""

    gateway: RunningGateway
    own: str
    other: str
    finished: str
    response_id: str

    def num_turns(self) -> int:
        names = ("own", "other", "finished")
        return sum(len(self.gateway.get(f"/sessions/{name}/turns", headers=OPERATOR)["turns"]) for name in names)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("access")


@pytest.fixture(scope="module")
def guarded(start_gateway: StartGateway, folder: Path) -> Guarded:
    gateway = start_gateway(folder, environment={"VERBATIM_OPERATOR_KEY": f" {KEYS[0]}, {KEYS[1]} "})
    keys = [
        gateway.post("/sessions", {"session_id": name}, headers=OPERATOR)["api_key"]
        for name in ("own", "other", "finished")
    ]
    for name, key in zip(("other", "finished"), keys[1:], strict=True):
        said = {"input": f"{SECRET} quick"}
        reply = gateway.post(f"/sessions/{name}/v1/responses", said, headers=bearer(key))
        if name == "other":
            response_id = reply["id"]
    gateway.post("/sessions/finished/finish", headers=OPERATOR)
    return Guarded(gateway, *keys, response_id)


def routes(guarded: Guarded, session: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Every operation of the gateway's own document, as (method, path with `session` in it, operation)."""
    for template, operations in guarded.gateway.get("/openapi.json")["paths"].items():
        path = template.replace("{session_id}", session).replace("{response_id}", guarded.response_id)
        for method, operation in operations.items():
            yield method.upper(), re.sub(r"{\w+}", "x", path), operation


def call(guarded: Guarded, method: str, path: str, key: str | None, *, session: str | None = None) -> httpx.Response:
    endpoint = re.sub(r"^/sessions/[^/]+", "", path)
    headers = ({} if key is None else bearer(key)) | ({} if session is None else {"X-Session-ID": session})
    body = BODIES.get(endpoint) if method == "POST" else None
    return httpx.request(method, guarded.gateway.url + path, json=body, headers=headers, timeout=30)


def is_open(path: str, operation: dict[str, Any]) -> bool:
    return path in OPEN and operation["tags"] == ["status"]


def is_agents(operation: dict[str, Any]) -> bool:
    return bool(operation["tags"] == ["agents"])


def test_every_route_refuses_who_has_no_key_or_another_ones(guarded: Guarded) -> None:
    """Also routes that are added later: the table is the gateway's own document."""
    before, seen = guarded.num_turns(), 0
    for method, path, operation in routes(guarded, "other"):
        if is_open(path, operation):
            continue
        seen += 1
        assert call(guarded, method, path, None).status_code == 401, (method, path)
        assert call(guarded, method, path, "made-up").status_code in (401, 403), (method, path)
        named = path.startswith("/sessions/")
        if named or not is_agents(operation):
            assert call(guarded, method, path, guarded.own).status_code == 403, (method, path)
            assert call(guarded, method, path, guarded.finished).status_code == 403, (method, path)
        if is_agents(operation) and not named:
            assert call(guarded, method, path, guarded.own, session="other").status_code == 403, (method, path)
            assert call(guarded, method, path, guarded.own, session="nobodys").status_code == 403, (method, path)
    assert seen > 40
    assert guarded.num_turns() == before


def test_a_finished_sessions_key_begins_nothing(guarded: Guarded) -> None:
    before = guarded.num_turns()
    statuses = set()
    for method, path, operation in routes(guarded, "finished"):
        if is_open(path, operation):
            continue
        reply = call(guarded, method, path, guarded.finished)
        if not is_agents(operation):
            assert reply.status_code == 403, (method, path)
        elif path.removeprefix("/sessions/finished") in BODIES and "token" not in path:
            statuses.add(reply.status_code)
    assert statuses == {409}
    assert guarded.num_turns() == before


def test_either_operators_key_opens_every_route(guarded: Guarded) -> None:
    """One key can take the other's place without a moment in which neither is good."""
    for method, path, _ in routes(guarded, "of-the-operator"):
        if (method, path) in (("POST", "/admin/generation/pause"), ("POST", "/admin/generation/resume")):
            continue
        for key in KEYS:
            assert call(guarded, method, path, key).status_code not in (401, 403), (method, path)
    assert call(guarded, "GET", "/sessions", f"{KEYS[0]}, {KEYS[1]}").status_code == 403
    assert call(guarded, "GET", "/sessions", KEYS[0][:-1]).status_code == 403


def exchange(guarded: Guarded, request: bytes) -> bytes:
    """What comes back for bytes on a connection, until it is closed or quiet."""
    address = urlsplit(guarded.gateway.url)
    with socket.create_connection((address.hostname, address.port), timeout=2) as connection:
        connection.sendall(request)
        received = bytearray()
        with suppress(TimeoutError, ConnectionResetError):
            while piece := connection.recv(2**16):
                received += piece
        return bytes(received)


def line(method: str, target: str, key: str, *headers: str, body: bytes = b"") -> bytes:
    head = [f"{method} {target} HTTP/1.1", "Host: localhost", f"Authorization: Bearer {key}", *headers]
    head += [] if "Upgrade" in str(headers) else ["Connection: close"]
    return "\r\n".join([*head, f"Content-Length: {len(body)}", "", ""]).encode("latin-1") + body


TRICKS = [
    "/admin/engines", "//admin/engines", "/admin//engines", "/%61dmin/engines", "/admin%2Fengines",
    "/admin/engines/", "/./admin/engines", "/ADMIN/engines", "/admin/engines;a=b",
    "/admin/engines?x=/sessions/own/v1", "/sessions/own/../../admin/engines",
    "/sessions/own/v1/../../../admin/engines", "/sessions/own%2F..%2F..%2Fadmin/engines",
    "/sessions/own/%2e%2e/%2e%2e/admin/engines", "/sessions/own/v1/%252e%252e/admin/engines",
    "/sessions/own/admin/engines", "http://localhost/admin/engines", "http://own:x@localhost/admin/engines",
    "https://example.org/feed/counts?consumer=c", "/sessions", "/sessions/", "/sessions/own", "/sessions/own/",
    "/sessions/own/turns", "/sessions/own/finish", "/sessions/other/turns", "/%73essions/other/turns",
    "//sessions/other/turns", "/sessions//other/turns", "/sessions/own%2F..%2Fother/turns",
    "/sessions/own/../other/turns", "/sessions/%6fther/turns", "/sessions/%256fther/turns",
    "/sessions/other/v1/models", "/sessions/other/v1/responses/RESPONSE",
    "/sessions/own/v1/responses/RESPONSE", "/v1/responses/RESPONSE",
    "/sessions/own%2F..%2Fother/v1/responses/RESPONSE", "/sessions/own/v1/responses/..%2F..%2Fother",
    "/sessions/other/blobs/" + "0" * 64, "/sessions/own/blobs/" + "0" * 64,
    "/sessions/own/blobs/..%2f..%2fledger.sqlite", "/feed/counts?consumer=c", "/feed/leases",
    "/feed/rollouts/finished?snapshot=x", "/sessions/own/feed/leases", "/metrics", "/sessions/own/metrics",
    "/sessions/own/flush_cache", "/sessions/own/update_weights_from_disk", "/sessions/own/abort_request",
    "/sessions/own/server_info", "/sessions/own/pause_generation", "/sessions/own/v1/../flush_cache",
    "/server_info", "/flush_cache", "/update_weights_from_disk", "/docs", "/redoc",
    "/sessions/own/openapi.json", "*", "/",
]  # fmt: skip
METHODS = ("GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "TRACE", "CONNECT")


def test_no_spelling_of_a_path_takes_an_agent_further_than_its_session(guarded: Guarded) -> None:
    before = guarded.num_turns()
    engines = guarded.gateway.get("/admin/engines", headers=OPERATOR)
    for target in TRICKS:
        for method in METHODS:
            sent = line(method, target.replace("RESPONSE", guarded.response_id), guarded.own)
            reply = exchange(guarded, sent)
            status = int(reply.split(b" ", 2)[1])
            assert status >= 400, (method, target, reply)
            assert SECRET.encode() not in reply, (method, target)
    assert guarded.num_turns() == before
    assert guarded.gateway.get("/admin/engines", headers=OPERATOR) == engines


@pytest.mark.parametrize(
    "header",
    [
        "X-HTTP-Method-Override: GET", "X-Original-URL: /sessions/other/turns", "X-Rewrite-URL: /sessions/other/turns",
        "X-Session-ID: other", "X-Session-ID: own", f"X-Api-Key: {KEYS[0]}x", "X-Forwarded-For: 127.0.0.1",
        "Cookie: key=made-up", "Upgrade: websocket\r\nConnection: Upgrade",
    ],
)  # fmt: skip
def test_no_header_takes_an_agent_further_than_its_session(guarded: Guarded, header: str) -> None:
    for target in ("/sessions/other/turns", "/admin/engines", "/feed/counts?consumer=c"):
        reply = exchange(guarded, line("GET", target, guarded.own, header))
        assert reply.startswith(b"HTTP/1.1 403"), (target, reply)


@pytest.mark.parametrize(
    "headers",
    [
        ["Authorization: Bearer made-up"], [f"Authorization: Bearer {KEYS[0]}"], ["authorization: Basic x"],
        ["X-Session-ID: own", "X-Session-ID: other"], ["X-Session-ID: own", "x-session-id: own"],
        ["X-Api-Key: a", "X-API-KEY: b"],
    ],
)  # fmt: skip
def test_a_request_that_says_twice_who_calls_is_refused(guarded: Guarded, headers: list[str]) -> None:
    """A proxy in front may go by the one and the gateway by the other."""
    for target in ("/sessions/own/v1/models", "/v1/models", "/sessions", "/health"):
        reply = exchange(guarded, line("GET", target, guarded.own, *headers))
        assert reply.startswith(b"HTTP/1.1 400"), (target, reply)
        assert headers[-1].partition(":")[0].lower().encode() + b": was sent more than once" in reply


def test_an_agents_call_without_its_key_is_in_the_audit(guarded: Guarded, folder: Path) -> None:
    before, _ = audited(guarded, folder)
    assert httpx.get(f"{guarded.gateway.url}/sessions/own/v1/models").status_code == 401
    after, _ = audited(guarded, folder)
    assert after == before + 1


@pytest.mark.parametrize(
    "lines",
    [
        ["Content-Length: 5", "Transfer-Encoding: chunked"],
        ["Transfer-Encoding: chunked", "Content-Length: 5"],
        ["Content-Length: 5", "Content-Length: 6"],
        ["Content-Length: 5, 6"],
        ["Content-Length: +5"],
        ["Content-Length: -1"],
        ["Transfer-Encoding: xchunked"],
        ["Transfer-Encoding: chunked, identity"],
        ["Transfer-Encoding : chunked"],
        [" Content-Length: 5"],
        ["Content-Length: 5\nX-A: b"],
    ],
)
def test_a_request_whose_length_can_be_read_in_two_ways_is_refused_and_nothing_follows_it(
    guarded: Guarded, lines: list[str]
) -> None:
    """Else what one reader takes for a body is a request to another: with a key that a proxy has put in front, say."""
    head = [
        "POST /sessions/own/v1/chat/completions HTTP/1.1",
        "Host: localhost",
        f"Authorization: Bearer {guarded.own}",
    ]
    smuggled = f"GET /sessions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEYS[0]}\r\n\r\n"
    address = urlsplit(guarded.gateway.url)
    with socket.create_connection((address.hostname, address.port), timeout=5) as connection:
        connection.sendall(("\r\n".join([*head, *lines, "", ""]) + "0\r\n\r\n" + smuggled).encode())
        received = bytearray()
        with suppress(ConnectionResetError, TimeoutError):
            while piece := connection.recv(2**16):
                received += piece
    assert received.startswith(b"HTTP/1.1 400"), bytes(received)
    assert received.count(b"HTTP/1.1 ") == 1
    assert b'"sessions"' not in received


def test_keys_are_told_once_and_kept_nowhere(guarded: Guarded, tmp_path: Path, start_gateway: StartGateway) -> None:
    """Not in what operators see, not in errors, files or the process's arguments; not those of sessions either that are
    made on the spot."""
    gateway = start_gateway(tmp_path, environment={"VERBATIM_OPERATOR_KEY": KEYS[0]})
    made = gateway.post("/sessions", {"session_id": "s"}, headers=OPERATOR)["api_key"]
    gateway.post("/sessions/s/v1/chat/completions", {"messages": [QUESTION]}, headers=bearer(made))
    spot = httpx.post(f"{gateway.url}/v1/chat/completions", json={"messages": [QUESTION]}, headers=OPERATOR)
    on_the_spot = spot.headers["x-session-id"]
    secrets = [key.encode() for key in (KEYS[0], made, made.partition(".")[2])]
    shown = [httpx.get(gateway.url + path, headers=OPERATOR).content for path in (
        "/sessions", "/sessions/s", "/sessions/s/turns", "/sessions/s/report", f"/sessions/{on_the_spot}", "/metrics",
    )]  # fmt: skip
    assert b"key_hash" not in b"".join(shown)
    shown += [httpx.get(gateway.url + "/sessions", headers=bearer(made)).content]
    shown += [httpx.post(gateway.url + "/sessions", json={"session_id": "s"}, headers=OPERATOR).content]
    name = made.partition(".")[0].replace(made.partition(".")[0][4:], on_the_spot)
    for guess in (f"{name}.", f"{name}.open", name):
        reply = httpx.get(f"{gateway.url}/sessions/{on_the_spot}/v1/models", headers=bearer(guess))
        assert reply.status_code == 403
    shown += [Path(f"/proc/{gateway.process.pid}/cmdline").read_bytes()]
    gateway.stop()
    assert gateway.process.stderr is not None
    shown += [
        gateway.process.stderr.read().encode(),
        *(file.read_bytes() for file in tmp_path.rglob("*.*") if file.is_file()),
    ]
    for content in shown:
        for secret in secrets:
            assert secret not in content


PROGRAM = """
import json, sys, urllib.error, urllib.request
url, key = sys.argv[1:]
found = []
for method, path, content, headers in json.load(sys.stdin):
    body = None if content is None else json.dumps(content).encode()
    headers = {"Authorization": "Bearer " + key, "Content-Type": "application/json"} | headers
    request = urllib.request.Request(url + path, body, headers, method=method)
    try:
        found.append(urllib.request.urlopen(request, timeout=10).status)
    except urllib.error.HTTPError as error:
        found.append(error.code)
    except OSError as error:
        found.append(str(error))
print(json.dumps(found))
"""
Attempt = tuple[str, str, Any, dict[str, str]]
ENGINE_PATHS = [
    "/flush_cache", "/update_weights_from_disk", "/update_weights_from_distributed", "/update_weights_from_tensor",
    "/init_weights_update_group", "/begin_weight_update", "/end_weight_update", "/release_memory_occupation",
    "/resume_memory_occupation", "/pause_generation", "/continue_generation", "/abort_request", "/open_session",
    "/close_session", "/load_lora_adapter", "/unload_lora_adapter", "/v1/load_lora_adapter", "/set_internal_state",
    "/start_profile", "/stop_profile", "/configure_logging", "/freeze_gc", "/sleep", "/wake_up",
    "/reset_prefix_cache", "/collective_rpc", "/workers", "/add_worker", "/remove_worker", "/get_loads", "/server_info",
    "/get_server_info", "/get_weights_by_name", "/shutdown", "/metrics",
]  # fmt: skip


def attempts_on_others(guarded: Guarded) -> list[Attempt]:
    """All that the gateway serves and an agent may not have: each operators' call, also on its own session; each call
    on another session, by path and by header; and what engines have besides."""
    found: list[Attempt] = []
    for method, path, operation in [*routes(guarded, "own"), *routes(guarded, "other"), *routes(guarded, "nobodys")]:
        endpoint = re.sub(r"^/sessions/[^/]+", "", path)
        body = BODIES.get(endpoint, {}) if method == "POST" else None
        if is_open(path, operation) or path.startswith("/openapi"):
            continue
        if not is_agents(operation) or (path != endpoint and not path.startswith("/sessions/own/")):
            found.append((method, path, body, {}))
        elif path == endpoint:
            found.append((method, path, body, {"X-Session-ID": "other"}))
    for path in ENGINE_PATHS:
        found += [(method, "/sessions/own" + path, None, {}) for method in ("GET", "POST")]
        if path != "/metrics":
            found.append(("POST", path, {}, {}))
    return [attempt for i, attempt in enumerate(found) if attempt not in found[:i]]


def audited(guarded: Guarded, folder: Path) -> tuple[int, set[str]]:
    """How many refusals the audit has seen, written or counted, and the paths of those that are written."""
    time.sleep(0.2)
    guarded.gateway.get("/sessions", headers=OPERATOR)  # its line says how many were counted before
    time.sleep(0.2)
    lines = [json.loads(line) for line in (folder / "audit.jsonl").read_text().splitlines()]
    refused = [line for line in lines if line["status"] >= 400]
    return len(refused) + sum(line.get("refused_before", 0) for line in lines), {line["path"] for line in refused}


async def test_an_agent_in_a_sandbox_that_has_the_network_reaches_its_own_session_only(
    guarded: Guarded, folder: Path
) -> None:
    """Every route of the gateway's document, so that none can be forgotten: refused, and in the audit."""
    own: list[Attempt] = [
        (method, path, BODIES.get(path.removeprefix("/sessions/own")) if method == "POST" else None, {})
        for method, path, operation in routes(guarded, "own")
        if is_agents(operation) and path.startswith("/sessions/own/") and "{" not in path
        and "/blobs/" not in path and "/responses/" not in path
    ]  # fmt: skip
    others = attempts_on_others(guarded)
    assert len(own) >= 8
    assert len(others) > 100
    turns, engines = guarded.num_turns(), guarded.gateway.get("/admin/engines", headers=OPERATOR)
    before, _ = audited(guarded, folder)
    driver = PlainProcessDriver()
    try:
        sandbox = await driver.create(SandboxSpec("a", network=NetworkAccess.LOOPBACK))
        argv = [sys.executable, "-c", PROGRAM, guarded.gateway.url, guarded.own]
        reached = await sandbox.execute(argv, stdin=json.dumps(own).encode(), timeout_seconds=60)
        own_turns = guarded.num_turns()
        refused = await sandbox.execute(argv, stdin=json.dumps(others).encode(), timeout_seconds=60)
    finally:
        await driver.aclose()
    assert dict(zip([each[1] for each in own], json.loads(reached.stdout), strict=True)) == {
        each[1]: 200 for each in own
    }
    assert own_turns > turns
    statuses = json.loads(refused.stdout)
    wrong = [
        (*each[:2], status) for each, status in zip(others, statuses, strict=True) if status not in (401, 403, 404)
    ]
    assert not wrong
    assert guarded.num_turns() == own_turns
    assert guarded.gateway.get("/admin/engines", headers=OPERATOR) == engines
    after, paths = audited(guarded, folder)
    assert after - before == len(others)
    assert paths


async def test_an_isolated_sandbox_does_not_even_reach_the_port(guarded: Guarded) -> None:
    driver = LocalDriver()
    try:
        driver.check()
    except SandboxUnavailable as error:
        pytest.skip(str(error))
    try:
        sandbox = await driver.create(SandboxSpec("a", network=NetworkAccess.LOOPBACK))
        argv = ["python3", "-I", "-c", PROGRAM, guarded.gateway.url, guarded.own]
        wanted: list[Attempt] = [("GET", "/health", None, {}), ("GET", "/sessions/own/v1/models", None, {})]
        seen = json.loads((await sandbox.execute(argv, stdin=json.dumps(wanted).encode(), timeout_seconds=60)).stdout)
    finally:
        await driver.aclose()
    assert len(seen) == 2
    assert all("refused" in str(answer) for answer in seen), seen


@pytest.fixture(scope="module")
def keyless(start_gateway: StartGateway, tmp_path_factory: pytest.TempPathFactory) -> RunningGateway:
    folder = tmp_path_factory.mktemp("keyless")
    return start_gateway(folder, "--set", 'allowed_hosts=["gateway.test"]')


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200), ("LOCALHOST:99", 200), ("127.0.0.1", 200), ("127.0.0.1:1", 200), ("[::1]", 200),
        ("[::1]:8600", 200), ("gateway.test", 200), ("Gateway.Test.:80", 200), ("127.1.2.3", 200),
        ("evil.example", 403), ("localhost.evil.example", 403), ("127.0.0.1.evil.example", 403),
        ("evil.example:8600", 403), ("", 403), ("0.0.0.0", 403), ("192.168.0.7", 403),
        ("[::1].evil.example", 403), ("evil@127.0.0.1", 403), ("169.254.169.254", 403),
        ("localhost,evil.example", 403),
    ],
)  # fmt: skip
def test_without_keys_only_this_machines_own_names_are_answered(
    keyless: RunningGateway, host: str, status: int
) -> None:
    """A page whose name was made to point here (DNS rebinding) is told nothing and changes nothing."""
    reply = httpx.get(f"{keyless.url}/sessions", headers={"Host": host})
    assert reply.status_code == status, reply.text
    made = httpx.post(f"{keyless.url}/sessions", json={"session_id": "of-a-page"}, headers={"Host": host})
    assert made.status_code == (status if status == 403 else made.status_code)
    if status == 403:
        assert reply.json()["error"]["code"] == "permission_denied"
        assert "allowed_hosts" in reply.json()["error"]["message"]
        assert reply.headers["x-request-id"]


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("OWN", 200), ("https://evil.example", 403), ("null", 403), ("http://localhost:1", 403),
        ("http://gateway.test", 200), ("http://127.0.0.1.evil.example", 403), ("", 403), ("file://", 403),
    ],
)  # fmt: skip
def test_without_keys_no_page_of_another_site_may_send_anything(
    keyless: RunningGateway, origin: str, status: int
) -> None:
    """Browsers send what needs no answer to any address; CORS is off besides."""
    origin = keyless.url if origin == "OWN" else origin
    headers = {"Origin": origin, "Content-Type": "text/plain"}
    reply = httpx.post(f"{keyless.url}/admin/generation/resume", headers=headers, content=b"{}")
    assert reply.status_code == status
    preflight = httpx.options(
        f"{keyless.url}/sessions", headers={"Origin": origin, "Access-Control-Request-Method": "POST"}
    )
    assert preflight.status_code in (403, 405)
    for each in (reply, preflight):
        assert not [name for name in each.headers if name.startswith("access-control")]


def test_with_keys_any_name_will_do(guarded: Guarded) -> None:
    """A name without a key opens nothing, and operators put gateways behind names of all kinds."""
    headers = OPERATOR | {"Host": "gateway.example", "Origin": "https://console.example"}
    assert httpx.get(f"{guarded.gateway.url}/sessions", headers=headers).status_code == 200


def test_two_hosts_are_refused(keyless: RunningGateway) -> None:
    address = urlsplit(keyless.url)
    with socket.create_connection((address.hostname, address.port), timeout=5) as connection:
        connection.sendall(
            b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\nConnection: close\r\n\r\n"
        )
        assert connection.recv(2**16).split(b" ")[1] in (b"400", b"403")


@pytest.mark.parametrize("key", [KEYS[0], "made-up", None])
def test_no_header_of_a_proxy_says_who_called(guarded: Guarded, folder: Path, key: str | None) -> None:
    """The audit names the peer of the connection, also where that is this machine, which a server may trust."""
    forged = "203.0.113.7"
    marked = f"/sessions?of={key}"
    headers = [f"X-Forwarded-For: {forged}", f"Forwarded: for={forged}", f"X-Real-IP: {forged}"]
    sent = line("GET", marked, key or "", *headers, "X-Forwarded-Proto: https", "X-Forwarded-Host: evil.example")
    reply = exchange(guarded, sent)
    assert b"evil.example" not in reply
    time.sleep(1.0)  # of refusals only so many are written a second
    exchange(guarded, sent)
    time.sleep(0.3)
    lines = [json.loads(text) for text in (folder / "audit.jsonl").read_text().splitlines()]
    found = [each for each in lines if each["query"] == f"of={key}"]
    assert found
    assert {each["peer"].rpartition(":")[0] for each in found} == {"127.0.0.1"}
    assert forged not in json.dumps(lines)


def test_the_key_of_a_deleted_session_opens_nothing_not_even_its_successor(guarded: Guarded) -> None:
    gateway, url = guarded.gateway, f"{guarded.gateway.url}/sessions/short-lived"
    old = gateway.post("/sessions", {"session_id": "short-lived"}, headers=OPERATOR)["api_key"]
    chat = {"messages": [QUESTION]}
    assert httpx.post(f"{url}/v1/chat/completions", json=chat, headers=bearer(old), timeout=30).status_code == 200
    assert httpx.delete(url, headers=OPERATOR).status_code == 200
    for target in (url, gateway.url):
        reply = httpx.post(f"{target}/v1/chat/completions", json=chat, headers=bearer(old))
        assert reply.status_code == 403
    new = gateway.post("/sessions", {"session_id": "short-lived"}, headers=OPERATOR)["api_key"]
    for key, status in ((old, 403), (new, 200)):
        for target in (url, gateway.url):
            reply = httpx.post(f"{target}/v1/chat/completions", json=chat, headers=bearer(key), timeout=30)
            assert reply.status_code == status


def test_who_has_no_key_to_a_session_does_not_have_it_read(start_gateway: StartGateway, tmp_path: Path) -> None:
    """A session may be large: loading it would cost memory and time, and the time would tell that there is one."""
    environment = {"VERBATIM_OPERATOR_KEY": KEYS[0]}
    gateway = start_gateway(tmp_path, environment=environment)
    own, other = (gateway.post("/sessions", {"session_id": each}, headers=OPERATOR)["api_key"] for each in "ab")
    gateway.stop()
    gateway = start_gateway(tmp_path, environment=environment)

    def num_loaded() -> float:
        text = httpx.get(f"{gateway.url}/metrics", headers=OPERATOR).text
        return float(re.search(r"^verbatim_sessions_in_memory (\S+)$", text, re.MULTILINE)[1])  # type: ignore[index]

    forged = other.partition(".")[0] + ".forged"
    for key in (own, forged, "made-up", None):
        headers = {} if key is None else bearer(key)
        for path in ("v1/chat/completions", "tokenize", "v1/messages/count_tokens"):
            reply = httpx.post(f"{gateway.url}/sessions/b/{path}", json={"messages": [QUESTION]}, headers=headers)
            assert reply.status_code == (401 if key is None else 403)
        for path in ("v1/models", "blobs/" + "0" * 64, "v1/responses/resp_x"):
            reply = httpx.get(f"{gateway.url}/sessions/b/{path}", headers=headers)
            assert reply.status_code == (401 if key is None else 403)
    assert num_loaded() == 0
    assert httpx.get(f"{gateway.url}/sessions/b/v1/responses/resp_x", headers=bearer(other)).status_code == 404
    assert num_loaded() == 1


def test_unknown_sessions_are_refused_by_a_flag(start_gateway: StartGateway, tmp_path: Path) -> None:
    gateway = start_gateway(tmp_path, "--unknown-sessions", "reject")
    for path in ("/sessions/nobody/v1/chat/completions", "/sessions/nobody/tokenize"):
        reply = httpx.post(gateway.url + path, json={"messages": [QUESTION]}, timeout=30)
        assert (reply.status_code, reply.json()["error"]["code"]) == (404, "not_found")
    assert gateway.get("/sessions") == {"sessions": []}


def test_the_url_of_a_session_is_the_one_by_which_agents_reach_the_gateway(
    start_gateway: StartGateway, tmp_path: Path
) -> None:
    """Also behind a proxy that ends TLS, whose headers anybody could send."""
    gateway = start_gateway(tmp_path, "--set", "public_url=https://models.example/rl/")
    told = httpx.post(f"{gateway.url}/sessions", json={"session_id": "a b"}, headers={"X-Forwarded-Proto": "ftp"})
    assert told.json()["base_url"] == "https://models.example/rl/sessions/a%20b/v1"
