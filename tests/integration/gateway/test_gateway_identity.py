"""Which engines a gateway takes: real processes, and a server with SGLang's routes whose tokenizer can be changed."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from aiohttp import web
from tokenizers import Tokenizer

from engines.echo import EchoServer
from engines.launch import free_port
from engines.sglang import SglangEngine
from gateway.client import GatewayClient
from gateway.contracts.errors import ConfigurationError, IdentityMismatch
from gateway.contracts.fingerprints import template_sha256, tokenizer_sha256
from gateway.contracts.verification import Proof, Verification
from gateway.sessions.admission import Admission
from gateway.sessions.model import ServedModel
from gateway.tito.conversation import HistoryPolicy
from tests.integration.gateway.conftest import RunningGateway, close, wait_ready
from tests.integration.gateway.test_gateway_embedded_engine import started, verbatim
from tests.waiting import until
from trainer.main import check_experts
from trainer.settings import ReplayMode

Start = Callable[..., RunningGateway]


class TokenizingServer(EchoServer):
    """An engine without fingerprints: `spells` answers `/tokenize` (None: no such route), `info` is its model_info."""

    def __init__(self, tokenizer: Path) -> None:
        super().__init__([5, 6])
        self.spells: Tokenizer | None = Tokenizer.from_file(str(tokenizer))
        self.as_prompts: Tokenizer | None = None
        self.info: dict[str, Any] = {"model_path": "tiny", "served_model_name": "tiny", "weight_version": "default"}
        self.startup_time = 1.0
        self.num_probes = 0

    def app(self) -> web.Application:
        app = web.Application(client_max_size=2**30)
        app.router.add_post("/tokenize", self._tokenize)
        app.router.add_post("/generate", self._generate_or_spell)
        app.router.add_get("/model_info", self._model_info)
        app.router.add_get("/server_info", self._server_info)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/ping", self._ping)
        app.router.add_post("/abort_request", self._ping)
        return app

    async def _model_info(self, request: web.Request) -> web.Response:
        return web.json_response(self.info)

    async def _server_info(self, request: web.Request) -> web.Response:
        return web.json_response({"startup_time": self.startup_time, "version": "0.5.23"})

    async def _tokenize(self, request: web.Request) -> web.Response:
        body = await request.json()
        if self.spells is None:
            return web.json_response({"error": {"message": "Not Found"}}, status=404)
        self.num_probes += 1
        assert body["add_special_tokens"] is False
        ids = [self.spells.encode(text, add_special_tokens=False).ids for text in body["prompt"]]
        return web.json_response({"tokens": ids, "count": list(map(len, ids)), "max_model_len": 4096})

    async def _generate_or_spell(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        if "text" not in body:
            return await self._generate(request)
        if self.as_prompts is None:
            return web.json_response({"error": {"message": "no text"}}, status=400)
        assert body["sampling_params"]["max_new_tokens"] == 1
        prompts = [self.as_prompts.encode(text).ids for text in body["text"]]
        metas = [{"input_token_logprobs": [[None, token_id, None] for token_id in ids]} for ids in prompts]
        return web.json_response([{"text": "", "meta_info": meta} for meta in metas])


@contextmanager
def serving(app: web.Application) -> Iterator[str]:
    """The address of an application that a thread serves."""
    loop, port = asyncio.new_event_loop(), free_port()
    runner = web.AppRunner(app)
    ready = threading.Event()

    async def start() -> None:
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        ready.set()

    def serve() -> None:
        loop.run_until_complete(start())
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())
        loop.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        assert ready.wait(10)
        yield f"http://127.0.0.1:{port}"
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)


@pytest.fixture(scope="module")
def engine_url(tiny_model: Path) -> Iterator[str]:
    """A real embedded engine of the tiny model."""
    process, url = started("engine", "--model", str(tiny_model), "--port", str(free_port()))
    try:
        yield url
    finally:
        close(process)


@pytest.fixture
def server(tiny_model: Path) -> TokenizingServer:
    return TokenizingServer(tiny_model / "tokenizer.json")


@pytest.fixture
def serve(tmp_path: Path, tiny_model: Path) -> Iterator[Start]:
    """Starts gateways before an engine; they end with the test."""
    with ExitStack() as stack:

        def start(*flags: str) -> RunningGateway:
            fixed = ["--model", str(tiny_model), "--port", str(free_port()), "--data", str(tmp_path / "ledger")]
            process = verbatim("serve", *fixed, "--set", "replicas.health_interval_seconds=0.1", *flags)
            stack.callback(close, process)
            return RunningGateway(process, wait_ready(process))

        yield start


def refusal(model: Path, engine: str, data: Path, *flags: str) -> str:
    """What a gateway says that does not start, with exit code 2."""
    fixed = ["--model", str(model), "--port", str(free_port()), "--data", str(data)]
    process = verbatim("serve", "--engine", engine, *fixed, *flags)
    try:
        _, said = process.communicate(timeout=60)
    finally:
        close(process)
    assert process.returncode == 2, said
    return said.strip().splitlines()[-1]


async def check(model: Path, url: str) -> Verification:
    """What a gateway with `model` finds of an engine."""
    served = ServedModel.load(model, history_policy=HistoryPolicy.KEEP)
    engine = SglangEngine(url, engine_id="engine-0", routing=served.routing, policy_version_of=lambda label: 0)
    try:
        return await Admission(served).check(engine, await engine.identity())
    finally:
        await engine.aclose()


def other_folder(model: Path, folder: Path) -> Path:
    """What a gateway needs of a model folder, to be changed."""
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json"):
        if (model / name).exists():
            shutil.copy(model / name, folder / name)
    return folder


def changed_json(file: Path, change: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    return content


def swap_words(tokenizer: dict[str, Any]) -> dict[str, int]:
    """The vocabulary, in which two words have each other's id."""
    vocab: dict[str, int] = tokenizer["model"]["vocab"]
    vocab["ĠUse"], vocab["Ġansw"] = vocab["Ġansw"], vocab["ĠUse"]
    return vocab


