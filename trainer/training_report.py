"""`verbatim train --report DIR`: one HTML page of a run, from its folder alone; it loads nothing from elsewhere.

    metrics.jsonl ─▶ charts, newest step      samples.jsonl ─▶ rollouts by token      settings.toml ─▶ settings

What models wrote is shown and never trusted: the template engine escapes every value that it is given.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import jinja2

from gateway.contracts.errors import ConfigurationError
from trainer.charts import HEIGHT, WIDTH, Chart, DrawnChart, Series, Values, draw, figure
from trainer.durable import write_text
from trainer.metrics import Evaluation, MetricsLog, StepMetrics, token_mean
from trainer.phases import Phase
from trainer.samples import Piece, PieceKind, RolloutSample, read_samples

SETTINGS_FILE = "settings.toml"
_TEMPLATE = Path(__file__).with_name("training_report.html")
_SHOWN_SAMPLES = 12
_GAP_LEVELS = (0.01, 0.05, 0.2, 0.7)
"""Log-prob gaps from which a token is tinted more; 0.7 is about the F(2) bound, log 2."""
_GIB = 2**30


@dataclass(frozen=True, slots=True)
class Run:
    """What a run folder holds. evaluations: each with the step after which it was made."""

    folder: Path
    steps: tuple[StepMetrics, ...]
    evaluations: tuple[tuple[int, Evaluation], ...]
    samples: tuple[RolloutSample, ...]
    settings: str | None


@dataclass(frozen=True, slots=True)
class Headline:
    """One of the figures at the page's top."""

    name: str
    value: str
    note: str = ""


def write_report(folder: Path) -> Path:
    """Write `report.html` into a run folder and return its path; a run under way may be looked at too.

    Raises ConfigurationError where the folder holds no run.
    """
    file = folder / "report.html"
    write_text(file, render_report(read_run(folder)))
    return file


def read_run(folder: Path) -> Run:
    """Read a run folder; a torn last line is left out."""
    metrics = folder / "metrics.jsonl"
    if not metrics.is_file():
        raise ConfigurationError(f"{folder} holds no metrics.jsonl; give the run.dir of a training run")
    steps: list[StepMetrics] = []
    evaluations: list[tuple[int, Evaluation]] = []
    for entry in MetricsLog(metrics).entries():
        if isinstance(entry, StepMetrics):
            steps.append(entry)
        else:
            evaluations.append((steps[-1].step if steps else 0, entry))
    settings = folder / SETTINGS_FILE
    return Run(
        folder,
        tuple(steps),
        tuple(evaluations),
        tuple(read_samples(folder / "samples.jsonl")),
        settings.read_text(encoding="utf-8") if settings.is_file() else None,
    )


