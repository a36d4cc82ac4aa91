"""What a client may send and how fast, and what a slow one can hold: nothing for long."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil
import pytest

from engines.launch import free_port
from tests.integration.gateway.conftest import RunningGateway, StartGateway, close, wait_ready
from tests.waiting import until

MIB = 2**20
QUESTION = {"role": "user", "content": "quick"}
CHAT = "/v1/chat/completions"
READ_SECONDS = 1.0
WRITE_SECONDS = 1.0
WIDE_PROGRAM = Path(__file__).parent / "gateway_with_wide_rows.py"
ROW_BYTES = 8192 * 8


@pytest.fixture(scope="module")
def strict(start_gateway: StartGateway, tmp_path_factory: pytest.TempPathFactory) -> RunningGateway:
    """A gateway whose limits are met soon."""
    return start_gateway(
        tmp_path_factory.mktemp("strict"),
        *("--set", f"max_body_bytes={4 * MIB}", "--set", f"bodies_in_flight_bytes={5 * MIB}"),
        *("--set", f"read_timeout_seconds={READ_SECONDS}", "--set", f"write_timeout_seconds={WRITE_SECONDS}"),
    )


def connect(gateway: RunningGateway) -> socket.socket:
    address = urlsplit(gateway.url)
    return socket.create_connection((address.hostname, address.port), timeout=30)


def everything(connection: socket.socket) -> bytes:
    """What comes until the gateway closes."""
    received = bytearray()
    with suppress(ConnectionResetError):
        while piece := connection.recv(2**16):
            received += piece
    return bytes(received)


def send_on(connection: socket.socket, piece: bytes, *, times: int) -> None:
    for _ in range(times):
        connection.sendall(piece)
        time.sleep(0.001)


def body_of(num_bytes: int) -> bytes:
    empty = json.dumps({"messages": [QUESTION], "metadata": {"x": ""}})
    return empty.replace('"x": ""', f'"x": "{"a" * (num_bytes - len(empty))}"').encode()


def head(path: str, *lines: str) -> bytes:
    return "\r\n".join([f"POST {path} HTTP/1.1", "Host: localhost", *lines, "", ""]).encode()


def is_let_in(connection: socket.socket, num_bytes: int) -> bool:
    """Announce a body of that length, and whether the gateway wants to have it."""
    connection.sendall(head(CHAT, f"Content-Length: {num_bytes}", "Expect: 100-continue"))
    return connection.recv(2**16).startswith(b"HTTP/1.1 100 ")


def error_of(reply: httpx.Response) -> dict[str, Any]:
    """OpenAI's error body, and nothing else."""
    [(name, error)] = reply.json().items()
    assert name == "error"
    assert error.keys() == {"message", "type", "param", "code"}
    return dict(error)


def test_a_body_of_64_mib_is_answered_and_a_longer_one_is_413(gateway: RunningGateway) -> None:
    fitting = httpx.post(gateway.url + CHAT, content=body_of(64 * MIB), timeout=60)
    assert fitting.status_code == 200
    longer = httpx.post(gateway.url + CHAT, content=body_of(64 * MIB + 1), timeout=60)
    assert (longer.status_code, error_of(longer)["code"]) == (413, "payload_too_large")


@pytest.mark.parametrize("is_chunked", [False, True])
def test_a_body_that_is_too_long_is_413_in_the_words_of_the_dialect(strict: RunningGateway, is_chunked: bool) -> None:
    def pieces() -> Iterator[bytes]:
        yield from [b" " * MIB] * 5

    content: Any = pieces() if is_chunked else body_of(5 * MIB)
    reply = httpx.post(strict.url + CHAT, content=content, timeout=30)
    assert (reply.status_code, error_of(reply)["type"]) == (413, "invalid_request_error")
    content = pieces() if is_chunked else body_of(5 * MIB)
    reply = httpx.post(strict.url + "/v1/messages", content=content, timeout=30)
    assert (reply.status_code, reply.json()["error"]["type"]) == (413, "request_too_large")


def test_a_chunked_body_is_read(strict: RunningGateway) -> None:
    body = body_of(300_000)
    pieces = (body[i : i + 7_000] for i in range(0, len(body), 7_000))
    assert httpx.post(strict.url + CHAT, content=pieces, timeout=30).status_code == 200


