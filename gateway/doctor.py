"""`verbatim doctor`: what is known of a model and of engines that are to serve it, before anything depends on them.

`--model PATH` reads a model folder as the gateway would and shows which turns its chat template only appends to, which
it rewrites and why, where a turn ends, and which of the template's own switches would make more turns append-only; with
the train extra also whether its routing can be replayed, which is proved on the spot (replay_check.py).
`--data DIR` verifies the ledger in a data folder, and with `--repair` mends what can be mended (ledger_check.py);
`--ledger URL --objects URL` verifies the one that several gateways share.
`--engine KIND=URL` with `--model` asks engines who they are and shows them beside the folder, as `/admin/identity` does
for a gateway that runs: what each says, how it was verified, what it can do, and why the gateway would refuse it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gateway.contracts.errors import ConfigurationError
from gateway.contracts.generation import Capability, JsonValue
from gateway.engine_check import show_engines
from gateway.ledger_check import show_ledger, show_shared_ledger
from gateway.replay_check import replay_support, show_replay
from gateway.sessions.model import ServedModel
from gateway.tito.backends import BackendChoice
from gateway.tito.certificate import ShapeCertificate, Verdict
from gateway.tito.conversation import HistoryPolicy
from gateway.tito.survey import Survey, survey
from gateway.tito.tokenizer import Backend

_PLAIN_WIDTH = 140
_STYLES = {Verdict.APPENDS: "green", Verdict.REASONING_DROPPED: "yellow"}


def configure(parser: argparse.ArgumentParser) -> None:
    """Flags of `verbatim doctor`."""
    parser.add_argument("--model", type=Path, metavar="PATH", help="model folder to look at")
    parser.add_argument("--data", type=Path, metavar="DIR", help="verify the ledger in this data folder instead")
    parser.add_argument("--ledger", metavar="URL", help="verify the ledger in this database instead, with --objects")
    parser.add_argument("--objects", metavar="URL", help="where its arrays are: s3://BUCKET/PREFIX or file:///FOLDER")
    parser.add_argument(
        "--repair", action="store_true", help="with --data: mend what can be proved; no gateway may use the folder"
    )
    parser.add_argument("--template-arguments", metavar="JSON", help="chat_template_kwargs to try it with (default {})")
    parser.add_argument(
        "--engine", action="append", default=[], metavar="KIND=URL", help="check an engine instead, repeatable"
    )
    parser.add_argument(
        "--require",
        action="append",
        default=[],
        choices=[capability.value for capability in Capability],
        metavar="CAPABILITY",
        help="what engines must be able to do, repeatable",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")


def run(arguments: argparse.Namespace) -> int:
    """Print what the model folder comes to; ConfigurationError for a folder that cannot be served.

    With engines: 0 if the gateway would take all of them, else 1. With a ledger: 0 if it is whole, else 1.
    """
    if arguments.data is not None or arguments.ledger is not None:
        return _ledger(arguments)
    if arguments.repair:
        raise ConfigurationError("--repair mends a ledger: give --data DIR with it")
    if arguments.objects is not None:
        raise ConfigurationError("--objects belongs to a database: give --ledger URL with it")
    if arguments.model is None:
        raise ConfigurationError("give --model PATH (a model folder), --data DIR (a ledger), or --ledger URL")
    if arguments.require and not arguments.engine:
        raise ConfigurationError("--require is asked of engines: give --engine KIND=URL with it")
    if arguments.template_arguments is not None and arguments.engine:
        raise ConfigurationError(
            "--template-arguments is for the model folder's survey, which is not made with --engine: give one of them"
        )
    template_arguments = _json_object(arguments.template_arguments or "{}")
    if not arguments.engine and _holds_no_tokenizer(arguments.model):
        return _show_replay_alone(arguments.model, as_json=arguments.json)
    model = ServedModel.load(arguments.model, history_policy=HistoryPolicy.KEEP)
    if arguments.engine:
        required = tuple(map(Capability, arguments.require))
        return show_engines(model, arguments.engine, required, as_json=arguments.json)
    model.tokenizer.prove_backend(BackendChoice.AUTO)
    found = survey(model.prompts, model.template, model.tokenizer, template_arguments)
    replay = replay_support(model.path)
    if arguments.json:
        sys.stdout.write(json.dumps({**_as_json(model, found), "replay": replay}, ensure_ascii=False) + "\n")
    else:
        _print(model, found)
        show_replay(replay)
    return 0


def _holds_no_tokenizer(folder: Path) -> bool:
    return (folder / "config.json").is_file() and not (folder / "tokenizer.json").is_file()


def _show_replay_alone(folder: Path, *, as_json: bool) -> int:
    """What a folder without a tokenizer still tells: no gateway can serve it, but a trainer can read its weights."""
    replay = replay_support(folder)
    if as_json:
        sys.stdout.write(json.dumps({"model": str(folder), "replay": replay}, ensure_ascii=False) + "\n")
    else:
        sys.stdout.write(f"{folder} holds no tokenizer.json: its turns were not looked at\n")
        show_replay(replay)
    return 0


def _ledger(arguments: argparse.Namespace) -> int:
    if arguments.model is not None or arguments.engine:
        raise ConfigurationError("--data looks at a ledger, --model and --engine at what serves: give one of them")
    if arguments.ledger is not None:
        if arguments.data is not None or arguments.objects is None:
            raise ConfigurationError("--ledger needs --objects URL, where the ledger's arrays are, and no --data")
        if arguments.repair:
            raise ConfigurationError("--repair mends a ledger in a folder; a database's is restored from its backup")
        return show_shared_ledger(arguments.ledger, arguments.objects, as_json=arguments.json)
    return show_ledger(arguments.data, repair=arguments.repair, as_json=arguments.json)


def _json_object(text: str) -> Mapping[str, JsonValue]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ConfigurationError(f"--template-arguments {text!r} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigurationError(f"--template-arguments {text!r}: give a JSON object")
    return value


def _as_json(model: ServedModel, found: Survey) -> dict[str, JsonValue]:
    num_checked, num_different = found.token_check
    return {
        "model": str(model.path),
        "fingerprints": model.fingerprints,
        "tokenizer_backend": asdict(model.tokenizer.backend),
        "parsing": model.parsing.name,
        "stop_tokens": _stop_tokens(model),
        "text_close": found.text_close,
        "reasoning_close": found.reasoning_close,
        "shapes": [_row(certificate) for certificate in found.certificates],
        "num_append_only": found.num_append_only,
        "switches": [
            {"name": switch.name, "value": switch.value, "num_append_only": switch.num_append_only}
            for switch in found.switches
        ],
        "token_check": {"num_checked": num_checked, "num_different": num_different},
    }


def _stop_tokens(model: ServedModel) -> list[dict[str, JsonValue]]:
    tokenizer = model.tokenizer
    return [
        {
            "token_id": token_id,
            "text": tokenizer.token_text(token_id),
            "added_token": token_id in tokenizer.added_tokens,
        }
        for token_id in tokenizer.eos_token_ids
    ]


def _backend(backend: Backend) -> str:
    """The tokenizer library that would serve, and why a faster one does not."""
    odd = f", but for {backend.num_odd_characters} characters" if backend.num_odd_characters else ""
    reasons = "; ".join(f"{name}: {reason}" for name, reason in backend.reasons.items())
    return backend.name + odd + (f" ({reasons})" if reasons else "")


def _row(certificate: ShapeCertificate) -> dict[str, JsonValue]:
    cells = certificate.cells
    return {
        "shape": str(certificate.shape),
        "verdict": certificate.verdict.value,
        "stops": list(certificate.stops),
        "short_path": certificate.stop is not None,
        "numbered": certificate.stop is not None and certificate.is_numbered,
        "num_conversations": len(cells),
        "num_raised": sum(cell.verdict is Verdict.RAISES for cell in cells),
    }


def _print(model: ServedModel, found: Survey) -> None:
    console = Console(highlight=False, width=None if sys.stdout.isatty() else _PLAIN_WIDTH)
    num_checked, num_different = found.token_check
    facts = Table(show_header=False, box=None)
    facts.add_row("model", Text(str(model.path)))
    facts.add_row("tokenizer", Text(f"{model.tokenizer.vocab_size} tokens, {model.tokenizer.fingerprint[:12]}"))
    facts.add_row("texts are spelled by", Text(_backend(model.tokenizer.backend)))
    facts.add_row("template", Text(model.template.fingerprint[:12]))
    facts.add_row("replies are read as", Text(model.parsing.name))
    facts.add_row(
        "stop tokens", Text(", ".join(f"{stop['text']} ({stop['token_id']})" for stop in _stop_tokens(model)))
    )
    facts.add_row("between text and stop", Text(repr(found.text_close)))
    facts.add_row("between reasoning and text", Text(repr(found.reasoning_close)))
    facts.add_row("suffixes in tokens", Text(f"{num_checked} checked, {num_different} differ from the whole text's"))
    console.print(facts)
    console.print(_table(found.certificates))
    num_shapes = len(found.certificates)
    console.print(f"{found.num_append_only} of {num_shapes} shapes are append-only; * is certified, # but for numbers.")
    for switch in found.switches:
        value = json.dumps({switch.name: switch.value})
        console.print(Text(f"With chat_template_kwargs {value} {switch.num_append_only} would be."))
    if found.switches:
        console.print("Such a switch changes what the model sees; set it for training and deployment alike, or not.")


def _table(certificates: Sequence[ShapeCertificate]) -> Table:
    """A row for every reply and what follows it; a column for each role that the reply may answer."""
    columns = list(dict.fromkeys(certificate.shape.before for certificate in certificates))
    rows: dict[tuple[str, str], dict[str, ShapeCertificate]] = {}
    for certificate in certificates:
        shape = certificate.shape
        rows.setdefault((shape.reply.parts, shape.follows), {})[shape.before] = certificate
    table = Table("sampled", "what follows", *(f"after a {role} message" for role in columns), "stop", box=box.SIMPLE)
    for (parts, follows), by_role in rows.items():
        stops = dict.fromkeys(stop for certificate in by_role.values() for stop in certificate.stops)
        verdicts = [_verdict(by_role[role]) if role in by_role else Text() for role in columns]
        table.add_row(Text(parts), Text(follows), *verdicts, Text(" ".join(stops)))
    return table


def _verdict(certificate: ShapeCertificate) -> Text:
    """The verdict; how many conversations the template refuses; `*` where turns need no full render, `#` where they
    need none if their numbers follow what lies before (`frames`)."""
    verdict, num_raised = certificate.verdict, sum(cell.verdict is Verdict.RAISES for cell in certificate.cells)
    text = verdict.value
    if certificate.stop is not None:
        text += " #" if certificate.is_numbered else " *"
    if 0 < num_raised < len(certificate.cells):
        text += f" (raises in {num_raised} of {len(certificate.cells)})"
    return Text(text, style=_STYLES.get(verdict, "red"))
