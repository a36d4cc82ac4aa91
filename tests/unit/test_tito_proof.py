"""What is proven in a process of its own is what would be proven here; a proof that breaks off proves nothing."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest

from gateway.contracts.generation import Finish, FinishReason, JsonValue
from gateway.tito.backends import BackendChoice
from gateway.tito.conversation import Conversation, ParentTurn
from gateway.tito.prompt import PromptBuilder
from gateway.tito.proof import Proven, Prover, ToProve, prove
from gateway.tito.shapes import standard_shapes
from gateway.tito.template import ChatTemplate
from gateway.tito.tokenizer import ChatTokenizer


@pytest.fixture
def builder(tiny_model: Path) -> PromptBuilder:
    return PromptBuilder(ChatTokenizer.load(tiny_model), ChatTemplate.load(tiny_model), backend=BackendChoice.FASTOKENS)


def test_another_process_proves_the_same(builder: PromptBuilder) -> None:
    """I1: certificates and libraries do not depend on where they were tried."""
    proven: dict[str, Proven] = {}

    def both(wanted: ToProve) -> Proven:
        proven.update(here=prove(wanted), elsewhere=Prover(niceness=0).prove(wanted))
        return proven["elsewhere"]

    builder.prepare(both)
    assert proven["elsewhere"] == proven["here"]
    assert proven["here"].backend.name == "fastokens"
    wanted = {
        shape
        for has_tools in (True, False)
        for with_system in (True, False)
        for shape in standard_shapes(starts_with_system=with_system, has_tools=has_tools)
    }
    assert {key.shape for key, _ in proven["here"].certificates} == wanted


def test_what_another_process_proved_is_relied_on(builder: PromptBuilder, tiny_model: Path) -> None:
    builder.prepare(Prover(niceness=0).prove)
    assert build_second_turn(builder, tiny_model) == "shape"


def test_a_proof_that_breaks_off_leaves_the_long_way_and_says_why(
    builder: PromptBuilder, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proven: list[Proven] = []

    def broken(wanted: ToProve) -> Proven:
        monkeypatch.setattr("sys.executable", "/bin/false")
        proven.append(Prover(niceness=0).prove(wanted))
        return proven[0]

    builder.prepare(broken)
    assert not proven[0].certificates
    assert proven[0].backend.name == "tokenizers"
    assert "broke off" in proven[0].backend.reasons["fastokens"]
    assert build_second_turn(builder, tiny_model) == "probe"
    builder.upkeep()  # the shape was asked for, and is certified here
    assert build_second_turn(builder, tiny_model) == "shape"


@pytest.mark.parametrize("seconds", [0.0, 0.2])
def test_a_proof_that_nobody_needs_ends_at_once(builder: PromptBuilder, seconds: float) -> None:
    """So that no gateway that is told to stop waits for one."""
    prover = Prover(niceness=0)
    with ThreadPoolExecutor(1) as pool:
        if not seconds:
            prover.end()
        preparing = pool.submit(builder.prepare, prover.prove)
        time.sleep(seconds)
        prover.end()
        preparing.result(timeout=10.0)
    process = prover._process
    assert process is None if not seconds else process is not None and process.returncode == -signal.SIGKILL


def test_a_proof_ends_with_a_gateway_that_is_killed() -> None:
    """Also while it stands still, so that nothing but the gateway's end can have ended it; it would keep its output."""
    program = "from gateway.tito.proof import Prover; print(Prover(niceness=0)._start().pid, flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as starter:
        assert starter.stdout is not None
        proof = psutil.Process(int(starter.stdout.readline()))
        while not any("numpy" in mapped.path for mapped in proof.memory_maps()):  # imported behind what binds it
            time.sleep(0.01)
        proof.suspend()
        starter.kill()
        _, left = psutil.wait_procs([proof], timeout=20)
    assert not left


def build_second_turn(builder: PromptBuilder, model: Path) -> str:
    """How the suffix of an ordinary second turn was found."""
    stop_id = ChatTokenizer.load(model).eos_token_ids[0]
    messages: list[JsonValue] = [
        {"role": "user", "content": "What is 48/2?"},
        {"role": "assistant", "content": "24"},
        {"role": "user", "content": "And 12/2?"},
    ]
    ids = np.array([5, 6, 7, 7, 5, stop_id], dtype=np.int32)
    parent = ParentTurn(ids, 3, 2, Finish(FinishReason.STOP, stop_id))
    return builder.build(Conversation(tuple(messages)), parent).certified_by