def test_a_body_is_asked_for_only_if_it_will_be_read(strict: RunningGateway) -> None:
    """`Expect: 100-continue`: the client hears of a body that is too long before it sends it."""
    body = body_of(3_000)
    with connect(strict) as connection:
        connection.sendall(head(CHAT, f"Content-Length: {len(body)}", "Expect: 100-continue", "Connection: close"))
        assert connection.recv(1000).startswith(b"HTTP/1.1 100 ")
        connection.sendall(body)
        assert everything(connection).startswith(b"HTTP/1.1 200 ")
    with connect(strict) as connection:
        connection.sendall(head(CHAT, f"Content-Length: {5 * MIB}", "Expect: 100-continue", "Connection: close"))
        assert everything(connection).startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize("encoding", ["gzip", "br", "gzip, gzip", "x"])
def test_a_compressed_body_is_415(strict: RunningGateway, encoding: str) -> None:
    reply = httpx.post(strict.url + CHAT, content=b"\x1f\x8b", headers={"Content-Encoding": encoding})
    assert (reply.status_code, reply.headers["accept-encoding"]) == (415, "identity")
    assert error_of(reply)["code"] == "unsupported_content_encoding"


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", CHAT, "POST"),
        ("PUT", "/sessions/s/v1/chat/completions", "POST"),
        ("PATCH", "/sessions", "GET, POST"),
        ("POST", "/sessions/s", "DELETE, GET"),
        ("POST", "/health", "GET"),
        ("GET", "/sessions/a%2Fb/finish", "POST"),
    ],
)
def test_a_wrong_method_is_405_with_the_right_ones(
    strict: RunningGateway, method: str, path: str, allowed: str
) -> None:
    reply = httpx.request(method, strict.url + path)
    assert (reply.status_code, reply.headers["allow"]) == (405, allowed)
    assert error_of(reply)["code"] == "method_not_allowed"


def test_a_path_that_is_not_served_is_404(strict: RunningGateway) -> None:
    reply = httpx.get(strict.url + "/v2/unheard")
    assert (reply.status_code, error_of(reply)["code"]) == (404, "not_found")


def test_an_error_names_its_field(strict: RunningGateway) -> None:
    body = {"messages": [QUESTION, {"role": "assistant", "content": None}, {"role": 3}]}
    reply = httpx.post(strict.url + CHAT, json=body)
    assert (reply.status_code, error_of(reply)["param"]) == (400, "messages[2].role")
    reply = httpx.post(strict.url + CHAT, content=b'{"messages": [], "x": {"y": [1e999]}}')
    assert (reply.status_code, error_of(reply)["param"]) == (400, "x.y[0]")
    reply = httpx.post(strict.url + CHAT, json={"messages": [QUESTION], "top_p": 2})
    assert (reply.status_code, error_of(reply)["param"]) == (400, "top_p")


def test_an_error_does_not_send_a_long_field_back(strict: RunningGateway) -> None:
    body = {"messages": [QUESTION], "tool_choice": {"function": {"name": "f" * MIB}}}
    reply = httpx.post(strict.url + CHAT, json=body)
    assert reply.status_code == 400
    assert len(reply.content) < 10_000


def test_a_session_id_has_a_limit(strict: RunningGateway) -> None:
    for path, headers in ((f"/sessions/{'s' * 600}{CHAT}", {}), (CHAT, {"X-Session-ID": "s" * 600})):
        reply = httpx.post(strict.url + path, json={"messages": [QUESTION]}, headers=headers)
        assert (reply.status_code, error_of(reply)["param"]) == (400, "session_id")


def test_a_key_that_is_no_key_is_no_error_of_ours(strict: RunningGateway) -> None:
    reply = httpx.post(
        strict.url + CHAT, json={"messages": [QUESTION]}, headers={b"Authorization": "Bearer vbs-é.x".encode()}
    )
    assert reply.status_code == 200


