"""Weights by broadcast over torch.distributed, without a folder that engines can read: SGLang's weight-update session.

    checkpoint ─▶ buckets of tensors ─▶ one process group for each engine (trainer rank 0) ─▶ engine's ranks 1 …
    HTTP:  init_weights_update_group ▸ begin ▸ label "…-loading" ▸ update_weights_from_distributed … ▸ end ▸ label

While an engine holds some tensors of the old weights and some of the new, its label ends in `-loading`, which stands
for no policy version: should the trainer die here and somebody resume the engine, the gateway refuses it until it is
given whole weights (I5, I9). One group an engine: one that dies takes no other with it.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, TypeAlias

import orjson
import torch
from safetensors import safe_open
from torch._C._distributed_c10d import PrefixStore, TCPStore
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import GroupName

from engines.weights.delivery import Controls, absolute, deliver
from engines.weights.names import LOADING, weight_label
from gateway.contracts.errors import EngineRejected, EngineUnavailable, TransportError
from gateway.contracts.ports import PauseMode

Bucket: TypeAlias = list[tuple[str, torch.Tensor]]
"""Tensors with their names, sent in one call."""

_SESSION_OPEN = "already open"


class DistributedTransport:
    """Broadcasts a checkpoint's tensors (implements `gateway.contracts.ports.WeightTransport`); for SGLang.

    pause: as `DiskTransport`'s; None leaves engines alone that someone else has paused, and retracts the requests of
    others. flush_cache: as there. backend: "gloo", or "nccl" where this process and the engines have GPUs of their own.
    master_address: of this machine as engines reach it. bucket_bytes: tensors sent in one call.
    """

    def __init__(
        self,
        *,
        pause: PauseMode | None = PauseMode.RETRACT,
        flush_cache: bool | None = None,
        backend: str = "gloo",
        master_address: str = "127.0.0.1",
        bucket_bytes: int = 2**30,
        timeout_seconds: float = 600.0,
        api_key: str | None = None,
    ) -> None:
        self._pause = pause
        self._flush_cache = pause is not PauseMode.IN_PLACE if flush_cache is None else flush_cache
        self._backend = backend
        self._master_address = master_address
        self._bucket_bytes = bucket_bytes
        self._timeout_seconds = timeout_seconds
        self._api_key = api_key

    async def publish(self, checkpoint: Path, *, policy_version: int, engine_urls: Sequence[str]) -> str:
        """Send `checkpoint` to every engine at once and return their new label.

        Raises TransportError for a folder without tensors, or naming the first engine that failed, when all have
        answered.
        """
        label = weight_label(policy_version)
        files = sorted(absolute(checkpoint).glob("*.safetensors"))
        if not files:
            raise TransportError(f"no checkpoint at {checkpoint}: no safetensors there")
        await deliver(
            engine_urls,
            partial(self._update, files=files, label=label),
            label=label,
            timeout_seconds=self._timeout_seconds,
            api_key=self._api_key,
        )
        return label

    async def aclose(self) -> None:
        """Nothing is kept open between two publications."""

    async def _update(self, engine: Controls, *, files: Sequence[Path], label: str) -> None:
        # An engine that runs would sample from a part of the new weights.
        mode = self._pause or (None if await engine.is_paused() else PauseMode.RETRACT)
        async with engine.paused(mode), self._group(engine) as (name, group):
            await self._begin(engine)
            await _relabel(engine, label + LOADING)
            for bucket in buckets(files, self._bucket_bytes):
                await self._send(engine, bucket, name, group)
            await _order(engine, "/end_weight_update", {})
            await self._flush(engine)
            await _relabel(engine, label)
        await engine.verify(label)

    @asynccontextmanager
    async def _group(self, engine: Controls) -> AsyncIterator[tuple[str, ProcessGroup]]:
        """A process group of this process and the engine's, under a name that no other had."""
        name = f"verbatim-{uuid.uuid4().hex}"
        info = await engine.get_object("/server_info")
        world_size = 1 + int(info.get("tp_size") or 1) * int(info.get("pp_size") or 1)
        timeout = timedelta(seconds=self._timeout_seconds)
        store = TCPStore(self._master_address, 0, world_size, is_master=True, wait_for_workers=False, timeout=timeout)
        body = {
            "master_address": self._master_address,
            "master_port": store.port,
            "rank_offset": 1,
            "world_size": world_size,
            "group_name": name,
            "backend": self._backend,
        }
        asked = asyncio.create_task(_order(engine, "/init_weights_update_group", body))
        try:
            group = await asyncio.to_thread(_open_group, self._backend, store, name, world_size, timeout)
            await asked
        finally:
            asked.cancel()
        try:
            yield name, group
            await _order(engine, "/destroy_weights_update_group", {"group_name": name})
        finally:
            torch.distributed.destroy_process_group(group)

    async def _begin(self, engine: Controls) -> None:
        """Open the engine's update session; one that a trainer left open is closed first."""
        try:
            await _order(engine, "/begin_weight_update", {})
        except EngineRejected as error:
            if _SESSION_OPEN not in error.message:
                raise
            await _order(engine, "/end_weight_update", {})
            await _order(engine, "/begin_weight_update", {})

    async def _send(self, engine: Controls, bucket: Bucket, name: str, group: ProcessGroup) -> None:
        """Broadcast while the engine receives; if it refuses, the broadcast is ended too."""
        body = {
            "names": [tensor_name for tensor_name, _ in bucket],
            "dtypes": [str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket],
            "shapes": [list(tensor.shape) for _, tensor in bucket],
            "group_name": name,
            "flush_cache": False,  # once, when all are there
        }
        received = asyncio.create_task(_order(engine, "/update_weights_from_distributed", body))
        sent = asyncio.create_task(asyncio.to_thread(_broadcast, group, bucket))
        try:
            await asyncio.wait((received, sent), return_when=asyncio.FIRST_EXCEPTION)
            if received.done() and received.exception() is not None:
                group.abort()
            await asyncio.wait((sent,))
            if (error := sent.exception()) is not None and not received.done():
                raise EngineUnavailable(f"{engine.url}: the broadcast broke off: {error}") from error
            await received
            await sent
        finally:
            received.cancel()

    async def _flush(self, engine: Controls) -> None:
        if self._flush_cache:
            await engine.post("/flush_cache", {})


