"""`verbatim eval`: a recipe's held-out tasks through the gateway, without a trainer: a table, and a JSON file.

    verbatim eval --config recipe.toml [--num-tasks N] [--greedy] [--samples K] [--output FILE.json] [--set a.b=c]
    verbatim eval --config recipe.toml --rescore FILE.json

The sessions are named by a digest of what is asked, how it is sampled and which policy answers. So the same command
goes on where it was interrupted, makes attempts that failed again, and shows a finished evaluation without asking anew;
`--name` sets one apart that should be made again. Two of equal name at once end each other's open attempts. `--rescore`
reads a file's recorded replies with the recipe as it is now.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from gateway.contracts.errors import ConfigurationError, SandboxUnavailable
from gateway.contracts.generation import JsonValue
from gateway.contracts.ports import Sandbox, SandboxSpec
from gateway.contracts.settings import load_settings, settings_toml
from trainer.connection import open_gateway
from trainer.durable import write_text
from trainer.evaluation import Estimate, EvalFigures, EvalRecord, Spread, eval_figures, evaluate, evaluation_rollouts
from trainer.rollouts.controller import RolloutController, Sandboxes, verdict_of
from trainer.rollouts.recipe import Recipe, load_recipe
from trainer.rollouts.settings import RolloutSettings
from trainer.rollouts.tasks import Task
from trainer.sandboxes import open_sandboxes
from trainer.settings import TrainSettings

FILE_VERSION = 1
"""Of the JSON file; raised with every change of its form."""
_DIGEST_DIGITS = 12
_LINES_OF_PROGRESS = 10


@dataclass(frozen=True, slots=True)
class Plan:
    """One evaluation: what is asked, how it is sampled, where its file goes."""

    settings: TrainSettings
    recipe: Recipe
    tasks: Sequence[Task]
    sampled: RolloutSettings
    given_name: str | None
    output: Path | None

    @property
    def samples(self) -> int:
        """Attempts at each task."""
        return self.settings.evaluation.samples


@dataclass(frozen=True, slots=True)
class Served:
    """Which policy answers: of the gateway's `/admin/identity`."""

    model: str
    policy_version: int
    weight_version: str
    engines: tuple[Mapping[str, JsonValue], ...]


def configure(parser: argparse.ArgumentParser) -> None:
    """The flags of `verbatim eval`."""
    parser.add_argument("--config", type=Path, metavar="FILE", required=True, help="the recipe, as TOML")
    parser.add_argument("--num-tasks", type=int, metavar="N", help="held-out tasks (evaluation.num_tasks)")
    parser.add_argument("--samples", type=int, metavar="K", help="attempts at each (evaluation.samples)")
    parser.add_argument("--greedy", action="store_true", help="temperature 0, whatever the recipe says")
    parser.add_argument("--output", type=Path, metavar="FILE", help="the JSON file (run.dir/evaluations/NAME.json)")
    parser.add_argument("--name", help="of the sessions; another name makes a finished evaluation again (run.name)")
    parser.add_argument("--rescore", type=Path, metavar="FILE", help="score a file's replies again, asking nobody")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="override one setting, repeatable")
    parser.add_argument("--print-config", action="store_true", help="show the settings and stop")


def run(arguments: argparse.Namespace) -> int:
    """Evaluate; 1 if an attempt has no score. Raises ConfigurationError for what must be set right first."""
    settings = load_settings(TrainSettings, file=arguments.config, overrides=_overrides(arguments))
    if arguments.print_config:
        sys.stdout.write(settings_toml(settings))
        return 0
    recipe = load_recipe(settings.rollouts.recipe, settings.rollouts.data, settings.rollouts.recipe_settings)
    console = Console(highlight=False)
    if arguments.rescore is not None:
        return _rescore(arguments.rescore, recipe, arguments.output, console)
    if not settings.evaluation.num_tasks:
        raise ConfigurationError(f"{arguments.config} sets no evaluation.num_tasks; say how many with --num-tasks")
    tasks = recipe.eval_tasks(settings.evaluation.num_tasks)
    if not tasks:
        raise ConfigurationError(f"recipe {recipe.name} has no held-out tasks with these settings")
    sampled = evaluation_rollouts(settings.rollouts, settings.evaluation)
    plan = Plan(settings, recipe, tasks, sampled, arguments.name, arguments.output)
    return asyncio.run(run_evaluation(plan, console))