def test_headers_of_a_reply_are_single_and_safe(strict: RunningGateway) -> None:
    """A request's id is echoed, or made; a session's id cannot add headers."""
    session = "a%0d%0aX-Evil: 1 ü".replace(" ", "%20").replace("ü", "%C3%BC")
    for stream in (False, True):
        body = {"messages": [QUESTION], "stream": stream}
        reply = httpx.post(f"{strict.url}/sessions/{session}{CHAT}", json=body, headers={"X-Request-ID": "mine-1"})
        names = [name for name, _ in reply.headers.multi_items()]
        assert len(names) == len(set(names)), names
        assert {"server", "date"} <= set(names)
        assert "content-encoding" not in names
        assert reply.headers["x-request-id"] == "mine-1"
        assert reply.headers["x-session-id"].lower() == session.lower().replace(":", "%3a")
        if not stream:
            assert int(reply.headers["content-length"]) == len(reply.content)
    made = [httpx.get(strict.url + "/health", headers={"X-Request-ID": "x" * n}) for n in (0, 200)]
    ids = [reply.headers["x-request-id"] for reply in made]
    assert len(set(ids)) == 2
    assert {len(each) for each in ids} == {36}


def test_a_slow_head_is_cut_off(strict: RunningGateway) -> None:
    with connect(strict) as connection:
        connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n")
        began = time.monotonic()
        reply = everything(connection)
        assert reply.startswith(b"HTTP/1.1 408 ")
        assert b'"code":"request_timeout"' in reply
        assert time.monotonic() - began < READ_SECONDS + 5
    with connect(strict) as connection:
        assert everything(connection) == b""  # nothing was begun, nothing is said


def test_a_slow_body_is_408_though_its_bytes_keep_coming(strict: RunningGateway) -> None:
    with connect(strict) as connection:
        connection.sendall(head(CHAT, "Content-Length: 100000"))
        began = time.monotonic()
        stop = threading.Event()

        def trickle() -> None:
            while not stop.wait(0.1):
                try:
                    connection.sendall(b" ")
                except OSError:
                    return

        thread = threading.Thread(target=trickle)
        thread.start()
        reply = connection.recv(2**16)
        assert reply.startswith(b"HTTP/1.1 408 ")
        assert READ_SECONDS * 0.9 <= time.monotonic() - began < READ_SECONDS + 5
        everything(connection)
        assert time.monotonic() - began < 2 * READ_SECONDS + 5  # the rest of the body is not waited for either
        stop.set()
        thread.join()


def test_a_head_without_end_is_431(strict: RunningGateway) -> None:
    with connect(strict) as connection:
        connection.sendall(b"POST / HTTP/1.1\r\nX-Long: ")
        with pytest.raises(OSError, match=r"."):  # the gateway closes while we still send
            send_on(connection, b"a" * 65_536, times=1000)
    with connect(strict) as connection:
        connection.sendall(b"POST / HTTP/1.1\r\nX-Long: ")
        for _ in range(3):
            connection.sendall(b"a" * 40_000)
            time.sleep(0.1)
        assert connection.recv(2**16).startswith(b"HTTP/1.1 431 ")


def test_what_is_no_http_is_400(strict: RunningGateway) -> None:
    with connect(strict) as connection:
        connection.sendall(b"\x16\x03\x01 hello\r\n\r\n")
        reply = everything(connection)
    assert reply.startswith(b"HTTP/1.1 400 ")
    assert reply.endswith(b"}")


