"""`verbatim bench gateway`: turns a second, latency and CPU of `verbatim serve`, beside the bare engine and peers.

Parts: turns, history, conversation (all three without names), and workers. Engine and agents are compiled and cost some
ten microseconds a turn, so what is measured is what stands between them. Rounds are interleaved in random order;
figures are medians and ranges over rounds, ratios are of one round. What the gateway does meanwhile is what it always
does: TITO, log-probs, and each turn on disk before its reply.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.load import charts
from benchmarks.load.contenders import (
    Launch,
    Running,
    bare,
    floor,
    litellm,
    require_workers_flag,
    running,
    smg,
    verbatim,
)
from benchmarks.load.cores import empty_loops, yield_together
from benchmarks.load.figures import Measured, Target, over_rounds, plain, ratios, spread
from benchmarks.load.history import AtLength, WholeConversation, at_length, line, whole_conversation
from benchmarks.load.script import Model, Workload
from benchmarks.load.stage import Stage, staged
from benchmarks.load.turns import Contest, run_rounds, targets
from benchmarks.results_file import merge
from gateway.contracts.errors import ConfigurationError

RESULTS = Path(__file__).parent / "results" / "gateway.json"
PEERS = ("smg", "litellm", "floor")
PACKAGES = ("verbatim-rl", "uvicorn", "uvloop", "tokenizers", "smg")
_LENGTHS = (1_000, 10_000, 30_000, 100_000)
_HISTORY_TURNS, _TURNS_BEHIND = 40, 10
_CONVERSATION_TURNS, _CONVERSATION_TOKENS = 100, 80_000
_LOOP_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Place:
    """Of one part: a folder for all that it makes, the model, what was asked for."""

    folder: Path
    model: Model
    arguments: argparse.Namespace

    @property
    def workload(self) -> Workload:
        """As the flags have it."""
        a = self.arguments
        return Workload(a.turns, a.reply_tokens, a.message_bytes, a.history_tokens, not a.no_tools)

    def stage(self, workload: Workload | None = None, *, cores: str = "") -> Any:
        """The engine and agents that the flags ask for; on these cores, else where the flags say."""
        a = self.arguments
        flags = ["--tokens-per-event", str(a.tokens_per_event), "--delay-ms", a.delay_ms]
        flags += ["--spread"] if a.spread else []
        folder, cores = self.folder / f"stage{cores}", cores or a.pin_tools
        return staged(folder, self.model, workload or self.workload, *flags, stream=a.stream, cores=cores)

    @property
    def sessions(self) -> list[int]:
        """The numbers of sessions at once to measure with."""
        return [int(each) for each in self.arguments.sessions.split(",")]

    def rounds(self, contests: Sequence[Contest]) -> list[Measured]:
        """All rounds that the flags ask for."""
        a = self.arguments
        return run_rounds(contests, rounds=a.rounds, seconds=a.seconds, seed=a.seed, rate=a.rate, tell=_tell)

    def keep(self, part: str, figures: Mapping[str, Any]) -> None:
        """Into the results file, under the part and the name that was given."""
        merge(
            self.arguments.output,
            part,
            self.arguments.name,
            figures,
            command=self.arguments.command_line,
            packages=PACKAGES,
        )

    def draw(self, name: str, draw: Callable[[Path, Any], None], figures: Any) -> None:
        """A picture beside the results."""
        output: Path = self.arguments.output
        label = "" if self.arguments.name == "default" else f"-{self.arguments.name}"
        if not charts.can_draw():
            _tell("no picture is drawn: matplotlib is not installed\n")
        elif output.suffix == ".json":
            draw(output.with_name(f"{output.stem}-{name}{label}.svg"), figures)


def configure(parser: argparse.ArgumentParser) -> None:
    """The flags of `verbatim bench gateway`."""
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (all but workers)")
    parser.add_argument(
        "--peers",
        default="",
        metavar="NAMES",
        help=f"measured beside: {','.join(PEERS)} (none); litellm and floor in turns only",
    )
    parser.add_argument("--litellm", metavar="PATH", help="its program ($LITELLM, or the one on the PATH)")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="`verbatim serve --workers N` (1)")
    parser.add_argument("--serve-flag", action="append", default=[], metavar="FLAG", help="more for `verbatim serve`")
    parser.add_argument("--sessions", default="1,8,32,256", metavar="LIST", help="sessions at once (1,8,32,256)")
    parser.add_argument(
        "--rate",
        type=float,
        metavar="N",
        help="open loop: so many conversations begin a second, however fast replies are",
    )
    parser.add_argument("--rounds", type=int, default=5, help="of everything (5)")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement of turns (4)")
    parser.add_argument("--seed", type=int, default=1, help="of the order within rounds (1)")
    _configure_workload(parser)
    parser.add_argument("--pin", default="", metavar="CORES", help="contenders run on these cores only, as `0,2-3`")
    parser.add_argument("--pin-tools", default="", metavar="CORES", help="engine and agents likewise")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="FILE", help="where the figures go")
    parser.add_argument("--name", default="default", help="what the figures are called there (default)")


def _configure_workload(parser: argparse.ArgumentParser) -> None:
    usual = Workload()
    parser.add_argument("--model", type=Path, metavar="PATH", help="a model folder of your own, for its tokenizer")
    parser.add_argument("--family", default="chatml_folds", help="how the model writes calls (chatml_folds)")
    parser.add_argument("--turns", type=int, default=usual.turns, help=f"of a conversation ({usual.turns})")
    parser.add_argument("--reply-tokens", type=int, default=usual.reply_tokens, help=f"({usual.reply_tokens})")
    parser.add_argument(
        "--message-bytes", type=int, default=usual.message_bytes, help=f"of a tool's result ({usual.message_bytes})"
    )
    parser.add_argument("--history-tokens", type=int, default=0, help="in the first messages (0)")
    parser.add_argument(
        "--tokens-per-event",
        type=int,
        default=1,
        metavar="N",
        help="of the engine's stream, where a request does not say (1)",
    )
    parser.add_argument("--no-tools", action="store_true", help="text only, no calls")
    parser.add_argument("--stream", action="store_true", help="agents ask for streamed replies")
    parser.add_argument("--delay-ms", default="0", metavar="A[-B]", help="how long the engine takes (0)")
    parser.add_argument("--spread", action="store_true", help="the engine's events come evenly over its time")


def run(arguments: argparse.Namespace) -> int:
    """Run and report; 1 if a target was missed."""
    parts = arguments.parts or [name for name in PARTS if name != "workers"]
    unknown = sorted(set(parts) - set(PARTS))
    if unknown:
        raise ConfigurationError(f"there is no part {unknown[0]!r}; there are {', '.join(PARTS)}")
    arguments.command_line = shlex.join(["verbatim", "bench", *sys.argv[sys.argv.index("gateway") :]])
    holds = True
    for name in parts:
        _tell(f"{name}\n")
        with tempfile.TemporaryDirectory(prefix=f"verbatim-gateway-{name}-") as scratch:
            holds &= PARTS[name](Place(Path(scratch), _model(arguments, Path(scratch) / "model"), arguments))
    return 0 if holds else 1


def _turns(place: Place) -> bool:
    """Throughput, latency and CPU over concurrency."""
    a = place.arguments
    with place.stage() as stage, _contenders(place, stage) as contenders:
        runs = place.rounds([Contest(stage, contender, place.sessions) for contender in contenders])
    figures = _by_sessions(runs)
    found = targets(runs, _ours(contenders))
    place.keep(
        "turns",
        {
            "workload": asdict(place.workload) | {"tokens_per_event": a.tokens_per_event, "stream": a.stream},
            "sessions": place.sessions,
            "rounds": a.rounds,
            "conversations_per_second": a.rate,
            "seconds": a.seconds,
            "figures": figures,
            "targets": [target.figures() for target in found],
            "runs": [plain(asdict(each)) for each in runs],
        },
    )
    place.draw("turns", charts.draw_turns, figures)
    return _told(found)


def _by_sessions(runs: Sequence[Measured]) -> dict[str, dict[str, Any]]:
    """Medians and ranges of each contender at each number of sessions."""
    found: dict[str, dict[str, Any]] = {}
    for name, at_once in sorted({(run.contender, run.sessions) for run in runs}):
        spreads = over_rounds(runs, name, at_once)
        found.setdefault(name, {})[str(at_once)] = {key: plain(asdict(value)) for key, value in spreads.items()}
    return found


def _history(place: Place) -> bool:
    """A turn behind 1,000 to 100,000 tokens of history."""
    points: dict[str, list[AtLength]] = {}
    workload = replace(place.workload, turns=_HISTORY_TURNS + 1 + _TURNS_BEHIND)
    with place.stage(workload) as stage, _contenders(place, stage, for_turns=False) as contenders:
        for contender in contenders:
            stage.warm(contender)
        for _ in range(place.arguments.rounds):
            for length in _LENGTHS:
                for contender in contenders:
                    point = at_length(stage, contender, length, sessions=8, history_turns=_HISTORY_TURNS)
                    points.setdefault(contender.name, []).append(point)
                    _tell(line(point))
    figures = {name: [_at(mine, length) for length in _LENGTHS] for name, mine in points.items()}
    ours = points[_ours(contenders)]
    short = [each for each in ours if each.history_tokens == _LENGTHS[0]]
    long = [each for each in ours if each.history_tokens == _LENGTHS[-1]]
    grown = spread(most.net_us / least.cpu_us for most, least in zip(long, short, strict=True))
    found = [Target("a turn at 100,000 tokens less its parse, in turns at 1,000", 3.0, grown)]
    place.keep("history", {"figures": figures, "targets": [target.figures() for target in found]})
    place.draw("history", charts.draw_history, figures)
    return _told(found)


def _at(points: Sequence[AtLength], length: int) -> dict[str, Any]:
    mine = [each for each in points if each.history_tokens == length]
    spreads = {
        name: plain(asdict(spread(getattr(each, name) for each in mine)))
        for name in ("cpu_us", "parse_us", "net_us", "p50_ms")
    }
    return {"history_tokens": length, "body_bytes": mine[0].body_bytes, **spreads}


def _conversation(place: Place) -> bool:
    """A hundred turns to 80,000 tokens, against one tokenisation of the final text."""
    turns, tokens = _CONVERSATION_TURNS, _CONVERSATION_TOKENS
    wholes: dict[str, list[WholeConversation]] = {}
    workload = Workload(turns=turns, reply_tokens=place.workload.reply_tokens, tools=place.workload.tools)
    with place.stage(workload) as stage, _contenders(place, stage, for_turns=False) as contenders:
        for contender in contenders:
            stage.warm(contender)
        for _ in range(place.arguments.rounds):
            for contender in contenders:
                whole = whole_conversation(stage, contender, turns=turns, tokens=tokens)
                wholes.setdefault(contender.name, []).append(whole)
                _tell(line(whole))
    figures = {name: _wholes(mine) for name, mine in wholes.items()}
    encodes = spread(each.encodes for each in wholes[_ours(contenders)])
    found = [Target("CPU of the whole conversation, in encodes of its final text", 3.0, encodes)]
    place.keep("conversation", {"figures": figures, "targets": [target.figures() for target in found]})
    place.draw("conversation", charts.draw_conversation, figures)
    return _told(found)


def _wholes(mine: Sequence[WholeConversation]) -> dict[str, Any]:
    columns = zip(*(each.turn_us for each in mine), strict=True)
    return {
        "turns": mine[0].turns,
        "final_tokens": mine[0].final_tokens,
        "cpu_seconds": plain(asdict(spread(each.cpu_seconds for each in mine))),
        "encode_seconds": plain(asdict(spread(each.encode_seconds for each in mine))),
        "turn_us": [round(spread(column).median, 1) for column in columns],
    }


def _workers(place: Place) -> bool:
    """Everything on one core, with one worker, then on as many as there are, each with a worker more: CPU of a turn
    stays, turns a second grow, as far as the machine's own cores let them.

    The numbers of sessions are one worker's. Several are measured with as many in all, and with as many each: a turn
    costs less the more of them come together, so only then do their workers do what the one did.
    """
    require_workers_flag()
    cores = sorted(os.sched_getaffinity(0))
    a = place.arguments
    count = partial(empty_loops, seconds=_LOOP_SECONDS)
    cores_yield = spread(yield_together(cores, count) for _ in range(a.rounds))
    _tell(f"{len(cores)} cores do {cores_yield.median:.2f} times the loops of one\n")
    with ExitStack() as stack:
        contests: list[Contest] = []
        for workers in range(1, len(cores) + 1):
            # Engine and agents too: where only the workers gained cores, only the first would have one for itself.
            mine = ",".join(map(str, cores[:workers]))
            stage = stack.enter_context(place.stage(cores=mine))
            data = place.folder / f"data-{workers}"
            launch = verbatim(stage.engine, place.model.folder, data, workers=workers, cores=mine, flags=a.serve_flag)
            contender = stack.enter_context(running(launch, place.folder / f"workers-{workers}.log"))
            at_once = {count * each for count in place.sessions for each in (1, workers)}
            contests.append(Contest(stage, contender, sorted(at_once)))
        runs = place.rounds(contests)
    one, all_ = contests[0].contender.name, contests[-1].contender.name
    grown: dict[str, dict[str, Any]] = {}
    for count in place.sessions:
        for figure in ("turns_per_second", "cpu_us"):
            grows = ratios(runs, figure, all_, one, count * len(cores), other_sessions=count)
            if grows is not None:
                _tell(f"{figure}, {all_} with {count} sessions each over {one} with {count}: {grows}\n")
                grown.setdefault(str(count), {})[figure] = plain(asdict(grows))
    place.keep(
        "workers",
        {
            "cores": len(cores),
            "cores_yield": plain(asdict(cores_yield)),
            "all_over_one_by_sessions_of_each": grown,
            "figures": _by_sessions(runs),
        },
    )
    return not any(each.errors for each in runs)


@contextmanager
def _contenders(place: Place, stage: Stage, *, for_turns: bool = True) -> Iterator[list[Running]]:
    """All that the flags ask for, serving beside each other. for_turns: else without the bare engine, which has no CPU
    of its own to tell, without litellm, which would take an hour for long histories, and without the floor, which plays
    the turns of a workload only."""
    a = place.arguments
    peers = [name for name in a.peers.split(",") if name and (for_turns or name == "smg")]
    with ExitStack() as stack:
        launches = [
            verbatim(
                stage.engine,
                place.model.folder,
                place.folder / "data",
                workers=a.workers,
                cores=a.pin,
                flags=a.serve_flag,
            ),
            *(_peer(name, place, stage) for name in peers),
        ]
        started = [stack.enter_context(running(each, place.folder / f"{each.name}.log")) for each in launches]
        yield [bare(stage.engine), *started] if for_turns else started


def _peer(name: str, place: Place, stage: Stage) -> Launch:
    if name == "smg":
        return smg(stage.engine, cores=place.arguments.pin)
    if name == "litellm":
        return litellm(stage.engine, place.folder, program=place.arguments.litellm, cores=place.arguments.pin)
    if name == "floor":
        if stage.stream or place.arguments.model:
            raise ConfigurationError("--peers floor: it plays whole replies of the benchmark's own model only")
        return floor(stage.engine, place.model.folder, place.folder / "floor", cores=place.arguments.pin)
    raise ConfigurationError(f"--peers {name}: known peers are {', '.join(PEERS)}")


def _ours(contenders: Sequence[Running]) -> str:
    return next(each.name for each in contenders if each.name.startswith("verbatim"))


def _model(arguments: argparse.Namespace, place: Path) -> Model:
    if arguments.model is not None:
        return Model.at(arguments.model.resolve(), family=arguments.family)
    return Model.made(place, family=arguments.family)


def _told(found: Sequence[Target]) -> bool:
    for target in found:
        _tell(target.line())
    return all(target.met for target in found)


def _tell(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


PARTS: Mapping[str, Callable[[Place], bool]] = {
    "turns": _turns,
    "history": _history,
    "conversation": _conversation,
    "workers": _workers,
}
"""Each says whether its targets were met."""