def swap_merges(tokenizer: dict[str, Any]) -> None:
    merges = tokenizer["model"]["merges"]
    merges[0], merges[1] = merges[1], merges[0]


def test_an_engine_with_another_tokenizer_is_refused_with_both_fingerprints(
    engine_url: str, tiny_model: Path, tmp_path: Path
) -> None:
    """I1: a subtle difference (the order of two merges), the same vocabulary."""
    folder = other_folder(tiny_model, tmp_path / "other")
    ours = tokenizer_sha256(changed_json(folder / "tokenizer.json", swap_merges))
    theirs = tokenizer_sha256(json.loads((tiny_model / "tokenizer.json").read_text()))
    said = refusal(folder, f"sglang={engine_url}", tmp_path / "ledger")
    assert "another tokenizer" in said
    assert ours[:12] in said
    assert theirs[:12] in said


async def test_an_engine_with_another_template_is_refused_with_both_fingerprints(
    engine_url: str, tiny_model: Path, tmp_path: Path
) -> None:
    folder = other_folder(tiny_model, tmp_path / "other")
    theirs = (folder / "chat_template.jinja").read_bytes().decode()
    (folder / "chat_template.jinja").write_text(theirs + "{# #}")
    with pytest.raises(IdentityMismatch, match="another template") as refused:
        await check(folder, engine_url)
    assert template_sha256(theirs)[:12] in refused.value.message
    assert template_sha256(theirs + "{# #}")[:12] in refused.value.message


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"num_hidden_layers": 6}, "its layers are 4, those of .* 6 "),
        ({"num_experts": 16}, "its experts a layer are 8, those of .* 16 "),
        ({"num_experts_per_tok": 4}, "its experts a token are 2, those of .* 4 "),
        ({"mlp_only_layers": [0]}, "its layers with experts are 0-3, those of .* 1-3 "),
        ({"vocab_size": 512}, "its vocabulary are [0-9]+, those of .* 512 "),
    ],
)
async def test_an_engine_of_other_dimensions_is_refused_with_both_values(
    change: dict[str, Any], expected: str, engine_url: str, tiny_model: Path, tmp_path: Path
) -> None:
    """I2: rows of another shape, or of other layers."""
    folder = other_folder(tiny_model, tmp_path / "other")
    changed_json(folder / "config.json", lambda config: config.update(change))
    with pytest.raises(IdentityMismatch, match=expected):
        await check(folder, engine_url)


