"""The training loop against real processes: engine, gateway, trainer; learning signal, versions, kills."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from engines.weights.disk import DiskTransport
from gateway.client import GatewayClient
from gateway.contracts.errors import ConfigurationError
from gateway.contracts.settings import load_settings
from trainer.algorithms.policy_objective import PolicyObjective
from trainer.checkpoint import CheckpointStore, RunState
from trainer.data.source import RolloutSource
from trainer.loop import LoopParts, Rollouts, train
from trainer.main import configure, make_backend, make_parts, open_metrics, run
from trainer.metrics import Evaluation
from trainer.processes import CHILD_ENVIRONMENT, Children, free_port
from trainer.progress import PlainProgress
from trainer.publish import Publisher
from trainer.settings import TrainSettings

RECIPE = Path(__file__).parents[2] / "trainer" / "recipes" / "calculator.toml"
COMMAND = (sys.executable, "-c", "import sys; from gateway.cli import main; sys.exit(main())")
GROUPS, GROUP_SIZE = 2, 4


@pytest.fixture(scope="module")
def engine_url(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One bfloat16 engine for all tests here."""
    with Children(tmp_path_factory.mktemp("engine-logs")) as children:
        flags = ["--model", str(tiny_model), "--port", str(free_port()), "--dtype", "bfloat16"]
        yield children.start_server("engine", flags, timeout_seconds=90)


@dataclass(frozen=True, slots=True)
class Gateways:
    """Starts gateways in front of the engine; `stop` ends the one that `start` began last."""

    engine_url: str
    model: Path
    logs: Path
    running: list[Children]

    def start(self, data: Path) -> str:
        children = Children(self.logs)
        self.running.append(children)
        flags = ["--engine", f"sglang={self.engine_url}", "--model", str(self.model), "--data", str(data)]
        return children.start_server("serve", [*flags, "--port", str(free_port(25_000))], timeout_seconds=60)

    def stop(self) -> None:
        self.running.pop().__exit__(None, None, None)


@pytest.fixture
def gateways(engine_url: str, tiny_model: Path, tmp_path: Path) -> Iterator[Gateways]:
    with ExitStack() as stack:
        running = Gateways(engine_url, tiny_model, tmp_path / "logs", [])
        stack.callback(lambda: [children.__exit__(None, None, None) for children in running.running])
        yield running


def train_settings(
    folder: Path, model: Path, gateway_url: str, *extra: str, steps: int, name: str = "loop"
) -> TrainSettings:
    overrides = [
        f"run.dir='{folder}'",
        f"run.name={name}",
        f"run.steps={steps}",
        f"model.path='{model}'",
        f"gateway.url={gateway_url}",
        f"rollouts.groups_per_step={GROUPS}",
        f"rollouts.group_size={GROUP_SIZE}",
        "optimizer.learning_rate=1e-2",
        "batch.max_staleness=10",
        "evaluation.num_tasks=0",
        *extra,
    ]
    return load_settings(TrainSettings, file=RECIPE, overrides=overrides)


class AllThere:
    """Rollouts of a run that has all of them in the feed."""

    async def produce(self, *, step: int) -> None:
        raise AssertionError("all rollouts are in the feed already")

    async def evaluate(self, policy_version: int) -> Evaluation:
        raise AssertionError("no evaluation was asked for")


@dataclass(frozen=True, slots=True)
class Chats(AllThere):
    """Rollouts of two turns over real HTTP; the reward prefers short replies, so that groups vary."""

    gateway: GatewayClient
    run_name: str
    groups: int = GROUPS
    group_size: int = GROUP_SIZE

    async def produce(self, *, step: int) -> None:
        async with httpx.AsyncClient(timeout=60) as http, asyncio.TaskGroup() as running:
            for group in range(self.groups):
                for attempt in range(self.group_size):
                    running.create_task(self._rollout(http, f"{self.run_name}-{step}-{group}", attempt))

    async def _rollout(self, http: httpx.AsyncClient, group: str, attempt: int) -> None:
        session = await self.gateway.create_session(
            session_id=f"{group}-{attempt}",
            group=group,
            group_size=self.group_size,
            labels={"run": self.run_name, "purpose": "train"},
        )
        messages: list[Any] = [{"role": "user", "content": f"Count to {attempt % 2 + 3}."}]
        for turn in range(2):
            body = {"model": "m", "messages": messages, "max_tokens": 6 + 4 * (attempt % 2), "temperature": 0.9}
            reply = await http.post(f"{session.base_url}/chat/completions", json=body)
            reply.raise_for_status()
            message = reply.json()["choices"][0]["message"]
            messages += [message, {"role": "user", "content": f"And again, {turn}."}]
        await self.gateway.finish_session(session.session_id, reward=float(attempt % 2))


