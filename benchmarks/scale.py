"""`verbatim bench scale`: 12,000 turns of 20 to 30 seconds in flight at once; start-up and idle memory.

Parts: flight and start. A process may hold 20,000 descriptors on many machines and a turn takes two, so the gateway
runs as two workers (`serve --workers`), or where that flag is missing as two processes with a ledger and a port each.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.load import charts
from benchmarks.load.contenders import Running, bare, has_workers_flag, raise_descriptor_limit, running, smg, verbatim
from benchmarks.load.figures import Target, plain, spread
from benchmarks.load.flight import Flight, Landed, fly
from benchmarks.load.script import Model, Workload
from benchmarks.load.stage import Stage, staged
from benchmarks.results_file import merge
from gateway.contracts.errors import ConfigurationError

RESULTS = Path(__file__).parent / "results" / "scale.json"
PACKAGES = ("verbatim-rl", "uvicorn", "uvloop", "smg")
_IDLE_SECONDS = 2.0


def configure(parser: argparse.ArgumentParser) -> None:
    """The flags of `verbatim bench scale`."""
    usual = Flight()
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (all)")
    parser.add_argument("--sessions", type=int, default=usual.sessions, help=f"turns in flight ({usual.sessions})")
    parser.add_argument("--turns", type=int, default=usual.turns, help=f"of each session ({usual.turns})")
    parser.add_argument(
        "--turn-ms", default=f"{usual.from_ms}-{usual.to_ms}", metavar="A-B", help="of the engine's time"
    )
    parser.add_argument("--ramp-seconds", type=float, default=usual.ramp_seconds, help="until all have begun (20)")
    parser.add_argument("--reply-tokens", type=int, default=64, help="of a turn (64)")
    parser.add_argument(
        "--tokens-per-event", type=int, default=1, help="of the engine's stream, where a request does not say (1)"
    )
    parser.add_argument("--message-bytes", type=int, default=2000, help="of a tool's result (2000)")
    parser.add_argument("--processes", type=int, default=2, help="of each contender (2)")
    parser.add_argument("--peers", default="", metavar="NAMES", help="measured after it: smg (none)")
    parser.add_argument("--serve-flag", action="append", default=[], metavar="FLAG", help="more for `verbatim serve`")
    parser.add_argument("--starts", type=int, default=5, help="start: how often (5)")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="FILE", help="where the figures go")
    parser.add_argument("--name", default="default", help="what the figures are called there (default)")


def run(arguments: argparse.Namespace) -> int:
    """Run and report; 1 if a target was missed."""
    parts = arguments.parts or list(PARTS)
    unknown = sorted(set(parts) - set(PARTS))
    if unknown:
        raise ConfigurationError(f"there is no part {unknown[0]!r}; there are {', '.join(PARTS)}")
    if arguments.peers not in ("", "smg"):
        raise ConfigurationError(f"--peers {arguments.peers}: smg is the only peer here")
    arguments.command_line = shlex.join(["verbatim", "bench", *sys.argv[sys.argv.index("scale") :]])
    raise_descriptor_limit()
    holds = True
    for name in parts:
        _tell(f"{name}\n")
        with tempfile.TemporaryDirectory(prefix=f"verbatim-scale-{name}-") as place:
            found, figures = PARTS[name](arguments, Path(place))
        figures = {**figures, "targets": [target.figures() for target in found]}
        merge(arguments.output, name, arguments.name, figures, command=arguments.command_line, packages=PACKAGES)
        for target in found:
            _tell(target.line())
            holds &= target.met
    return 0 if holds else 1


Outcome = tuple[Sequence[Target], Mapping[str, Any]]


def _flight(arguments: argparse.Namespace, place: Path) -> Outcome:
    """Turns in flight: failures, added latency, memory, descriptors."""
    from_ms, _, to_ms = arguments.turn_ms.partition("-")
    flight = Flight(arguments.sessions, arguments.turns, int(from_ms), int(to_ms or from_ms), arguments.ramp_seconds)
    landed: dict[str, Landed] = {}
    with _staged(arguments, place, "--spread", "--tokens-per-event", str(arguments.tokens_per_event)) as stage:
        for name, contender in (
            ("engine", None),
            ("verbatim", _gateways),
            *((n, _smgs) for n in arguments.peers.split()),
        ):
            with ExitStack() as stack:
                ports = [bare(stage.engine)] if contender is None else contender(arguments, stage, place, stack)
                landed[name] = fly(stage, name, ports, flight)
            _tell(landed[name].line())
    figures = {name: each.figures() for name, each in landed.items()}
    ours = figures["verbatim"]
    targets = [
        Target("turns in flight", arguments.sessions, spread([ours["peak_in_flight"]]), at_least=True),
        Target("failed turns", 0, spread([ours["errors"]])),
        Target("added p99 in ms", 100, spread([ours["added_ms"]["p99"]])),
        Target("KB a turn in flight", 40, spread([ours["kb_a_turn"]])),
    ]
    if charts.can_draw() and arguments.output.suffix == ".json":
        picture = arguments.output.with_name(f"{arguments.output.stem}-memory.svg")
        charts.draw_memory(picture, {name: each["memory"] for name, each in figures.items() if name != "engine"})
    return targets, {"flight": asdict(flight), "figures": figures}


def _gateways(arguments: argparse.Namespace, stage: Stage, place: Path, stack: ExitStack) -> list[Running]:
    """One port with workers behind it, else a port each."""
    at_once, workers = (1, arguments.processes) if has_workers_flag() else (arguments.processes, 1)
    return [
        stack.enter_context(
            running(
                verbatim(
                    stage.engine,
                    stage.model.folder,
                    place / f"data-{number}",
                    workers=workers,
                    flags=arguments.serve_flag,
                ),
                place / f"verbatim-{number}.log",
            )
        )
        for number in range(at_once)
    ]


def _smgs(arguments: argparse.Namespace, stage: Stage, place: Path, stack: ExitStack) -> list[Running]:
    return [
        stack.enter_context(running(smg(stage.engine), place / f"smg-{number}.log"))
        for number in range(arguments.processes)
    ]


def _start(arguments: argparse.Namespace, place: Path) -> Outcome:
    """From the command to the first answer of /ready, and what it holds when nobody asks."""
    seconds, rss = [], []
    with _staged(arguments, place) as stage:
        for number in range(arguments.starts):
            launch = verbatim(stage.engine, stage.model.folder, place / f"data-{number}", flags=arguments.serve_flag)
            with running(launch, place / f"start-{number}.log") as gateway:
                seconds.append(gateway.ready_seconds)
                time.sleep(_IDLE_SECONDS)
                rss.append(gateway.usage().rss_bytes / 2**20)
            _tell(f"ready after {seconds[-1]:.2f} s, {rss[-1]:.0f} MB\n")
    targets = [Target("seconds until ready", 1.0, spread(seconds)), Target("idle MB", 80, spread(rss))]
    figures = {"ready_seconds": plain(asdict(spread(seconds))), "idle_rss_mb": plain(asdict(spread(rss)))}
    return targets, figures


@contextmanager
def _staged(arguments: argparse.Namespace, place: Path, *flags: str) -> Iterator[Stage]:
    """An engine whose reply takes as many milliseconds as it may have tokens: agents know what it took."""
    workload = Workload(
        turns=arguments.turns, reply_tokens=arguments.reply_tokens, message_bytes=arguments.message_bytes
    )
    with staged(place / "stage", Model.made(place / "model"), workload, "--ms-per-max-token", "1", *flags) as stage:
        yield stage


def _tell(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


PARTS: Mapping[str, Callable[[argparse.Namespace, Path], Outcome]] = {"flight": _flight, "start": _start}
"""Each gives its targets and its figures."""
