"""`verbatim train`: the trainer's composition root. It chooses the classes, wires them, and owns their lives.

SIGTERM ends the run after the step under way (exit code 0); the same command goes on from there.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
import tomllib
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path

import torch

from engines.weights.disk import DiskTransport
from engines.weights.distributed import DistributedTransport
from gateway.client import GatewayClient
from gateway.contracts.errors import ConfigurationError
from gateway.contracts.ports import WeightTransport
from gateway.contracts.settings import engine_key, load_settings, settings_toml
from trainer.algorithms.advantages import make_estimator
from trainer.algorithms.aggregation import make_aggregation
from trainer.algorithms.objective import Objective
from trainer.algorithms.policy_objective import PolicyObjective
from trainer.backends.hf import HFBackend
from trainer.backends.protocol import TrainBackend
from trainer.backends.ranks import PolicySettings
from trainer.checkpoint import CheckpointStore, RunState
from trainer.connection import open_gateway
from trainer.data.source import RolloutSource
from trainer.evaluation import eval_figures, evaluate, evaluation_of, evaluation_rollouts
from trainer.learning import Learner
from trainer.loop import LoopParts, Rollouts, train
from trainer.metrics import Evaluation, MetricsLog
from trainer.nonfinite import BatchKeeper, replay_batch
from trainer.progress import Progress, make_progress
from trainer.publish import Publisher
from trainer.rollouts.controller import RolloutController, Sandboxes
from trainer.rollouts.recipe import Recipe, load_recipe
from trainer.samples import SampleLog, tokenizer_decode
from trainer.sandboxes import open_sandboxes
from trainer.settings import EngineSettings, ReplayMode, TrainSettings
from trainer.sinks import RunMetrics, make_sinks
from trainer.training_report import write_report

# The publisher pauses generation at the gateway; a transport that paused and resumed engines by itself would let
# turns go on before the gateway knows what the new label means.
_TRANSPORTS: Mapping[str, Callable[..., WeightTransport]] = {
    "disk": partial(DiskTransport, pause=None),
    "distributed": partial(DistributedTransport, pause=None),
}


def configure(parser: argparse.ArgumentParser) -> None:
    """The flags of `verbatim train`."""
    parser.add_argument("--config", type=Path, metavar="FILE", help="the recipe, as TOML")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="override one setting, repeatable")
    parser.add_argument("--print-config", action="store_true", help="show the settings and stop")
    parser.add_argument("--report", type=Path, metavar="DIR", help="write DIR/report.html of a run folder and stop")
    parser.add_argument(
        "--replay-batch", type=Path, metavar="FILE", help="run a batch that was not finite again, say where, and stop"
    )


def run(arguments: argparse.Namespace) -> int:
    """Train; raises ConfigurationError for what must be set right first."""
    if arguments.report is not None:
        sys.stdout.write(f"{write_report(arguments.report)}\n")
        return 0
    if arguments.config is None:
        raise ConfigurationError("give --config FILE (a recipe, as TOML), or --report DIR (a run folder)")
    settings = load_settings(TrainSettings, file=arguments.config, overrides=arguments.set)
    if arguments.print_config:
        sys.stdout.write(settings_toml(settings))
        return 0
    if arguments.replay_batch is not None:
        sys.stdout.write(run_batch_again(settings, arguments.replay_batch))
        return 0
    with make_progress(settings) as progress:
        state = asyncio.run(run_training(settings, progress))
    sys.stderr.write(
        f"run {settings.run.name}: {state.step} of {settings.run.steps} steps, policy {state.policy_version}; "
        f"metrics in {settings.run.dir / 'metrics.jsonl'}\n"
    )
    return 0


def run_batch_again(settings: TrainSettings, file: Path) -> str:
    """What `--replay-batch` prints: a kept step run again on its checkpoint, in this process alone."""
    torch.set_num_threads(settings.run.threads)
    objective = PolicyObjective(settings.loss)
    backend = make_own_backend(settings, needs_reference=objective.needs_reference)
    return replay_batch(backend, objective, file, checkpoints=settings.run.dir / "checkpoints")


async def run_training(settings: TrainSettings, progress: Progress) -> RunState:
    """Wire everything, train to the end or to SIGTERM, and take everything down again."""
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    torch.set_num_threads(settings.run.threads)
    recipe = load_recipe(settings.rollouts.recipe, settings.rollouts.data, settings.rollouts.recipe_settings)
    async with AsyncExitStack() as stack:
        # The cheap ones first: a wrong name should cost nothing.
        transport = _make_transport(settings.engines)
        stack.push_async_callback(transport.aclose)
        sandboxes = await stack.enter_async_context(open_sandboxes(settings))
        gateway = await stack.enter_async_context(open_gateway(settings.gateway))
        await _check_pick(gateway, settings.batch.pick)
        await check_experts(gateway, settings.replay.mode)
        objective = PolicyObjective(settings.loss)
        backend = await asyncio.to_thread(
            make_backend,
            settings,
            needs_reference=objective.needs_reference,
            on_microbatch=progress.microbatches,
        )
        stack.callback(backend.close)
        rollouts = RecipeRollouts(settings, gateway, sandboxes, recipe, progress)
        await rollouts.abandon_open_sessions()
        metrics = open_metrics(settings)
        stack.callback(metrics.close)
        parts = make_parts(
            settings,
            backend=backend,
            objective=objective,
            gateway=gateway,
            transport=transport,
            rollouts=rollouts,
            metrics=metrics,
            watcher=progress,
        )
        return await train(settings, parts, stop=stop)


def make_parts(
    settings: TrainSettings,
    *,
    backend: TrainBackend,
    objective: Objective,
    gateway: GatewayClient,
    transport: WeightTransport,
    rollouts: Rollouts,
    metrics: RunMetrics,
    watcher: Progress,
) -> LoopParts:
    """The loop's parts as the settings want them, around what was opened already."""
    folder, kept = settings.run.dir, settings.checkpoint
    checkpoints = CheckpointStore(folder / "checkpoints", keep=kept.keep, keep_every=kept.keep_every)
    keeper = BatchKeeper(
        folder / "non-finite",
        checkpoints,
        run_name=settings.run.name,
        seed=settings.run.seed,
        settings=settings_toml(settings),
    )
    return LoopParts(
        backend=backend,
        learner=Learner(
            backend,
            objective,
            replay=settings.replay.mode,
            tokens_per_microbatch=settings.batch.tokens_per_microbatch,
            measure_without_replay=settings.replay.measure_without_replay,
            save_batches=keeper,
        ),
        estimator=make_estimator(settings.advantage),
        aggregate=make_aggregation(settings.loss),
        source=RolloutSource(
            gateway,
            run_name=settings.run.name,
            group_size=settings.rollouts.group_size,
            pick=settings.batch.pick,
        ),
        rollouts=rollouts,
        publisher=Publisher(
            gateway=gateway,
            transport=transport,
            folder=folder / "policies",
            pause=settings.engines.pause,
            pause_seconds=settings.engines.pause_seconds,
        ),
        checkpoints=checkpoints,
        metrics=metrics,
        samples=SampleLog(folder / "samples.jsonl", tokenizer_decode(settings.model.path)),
        watcher=watcher,
    )


