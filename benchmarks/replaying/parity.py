"""Log-probs of a real engine in float32 against those of the trainer that replays its routing.

real SGLang or vLLM ◀── gateway ◀── conversations          several temperatures, cached prefixes, edited histories
                           └─feed─▶ assemble ▶ pack ▶ HFBackend.measure under replay: equal within TOLERANCE
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.replaying.checkpoints import MoeShape, make_moe
from benchmarks.replaying.conversations import Talk, converse, serving
from benchmarks.replaying.scoring import Comparison, Scorer
from gateway.contracts.errors import ConfigurationError

TOLERANCE = 1e-4
"""Largest difference of two log-probs, in nats."""

TEMPERATURES: Sequence[Mapping[str, float]] = tuple({"temperature": value} for value in (1.0, 0.6, 1.4))
_ROOT = Path(__file__).resolve().parents[2]
_VLLM_ROUTING = ("--enable-scale-out", "--enable-return-routed-experts")


@dataclass(frozen=True, slots=True)
class RealEngine:
    """One way of starting an engine: its kind at the gateway (sglang, vllm) and flags on top of the usual ones."""

    name: str
    kind: str
    flags: tuple[str, ...] = ()
    sampling: Sequence[Mapping[str, float]] = TEMPERATURES


SGLANG = RealEngine("sglang", "sglang")
VLLM_RAW = RealEngine("vllm raw", "vllm", _VLLM_ROUTING)
VLLM_PROCESSED = RealEngine("vllm processed", "vllm", (*_VLLM_ROUTING, "--logprobs-mode", "processed_logprobs"))
ENGINES: Mapping[str, RealEngine] = {engine.name: engine for engine in (SGLANG, VLLM_RAW, VLLM_PROCESSED)}

SERVED_FAMILIES: Mapping[str, tuple[str, ...]] = {
    "sglang": ("qwen3_moe", "olmoe", "granitemoe", "glm4_moe"),
    "vllm": ("qwen3_moe", "qwen2_moe", "mixtral", "olmoe", "granitemoe", "glm4_moe"),
}
"""Architectures that each kind of engine serves on a CPU. SGLang 0.5.23 computes Qwen2-MoE's shared expert in a Triton
kernel, and its Mistral tokenizer needs a package that its pins leave out."""


@dataclass(frozen=True, slots=True)
class ParityRun:
    """One engine and one architecture."""

    engine: str
    family: str
    rollouts: int
    segments: int
    cached_tokens: int
    comparison: Comparison

    @property
    def holds(self) -> bool:
        """Whether every log-prob is equal and every row that the engine told was replayed and verified.

        vLLM 0.30 drops a request's rows where its last output joins one that was not read yet, which happens on busy
        machines; such rows are invalid, not wrong, and stay in `fallback`.
        """
        gap = self.comparison.replay
        complete = gap.replayed == gap.rows if self.engine == SGLANG.name else gap.replayed > 0
        return gap.max_difference <= TOLERANCE and complete and gap.verified == gap.replayed

    def line(self) -> str:
        """For people."""
        gap = self.comparison.replay
        return (
            f"{'' if self.holds else 'NOT EQUAL '}{self.engine:14} {self.family:11} {gap.tokens} tokens of "
            f"{self.rollouts} conversations in {self.segments} segments, {self.cached_tokens} prompt tokens cached: "
            f"log-probs differ by {gap.max_difference:.1e} at most, {gap.mean_difference:.1e} on average; "
            f"{gap.verified} of {gap.rows} rows verified, {gap.fallback} not told\n"
        )

    def figures(self) -> dict[str, Any]:
        """For the results file."""
        return {
            "rollouts": self.rollouts,
            "segments": self.segments,
            "cached_tokens": self.cached_tokens,
            **self.comparison.figures(),
        }


def run_parity(engine: RealEngine, family: str, folder: Path, *, seed: int) -> ParityRun:
    """Make the model, serve it, talk, and compare; raises ConfigurationError where the engine is not installed."""
    model = make_moe(folder / "model", family, seed=seed, shape=MoeShape())
    with real_engine(engine, model, folder) as url, serving(model, f"{engine.kind}={url}", folder) as gateway:
        talk = Talk(f"parity-{family}", seed=seed, sampling=engine.sampling)
        heard = asyncio.run(converse(gateway, talk))
    return ParityRun(
        engine=engine.name,
        family=family,
        rollouts=len(heard.rollouts),
        segments=heard.num_segments,
        cached_tokens=heard.cached_tokens,
        comparison=Scorer(model).compare(heard.rollouts),
    )


@contextmanager
def real_engine(engine: RealEngine, model: Path, folder: Path, *flags: str) -> Iterator[str]:
    """The address of an unmodified engine in float32 (or what `flags` say), its log in `folder`."""
    if not installed(engine.kind):
        raise ConfigurationError(f"{engine.kind} is not installed: tests/real_engines/install.sh {engine.kind}")
    # Imported here: the suites' way of starting engines needs pytest, other measurements do not.
    from tests.real_engines.servers import real_sglang, real_vllm

    start: Callable[..., AbstractContextManager[str]] = {"sglang": real_sglang, "vllm": real_vllm}[engine.kind]
    folder.mkdir(parents=True, exist_ok=True)
    with start(model, folder / "engine.log", *engine.flags, *flags) as url:
        yield url


def installed(kind: str) -> bool:
    """Whether this checkout has the environment of that engine."""
    return (_ROOT / f".venv-{kind}" / "bin" / "python").exists()