async def run_evaluation(plan: Plan, console: Console) -> int:
    """Ask, read back, write the file, show the table; returns the exit code."""
    async with open_gateway(plan.settings.gateway) as gateway, _open_sandboxes(plan) as sandboxes:
        served = served_policy(await gateway.identity())
        name = evaluation_name(plan, served)
        controller = RolloutController(
            gateway=gateway, sandboxes=sandboxes, recipe=plan.recipe, settings=plan.sampled, run_name=name
        )
        await controller.abandon_open_sessions()
        started = time.time()
        with _progress(len(plan.tasks) * plan.samples) as on_progress:
            records = await evaluate(
                gateway,
                controller,
                plan.tasks,
                run_name=name,
                policy_version=served.policy_version,
                samples=plan.samples,
                on_progress=on_progress,
            )
        seconds = time.time() - started
        figures = eval_figures(records, samples=plan.samples)
        file = plan.output or plan.settings.run.dir / "evaluations" / f"{name}.json"
        _write(file, _document(plan, name, served, figures, records, started=started, seconds=seconds))
        _show(console, f"{plan.recipe.name}, {served.model} (policy {served.policy_version})", figures, file)
        return _exit_code(figures, served)


def served_policy(identity: Mapping[str, Any]) -> Served:
    """The one policy that all usable engines serve; raises ConfigurationError if there is none, or several."""
    engines = [engine for engine in identity["engines"] if engine["healthy"] and not engine["draining"]]
    if not engines:
        raise ConfigurationError("gateway.url: no engine of that gateway can answer now; see `GET /admin/engines`")
    kept = ("engine_id", "kind", "model_path", "served_model_name", "weight_version", "policy_version")
    policies = {(engine["policy_version"], engine["weight_version"]) for engine in engines}
    if len(policies) > 1 or not all(engine["one_version"] for engine in engines):
        raise ConfigurationError(
            f"the engines serve several policies ({', '.join(f'{v} {label!r}' for v, label in sorted(policies))}); "
            "evaluate when the update of weights is over"
        )
    policy_version, weight_version = policies.pop()
    facts = tuple({name: engine[name] for name in kept} for engine in engines)
    return Served(identity["model"], policy_version, weight_version, facts)


def evaluation_name(plan: Plan, served: Served) -> str:
    """The name of the sessions: equal for equal tasks, sampling and policy, in every process.

    Weights are known by the engines' label and model folder: other weights under the same two need another `--name`.
    """
    asked = {
        "recipe": [plan.settings.rollouts.recipe, plan.recipe.settings],
        "tasks": [[task.task_id, task.messages, task.facts] for task in plan.tasks],
        "samples": plan.samples,
        "sampled": {
            name: getattr(plan.sampled, name)
            for name in ("max_turns", "max_new_tokens", "temperature", "top_p", "model")
        },
        "policy": [served.model, served.policy_version, served.weight_version],
        "engines": sorted({str(engine["model_path"]) for engine in served.engines}),
    }
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True, default=str).encode()).hexdigest()[:_DIGEST_DIGITS]
    return f"{plan.given_name or plan.settings.run.name}-{digest}"


def _overrides(arguments: argparse.Namespace) -> list[str]:
    """`--set`, then the flags that stand for settings."""
    flags = (("num_tasks", arguments.num_tasks), ("samples", arguments.samples))
    given = [f"evaluation.{name}={value}" for name, value in flags if value is not None]
    if arguments.greedy:
        given += ["evaluation.temperature=0.0", "evaluation.top_p=1.0"]
    return [*arguments.set, *given]


@asynccontextmanager
async def _open_sandboxes(plan: Plan) -> AsyncIterator[Sandboxes]:
    if not plan.recipe.tools:
        yield _NoSandboxes()
        return
    async with open_sandboxes(plan.settings) as sandboxes:
        yield sandboxes


class _NoSandboxes:
    """Of recipes without tools."""

    def take(self, spec: SandboxSpec) -> AbstractAsyncContextManager[Sandbox]:
        raise SandboxUnavailable(f"no sandbox for {spec.key}: its recipe has no tools")


def _document(
    plan: Plan,
    name: str,
    served: Served,
    figures: EvalFigures,
    records: Sequence[EvalRecord],
    *,
    started: float,
    seconds: float,
) -> dict[str, JsonValue]:
    """What the file holds. seconds: of this call, which may have had little left to do."""
    return {
        "file_version": FILE_VERSION,
        "verbatim": version("verbatim-rl"),
        "name": name,
        "recipe": plan.settings.rollouts.recipe,
        "served": asdict(served),
        "settings": {
            "rollouts": _plain(plan.sampled),
            "recipe": plan.recipe.settings,
            "evaluation": _plain(plan.settings.evaluation),
            "gateway": plan.settings.gateway.url,
        },
        "started_at": started,
        "seconds": seconds,
        "figures": asdict(figures),
        "records": [asdict(record) for record in records],
    }


def _plain(settings: Any) -> JsonValue:
    return json.loads(json.dumps(asdict(settings), default=str))


