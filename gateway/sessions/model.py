"""The model that this gateway serves: what of it is needed without its weights, and which engines fit it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gateway.contracts.errors import IdentityMismatch
from gateway.contracts.experts import RoutingShape
from gateway.contracts.generation import EngineIdentity
from gateway.tito.conversation import HistoryPolicy
from gateway.tito.model_files import read_model_files
from gateway.tito.parsing.choice import AUTO, choose_parsing
from gateway.tito.parsing.marked import MarkedParsing
from gateway.tito.parsing.reply import ReplyParsing
from gateway.tito.prompt import PromptBuilder
from gateway.tito.template import ChatTemplate
from gateway.tito.tokenizer import ChatTokenizer


@dataclass(frozen=True, slots=True, eq=False)
class ServedModel:
    """Tokenizer, template and parsers of one model folder; `plain_parsing` takes markup for text.

    name: what `/v1/models` says. routing: None for a dense model or an unknown one. context_length: 0 is unknown.
    """

    name: str
    path: Path
    tokenizer: ChatTokenizer
    template: ChatTemplate
    prompts: PromptBuilder
    parsing: ReplyParsing
    plain_parsing: ReplyParsing
    routing: RoutingShape | None
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
            prompts=PromptBuilder(tokenizer, template, parsing=parsing, history_policy=history_policy),
            parsing=parsing,
            plain_parsing=MarkedParsing("text", tokenizer, reasoning=None, calls=None),
            routing=files.routing,
            context_length=files.context_length,
        )

    @property
    def fingerprints(self) -> dict[str, str]:
        """sha256 hex of tokenizer.json and of the template's text."""
        return {"tokenizer": self.tokenizer.fingerprint, "template": self.template.fingerprint}

    def check_engine(self, engine: EngineIdentity) -> None:
        """Raise IdentityMismatch, with both values, for an engine whose model is not this one."""
        who = f"engine {engine.engine_id} ({engine.url}, {engine.model_path or 'model path unknown'})"
        if engine.vocab_size and engine.vocab_size < self.tokenizer.vocab_size:
            raise IdentityMismatch(
                f"{who} has a vocabulary of {engine.vocab_size} tokens, the tokenizer in {self.path} has "
                f"{self.tokenizer.vocab_size}: point --model at the engine's own model"
            )
        if self.routing is not None and engine.routing is not None and engine.routing != self.routing:
            raise IdentityMismatch(f"{who} routes as {engine.routing}, the model in {self.path} as {self.routing}")
        for part, ours in self.fingerprints.items():
            theirs = engine.fingerprints.get(part, ours)  # absent where the engine's files cannot be read
            if theirs != ours:
                raise IdentityMismatch(
                    f"{who} has another {part} ({theirs[:12]}) than {self.path} ({ours[:12]}): "
                    "point --model at the engine's own model"
                )
