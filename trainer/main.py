"""`verbatim train`: the trainer's composition root. It chooses the classes, wires them, and owns their lives.

SIGTERM ends the run after the step under way (exit code 0); the same command goes on from there.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path

import torch

from engines.weights.disk import DiskTransport
from engines.weights.distributed import DistributedTransport
from gateway.client import GatewayClient
from gateway.contracts.errors import ConfigurationError, LedgerError, VerbatimError
from gateway.contracts.ports import WeightTransport
from gateway.contracts.settings import engine_key, load_settings, settings_toml
from sandbox.drivers import make_driver
from sandbox.pool import SandboxPool
from trainer.algorithms.policy_objective import PolicyObjective
from trainer.backends.hf import HFBackend
from trainer.checkpoint import CheckpointStore, RunState
from trainer.data.source import RolloutSource
from trainer.loop import LoopParts, train
from trainer.metrics import Evaluation, MetricsLog
from trainer.progress import Progress, make_progress
from trainer.publish import Publisher
from trainer.rollouts.controller import RolloutController
from trainer.rollouts.recipe import Recipe, load_recipe
from trainer.settings import EngineSettings, GatewaySettings, ReplayMode, TrainSettings

OPERATOR_KEY_VARIABLE = "VERBATIM_OPERATOR_KEY"
"""Environment variable with the operator's key of the gateway, where keys are on."""

# The publisher pauses generation at the gateway; a transport that paused and resumed engines by itself would let
# turns go on before the gateway knows what the new label means.
_TRANSPORTS: Mapping[str, Callable[..., WeightTransport]] = {
    "disk": partial(DiskTransport, pause=None),
    "distributed": partial(DistributedTransport, pause=None),
}


def configure(parser: argparse.ArgumentParser) -> None:
    """The flags of `verbatim train`."""
    parser.add_argument("--config", type=Path, metavar="FILE", required=True, help="the recipe, as TOML")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="override one setting, repeatable")
    parser.add_argument("--print-config", action="store_true", help="show the settings and stop")


def run(arguments: argparse.Namespace) -> int:
    """Train; raises ConfigurationError for what must be set right first."""
    settings = load_settings(TrainSettings, file=arguments.config, overrides=arguments.set)
    if arguments.print_config:
        sys.stdout.write(settings_toml(settings))
        return 0
    with make_progress(settings) as progress:
        state = asyncio.run(run_training(settings, progress))
    sys.stderr.write(
        f"run {settings.run.name}: {state.step} of {settings.run.steps} steps, policy {state.policy_version}; "
        f"metrics in {settings.run.dir / 'metrics.jsonl'}\n"
    )
    return 0


async def run_training(settings: TrainSettings, progress: Progress) -> RunState:
    """Wire everything, train to the end or to SIGTERM, and take everything down again."""
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    torch.set_num_threads(settings.run.threads)
    recipe = load_recipe(settings.rollouts.recipe, settings.rollouts.data)
    async with AsyncExitStack() as stack:
        # The cheap ones first: a wrong name should cost nothing.
        transport = _make_transport(settings.engines)
        stack.push_async_callback(transport.aclose)
        sandboxes = await stack.enter_async_context(_open_sandboxes(settings))
        gateway = await stack.enter_async_context(_open_gateway(settings.gateway))
        await _check_pick(gateway, settings.batch.pick)
        await check_experts(gateway, settings.replay.mode)
        backend = await asyncio.to_thread(
            HFBackend, settings.model, settings.optimizer, replay=settings.replay.mode, seed=settings.run.seed
        )
        controller = RolloutController(
            gateway=gateway,
            sandboxes=sandboxes,
            recipe=recipe,
            settings=settings.rollouts,
            run_name=settings.run.name,
        )
        await controller.abandon_open_sessions()
        rollouts = RecipeRollouts(settings, gateway, controller, recipe, progress)
        parts = LoopParts(
            backend=backend,
            objective=PolicyObjective(settings.loss),
            source=RolloutSource(
                gateway,
                run_name=settings.run.name,
                group_size=settings.rollouts.group_size,
                pick=settings.batch.pick,
            ),
            produce=rollouts.produce,
            publisher=Publisher(
                gateway=gateway,
                transport=transport,
                folder=settings.run.dir / "policies",
                pause=settings.engines.pause,
                pause_seconds=settings.engines.pause_seconds,
            ),
            checkpoints=CheckpointStore(settings.run.dir / "checkpoints", keep=settings.checkpoint.keep),
            metrics=MetricsLog(settings.run.dir / "metrics.jsonl"),
            evaluate=rollouts.evaluate,
            on_step=progress.step,
            on_evaluation=progress.evaluation,
        )
        return await train(settings, parts, stop=stop)