class RecipeRollouts:
    """A recipe's rollouts as the loop asks for them: those of a training step, and an evaluation."""

    def __init__(
        self,
        settings: TrainSettings,
        gateway: GatewayClient,
        sandboxes: Sandboxes,
        recipe: Recipe,
        progress: Progress,
    ) -> None:
        self._settings = settings
        self._gateway = gateway
        self._recipe = recipe
        self._progress = progress
        self._training, self._evaluating = (
            RolloutController(
                gateway=gateway, sandboxes=sandboxes, recipe=recipe, settings=sampled, run_name=settings.run.name
            )
            for sampled in (settings.rollouts, evaluation_rollouts(settings.rollouts, settings.evaluation))
        )

    async def abandon_open_sessions(self) -> None:
        """Finish what an interrupted process of this run left open."""
        await self._training.abandon_open_sessions()

    async def produce(self, *, step: int) -> None:
        """The step's groups; attempts that ended before a restart are not made again."""
        rollouts = self._settings.rollouts
        tasks = self._recipe.train_tasks(self._settings.run.seed, step, rollouts.groups_per_step)
        await self._training.run_groups(
            tasks, group_size=rollouts.group_size, purpose="train", step=step, on_progress=self._progress.rollouts
        )

    async def evaluate(self, policy_version: int) -> Evaluation:
        """The held-out tasks under the policy that the engines serve."""
        samples = self._settings.evaluation.samples
        records = await evaluate(
            self._gateway,
            self._evaluating,
            self._recipe.eval_tasks(self._settings.evaluation.num_tasks),
            run_name=self._settings.run.name,
            policy_version=policy_version,
            samples=samples,
            on_progress=self._progress.rollouts,
        )
        return evaluation_of(eval_figures(records, samples=samples), policy_version)


