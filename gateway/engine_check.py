"""Engines beside the model folder that they should serve, for `verbatim doctor --engine`; no gateway runs for it."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gateway.contracts.dimensions import UNKNOWN_DIMENSIONS
from gateway.contracts.errors import EngineError, EngineTimeout, IdentityMismatch, VerbatimError
from gateway.contracts.generation import Capability, EngineIdentity, JsonValue
from gateway.contracts.ports import Engine
from gateway.contracts.verification import Verification
from gateway.engine_kinds import make_engine, shipped_kinds
from gateway.routes.admin import identity_json
from gateway.sessions.admission import Admission
from gateway.sessions.model import ServedModel
from gateway.settings import split_engine

_ENGINE_SECONDS = 30.0
_PLAIN_WIDTH = 140


@dataclass(frozen=True, slots=True)
class EngineFinding:
    """One engine. identity is None where it did not answer; verification where it is refused, for `refusal`."""

    name: str
    identity: EngineIdentity | None
    verification: Verification | None
    refusal: str


def show_engines(model: ServedModel, engines: Sequence[str], required: Sequence[Capability], *, as_json: bool) -> int:
    """Print what `KIND=URL` engines are, beside a model folder; 0 if all may serve it, else 1."""
    findings = asyncio.run(check_engines(model, engines, required))
    if as_json:
        report = {**identity_json(model), "required": list(required), "engines": [_as_json(f) for f in findings]}
        sys.stdout.write(json.dumps(report, ensure_ascii=False) + "\n")
    else:
        console = Console(highlight=False, width=None if sys.stdout.isatty() else _PLAIN_WIDTH)
        console.print(_table(model, findings))
        for finding in findings:
            console.print(Text(f"{finding.name}: {finding.refusal or 'may serve this model'}"), soft_wrap=True)
    return 1 if any(finding.refusal for finding in findings) else 0


async def check_engines(
    model: ServedModel, engines: Sequence[str], required: Sequence[Capability]
) -> list[EngineFinding]:
    """What is found of each; raises ConfigurationError for a kind that does not exist."""
    kinds = shipped_kinds()
    made = [(text, make_engine(kinds, *split_engine(text), model, _AnyPolicy())) for text in engines]
    admission = Admission(model, tuple(required))
    return await asyncio.gather(*(_check(text, engine, admission) for text, engine in made))


class _AnyPolicy(dict[str, int]):
    """Labels of weights mean something to the gateway that knows them; here any will do."""

    def __missing__(self, label: str) -> int:
        return 0

    def __contains__(self, label: object) -> bool:
        return True


async def _check(name: str, engine: Engine, admission: Admission) -> EngineFinding:
    identity: EngineIdentity | None = None
    async with aclosing(engine):
        try:
            async with asyncio.timeout(_ENGINE_SECONDS):
                identity = await engine.identity()
                return EngineFinding(name, identity, await admission.check(engine, identity), "")
        except TimeoutError:
            refusal: VerbatimError = EngineTimeout(f"{name} did not answer within {_ENGINE_SECONDS:g} s")
        except (EngineError, IdentityMismatch) as error:
            refusal = error
    return EngineFinding(name, identity, None, refusal.message)


def _as_json(finding: EngineFinding) -> dict[str, JsonValue]:
    identity, verification = finding.identity, finding.verification
    return {
        "engine": finding.name,
        # Which version a label of weights means is known to the gateway that was told.
        "identity": None if identity is None else {**asdict(identity), "policy_version": None},
        "capabilities": [] if identity is None else [each for each in Capability if identity.can(each)],
        "verified": None if verification is None else asdict(verification),
        "refusal": finding.refusal or None,
    }


def _table(model: ServedModel, findings: Sequence[EngineFinding]) -> Table:
    """A row for each fact; a column for the folder and for each engine."""
    ours = {
        "tokenizer": model.tokenizer.fingerprint[:12],
        "template": model.template.fingerprint[:12],
        "dimensions": str(model.dimensions),
        "context": str(model.context_length or "unknown"),
        "replies are read as": model.parsing.name,
    }
    theirs = [_facts(finding) for finding in findings]
    table = Table("", "model folder", *(finding.name for finding in findings), box=box.SIMPLE)
    for row in dict.fromkeys([*ours, *(name for facts in theirs for name in facts)]):
        table.add_row(row, Text(ours.get(row, "")), *(Text(facts.get(row, "")) for facts in theirs))
    return table


def _facts(finding: EngineFinding) -> Mapping[str, str]:
    identity = finding.identity
    if identity is None:
        return {"tokenizer": "no answer"}
    prints, verified = identity.fingerprints, finding.verification or Verification()
    known = identity.dimensions != UNKNOWN_DIMENSIONS
    return {
        "tokenizer": f"{prints.get('tokenizer', 'not told')[:12]} ({verified.tokenizer})",
        "template": f"{prints.get('template', 'not told')[:12]} ({verified.template})",
        "dimensions": f"{identity.dimensions if known else 'not told'} ({verified.dimensions})",
        "context": str(identity.context_length or "unknown"),
        "replies are read as": "by the gateway; its own parsers: "
        + (", ".join(f"{kind} {name}" for kind, name in identity.parsers.items()) or "none"),
        "weights": identity.weight_version,
        "can": ", ".join(each for each in Capability if identity.can(each)),
        "cannot": ", ".join(each for each in Capability if not identity.can(each)),
    }