def render_report(run: Run) -> str:
    """The page's text."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters["figure"] = figure
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    newest = run.steps[-1] if run.steps else None
    return template.render(
        title=run.folder.resolve().name,
        made_at=time.strftime("%Y-%m-%d %H:%M:%S %z"),
        headlines=_headlines(run),
        sections=_sections(run),
        newest=newest,
        newest_rows=[] if newest is None else list(_rows(newest)),
        evaluations=run.evaluations,
        samples=[_shown(sample) for sample in reversed(run.samples[-_SHOWN_SAMPLES:])],
        num_samples=len(run.samples),
        gap_levels=_GAP_LEVELS,
        settings=run.settings,
        width=WIDTH,
        height=HEIGHT,
    )


def _headlines(run: Run) -> list[Headline]:
    if not run.steps:
        return [Headline("steps", "0", "no step has ended yet")]
    first, newest = run.steps[0], run.steps[-1]
    sampled, trained, left_out = (
        sum(getattr(step, name) for step in run.steps)
        for name in ("tokens_sampled", "tokens_trained", "tokens_left_out")
    )
    with_replay, live = token_mean(run.steps, "kl_with_replay"), token_mean(run.steps, "kl_without_replay")
    verified, replayed = (sum(getattr(step, n) for step in run.steps) for n in ("rows_verified", "rows_replayed"))
    return [
        Headline("step", str(newest.step), f"policy {newest.policy_version}"),
        Headline("reward", figure(newest.reward_mean), f"{figure(first.reward_mean)} in step {first.step}"),
        *_held_out(run.evaluations),
        Headline("KL rollout ‖ trainer", figure(with_replay), _replay_note(with_replay, live)),
        Headline(
            "expert ids verified",
            f"{100 * verified / replayed:.4g} %" if replayed else "–",
            f"{figure(replayed)} rows replayed",
        ),
        Headline(
            "tokens",
            figure(trained),
            f"trained + {figure(left_out)} left out = {figure(sampled)} sampled"
            if sampled == trained + left_out
            else f"trained + {figure(left_out)} left out ≠ {figure(sampled)} sampled",
        ),
        Headline("time", _duration(sum(step.seconds_total for step in run.steps)), f"{len(run.steps)} steps"),
    ]


def _held_out(evaluations: Sequence[tuple[int, Evaluation]]) -> Iterable[Headline]:
    if evaluations:
        newest, first = evaluations[-1][1], evaluations[0][1]
        notes = [] if newest.ci_low is None else [f"95 % in {figure(newest.ci_low)} to {figure(newest.ci_high)}"]
        if len(evaluations) > 1:
            notes.append(f"{figure(_score(first))} under policy {first.policy_version}")
        yield Headline("held-out", figure(_score(newest)), "; ".join(notes))


def _replay_note(with_replay: float | None, live: float | None) -> str:
    if with_replay is None:
        return f"nothing replayed; {figure(live)} through the live router"
    times = f", {figure(live / with_replay)} times as much" if live is not None and with_replay > 0 else ""
    return f"with replay; {figure(live)} through the live router{times}"


def _sections(run: Run) -> list[tuple[str, list[DrawnChart]]]:
    """Charts by heading; what was never measured is left out."""
    steps = run.steps
    xs = tuple(step.step for step in steps)

    def chart(title: str, *series: tuple[str, Callable[[StepMetrics], float | None]], **options: str | bool) -> Chart:
        lines = tuple(Series(name, tuple(value(step) for step in steps)) for name, value in series)
        return Chart(title, xs, lines, **options)  # type: ignore[arg-type]  # titles and switches of Chart

    def mapping(title: str, read: Callable[[StepMetrics], Mapping[str, float]], order: Sequence[str] = ()) -> Chart:
        names = [*order, *sorted({name for step in steps for name in read(step)} - set(order))]
        series = tuple(Series(n, tuple(float(read(step).get(n, 0.0)) for step in steps)) for n in names)
        kept = tuple(one for one in series if any(one.values))
        return Chart(title, xs, kept, stacked=True)

    sections = [
        (
            "Learning",
            [
                chart(
                    "Reward",
                    ("mean", lambda m: m.reward_mean),
                    ("lowest", lambda m: m.reward_min),
                    ("highest", lambda m: m.reward_max),
                ),
                _held_out_chart(run.evaluations),
                chart("Spread of rewards", ("standard deviation", lambda m: m.reward_std)),
                chart(
                    "Response length",
                    ("mean", lambda m: m.response_tokens_mean),
                    ("longest", lambda m: m.response_tokens_max),
                    unit="sampled tokens a rollout",
                ),
                chart("Turns", ("mean", lambda m: m.turns_mean), unit="a rollout"),
                chart("Entropy", ("entropy", lambda m: m.entropy), unit="nats a token"),
            ],
        ),
        (
            "Rollout against trainer",
            [
                chart(
                    "KL rollout ‖ trainer (k3)",
                    ("with replay", lambda m: m.kl_with_replay),
                    ("live router", lambda m: m.kl_without_replay),
                    unit="nats a token",
                    log=True,
                ),
                chart(
                    "Extreme tokens, F(2)",
                    ("with replay", lambda m: m.extreme_share_with_replay),
                    ("live router", lambda m: m.extreme_share_without_replay),
                    unit="share of tokens",
                ),
                chart(
                    "Routing rows",
                    ("flipped by the live router", lambda m: m.rows_flipped_share),
                    ("fallback", lambda m: m.rows_fallback_share),
                    unit="share of rows",
                ),
                chart("Expert ids verified", ("verified", lambda m: m.rows_verified_share), unit="share of replayed"),
                chart(
                    "Staleness",
                    ("mean", lambda m: m.staleness_mean),
                    ("most", lambda m: m.staleness_max),
                    unit="policy versions",
                ),
            ],
        ),
        (
            "Update",
            [
                chart("Loss", ("loss", lambda m: m.loss)),
                chart("Gradient norm", ("before clipping", lambda m: m.grad_norm), log=True),
                chart("Learning rate", ("learning rate", lambda m: m.learning_rate), smooth=False),
                chart(
                    "Clipped and masked",
                    ("clipped low", lambda m: m.clipped_low_share),
                    ("clipped high", lambda m: m.clipped_high_share),
                    ("masked by the correction", lambda m: m.masked_share),
                    unit="share of tokens",
                ),
                chart("KL to the reference", ("KL", lambda m: m.kl_reference), unit="nats a token"),
                *_share_charts(steps, xs),
            ],
        ),
        (
            "Cost and accounts",
            [
                chart("Speed", ("trained tokens", lambda m: m.tokens_per_second), unit="a second of training"),
                mapping("Time by phase", lambda m: m.seconds, order=[phase.value for phase in Phase]),
                chart(
                    "Memory",
                    ("process", lambda m: m.peak_rss_bytes / _GIB),
                    ("device", lambda m: None if m.peak_device_bytes is None else m.peak_device_bytes / _GIB),
                    unit="GiB at most",
                ),
                mapping("Tokens", _token_accounts, order=("trained", "left out", "of dropped rollouts")),
                mapping("Dropped rollouts by reason", lambda m: m.dropped_by),
                mapping("Tokens of dropped rollouts by reason", lambda m: m.dropped_tokens_by),
                mapping("Tokens left out by reason", lambda m: m.left_out_by),
                chart(
                    "Groups",
                    ("all", lambda m: m.groups),
                    ("with equal rewards", lambda m: m.zero_variance_groups),
                ),
            ],
        ),
    ]
    drawn = [(name, [done for one in charts if one.xs and (done := draw(one))]) for name, charts in sections]
    return [(name, charts) for name, charts in drawn if charts]


def _held_out_chart(evaluations: Sequence[tuple[int, Evaluation]]) -> Chart:
    def values(read: Callable[[Evaluation], float | None]) -> Values:
        return tuple(read(evaluation) for _, evaluation in evaluations)

    scores = Series("score", values(_score), values(lambda e: e.ci_low), values(lambda e: e.ci_high))
    has_interval = any(evaluation.ci_low is not None for _, evaluation in evaluations)
    title = "Held-out score with its 95 % interval" if has_interval else "Held-out reward"
    return Chart(title, tuple(step for step, _ in evaluations), (scores,), dots=True)


def _share_charts(steps: Sequence[StepMetrics], xs: tuple[int, ...]) -> list[Chart]:
    """The objective's own means, each for itself: their scales differ."""
    names = sorted({name for step in steps for name in step.shares})
    return [
        Chart(name, xs, (Series(name, tuple(step.shares.get(name) for step in steps)),), note="of the objective")
        for name in names
    ]


