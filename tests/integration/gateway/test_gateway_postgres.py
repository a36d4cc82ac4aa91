"""Several gateways, real processes, on one PostgreSQL and one store of objects: any of them serves any session."""

from __future__ import annotations

import itertools
import json
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import httpx
import pytest

from engines.launch import free_port
from gateway.client import SyncGatewayClient
from gateway.contracts.rollouts import FinishedRollout
from gateway.ledger_check import verify_shared_ledger
from tests.integration.gateway.conftest import TOOLS, RunningGateway, StartGateway
from tests.object_server import ObjectServer
from tests.postgres_server import PostgresServer
from tests.waiting import until

QUESTIONS = ("What is 48/2?", "quick", "count to six", "And what is 48/2?", "quick", "thanks")
NUM_AGENTS = 8
NUM_QUESTIONS = 5

Fleet: TypeAlias = list[RunningGateway]
Message: TypeAlias = dict[str, Any]


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Turns of a few hundredths of a second, so that some are under way whenever something dies."""
    file = tmp_path_factory.mktemp("script") / "rules.json"
    rules: list[dict[str, Any]] = [
        {"after": "\0", "reply": "hello"},
        {"after": "48/2?", "reply": "<think>\nlet me see\n</think>\nThe answer is 24."},
        {"after": "count to six", "reply": "one two three four five six", "delay_seconds": 0.01},
        {"after": "quick", "reply": "the quick answer", "chunk_size": 100},
    ]
    file.write_text(json.dumps(rules))
    return f"scripted={file}"


@pytest.fixture(scope="module")
def dsn(postgres_server: PostgresServer) -> Iterator[str]:
    dsn = postgres_server.create_ledger()
    yield dsn
    postgres_server.drop_ledger(dsn)


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> str:
    return (tmp_path_factory.mktemp("shared") / "objects").as_uri()


@pytest.fixture(scope="module")
def start_shared(
    start_gateway: StartGateway, script: str, dsn: str, objects: str, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[], RunningGateway]:
    """Starts one more gateway on the database and the folder of objects that all of these tests share."""
    flags = ("--ledger", dsn, "--objects", objects)
    return lambda: start_gateway(tmp_path_factory.mktemp("own"), *flags, engine=script, port=free_port())


@pytest.fixture(scope="module")
def fleet(start_shared: Callable[[], RunningGateway]) -> Fleet:
    """Three gateways that find an empty database at once; every test has sessions of its own."""
    with ThreadPoolExecutor() as threads:
        return [each.result() for each in [threads.submit(start_shared) for _ in range(3)]]


@pytest.fixture(scope="module")
def embedded(start_gateway: StartGateway, script: str, tmp_path_factory: pytest.TempPathFactory) -> RunningGateway:
    """One gateway with a ledger of its own, to compare with."""
    return start_gateway(tmp_path_factory.mktemp("alone"), engine=script)


def post(gateway: RunningGateway, session_id: str, messages: Sequence[Message]) -> httpx.Response:
    url = f"{gateway.url}/sessions/{session_id}/v1/chat/completions"
    body = {"messages": list(messages), "tools": TOOLS, "return_token_ids": True}
    return httpx.post(url, json=body, timeout=30)


def ask(gateway: RunningGateway, session_id: str, messages: Sequence[Message]) -> dict[str, Any]:
    reply = post(gateway, session_id, messages)
    assert reply.status_code == 200, reply.text
    return dict(reply.json())


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def said(reply: Mapping[str, Any]) -> Message:
    return {"role": "assistant", "content": reply["choices"][0]["message"]["content"]}


def sampled(reply: Mapping[str, Any]) -> list[int]:
    return list(reply["choices"][0]["token_ids"])


def prompt_ids(gateway: RunningGateway, session_id: str, messages: Sequence[Message]) -> list[int]:
    """What a turn's prompt would be."""
    body = {"messages": list(messages), "tools": TOOLS, "add_generation_prompt": True}
    return list(gateway.post(f"/sessions/{session_id}/tokenize", body)["tokens"])