def _write(file: Path, document: Mapping[str, JsonValue]) -> None:
    """Whole or not at all."""
    try:
        write_text(file, json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    except OSError as error:
        raise ConfigurationError(f"--output {file}: {error.strerror}; the rollouts are at the gateway") from error


def _rescore(file: Path, recipe: Recipe, output: Path | None, console: Console) -> int:
    """Read the replies of a file with the recipe as it is now; attempts without a score stay without."""
    document = _read(file)
    samples, most = document["figures"]["samples"], 1 + max(record["task_index"] for record in document["records"])
    tasks = recipe.eval_tasks(most)
    records = [_scored_again(_record(fields), recipe, tasks, file) for fields in document["records"]]
    changed = sum(
        (new.reward, new.verdict) != (old["reward"], old["verdict"])
        for new, old in zip(records, document["records"], strict=True)
    )
    figures = eval_figures(records, samples=samples)
    if output is not None:
        _write(output, document | {"figures": asdict(figures), "records": [asdict(record) for record in records]})
    _show(console, f"{recipe.name}, scored again: {changed} of {len(records)} changed", figures, output or file)
    return 0


def _scored_again(record: EvalRecord, recipe: Recipe, tasks: Sequence[Task], file: Path) -> EvalRecord:
    if record.reward is None:
        return record
    task = tasks[record.task_index] if record.task_index < len(tasks) else None
    if task is None or (task.task_id, task.facts) != (record.task_id, record.facts):
        raise ConfigurationError(
            f"{file}: its task {record.task_index} is {record.task_id}, which is another one with these settings"
        )
    score = recipe.score(task, [*task.messages, *record.messages])
    return replace(record, reward=score.reward, verdict=str(verdict_of(score.verdict, record.outcome)))


def _read(file: Path) -> dict[str, Any]:
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"--rescore {file}: {error}") from error
    if not isinstance(document, dict) or document.get("file_version") != FILE_VERSION or not document.get("records"):
        raise ConfigurationError(f"--rescore {file}: not a file that `verbatim eval` of this version wrote")
    return document


def _record(fields: Mapping[str, Any]) -> EvalRecord:
    lists = {name: tuple(fields[name]) for name in ("messages", "policy_versions")}
    return EvalRecord(**(dict(fields) | lists))


def _show(console: Console, title: str, figures: EvalFigures, file: Path) -> None:
    """The table."""
    table = Table(title=title, show_header=False, title_justify="left")
    for name, value in _rows(figures):
        table.add_row(name, value)
    console.print(table)
    console.print(f"records: {file}", soft_wrap=True)


def _rows(figures: EvalFigures) -> Iterator[tuple[str, str]]:
    yield "tasks, attempts", f"{figures.num_tasks}, {figures.samples} each"
    yield "mean reward", "not measured" if figures.reward is None else f"{figures.reward.mean:.4g}"
    yield "pass@1", _interval(figures.pass_at_1)
    if figures.samples > 1:
        yield f"pass@{figures.samples}", _percent(figures.pass_any)
    for verdict, count in figures.verdicts.items():
        yield f"  {verdict}", f"{count} ({_percent(count / (figures.num_rollouts - figures.num_failed))})"
    for error, count in figures.errors.items():
        yield f"  no score: {error}", str(count)
    yield "truncated", _percent(figures.truncated_share)
    yield "tokens sampled", f"{figures.tokens_sampled}; of an attempt {_spread(figures.tokens, '')}"
    yield "seconds an attempt", _spread(figures.seconds, " s")
    yield "policy versions", ", ".join(map(str, figures.policy_versions)) or "none"


def _interval(estimate: Estimate | None) -> str:
    if estimate is None:
        return "not measured"
    return f"{_percent(estimate.mean)} (95 % interval {_percent(estimate.low)} to {_percent(estimate.high)})"


def _spread(spread: Spread | None, unit: str) -> str:
    if spread is None:
        return "not measured"
    return f"mean {spread.mean:.3g}{unit}, p50 {spread.p50:.3g}{unit}, p95 {spread.p95:.3g}{unit}"


def _percent(share: float | None) -> str:
    return "not measured" if share is None else f"{100 * share:.2f} %"


def _exit_code(figures: EvalFigures, served: Served) -> int:
    if figures.policy_versions not in ((), (served.policy_version,)):
        sys.stderr.write(
            f"WARNING: weights changed meanwhile: policies {', '.join(map(str, figures.policy_versions))} answered\n"
        )
    if figures.num_failed:
        sys.stderr.write(
            f"verbatim: {figures.num_failed} of {figures.num_rollouts} attempts have no score; the same command makes "
            "them again\n"
        )
    return 1 if figures.num_failed else 0


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal, some lines elsewhere; on standard error."""
    if not sys.stderr.isatty():
        yield _lines(total)
        return
    columns = (TextColumn("attempts"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bars:
        task = bars.add_task("attempts", total=total)
        yield lambda ended, wanted: bars.update(task, completed=ended, total=wanted)


def _lines(total: int) -> Callable[[int, int], None]:
    every = max(total // _LINES_OF_PROGRESS, 1)

    def told(ended: int, wanted: int) -> None:
        if ended % every == 0 or ended == wanted:
            sys.stderr.write(f"attempts {ended}/{wanted}\n")
            sys.stderr.flush()

    return told
