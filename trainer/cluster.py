"""ClusterBackend: a policy over several processes, each a Ray actor. The only module that imports Ray.

    TrainBackend call ─▶ Deal ─▶ one actor a rank (RankBackend: FSDP2, expert parallelism) ─▶ gathered in batch order

Ray starts the processes, carries arrays to them (numpy, through shared memory on one machine: what is uint8 stays
uint8 and is not copied), and tells when one has died. Ranks talk to each other by torch.distributed alone.

A rank that dies or fails takes the others with it: they would wait for it. The call ends in a TrainingError that names
the rank; the run goes on from its checkpoint with a new backend. Nothing is restarted here.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from gateway.contracts.errors import ConfigurationError, NonFiniteLoss, TrainingError, VerbatimError
from trainer.algorithms.objective import Objective
from trainer.backends.model import choose_device
from trainer.backends.protocol import Measured, Policy, Update
from trainer.backends.ranks import Deal, PolicySettings, RankBackend, RankFacts, join_ranks, listening_socket
from trainer.data.packing import PackedBatch, ScoredBatch
from trainer.replay.validate import RoutedLayers

_START_SECONDS = 300.0
"""How long Ray may take to find room for the ranks and to start their processes."""
_CONNECT_SECONDS = 10.0
_OTHERS_SECONDS = 5.0
"""How long after a first failure the other ranks' own word is waited for, to tell cause from consequence."""


class RankActor:
    """One rank as Ray runs it: joins the others, then does what `RankBackend` does."""

    def __init__(self, threads: int) -> None:
        torch.set_num_threads(threads)
        self._listener: Any = None
        self._backend: RankBackend | None = None

    def node(self) -> tuple[str, str]:
        """Id and address of the machine that Ray chose."""
        import ray

        address: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        return ray.get_runtime_context().get_node_id(), address

    def listen(self, host: str) -> int:
        """On rank 0: the port where the others find it."""
        self._listener = listening_socket(host)
        return int(self._listener.getsockname()[1])

    def join(self, rank: int, host: str, port: int, settings: PolicySettings) -> RankFacts:
        """Find the other ranks and load the policy."""
        device = choose_device(settings.model.device)
        num_ranks = settings.parallel.processes
        join_ranks(rank, num_ranks, host=host, port=port, device=device, listener=self._listener)
        self._backend = RankBackend(settings)
        return self._backend.facts

    def call(self, method: str, *arguments: Any, **options: Any) -> Any:
        """A method of this rank's backend."""
        return getattr(self._backend, method)(*arguments, **options)


