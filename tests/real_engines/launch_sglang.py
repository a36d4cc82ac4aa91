"""Start the unmodified SGLang wheel on a CPU without CUDA, AMX or sgl_kernel: `python launch_sglang.py <sglang flags>`.

Runs in .venv-sglang (see install.sh), where nothing of this project is installed. SGLang starts its scheduler and
detokenizer as spawned processes that import this file again, so the three adaptations stand at module level:
they replace things that only a GPU needs, and nothing of the engine itself.
"""

from __future__ import annotations

import os
import sys

# "1" would make SGLang import sgl_kernel, whose published wheels are for CUDA only.
os.environ["SGLANG_USE_CPU_ENGINE"] = "0"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

# The published torchvision is a CUDA build whose C++ part cannot load here; SGLang's text models only need its import
# to succeed, for which the two operator schemas must exist. The library object must outlive the import.
_TORCHVISION_SCHEMAS = torch.library.Library("torchvision", "DEF")
for _operator in ("nms", "qnms"):
    _TORCHVISION_SCHEMAS.define(f"{_operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import sglang.srt.layers.rotary_embedding.base as rotary_embedding  # noqa: E402
import sglang.srt.mem_cache.pool_host.common as host_pool  # noqa: E402


def _leave_memory_pageable(*_args: object, **_kwargs: object) -> None:
    """Page-locking the routed-experts buffer speeds up copies from a GPU; there is none."""


host_pool._cuda_host_register = _leave_memory_pageable
# Keeps the pure-torch rotary embedding; the other branch imports vLLM's compiled operators.
rotary_embedding._is_cpu = True


def main() -> None:
    """Serve until killed, and take the child processes along."""
    from sglang.launch_server import run_server
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    try:
        run_server(prepare_server_args(sys.argv[1:]))
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


if __name__ == "__main__":
    main()
