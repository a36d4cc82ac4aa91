"""Fixtures that every suite shares: a tiny checkpoint, made once per run, and free ports."""

from __future__ import annotations

import os

# One thread per torch process: OpenMP threads spin on shared cores (60 times slower as soon as two processes run).
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from tests.object_server import ObjectServer, running_object_server
from tests.postgres_server import PostgresServer, running_postgres

# What an example may take says nothing of the code on a machine that others use, too.
hypothesis.settings.register_profile("verbatim", deadline=None)
hypothesis.settings.load_profile("verbatim")

CORPUS = [
    'What is 48/2? Use the calculator. {"name": "calculator", "arguments": {"expression": "48/2"}} The answer is 24.',
    "You are a careful assistant. Work out 48+24, then 12*7, and give the result after ####.",
]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3-MoE checkpoint folder (4 layers, 8 experts top-2, 0.5 M parameters, vocabulary about 350)."""
    from trainer.recipes.checkpoint import TinyMoeShape, make_checkpoint

    folder = tmp_path_factory.mktemp("model") / "tiny"
    shape = TinyMoeShape(hidden_size=64, expert_size=64, vocab_size=400)
    make_checkpoint(folder, corpus=CORPUS, seed=0, shape=shape)
    return folder


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """One PostgreSQL for the whole run; who stops or kills it starts it again."""
    with running_postgres() as server:
        yield server


@pytest.fixture
def postgres_dsn(postgres_server: PostgresServer) -> Iterator[str]:
    """Where nothing is stored yet."""
    dsn = postgres_server.create_ledger()
    yield dsn
    postgres_server.drop_ledger(dsn)


@pytest.fixture(scope="session")
def object_server() -> Iterator[ObjectServer]:
    """One server of the S3 protocol for the whole run."""
    with running_object_server() as server:
        yield server


@pytest.fixture(scope="session")
def dense_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3 without experts, in bfloat16, with tied embeddings and the tiny model's tokenizer."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    folder = tmp_path_factory.mktemp("dense") / "model"
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=351,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=True,
        initializer_range=0.1,
    )
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).write_bytes((tiny_model / name).read_bytes())
    return folder