def converse(gateways: Sequence[RunningGateway], session_id: str) -> list[list[int]]:
    """The prompts of a conversation, each turn of which goes to the next gateway; any would give it the same one."""
    messages: list[Message] = []
    prompts: list[list[int]] = []
    for question, gateway in zip(QUESTIONS, itertools.cycle(gateways), strict=False):
        messages.append(user(question))
        expected = [prompt_ids(each, session_id, messages) for each in gateways]
        reply = ask(gateway, session_id, messages)
        assert expected == [reply["prompt_token_ids"]] * len(gateways), question
        prompts.append(reply["prompt_token_ids"])
        messages.append(said(reply))
    return prompts


def take_all(gateways: Sequence[RunningGateway], labels: Mapping[str, str]) -> list[FinishedRollout]:
    """All rollouts of these labels, each leased from one gateway, read from the next and acknowledged at a third."""
    found: list[FinishedRollout] = []
    with ExitStack() as stack:
        clients = [stack.enter_context(SyncGatewayClient(each.url, timeout_seconds=20.0)) for each in gateways]
        turns = itertools.cycle(clients)
        while (lease := next(turns).lease(consumer="trainer", limit=3, labels=labels)) is not None:
            found += [next(turns).rollout(each.session_id, each.snapshot) for each in lease.rollouts]
            next(turns).acknowledge(lease.lease_id)
    return found


def trained_tokens(rollout: FinishedRollout) -> list[int]:
    return [token for each in rollout.segments for token in each.token_ids[each.loss_mask].tolist()]


def test_turns_of_one_session_alternate_between_gateways_and_no_prompt_differs(
    fleet: Fleet, embedded: RunningGateway, session_id: str
) -> None:
    """I1: the ids of each prompt are those that one gateway alone would have built, wherever the turn is asked."""
    assert converse(fleet, session_id) == converse([embedded], session_id)
    theirs = embedded.get(f"/sessions/{session_id}/segments?arrays=1")["segments"]
    for gateway in fleet:
        mine = gateway.get(f"/sessions/{session_id}/segments?arrays=1")["segments"]
        assert [each["token_ids"] for each in mine] == [each["token_ids"] for each in theirs]
        assert [turn["index"] for turn in gateway.turns(session_id)] == list(range(len(QUESTIONS)))
        assert all(turn["delivered_at"] is not None for turn in gateway.turns(session_id))


def test_gateways_that_race_on_one_session_make_siblings(fleet: Fleet, session_id: str) -> None:
    """I2, I3: each turn has an index of its own, hangs on what it answered, and each of its tokens trains once."""
    labels = {"suite": session_id}
    fleet[0].post("/sessions", {"session_id": session_id, "labels": labels})
    first = ask(fleet[0], session_id, [user("quick")])
    history = [user("quick"), said(first)]
    questions = [f"{text} ({number})" for number in range(4) for text in ("48/2?", "quick", "count to six")]
    with ThreadPoolExecutor(len(questions)) as threads:
        asked = zip(questions, itertools.cycle(fleet), strict=False)
        replies = list(threads.map(lambda one: ask(one[1], session_id, [*history, user(one[0])]), asked))

    [seen, *others] = [gateway.turns(session_id) for gateway in fleet]
    assert others == [seen] * len(others)
    assert [turn["index"] for turn in seen] == list(range(1 + len(questions)))
    assert {turn["attachment"]["parent_id"] for turn in seen[1:]} == {seen[0]["turn_id"]}
    fleet[1].post(f"/sessions/{session_id}/finish", {"reward": 1.0})
    [rollout] = take_all(fleet, labels)
    assert Counter(trained_tokens(rollout)) == Counter(token for each in (first, *replies) for token in sampled(each))