class ClusterBackend:
    """A `TrainBackend` whose ranks are Ray actors."""

    def __init__(self, settings: PolicySettings, *, threads: int = 1) -> None:
        """Start or find Ray, start the ranks, and load the policy on all of them.

        threads: CPU threads of each rank. Raises ConfigurationError where Ray or its resources are missing, and what
        the backend of a single process raises for a policy that it cannot train.
        """
        num_ranks = settings.parallel.processes
        self._actors: list[Any] = []
        self._owns_ray = False
        self._ray = self._connected(settings, num_cpus=num_ranks * threads)
        try:
            settings = replace(settings, model=replace(settings.model, device=self._device(settings)))
            self._actors = self._started(num_ranks, threads=threads, on_gpu=settings.model.device != "cpu")
            facts = self._joined(settings)
        except BaseException:
            self.close()
            raise
        self.routed: RoutedLayers | None = facts.routed
        self.packs_samples = facts.packs_samples

    def measure(self, batches: Sequence[PackedBatch], *, replay: bool, policy: Policy = Policy.ACTOR) -> Measured:
        """See `TrainBackend`."""
        deal = self._dealt(batches)
        scores = self._each(
            "measure", [(part, deal.num_rounds) for part in deal.of(batches)], replay=replay, policy=policy
        )
        return deal.measured(scores)

    def record(self, batches: Sequence[PackedBatch]) -> tuple[tuple[PackedBatch, ...], Measured]:
        """See `TrainBackend`."""
        deal = self._dealt(batches)
        parts = self._each("record", [(part, deal.num_rounds) for part in deal.of(batches)])
        rows = deal.gathered([rows for rows, _scores in parts])
        recorded = tuple(
            replace(batch, layout=replace(batch.layout, routing=routing))
            for batch, routing in zip(batches, rows, strict=True)
        )
        return recorded, deal.measured([scores for _rows, scores in parts])

    def update(self, batches: Sequence[ScoredBatch], objective: Objective) -> Update:
        """See `TrainBackend`; after NonFiniteLoss all ranks go on."""
        if not any(scored.batch.layout.num_trained for scored in batches):
            raise TrainingError("no token of this batch may be trained")
        deal = self._dealt([scored.batch for scored in batches])
        parts = [(part, deal.num_rounds, objective) for part in deal.of(batches)]
        return deal.update(self._each("update", parts))

    def save(self, folder: Path) -> None:
        """Every rank writes into `folder`, which all machines must see under this path."""
        self._all("save", folder)

    def load(self, folder: Path) -> None:
        """What any number of ranks saved."""
        self._all("load", folder)

    def export(self, folder: Path) -> None:
        """Rank 0 writes the whole policy."""
        self._all("export", folder)

    def close(self) -> None:
        """End the ranks, and Ray where it was started here."""
        for actor in self._actors:
            self._ray.kill(actor, no_restart=True)
        self._actors = []
        if self._owns_ray:
            self._ray.shutdown()
            self._owns_ray = False

    def _dealt(self, batches: Sequence[PackedBatch]) -> Deal:
        self._check_alive()
        if not batches:
            raise TrainingError("there is no micro-batch to run")
        return Deal(batches, len(self._actors))

    def _all(self, method: str, *arguments: Any) -> list[Any]:
        return self._each(method, [arguments] * len(self._actors))

    def _each(self, method: str, arguments: Sequence[tuple[Any, ...]], **options: Any) -> list[Any]:
        """The method's results on all ranks, called at once with each rank's own arguments."""
        self._check_alive()
        return self._results(
            method,
            [actor.call.remote(method, *one, **options) for actor, one in zip(self._actors, arguments, strict=True)],
        )

    def _check_alive(self) -> None:
        if not self._actors:
            raise TrainingError("the ranks have ended; go on from the last checkpoint with a new backend")

    def _results(self, what: str, calls: list[Any]) -> list[Any]:
        """Results in the order of ranks. After a failure nothing runs any more, unless all ranks say NonFiniteLoss."""
        pending = list(calls)
        failures: dict[int, Exception] = {}
        while pending:
            done, pending = self._ray.wait(pending, timeout=_OTHERS_SECONDS if failures else None)
            if not done:
                break
            failure = self._failure(done[0])
            if failure is not None:
                failures[calls.index(done[0])] = failure
        if not failures:
            return list(self._ray.get(calls))
        if len(failures) == len(calls) and all(isinstance(failure, NonFiniteLoss) for failure in failures.values()):
            raise failures[0]
        num_ranks = len(self._actors)
        self.close()
        rank, failure = min(failures.items(), key=lambda item: self._remoteness(item[1]))
        if isinstance(failure, VerbatimError):
            raise failure
        if isinstance(failure, self._ray.exceptions.RayActorError):
            reason = "died (killed, out of memory, or crashed; Ray's logs of its process say more)"
        else:
            reason = f"failed ({_line(failure)})"
        raise TrainingError(f"{what}: rank {rank} of {num_ranks} {reason}, and the others were ended")

    def _failure(self, call: Any) -> Exception | None:
        """What a finished call raised, in the rank; None if it returned."""
        try:
            self._ray.get(call)
        except self._ray.exceptions.RayTaskError as error:
            return error.cause if isinstance(error.cause, Exception) else TrainingError(_line(error))
        except self._ray.exceptions.RayError as error:
            died: Exception = error
            return died
        return None

    def _remoteness(self, failure: Exception) -> int:
        """Ranks that waited for another fail too: the one that died is the cause, else one that has its own reason."""
        if isinstance(failure, self._ray.exceptions.RayActorError):
            return 0
        return 2 if isinstance(failure, RuntimeError) else 1

    def _connected(self, settings: PolicySettings, *, num_cpus: int) -> Any:
        """The `ray` module, connected: to what this process is connected to already, to a cluster, or to a Ray of its
        own on this machine, which is heard on the loopback interface only and reports nothing."""
        address = settings.parallel.address
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        if address is None:
            os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # read when ray is imported: loopback
        try:
            import ray
        except ImportError as error:
            raise ConfigurationError(
                f"parallel.processes {settings.parallel.processes} needs Ray: pip install 'verbatim-rl[train]'"
            ) from error
        if ray.is_initialized():
            return ray
        if address is not None:
            _check_reachable(address)
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if address is None:
            options |= {"address": "local", "num_cpus": num_cpus, "include_dashboard": False}
        else:
            options |= {"address": address}
        try:
            ray.init(**options)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ConfigurationError(f"parallel.address {address}: Ray cannot be reached: {_line(error)}") from error
        self._owns_ray = True
        return ray

    def _device(self, settings: PolicySettings) -> str:
        """Where ranks compute: cpu, or cuda, of which each rank gets one.

        Raises ConfigurationError where the cluster has too few.
        """
        wanted, num_ranks = settings.model.device, settings.parallel.processes
        num_gpus = int(self._ray.cluster_resources().get("GPU", 0))
        if wanted == "cpu" or (wanted == "auto" and not num_gpus):
            return "cpu"
        if num_gpus < num_ranks:
            raise ConfigurationError(
                f"parallel.processes {num_ranks} with model.device {wanted} needs as many GPUs, Ray has {num_gpus}"
            )
        return "cuda"

    def _started(self, num_ranks: int, *, threads: int, on_gpu: bool) -> list[Any]:
        """Actors in the order of ranks: those of one machine follow each other, so that expert-parallel groups meet on
        one where they can."""
        actor = self._ray.remote(RankActor).options(num_cpus=threads, num_gpus=int(on_gpu), max_restarts=0)
        self._actors = [actor.remote(threads) for _ in range(num_ranks)]
        calls = [actor.node.remote() for actor in self._actors]
        started, missing = self._ray.wait(calls, num_returns=num_ranks, timeout=_START_SECONDS)
        if missing:
            raise ConfigurationError(
                f"parallel.processes {num_ranks}: only {len(started)} ranks started within {_START_SECONDS:g} s; each "
                f"needs {threads} CPU{' and a GPU' if on_gpu else ''} of Ray, which has {self._room()} free"
            )
        nodes = self._results("start", calls)
        order = sorted(range(num_ranks), key=lambda index: nodes[index])
        return [self._actors[index] for index in order]

    def _room(self) -> str:
        free = self._ray.available_resources()
        return ", ".join(f"{free.get(kind, 0.0):g} {kind}" for kind in ("CPU", "GPU"))

    def _joined(self, settings: PolicySettings) -> RankFacts:
        first: Any = self._actors[0]
        ((_node, host),) = self._results("start", [first.node.remote()])
        (port,) = self._results("start", [first.listen.remote(host)])
        calls = [actor.join.remote(rank, host, port, settings) for rank, actor in enumerate(self._actors)]
        facts: list[RankFacts] = self._results("load", calls)
        return facts[0]


def _check_reachable(address: str) -> None:
    """Ray itself tries for minutes before it gives up on HOST:PORT; other forms (auto, ray://…) are left to it.

    Raises ConfigurationError.
    """
    host, _colon, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal():
        return
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ConfigurationError(f"parallel.address {address}: nothing answers there ({error})") from error


def _line(error: Exception) -> str:
    """What kind of error, and the first line of what it says."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