def loop_parts(settings: TrainSettings, gateway: GatewayClient, *, rollouts: Rollouts) -> LoopParts:
    objective = PolicyObjective(settings.loss)
    return make_parts(
        settings,
        backend=make_backend(settings, needs_reference=objective.needs_reference),
        objective=objective,
        gateway=gateway,
        transport=DiskTransport(pause=None),
        rollouts=rollouts,
        metrics=open_metrics(settings),
        watcher=PlainProgress(settings.run.steps),
    )


def metrics_lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


async def test_each_step_replays_trains_and_publishes_and_the_next_rollouts_carry_the_new_version(
    gateways: Gateways, tiny_model: Path, tmp_path: Path
) -> None:
    """I3, I5, I10 over a real engine in bfloat16 and a trainer in float32."""
    url = gateways.start(tmp_path / "ledger")
    settings = train_settings(tmp_path / "run", tiny_model, url, steps=3)
    async with GatewayClient(url) as gateway:
        chats = Chats(gateway, "loop")
        state = await train(settings, loop_parts(settings, gateway, rollouts=chats), stop=asyncio.Event())
        assert (state.step, state.policy_version) == (3, 3)
        lease = await gateway.lease(consumer="reader", limit=100, labels={"run": "loop"})
        assert lease is not None
        versions: dict[str, set[int]] = {}
        for leased in lease.rollouts:
            rollout = await gateway.rollout(leased.session_id, leased.snapshot)
            step = leased.session_id.split("-")[1]
            for segment in rollout.segments:
                versions.setdefault(step, set()).update(segment.policy_version[segment.loss_mask].tolist())
        engines = await gateway.engines()
        left = await gateway.lease(consumer="loop", limit=100, labels={"run": "loop"})
    assert versions == {"0": {0}, "1": {1}, "2": {2}}
    assert engines[0]["policy_version"] == 3
    assert left is None, "every rollout was acknowledged"
    lines = metrics_lines(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2, 3]
    for line in lines:
        assert line["tokens_trained"] == line["tokens_sampled"] > 0
        assert line["rows_verified"] == line["rows_replayed"] == line["rows_total"] > 0
        assert line["rows_fallback"] == line["dropped_rollouts"] == 0
        assert line["kl_with_replay"] < 1e-4  # on a random model as small as without replay: rounding, in either order
        assert line["kl_without_replay"] < 0.1
        assert line["loss"] is not None
        assert line["staleness_mean"] == 0.0
        assert line["grad_norm"] > 0


WAYS = {
    "off": ("replay.mode=off", "batch.minibatches=2"),
    "r2": ("replay.mode=r2", "batch.minibatches=2", "loss.kl_coefficient=0.1"),
    "r3": ("lora.rank=2", "loss.kl_coefficient=0.1", "batch.max_tokens=60", "batch.overlong=mask"),
    "flat": ("rollouts.group_size=1", "batch.zero_variance=drop"),
}