@pytest.mark.parametrize("kind", ["sglang", "vllm"])
def test_the_same_model_in_another_spelling_is_taken_and_shown_as_verified(
    kind: str, engine_url: str, tiny_model: Path, tmp_path: Path
) -> None:
    folder = other_folder(tiny_model, tmp_path / "spelled")
    changed_json(folder / "tokenizer.json", lambda tokenizer: tokenizer["added_tokens"].reverse())
    flags = ["--model", str(folder), "--port", str(free_port()), "--data", str(tmp_path / "ledger")]
    process = verbatim("serve", "--engine", f"{kind}={engine_url}", *flags, "--require", "routed_experts")
    try:
        shown = RunningGateway(process, wait_ready(process)).get("/admin/identity")
    finally:
        close(process)
    [engine] = shown["engines"]
    ways = {
        "sglang": {"tokenizer": "sha256", "template": "sha256", "dimensions": "told"},
        "vllm": {"tokenizer": "probe", "template": "folder", "dimensions": "folder"},
    }
    assert engine["verified"] == ways[kind]
    assert engine["fingerprints"] == shown["fingerprints"]
    assert engine["dimensions"] == shown["dimensions"]
    assert {"routed_experts", "token_ids", "pause"} <= set(engine["capabilities"])
    assert (shown["required"], engine["unmet"]) == (["routed_experts"], [])


def test_an_engine_without_fingerprint_is_taken_when_it_spells_the_probe_texts_alike(
    server: TokenizingServer, serve: Start
) -> None:
    """Once for a process and its weights, however often its health is checked."""
    with serving(server.app()) as url:
        gateway = serve("--engine", f"sglang={url}")
        [engine] = gateway.get("/admin/identity")["engines"]
        assert engine["verified"] == {"tokenizer": "probe", "template": "unverified", "dimensions": "unverified"}
        time.sleep(0.5)
        assert server.num_probes == 1
        server.info["weight_version"] = "policy-000001"
        until(lambda: server.num_probes == 2)


def test_an_engine_that_spells_one_text_otherwise_is_refused_with_text_and_both_spellings(
    server: TokenizingServer, tiny_model: Path, tmp_path: Path
) -> None:
    """I1: two words of the vocabulary have each other's id."""
    description = json.loads((tiny_model / "tokenizer.json").read_text())
    vocab = swap_words(description)
    server.spells = Tokenizer.from_str(json.dumps(description))
    with serving(server.app()) as url:
        said = refusal(tiny_model, f"sglang={url}", tmp_path / "ledger")
    assert "has another tokenizer: it spells ' " in said
    assert f"as [{vocab['Ġansw']}], ours as [{vocab['ĠUse']}]" in said or (
        f"as [{vocab['ĠUse']}], ours as [{vocab['Ġansw']}]" in said
    )


async def test_an_engine_without_an_added_token_is_refused_and_the_token_is_named(
    server: TokenizingServer, tiny_model: Path
) -> None:
    """I1: a control token that the engine takes for text."""
    description = json.loads((tiny_model / "tokenizer.json").read_text())
    description["added_tokens"] = description["added_tokens"][:-1]
    server.spells = Tokenizer.from_str(json.dumps(description))
    with serving(server.app()) as url, pytest.raises(IdentityMismatch, match=r"spells '</tool_call>' as .*, ours as"):
        await check(tiny_model, url)


async def test_an_engine_without_any_route_for_it_is_asked_through_prompts(
    server: TokenizingServer, tiny_model: Path
) -> None:
    server.spells, server.as_prompts = None, server.spells
    with serving(server.app()) as url:
        assert (await check(tiny_model, url)).tokenizer is Proof.PROBE


def test_an_engine_that_cannot_be_asked_is_taken_and_called_unverified(server: TokenizingServer, serve: Start) -> None:
    server.spells = None
    with serving(server.app()) as url:
        gateway = serve("--engine", f"sglang={url}")
        [engine] = gateway.get("/admin/identity")["engines"]
        assert engine["verified"]["tokenizer"] == "unverified"
    gateway.stop()
    assert gateway.process.stderr is not None
    assert "its tokenizer is not verified" in gateway.process.stderr.read()


def test_an_engine_that_lacks_what_is_required_is_refused_and_told_what_turns_it_on(
    server: TokenizingServer, serve: Start, tiny_model: Path, tmp_path: Path
) -> None:
    """At the start with exit code 2; when it is added with 409."""
    with serving(server.app()) as url:
        said = refusal(tiny_model, f"sglang={url}", tmp_path / "first", "--require", "routed_experts")
        assert "lacks routed_experts" in said
        assert "--enable-return-routed-experts" in said
        gateway = serve("--set", 'require=["routed_experts", "grammar"]')
        reply = httpx.post(f"{gateway.url}/admin/engines", json={"kind": "sglang", "url": url}, timeout=30)
    assert reply.status_code == 409
    error = reply.json()["error"]
    assert error["code"] == "capability_missing"
    assert "lacks routed_experts, grammar" in error["message"]
    assert "--grammar-backend" in error["message"]
    assert gateway.get("/admin/engines")["engines"] == []