def test_finish_at_one_gateway_races_with_turns_at_the_others(fleet: Fleet, session_id: str) -> None:
    """I3: a turn that was answered is in the rollout or named by a later snapshot; one that was refused is not."""
    labels = {"suite": session_id}
    for number in range(4):
        name = f"{session_id}-{number}"
        fleet[0].post("/sessions", {"session_id": name, "labels": labels})
        with ThreadPoolExecutor() as threads:
            waiting = [threads.submit(post, gateway, name, [user("count to six")]) for gateway in fleet * 2]
            time.sleep(0.05 * number)
            finished = threads.submit(fleet[number % 3].post, f"/sessions/{name}/finish", {"reward": 0.5})
            replies = [each.result() for each in waiting]
            finished.result()
        assert {reply.status_code for reply in replies} <= {200, 409}, [reply.text for reply in replies]
        answered = sorted(sampled(reply.json()) for reply in replies if reply.status_code == 200)
        turns = fleet[number % 3].turns(name)
        recorded = sorted(turn["output_token_ids"] for turn in turns)
        assert not Counter(map(tuple, answered)) - Counter(map(tuple, recorded))
        until(partial(all_are_delivered, fleet[number % 3], name, answered))
        assert [turn["index"] for turn in turns] == list(range(len(turns)))
    assert len(take_all(fleet, labels)) == 4


def all_are_delivered(gateway: RunningGateway, session_id: str, answered: Sequence[list[int]]) -> bool:
    """Whether turns of these tokens are known as delivered, and no others; another gateway notes it a moment later."""
    turns = gateway.turns(session_id)
    return sorted(turn["output_token_ids"] for turn in turns if turn["delivered_at"] is not None) == answered


class Agent:
    """Asks its questions one after another, each of any gateway, and asks another one again where nobody answers."""

    def __init__(self, fleet: Fleet, session_id: str, seed: int) -> None:
        self.session_id = session_id
        self.received: list[int] = []
        self.num_retries = 0
        self._fleet = fleet
        self._random = random.Random(seed)

    def run(self) -> None:
        """The whole conversation."""
        messages: list[Message] = []
        for number in range(NUM_QUESTIONS):
            messages.append(user(f"{self._random.choice(QUESTIONS)} ({number})"))
            reply = self._insist(messages)
            self.received += sampled(reply)
            messages.append(said(reply))

    def _insist(self, messages: Sequence[Message]) -> dict[str, Any]:
        deadline = time.monotonic() + 40
        while time.monotonic() < deadline:
            try:
                reply = post(self._random.choice(self._fleet), self.session_id, messages)
            except httpx.TransportError:
                self.num_retries += 1
                continue
            if reply.status_code == 200:
                return dict(reply.json())
            assert reply.status_code == 503, reply.text
            self.num_retries += 1
            time.sleep(0.1)
        raise AssertionError(f"{self.session_id}: nobody answered")


def run_agents(fleet: Fleet, name: str, meanwhile: Callable[[Sequence[Agent]], None]) -> list[Agent]:
    """Agents under load; `meanwhile` runs beside them. Returns when all have their answers."""
    agents = [Agent(fleet, f"{name}-{number}", number) for number in range(NUM_AGENTS)]
    for agent in agents:
        fleet[0].post("/sessions", {"session_id": agent.session_id, "labels": {"suite": name}})
    with ThreadPoolExecutor(NUM_AGENTS) as threads:
        running = [threads.submit(agent.run) for agent in agents]
        meanwhile(agents)
        for each in running:
            each.result()
    return agents


def is_delivered(gateway: RunningGateway, session_id: str) -> bool:
    """Whether the last reply is known as delivered, which the gateway that gave it notes a moment later."""
    return gateway.turns(session_id)[-1]["delivered_at"] is not None


