"""New weights into a running vLLM 0.30.0 with a dense model: exact, labelled, and no prefix of the old ones survives.

Runs where `tests/real_engines/install.sh vllm` has made `.venv-vllm` (`make test-engines`); fails where it has not.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from engines.vllm import VllmEngine
from engines.weights.names import policy_version_of
from engines.weights.vllm_reload import VllmReloadTransport
from gateway.contracts.errors import TransportError
from gateway.contracts.generation import GenerateChunk, GenerateEnd, GenerateRequest, SamplingParams
from gateway.contracts.versions import VersionSpan
from tests.real_engines.servers import real_vllm

pytestmark = [pytest.mark.real_engine, pytest.mark.timeout(600)]


def write_dense(folder: Path, tokenizer_folder: Path, *, seed: int) -> Path:
    """A dense Qwen3 with heads of 32 dimensions, which vLLM needs on a CPU."""
    config = Qwen3Config(
        vocab_size=400,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=1024,
        initializer_range=0.08,
        tie_word_embeddings=False,
        eos_token_id=2,
    )
    torch.manual_seed(seed)
    Qwen3ForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tokenizer_folder / name, folder / name)
    return folder


async def sampled(engine: VllmEngine, prompt: list[int], rid: str) -> tuple[list[int], list[float], GenerateEnd]:
    sampling = SamplingParams(max_new_tokens=20, ignore_eos=True)
    items = [item async for item in engine.generate(GenerateRequest(rid * 32, np.array(prompt, np.int32), sampling))]
    *chunks, end = items
    assert isinstance(end, GenerateEnd)
    kept = [chunk for chunk in chunks if isinstance(chunk, GenerateChunk)]
    ids = [i for chunk in kept for i in chunk.token_ids.tolist()]
    return ids, [v for chunk in kept for v in chunk.logprobs.tolist()], end


async def test_a_reload_serves_the_new_weights_and_says_so(tmp_path: Path, tiny_model: Path) -> None:
    """I5: log-probs equal a forward of the checkpoint that the label names, before and after, prefix cached or not."""
    folders = [write_dense(tmp_path / str(seed), tiny_model, seed=seed) for seed in (0, 1)]
    prompt = np.random.default_rng(3).integers(3, 300, 300).tolist()  # two blocks of the prefix cache
    with real_vllm(folders[0], tmp_path / "vllm.log", "--enable-scale-out") as url:
        engine = VllmEngine(
            url, engine_id="v", routing=None, policy_version_of=lambda label: policy_version_of(label, {})
        )
        transport = VllmReloadTransport()
        for policy_version, folder in ((0, folders[0]), (1, folders[1]), (2, folders[0])):
            if policy_version:
                await transport.publish(folder, policy_version=policy_version, engine_urls=[url])
            ids, logprobs, end = await sampled(engine, prompt, str(policy_version))
            assert end.version_spans == (VersionSpan(0, 20, policy_version),)
            assert end.versions_certain
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            with torch.inference_mode():
                raw = torch.log_softmax(model(torch.tensor([prompt + ids])).logits[0, :-1], dim=-1)
            wanted = raw.gather(-1, torch.tensor(prompt[1:] + ids)[:, None])[299:, 0]
            np.testing.assert_allclose(logprobs, wanted.numpy(), atol=1e-4)
        with pytest.raises(TransportError, match="no checkpoint folder"):
            await transport.publish(tmp_path / "none", policy_version=3, engine_urls=[url])
        assert (await sampled(engine, prompt, "x"))[2].version_spans == (VersionSpan(0, 20, 2),)
        await engine.aclose()