def test_a_capability_that_does_not_exist_is_a_wrong_flag(tiny_model: Path, tmp_path: Path) -> None:
    said = refusal(tiny_model, "sglang=http://127.0.0.1:9", tmp_path / "ledger", "--require", "magic")
    assert "invalid choice: 'magic'" in said


def test_an_engine_that_becomes_another_is_ejected_and_comes_back_when_it_is_right(
    server: TokenizingServer, serve: Start, tiny_model: Path
) -> None:
    """I1: what restarts at the same address may be another model."""
    right = server.spells
    description = json.loads((tiny_model / "tokenizer.json").read_text())
    swap_words(description)
    with serving(server.app()) as url:
        gateway = serve("--engine", f"sglang={url}")

        def engine() -> dict[str, Any]:
            [shown] = gateway.get("/admin/identity")["engines"]
            return dict(shown)

        assert engine()["healthy"]
        server.spells, server.startup_time = Tokenizer.from_str(json.dumps(description)), 2.0
        until(lambda: not engine()["healthy"])
        assert "has another tokenizer: it spells" in engine()["last_error"]
        server.spells, server.startup_time = right, 3.0
        until(lambda: bool(engine()["healthy"]))
        server.info["tokenizer_sha256"] = "f" * 64
        until(lambda: not engine()["healthy"])
        assert "another tokenizer (ffffffffffff) than" in engine()["last_error"]
        del server.info["tokenizer_sha256"]
        until(lambda: bool(engine()["healthy"]))


async def test_a_trainer_that_replays_does_not_start_before_engines_without_experts(
    server: TokenizingServer, serve: Start
) -> None:
    """I10: not at the first batch, when rollouts were sampled for nothing."""
    with serving(server.app()) as url:
        gateway = serve("--engine", f"sglang={url}")
        async with GatewayClient(gateway.url) as client:
            await check_experts(client, ReplayMode.OFF)
            with pytest.raises(ConfigurationError, match="--require routed_experts"):
                await check_experts(client, ReplayMode.R3)


async def test_while_generation_is_paused_an_engine_is_not_asked_to_spell(
    server: TokenizingServer, serve: Start
) -> None:
    """It may hold requests back; new weights are verified once it goes on."""
    with serving(server.app()) as url:
        gateway = serve("--engine", f"sglang={url}")
        gateway.post("/admin/generation/pause", {"mode": "drain"})
        server.info["weight_version"] = "policy-000001"
        gateway.post("/admin/policy", {"policy_version": 1, "weight_version": "policy-000001"})
        assert gateway.get("/admin/engines")["engines"][0]["policy_version"] == 1
        assert server.num_probes == 1
        gateway.post("/admin/generation/resume")
        until(lambda: server.num_probes == 2)


def test_doctor_shows_an_engine_beside_the_folder_without_a_gateway(
    engine_url: str, server: TokenizingServer, tiny_model: Path
) -> None:
    with serving(server.app()) as url:
        flags = ["--model", str(tiny_model), "--engine", f"sglang={engine_url}", "--engine", f"sglang={url}"]
        nobody = ["--engine", "sglang=http://127.0.0.1:9", "--require", "routed_experts", "--json"]
        first, second, third = json.loads(finished("doctor", *flags, *nobody, code=1))["engines"]
        table = finished("doctor", *flags, code=0)
    assert first["verified"] == {"tokenizer": "sha256", "template": "sha256", "dimensions": "told"}
    assert first["refusal"] is None
    assert "lacks routed_experts" in second["refusal"]
    assert "is not reachable" in third["refusal"]
    assert f"sglang={engine_url}: may serve this model" in table
    assert "2 of 8 experts" in table
    assert "(probe)" in table


def finished(command: str, *flags: str, code: int) -> str:
    """What a command prints that ends with `code`."""
    process = verbatim(command, *flags)
    try:
        said, errors = process.communicate(timeout=60)
    finally:
        close(process)
    assert process.returncode == code, said + errors
    return said