def test_bodies_in_flight_have_a_bound_and_small_ones_get_in(start_gateway: StartGateway, tmp_path: Path) -> None:
    """Two uploads of 3.5 MiB that do not end hold 5 MiB: the third is told to come again."""
    patient = start_gateway(
        tmp_path, "--set", f"max_body_bytes={4 * MIB}", "--set", f"bodies_in_flight_bytes={5 * MIB}"
    )
    held = [connect(patient) for _ in range(2)]
    assert all(is_let_in(connection, 4 * MIB) for connection in held)
    for connection in held:
        connection.sendall(b" " * (3 * MIB + MIB // 2))

    def large() -> httpx.Response:
        return httpx.post(patient.url + CHAT, content=body_of(3 * MIB), timeout=30)

    def has_room() -> bool:
        """A whole body that were let in would take the room of those that are still being read."""
        with connect(patient) as asking:
            return is_let_in(asking, 3 * MIB)

    until(lambda: not has_room())
    refused = large()
    small = httpx.post(patient.url + CHAT, content=body_of(MIB), timeout=30)
    for connection in held:
        connection.close()
    assert (refused.status_code, error_of(refused)["code"]) == (429, "rate_limit_exceeded")
    assert int(refused.headers["retry-after"]) >= 1
    assert small.status_code == 200

    until(lambda: large().status_code == 200)


@pytest.fixture(scope="module")
def wide(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGateway]:
    """A gateway of a model of 8192 layers with eight experts a token: 64 KiB of routing for each token."""
    folder = tmp_path_factory.mktemp("wide")
    model = folder / "model"
    shutil.copytree(tiny_model, model, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((model / "config.json").read_text())
    config |= {
        "num_hidden_layers": 8192,
        "num_experts": 8,
        "num_experts_per_tok": 8,
        "max_position_embeddings": 100_000,
    }
    (model / "config.json").write_text(json.dumps(config))
    flags = ["--engine", "wide=one two", "--model", str(model), "--data", str(folder / "data")]
    flags += ["--set", f"write_timeout_seconds={WRITE_SECONDS}", "--port", str(free_port())]
    process = subprocess.Popen(
        [sys.executable, str(WIDE_PROGRAM), *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        yield RunningGateway(process, wait_ready(process))
    finally:
        close(process)


def peak_bytes(process: subprocess.Popen[str]) -> int:
    """Highest resident memory since `forget_peak`."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024


def forget_peak(process: subprocess.Popen[str]) -> int:
    """Resident memory now."""
    Path(f"/proc/{process.pid}/clear_refs").write_text("5")
    return psutil.Process(process.pid).memory_info().rss


def asking(num_rows: int, **fields: Any) -> dict[str, Any]:
    return {"prompt": [5] * num_rows, "return_routed_experts": True, "max_tokens": 20, **fields}


def costs(gateway: RunningGateway, path: str, body: dict[str, Any]) -> tuple[int, int]:
    """Bytes of a reply, and of memory that it took."""
    before = forget_peak(gateway.process)
    size = 0
    with httpx.stream("POST", gateway.url + path, json=body, timeout=300) as reply:
        assert reply.status_code == 200
        for piece in reply.iter_raw():
            size += len(piece)
        declared = reply.headers.get("content-length")
    assert declared in (None, str(size))
    return size, peak_bytes(gateway.process) - before


@pytest.mark.parametrize("stream", [False, True])
def test_a_reply_of_64_mib_of_routing_costs_its_rows_and_not_its_text(wide: RunningGateway, stream: bool) -> None:
    """The rows as they came and as they are stored; no base64 and no JSON of the whole is ever in memory."""
    num_rows = 800
    size, memory = costs(wide, "/v1/completions", asking(num_rows, stream=stream))
    assert size > 64 * MIB
    assert memory < 2.5 * num_rows * ROW_BYTES


def test_rows_that_sglang_wants_as_int32_are_widened_while_they_leave(wide: RunningGateway) -> None:
    num_rows = 400
    body = {"input_ids": [5] * num_rows, "return_routed_experts": True, "sampling_params": {"max_new_tokens": 20}}
    size, memory = costs(wide, "/generate", body)
    assert size > 4 * num_rows * ROW_BYTES
    assert memory < 3 * num_rows * ROW_BYTES


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True])
def test_a_reply_of_512_mib_works(wide: RunningGateway, stream: bool) -> None:
    num_rows = 6144
    size, memory = costs(wide, "/v1/completions", asking(num_rows, stream=stream))
    assert size > 512 * MIB
    assert memory < 2.5 * num_rows * ROW_BYTES


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_does_not_read_is_cut_off_and_its_turn_is_not_delivered(
    wide: RunningGateway, session_id: str, stream: bool
) -> None:
    """The reply stays in the record (I4), and none of its text is held for the reader that does not come."""
    num_rows = 800
    before = forget_peak(wide.process)
    content = json.dumps(asking(num_rows, stream=stream)).encode()
    with connect(wide) as connection:
        connection.sendall(head(f"/sessions/{session_id}/v1/completions", f"Content-Length: {len(content)}") + content)
        until(lambda: wide.get("/health")["turns_running"] == 0 and has_turn(wide, session_id))
        time.sleep(WRITE_SECONDS + 1)
        received = everything(connection)
    assert len(received) < 32 * MIB
    assert peak_bytes(wide.process) - before < 2.5 * num_rows * ROW_BYTES
    [turn] = wide.turns(session_id)
    assert turn["delivered_at"] is None
    again = httpx.post(wide.url + "/v1/completions", json=asking(3), timeout=30)
    assert again.status_code == 200


def has_turn(gateway: RunningGateway, session_id: str) -> bool:
    return bool(httpx.get(f"{gateway.url}/sessions/{session_id}/turns", timeout=30).json().get("turns"))