def make_backend(
    settings: TrainSettings, *, needs_reference: bool, on_microbatch: Callable[[int, int], None] | None = None
) -> TrainBackend:
    """The backend that the settings name, its model loaded; on_microbatch hears of this process's, not of ranks'."""
    if settings.parallel.processes == 1:
        return make_own_backend(settings, needs_reference=needs_reference, on_microbatch=on_microbatch)
    from trainer.cluster import ClusterBackend  # Ray takes seconds to import, and one process needs none

    policy = PolicySettings(
        model=settings.model,
        optimizer=settings.optimizer,
        parallel=settings.parallel,
        replay=settings.replay.mode,
        seed=settings.run.seed,
        lora=settings.lora,
        num_updates=settings.run.steps * settings.batch.minibatches,
        needs_reference=needs_reference,
    )
    return ClusterBackend(policy, threads=settings.run.threads)


def make_own_backend(
    settings: TrainSettings, *, needs_reference: bool, on_microbatch: Callable[[int, int], None] | None = None
) -> HFBackend:
    """The backend of this process alone, however many the settings name."""
    return HFBackend(
        settings.model,
        settings.optimizer,
        replay=settings.replay.mode,
        seed=settings.run.seed,
        lora=settings.lora,
        num_updates=settings.run.steps * settings.batch.minibatches,
        needs_reference=needs_reference,
        on_microbatch=on_microbatch,
    )


def open_metrics(settings: TrainSettings) -> RunMetrics:
    """metrics.jsonl and the sinks beside it."""
    folder, shown = settings.run.dir, tomllib.loads(settings_toml(settings))
    sinks = make_sinks(settings.metrics.sinks, folder, run_name=settings.run.name, settings=shown)
    return RunMetrics(MetricsLog(folder / "metrics.jsonl"), sinks)


async def _check_pick(gateway: GatewayClient, pick: str | None) -> None:
    """Before anything is sampled, not when the first rollouts are read."""
    if pick is not None and pick not in (names := await gateway.picks()):
        raise ConfigurationError(f"batch.pick {pick!r} is none of the gateway's: {', '.join(names)}")


async def check_experts(gateway: GatewayClient, mode: ReplayMode) -> None:
    """r3 needs what engines must have been started for; an engine that comes later is the gateway's to refuse."""
    if mode is not ReplayMode.R3:
        return
    engines = await gateway.engines()
    silent = [engine["engine_id"] for engine in engines if engine["routing"] and not engine["captures_experts"]]
    if silent:
        raise ConfigurationError(
            f"replay.mode {mode.value} needs routed experts, which {', '.join(silent)} does not return: start such "
            "engines with --enable-return-routed-experts, and the gateway with --require routed_experts, or set "
            "replay.mode to off"
        )


def _make_transport(engines: EngineSettings) -> WeightTransport:
    if engines.transport not in _TRANSPORTS:
        raise ConfigurationError(f"engines.transport {engines.transport!r} is none of {', '.join(_TRANSPORTS)}")
    # Requests that are kept with their cache hold on to it: engines would refuse to flush it.
    return _TRANSPORTS[engines.transport](flush_cache=engines.pause != "keep", api_key=engine_key())