class RecipeRollouts:
    """A recipe's rollouts as the loop asks for them: those of a training step, and an evaluation."""

    def __init__(
        self,
        settings: TrainSettings,
        gateway: GatewayClient,
        controller: RolloutController,
        recipe: Recipe,
        progress: Progress,
    ) -> None:
        self._settings = settings
        self._gateway = gateway
        self._controller = controller
        self._recipe = recipe
        self._progress = progress

    async def produce(self, *, step: int) -> None:
        """The step's groups; attempts that ended before a restart are not made again."""
        rollouts = self._settings.rollouts
        tasks = self._recipe.train_tasks(self._settings.run.seed, step, rollouts.groups_per_step)
        try:
            await self._controller.run_groups(
                tasks,
                group_size=rollouts.group_size,
                purpose="train",
                step=step,
                on_progress=self._progress.rollouts,
            )
        except ExceptionGroup as failures:
            raise _first_of_ours(failures) from failures

    async def evaluate(self, policy_version: int) -> Evaluation:
        """One attempt at each held-out task under the policy that the engines serve."""
        tasks = self._recipe.eval_tasks(self._settings.evaluation.num_tasks)
        try:
            summary = await self._controller.run_groups(
                tasks, group_size=1, purpose="eval", step=policy_version, on_progress=self._progress.rollouts
            )
        except ExceptionGroup as failures:
            raise _first_of_ours(failures) from failures
        return Evaluation(
            policy_version=policy_version,
            num_tasks=len(tasks),
            num_failed=summary.num_failed,
            reward_mean=summary.mean_reward if summary.rewards else None,
            tokens_sampled=await self._settle_evaluation(policy_version),
        )

    async def _settle_evaluation(self, policy_version: int) -> int:
        """Take an evaluation's rollouts out of the feed, as nobody trains on them; returns their sampled tokens."""
        run_name, tokens = self._settings.run.name, 0
        labels = {"run": run_name, "purpose": "eval", "step": str(policy_version)}
        while lease := await self._gateway.lease(
            consumer=f"{run_name}.eval", limit=256, whole_groups=False, labels=labels
        ):
            tokens += sum(rollout.num_sampled_tokens for rollout in lease.rollouts)
            await self._gateway.acknowledge(lease.lease_id)
        return tokens


@asynccontextmanager
async def _open_gateway(settings: GatewaySettings) -> AsyncIterator[GatewayClient]:
    """A client of a gateway that answers now, and may go away for a while later.

    Raises ConfigurationError if there is none.
    """
    key = os.environ.get(OPERATOR_KEY_VARIABLE) or None
    async with GatewayClient(settings.url, api_key=key, retry_seconds=0.0) as impatient:
        try:
            await impatient.health()
        except LedgerError as error:
            raise ConfigurationError(f"gateway.url: {error.message}; start it with `verbatim serve`") from error
    async with GatewayClient(settings.url, api_key=key, retry_seconds=settings.retry_seconds) as gateway:
        yield gateway


async def _check_pick(gateway: GatewayClient, pick: str | None) -> None:
    """Before anything is sampled, not when the first rollouts are read."""
    if pick is not None and pick not in (names := await gateway.picks()):
        raise ConfigurationError(f"batch.pick {pick!r} is none of the gateway's: {', '.join(names)}")


async def check_experts(gateway: GatewayClient, mode: ReplayMode) -> None:
    """Replay needs what engines must have been started for; an engine that comes later is the gateway's to refuse."""
    if mode is ReplayMode.OFF:
        return
    engines = await gateway.engines()
    silent = [engine["engine_id"] for engine in engines if engine["routing"] and not engine["captures_experts"]]
    if silent:
        raise ConfigurationError(
            f"replay.mode {mode.value} needs routed experts, which {', '.join(silent)} does not return: start such "
            "engines with --enable-return-routed-experts, and the gateway with --require routed_experts, or set "
            "replay.mode to off"
        )


@asynccontextmanager
async def _open_sandboxes(settings: TrainSettings) -> AsyncIterator[SandboxPool]:
    driver = make_driver(settings.sandbox.driver)
    try:
        pool = SandboxPool(driver, size=settings.rollouts.concurrency)
        try:
            yield pool
        finally:
            await pool.aclose()
    finally:
        await driver.aclose()


def _make_transport(engines: EngineSettings) -> WeightTransport:
    if engines.transport not in _TRANSPORTS:
        raise ConfigurationError(f"engines.transport {engines.transport!r} is none of {', '.join(_TRANSPORTS)}")
    # Requests that are kept with their cache hold on to it: engines would refuse to flush it.
    return _TRANSPORTS[engines.transport](flush_cache=engines.pause != "keep", api_key=engine_key())


def _first_of_ours(failures: ExceptionGroup[Exception]) -> Exception:
    """What one line can say of a group of failures: the first error of our tree, else the first of all."""
    ours = failures.subgroup(VerbatimError) or failures
    first: Exception = ours.exceptions[0]
    return _first_of_ours(first) if isinstance(first, ExceptionGroup) else first
