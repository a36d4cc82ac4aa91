"""The model that this gateway serves: what of it is needed without its weights, and which engines fit it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path

from gateway.contracts.dimensions import UNKNOWN_DIMENSIONS, ModelDimensions
from gateway.contracts.errors import EngineTimeout, IdentityMismatch
from gateway.contracts.experts import RoutingShape
from gateway.contracts.generation import EngineIdentity
from gateway.contracts.ports import Engine
from gateway.contracts.verification import Proof, Verification
from gateway.tito.backends import BackendChoice
from gateway.tito.conversation import HistoryPolicy
from gateway.tito.model_files import read_model_files
from gateway.tito.parsing.choice import AUTO, choose_parsing
from gateway.tito.parsing.marked import MarkedParsing
from gateway.tito.parsing.reply import ReplyParsing
from gateway.tito.probe import probe_engine
from gateway.tito.prompt import PromptBuilder
from gateway.tito.template import ChatTemplate
from gateway.tito.tokenizer import ChatTokenizer

_PROBE_SECONDS = 4.0
"""How long an engine may take to spell the probe set; under the deadline of a health check."""


@dataclass(frozen=True, slots=True, eq=False)
class ServedModel:
    """Tokenizer, template and parsers of one model folder; `plain_parsing` takes markup for text.

    name: what `/v1/models` says. dimensions: of its config.json. context_length: 0 is unknown.
    """

    name: str
    path: Path
    tokenizer: ChatTokenizer
    template: ChatTemplate
    prompts: PromptBuilder
    parsing: ReplyParsing
    plain_parsing: ReplyParsing
    dimensions: ModelDimensions
    context_length: int

    @classmethod
    def load(
        cls,
        path: Path,
        *,
        history_policy: HistoryPolicy,
        name: str = "",
        tool_call_parser: str = AUTO,
        reasoning_parser: str = AUTO,
        tokenizer_backend: BackendChoice = BackendChoice.AUTO,
    ) -> ServedModel:
        """Read a model folder; raises ConfigurationError naming the file that is missing or wrong, or the parser."""
        tokenizer = ChatTokenizer.load(path)
        template = ChatTemplate.load(path)
        files = read_model_files(path)
        parsing = choose_parsing(template, tokenizer, calls=tool_call_parser, reasoning=reasoning_parser)
        return cls(
            name=name or path.name,
            path=path,
            tokenizer=tokenizer,
            template=template,
            prompts=PromptBuilder(
                tokenizer, template, parsing=parsing, history_policy=history_policy, backend=tokenizer_backend
            ),
            parsing=parsing,
            plain_parsing=MarkedParsing("text", tokenizer, reasoning=None, calls=None),
            dimensions=files.dimensions,
            context_length=files.context_length,
        )

    @property
    def routing(self) -> RoutingShape | None:
        """The shape of routing rows; None for a dense model or an unknown one."""
        return self.dimensions.routing

    @property
    def fingerprints(self) -> dict[str, str]:
        """Of "tokenizer" and "template", as `gateway.contracts.fingerprints` has them."""
        return {"tokenizer": self.tokenizer.fingerprint, "template": self.template.fingerprint}

    async def check_engine(
        self, engine: Engine, identity: EngineIdentity, proven: Verification | None = None
    ) -> Verification:
        """How it is known that an engine's model is this one; raises IdentityMismatch, with both values, if it is not.

        An engine that does not say its tokenizer's fingerprint is asked to spell the probe set, unless `proven` is what
        was found of the same process and weights before. Raises EngineError if it fails at that.

        Its own parsers are not compared: they read text for those who ask the engine for text, and the gateway reads
        replies from ids by its own.
        """
        self._check_facts(identity)
        if proven is not None:
            return proven
        tokenizer = _proof_of("tokenizer", identity, known="tokenizer" in identity.fingerprints)
        if tokenizer is not Proof.SHA256 and identity.token_exact and await self._probe(engine, identity):
            tokenizer = Proof.PROBE
        dimensions = _proof_of("dimensions", identity, known=identity.dimensions != UNKNOWN_DIMENSIONS)
        return Verification(
            tokenizer=tokenizer,
            template=_proof_of("template", identity, known="template" in identity.fingerprints),
            dimensions=Proof.TOLD if dimensions is Proof.SHA256 else dimensions,
        )

    def _check_facts(self, engine: EngineIdentity) -> None:
        who, advice = _named(engine), "point --model at the engine's own model"
        if engine.vocab_size and engine.vocab_size < self.tokenizer.vocab_size:
            raise IdentityMismatch(
                f"{who} has a vocabulary of {engine.vocab_size} tokens, the tokenizer in {self.path} has "
                f"{self.tokenizer.vocab_size}: {advice}"
            )
        for name, ours, theirs in self.dimensions.differences(engine.dimensions):
            raise IdentityMismatch(
                f"{who} has another model: its {name} are {theirs}, those of {self.path} {ours} "
                f"(engine: {engine.dimensions}; here: {self.dimensions}): {advice}"
            )
        if self.routing is not None and engine.routing is not None and engine.routing != self.routing:
            raise IdentityMismatch(f"{who} routes as {engine.routing}, the model in {self.path} as {self.routing}")
        for part, ours in self.fingerprints.items():
            theirs = engine.fingerprints.get(part, ours)  # absent where the engine does not say
            if theirs != ours:
                raise IdentityMismatch(
                    f"{who} has another {part} ({theirs[:12]}) than {self.path} ({ours[:12]}): {advice}"
                )

    async def _probe(self, engine: Engine, identity: EngineIdentity) -> bool:
        named = _named(identity)
        try:
            async with asyncio.timeout(_PROBE_SECONDS):
                return await probe_engine(engine, self.tokenizer, named=named)
        except TimeoutError as error:
            raise EngineTimeout(f"{named} did not spell the probe texts within {_PROBE_SECONDS:g} s") from error


def _proof_of(part: str, identity: EngineIdentity, *, known: bool) -> Proof:
    """Of a part that was compared and found equal."""
    if part in identity.told:
        return Proof.SHA256
    return Proof.FOLDER if known else Proof.UNVERIFIED


def _named(engine: EngineIdentity) -> str:
    return f"engine {engine.engine_id} ({engine.url}, {engine.model_path or 'model path unknown'})"