def _token_accounts(step: StepMetrics) -> Mapping[str, float]:
    return {
        "trained": step.tokens_trained,
        "left out": step.tokens_left_out,
        "of dropped rollouts": step.tokens_dropped,
    }


def _score(evaluation: Evaluation) -> float | None:
    return evaluation.reward_mean if evaluation.pass_at_1 is None else evaluation.pass_at_1


def _rows(newest: StepMetrics) -> Iterable[tuple[str, str]]:
    for name, value in asdict(newest).items():
        if isinstance(value, Mapping):
            yield from ((f"{name}: {inner}", figure(number)) for inner, number in value.items())
        elif name.endswith("_bytes"):
            yield name, "–" if value is None else f"{value / _GIB:.3g} GiB"
        else:
            yield name, str(value) if isinstance(value, int) else figure(value)


@dataclass(frozen=True, slots=True)
class _Token:
    """A piece as the page shows it: its class and what hovering says; label: of a policy that takes over here."""

    piece: Piece
    style: str
    hint: str
    label: str


def _shown(sample: RolloutSample) -> tuple[RolloutSample, list[_Token]]:
    tokens: list[_Token] = []
    version: int | None = None
    for piece in sample.pieces:
        label = ""
        if piece.policy_version is not None:
            label = "" if piece.policy_version == version else f"policy {piece.policy_version}"
            version = piece.policy_version
        tokens.append(_Token(piece, _style(piece), _hint(piece), label))
    return sample, tokens


def _style(piece: Piece) -> str:
    gap = _gap(piece)
    if gap is None:
        return piece.kind.value
    level = sum(abs(gap) >= least for least in _GAP_LEVELS) if math.isfinite(gap) else len(_GAP_LEVELS)
    return f"{piece.kind.value} gap-{level}"


def _hint(piece: Piece) -> str:
    if piece.kind is PieceKind.CONTEXT:
        return f"context, {piece.num_tokens} tokens"
    if piece.kind is PieceKind.OMITTED:
        return f"{piece.num_tokens} tokens are not shown"
    hint = f"{piece.kind.value} by policy {piece.policy_version}; log-prob: engine {piece.rollout_logprob:.4g}"
    return hint if piece.train_logprob is None else f"{hint}, trainer {piece.train_logprob:.4g}, gap {_gap(piece):+.2g}"


def _gap(piece: Piece) -> float | None:
    if piece.train_logprob is None or piece.rollout_logprob is None:
        return None
    return piece.train_logprob - piece.rollout_logprob


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes, hours = seconds / 60, seconds / 3600
    return f"{minutes:.0f} min" if hours < 2 else f"{hours:.1f} h"
