"""Pictures of what was measured, as SVG files beside the results; matplotlib draws them, where it is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_COLOURS = {"verbatim": "#1f6feb", "smg": "#d1242f", "litellm": "#9a6700", "floor": "#2da44e", "engine": "#6e7781"}
_SPARE = ("#8250df", "#1a7f37", "#bf3989")


def can_draw() -> bool:
    """Whether matplotlib is there."""
    return importlib.util.find_spec("matplotlib") is not None


def draw_turns(file: Path, figures: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> None:
    """Throughput and latency over concurrency. figures: contender → sessions → figure → median, low, high."""
    with _figure(file, 3) as axes:
        for number, (name, by_sessions) in enumerate(figures.items()):
            at = sorted(by_sessions, key=int)
            x = [int(sessions) for sessions in at]
            for axis, figure in zip(axes, ("turns_per_second", "p50_ms", "p99_ms"), strict=True):
                _band(axis, x, [by_sessions[sessions][figure] for sessions in at], name, number)
        for axis, title in zip(axes, ("turns a second", "median latency, ms", "p99 latency, ms"), strict=True):
            _logarithmic(axis, "sessions at once", title)


def draw_history(file: Path, figures: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Cost of a turn over the length of its history. figures: contender → points."""
    with _figure(file, 1) as axes:
        for number, (name, points) in enumerate(figures.items()):
            x = [point["history_tokens"] for point in points]
            _band(axes[0], x, [point["cpu_us"] for point in points], name, number)
        points = next(iter(figures.values()))
        x, parse = [point["history_tokens"] for point in points], [point["parse_us"]["median"] for point in points]
        axes[0].plot(x, parse, "--", color="#6e7781", label="parse of the body")
        _logarithmic(axes[0], "tokens of history", "CPU of a turn, us")


def draw_conversation(file: Path, figures: Mapping[str, Mapping[str, Any]]) -> None:
    """Cost of a turn over the turns of a long conversation. figures: contender → turns, turn_us by tenths."""
    with _figure(file, 1) as axes:
        for number, (name, told) in enumerate(figures.items()):
            step = told["turns"] / len(told["turn_us"])
            x = [step * (i + 0.5) for i in range(len(told["turn_us"]))]
            axes[0].plot(x, told["turn_us"], marker="o", color=_colour(name, number), label=name)
        axes[0].set(xlabel="turn", ylabel="CPU of a turn, us", ylim=(0, None))
        axes[0].legend()


def draw_memory(file: Path, figures: Mapping[str, Sequence[Mapping[str, float]]]) -> None:
    """Memory over turns in flight. figures: contender → samples of in_flight and mb."""
    with _figure(file, 1) as axes:
        for number, (name, samples) in enumerate(figures.items()):
            x, y = [sample["in_flight"] for sample in samples], [sample["mb"] for sample in samples]
            axes[0].plot(x, y, ".-", color=_colour(name, number), label=name)
        axes[0].set(xlabel="turns in flight", ylabel="memory above idle, MB", ylim=(0, None))
        axes[0].legend()


class _figure:
    """Axes side by side; saved on leaving, the same bytes for the same figures."""

    def __init__(self, file: Path, panels: int) -> None:
        self._file, self._panels = file, panels

    def __enter__(self) -> Any:
        import matplotlib

        matplotlib.use("svg")
        matplotlib.rcParams |= {"svg.hashsalt": "verbatim", "svg.fonttype": "none", "font.size": 9}
        from matplotlib import pyplot

        self._figure, axes = pyplot.subplots(1, self._panels, figsize=(4.2 * self._panels, 3.4), squeeze=False)
        return axes[0]

    def __exit__(self, kind: object, *_: object) -> None:
        from matplotlib import pyplot

        if kind is None:
            self._figure.tight_layout()
            self._figure.savefig(self._file, metadata={"Date": None, "Creator": None})
        pyplot.close(self._figure)


def _band(axis: Any, x: Sequence[float], spreads: Sequence[Mapping[str, float]], name: str, number: int) -> None:
    colour = _colour(name, number)
    axis.plot(x, [each["median"] for each in spreads], marker="o", color=colour, label=name)
    axis.fill_between(
        x, [each["low"] for each in spreads], [each["high"] for each in spreads], color=colour, alpha=0.15, linewidth=0
    )


def _logarithmic(axis: Any, xlabel: str, ylabel: str) -> None:
    axis.set(xscale="log", yscale="log", xlabel=xlabel, ylabel=ylabel)
    axis.legend()


def _colour(name: str, number: int) -> str:
    return _COLOURS.get(name, _SPARE[number % len(_SPARE)])