async def _order(engine: Controls, path: str, body: dict[str, Any]) -> None:
    """POST what is answered with `{"success", "message"}`; raises EngineRejected with the engine's reason."""
    answer = orjson.loads(await engine.post(path, body))
    if not answer.get("success"):
        raise EngineRejected(f"{engine.url}{path}: {answer.get('message')}")


async def _relabel(engine: Controls, label: str) -> None:
    await _order(engine, "/update_weight_version", {"new_version": label, "abort_all_requests": False})


def buckets(files: Sequence[Path], bucket_bytes: int) -> Iterator[Bucket]:
    """A checkpoint's tensors in order, together at most `bucket_bytes` (a larger one comes alone)."""
    bucket: Bucket = []
    size = 0
    for name, tensor in chain.from_iterable(map(_tensors, files)):
        if bucket and size + tensor.nbytes > bucket_bytes:
            yield bucket
            bucket, size = [], 0
        bucket.append((name, tensor))
        size += tensor.nbytes
    if bucket:
        yield bucket


def _tensors(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    with safe_open(file, framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118  # not a mapping
            yield name, tensors.get_tensor(name)


def _open_group(backend: str, store: TCPStore, name: str, world_size: int, timeout: timedelta) -> ProcessGroup:
    """A group beside the process's default one, if it has any; blocks until all ranks are there.

    torch has no public way to make one with ranks of another job. Engines make theirs with this function, so the keys
    under which ranks find each other agree.
    """
    torch_groups = torch.distributed.distributed_c10d
    group: ProcessGroup
    group, _ = torch_groups._new_process_group_helper(
        world_size,
        0,
        [],
        torch.distributed.Backend(backend),
        PrefixStore(name, store),
        group_name=GroupName(name),
        timeout=timeout,
    )
    torch_groups._world.pg_group_ranks[group] = {rank: rank for rank in range(world_size)}  # or it cannot be destroyed
    return group


def _broadcast(group: ProcessGroup, bucket: Bucket) -> None:
    """Send each tensor in order from rank 0; blocks until the engine has them. Raises RuntimeError if it is gone."""
    for work in [group.broadcast(tensor.contiguous(), 0) for _, tensor in bucket]:
        work.wait()