async def test_modes_minibatches_references_adapters_and_masks_go_through_the_whole_loop(
    gateways: Gateways, tiny_model: Path, tmp_path: Path
) -> None:
    """I3, I10: what a step says of itself fits what it was asked to do."""
    url = gateways.start(tmp_path / "ledger")
    last = {}
    async with GatewayClient(url) as gateway:
        for name, extra in WAYS.items():
            settings = train_settings(tmp_path / name, tiny_model, url, *extra, steps=2, name=name)
            chats = Chats(gateway, name, group_size=settings.rollouts.group_size)
            await train(settings, loop_parts(settings, gateway, rollouts=chats), stop=asyncio.Event())
            last[name] = metrics_lines(tmp_path / name)[-1]
            assert last[name]["tokens_sampled"] == last[name]["tokens_trained"] + last[name]["tokens_left_out"]
    off, r2, r3, flat = last.values()
    assert (off["updates"], off["policy_version"], off["rows_total"], off["kl_with_replay"]) == (2, 2, 0, None)
    assert off["kl_without_replay"] < 0.1
    assert r2["updates"] == 2
    assert r2["rows_verified"] == r2["rows_replayed"] == r2["rows_total"] > 0
    assert r2["kl_with_replay"] == r2["kl_without_replay"] < 0.1, "before the first update, both"
    assert r2["kl_reference"] > 0
    assert r3["left_out_by"] == {"overlong": r3["tokens_left_out"]}
    assert r3["rows_verified"] == r3["rows_replayed"] == r3["rows_total"] == r3["rows_compared"] > 0
    assert 0 < r3["kl_with_replay"] < 0.1
    assert r3["kl_reference"] > 0
    assert (flat["updates"], flat["policy_version"], flat["tokens_sampled"]) == (0, 0, 0)
    assert flat["dropped_by"] == {"zero_variance": GROUPS}


async def test_a_trainer_killed_at_every_point_ends_with_the_weights_of_one_that_was_not(
    gateways: Gateways, tiny_model: Path, tmp_path: Path
) -> None:
    """I3: each rollout is trained exactly once; a resumed run is bit-exact on CPU."""
    url = gateways.start(tmp_path / "ledger")
    async with GatewayClient(url) as gateway:
        # The engine is shared and may hold another test's policy: give it this run's first.
        first_settings = train_settings(tmp_path / "first", tiny_model, url, steps=3)
        first = loop_parts(first_settings, gateway, rollouts=AllThere())
        await first.publisher.publish(first.backend, policy_version=0)
        for step in range(3):
            await Chats(gateway, "loop").produce(step=step)
    gateways.stop()
    finals = []
    for variant in ("whole", "killed"):
        shutil.copytree(tmp_path / "ledger", tmp_path / variant / "ledger")
        url = gateways.start(tmp_path / variant / "ledger")
        settings = train_settings(tmp_path / variant / "run", tiny_model, url, steps=3)
        async with GatewayClient(url) as gateway:
            points = ("checkpoint", "acknowledge", "publish", "end") if variant == "killed" else ("end",)
            for point in points:
                await _run_until(point, settings, gateway)
            assert await gateway.lease(consumer="loop", limit=100, labels={"run": "loop"}) is None
        gateways.stop()
        lines = metrics_lines(tmp_path / variant / "run")
        assert [line["step"] for line in lines] == [1, 2, 3], variant
        assert sum(line["rollouts"] for line in lines) == 3 * GROUPS * GROUP_SIZE
        state = torch.load(tmp_path / variant / "run/checkpoints/step-000003/backend.pt", weights_only=True)
        finals.append((state["parameters"], [line["loss"] for line in lines]))
    (whole, whole_losses), (killed, killed_losses) = finals
    assert whole_losses == killed_losses
    assert all(torch.equal(whole[name], killed[name]) for name in whole)


class _Killed(Exception):
    """Stands for SIGKILL at one point of the protocol."""


async def _run_until(point: str, settings: TrainSettings, gateway: GatewayClient) -> None:
    """A fresh trainer that dies at `point` of its first step, or runs to the end."""
    parts = loop_parts(settings, gateway, rollouts=AllThere())
    if point == "checkpoint":
        parts = replace(parts, checkpoints=_DyingStore(settings.run.dir / "checkpoints", keep=2))
    elif point == "acknowledge":
        parts = replace(parts, source=_DyingSource(gateway, run_name="loop", group_size=GROUP_SIZE))
    elif point == "publish":
        parts = replace(
            parts,
            publisher=_DyingPublisher(
                gateway=gateway, transport=DiskTransport(pause=None), folder=settings.run.dir / "policies"
            ),
        )
    if point == "end":
        await train(settings, parts, stop=asyncio.Event())
        return
    with pytest.raises(_Killed):
        await train(settings, parts, stop=asyncio.Event())


class _DyingStore(CheckpointStore):
    def save(self, state: RunState, write_backend: Any) -> Path:
        raise _Killed