def check_rollouts(fleet: Fleet, name: str, agents: Sequence[Agent]) -> None:
    """I3: what agents received is what trains: nothing more, nothing less, nothing twice."""
    for number, agent in enumerate(agents):
        gateway = fleet[number % len(fleet)]
        until(partial(is_delivered, gateway, agent.session_id))
        gateway.post(f"/sessions/{agent.session_id}/finish", {"reward": 1.0})
    rollouts = take_all(fleet, {"suite": name})
    assert sorted(each.session.session_id for each in rollouts) == [agent.session_id for agent in agents]
    trained = {each.session.session_id: trained_tokens(each) for each in rollouts}
    assert trained == {agent.session_id: agent.received for agent in agents}


def test_a_gateway_is_killed_under_load_and_the_others_go_on(
    fleet: Fleet, start_shared: Callable[[], RunningGateway], session_id: str
) -> None:
    """I3, I4: agents ask the others again, and no token is lost or trained twice; a new process joins."""
    victim = fleet[2]

    def kill(agents: Sequence[Agent]) -> None:
        until(lambda: sum(len(agent.received) > 0 for agent in agents) >= NUM_AGENTS // 2)
        victim.stop(signal.SIGKILL)

    agents = run_agents(fleet, session_id, kill)
    assert sum(agent.num_retries for agent in agents)
    fleet[2] = start_shared()
    check_rollouts(fleet, session_id, agents)


def test_the_database_is_killed_under_load_and_nobody_is_restarted(
    fleet: Fleet, postgres_server: PostgresServer, dsn: str, objects: str, session_id: str
) -> None:
    """I3, I4: who is told 503 asks again; gateways find the database again by themselves, and all of it is whole."""

    def kill(agents: Sequence[Agent]) -> None:
        until(lambda: sum(len(agent.received) > 0 for agent in agents) >= NUM_AGENTS // 2)
        postgres_server.kill()
        postgres_server.start()

    agents = run_agents(fleet, session_id, kill)
    check_rollouts(fleet, session_id, agents)
    assert all(gateway.process.poll() is None for gateway in fleet)
    assert verify_shared_ledger(dsn, objects).damages == []


def test_operators_see_the_size_of_the_shared_store_and_sweep_it(fleet: Fleet, session_id: str) -> None:
    for name in ("open", "ended"):
        ask(fleet[0], f"{session_id}-{name}", [user("quick")])
    fleet[0].post(f"/sessions/{session_id}-ended/finish", {"reward": 1.0})
    before = fleet[1].get("/admin/storage")
    assert before["space"] is None
    assert before["usage"]["rows_bytes"] > 0
    assert before["usage"]["routing_bytes"] > 0
    assert before["stored_bytes"] > 0
    swept = fleet[1].post("/admin/storage/sweep", {"older_than_seconds": 0, "acknowledged_only": False})
    assert f"{session_id}-ended" in [each["session_id"] for each in swept["dropped"]]
    assert fleet[2].get("/admin/storage")["stored_bytes"] < before["stored_bytes"]
    assert fleet[2].turns(f"{session_id}-ended") == []
    assert len(fleet[2].turns(f"{session_id}-open")) == 1


def test_two_gateways_share_a_bucket(
    start_gateway: StartGateway,
    postgres_dsn: str,
    object_server: ObjectServer,
    script: str,
    session_id: str,
    tmp_path: Path,
) -> None:
    """I5: routing rows that one gateway stored are read by the other."""
    flags = ("--ledger", postgres_dsn, "--objects", object_server.bucket_url(session_id))

    def start(name: str) -> RunningGateway:
        return start_gateway(
            tmp_path / name, *flags, engine=script, environment=object_server.environment, port=free_port()
        )

    with ThreadPoolExecutor() as threads:
        gateways = list(threads.map(start, ("one", "two")))
    try:
        converse(gateways, session_id)
        gateways[0].post(f"/sessions/{session_id}/finish", {"reward": 1.0})
        [rollout] = take_all(gateways, {})
    finally:
        for gateway in gateways:
            gateway.stop()
    assert len(trained_tokens(rollout)) > 0
    assert all(each.routed_valid.all() for each in rollout.segments)