class _DyingSource(RolloutSource):
    async def acknowledge(self, lease_ids: Any) -> None:
        raise _Killed


class _DyingPublisher(Publisher):
    """Dies at the second publication: the first is that of the start."""

    started = False

    async def publish(self, backend: Any, *, policy_version: int) -> str:
        if self.started:
            raise _Killed
        self.started = True
        return await super().publish(backend, policy_version=policy_version)


def train_command(settings: TrainSettings, *extra: str) -> list[str]:
    overrides = [
        f"run.dir='{settings.run.dir}'",
        f"run.name={settings.run.name}",
        f"run.steps={settings.run.steps}",
        f"model.path='{settings.model.path}'",
        f"gateway.url={settings.gateway.url}",
        f"rollouts.groups_per_step={GROUPS}",
        f"rollouts.group_size={GROUP_SIZE}",
        "rollouts.max_new_tokens=8",
        "rollouts.max_turns=2",
        "sandbox.driver=subprocess",
        "evaluation.num_tasks=2",
        *extra,
    ]
    return [*COMMAND, "train", "--config", str(RECIPE), *(word for o in overrides for word in ("--set", o))]


def test_the_command_goes_on_after_sigkill_and_ends_cleanly_after_sigterm(
    gateways: Gateways, tiny_model: Path, tmp_path: Path
) -> None:
    """The real command with the real recipe; a SIGKILL anywhere costs at most the step under way."""
    url = gateways.start(tmp_path / "ledger")
    settings = train_settings(tmp_path / "run", tiny_model, url, steps=1000)
    command = train_command(settings)
    metrics_file = tmp_path / "run" / "metrics.jsonl"
    log = tmp_path / "train.log"
    for number in (signal.SIGKILL, signal.SIGTERM):
        before = _num_steps(metrics_file)
        with log.open("ab") as stream:
            process = subprocess.Popen(command, env={**os.environ, **CHILD_ENVIRONMENT}, stdout=stream, stderr=stream)
        deadline = time.monotonic() + 90
        while _num_steps(metrics_file) < before + 2 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(number)
        code = process.wait(60)
        assert code == (0 if number == signal.SIGTERM else -signal.SIGKILL), log.read_text()
    steps = [line["step"] for line in metrics_lines(tmp_path / "run") if "step" in line]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) >= 4
    evaluations = [line["evaluation"] for line in metrics_lines(tmp_path / "run") if "evaluation" in line]
    assert [evaluation["policy_version"] for evaluation in evaluations] == [0]
    with httpx.Client() as http:
        sessions = http.get(f"{url}/sessions?limit=1000").json()["sessions"]
    assert not [s for s in sessions if s["state"] == "open"]
    for line in metrics_lines(tmp_path / "run"):
        if "step" in line:
            assert line["tokens_trained"] == line["tokens_sampled"]
            assert line["rows_verified"] == line["rows_replayed"]


def _num_steps(file: Path) -> int:
    return sum(line.startswith('{"step"') for line in file.read_text().splitlines()) if file.exists() else 0


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("gateway.url=http://127.0.0.1:9", "verbatim serve"),
        ("model.path=/nowhere", "config.json"),
        ("engines.transport=pigeon", "pigeon"),
        ("rollouts.recipe=chess", "chess"),
        ("sandbox.driver=locale", "locale"),
        ("run.stepz=3", "did you mean 'steps'"),
        ("batch.pick=best", "batch.pick 'best' is none of the gateway's: all, delivered, final-path"),
    ],
)
def test_a_wrong_setting_is_one_line_of_a_configuration_error(
    gateways: Gateways, tiny_model: Path, tmp_path: Path, override: str, says: str
) -> None:
    """The command line makes exit code 2 of it."""
    url = gateways.start(tmp_path / "ledger") if override.startswith(("model", "batch")) else "http://127.0.0.1:9"
    settings = train_settings(tmp_path / "run", tiny_model, url, steps=1)
    words = train_command(settings, override)[len(COMMAND) + 1 :]
    parser = argparse.ArgumentParser()
    configure(parser)
    with pytest.raises(ConfigurationError, match=says) as raised:
        run(parser.parse_args(words))
    assert "\n" not in raised.value.message
    assert not (tmp_path / "run").exists(), "nothing is written before the settings hold"
