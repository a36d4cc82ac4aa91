"""The report page: what it shows is what the run's files hold, and nothing of what a model wrote is markup."""

from __future__ import annotations

import math
from dataclasses import asdict, astuple, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gateway.contracts.errors import ConfigurationError, SchemaMismatch
from tests.run_records import EVALUATION, METRICS
from trainer.charts import HEIGHT, WIDTH, Chart, Series, draw, figure
from trainer.json_lines import JsonLines
from trainer.metrics import MetricsLog
from trainer.samples import Piece, PieceKind, RolloutSample
from trainer.training_report import write_report

HOSTILE = "</pre></span></script><script>alert(1)</script><img src=x onerror=alert(2)>\"'`&lt;{{ 7*7 }}"


class Page(HTMLParser):
    """A page's elements, attributes and text, as a browser's parser would see them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def a_run(folder: Path, *, steps: int = 3) -> Path:
    log = MetricsLog(folder / "metrics.jsonl")
    log.evaluation(EVALUATION)
    for step in range(1, steps + 1):
        log.step(replace(METRICS, step=step, policy_version=step, loss=0.5 / step))
    return folder


def a_line(text: str = "hello") -> dict[str, Any]:
    """A line of samples.jsonl, every text of it `text`."""
    pieces = [
        Piece(text, PieceKind.CONTEXT, 3),
        Piece(text, PieceKind.TRAINED, 1, 4, -0.5, -1.5),
        Piece(text, PieceKind.SAMPLED, 1, 5, -0.25, None),
        Piece("", PieceKind.OMITTED, 3120),
        Piece(text, PieceKind.TRAINED, 1, 5, float("nan"), float("-inf")),
    ]
    sample = RolloutSample(3, "largest gap", f"session {text}", f"segment {text}", 1.0, 0.5, 3126, ())
    return asdict(sample) | {"pieces": [astuple(piece) for piece in pieces]}


def page_of(folder: Path) -> Page:
    return Page(write_report(folder).read_text(encoding="utf-8"))


def test_nothing_of_a_models_output_or_of_a_name_becomes_markup(tmp_path: Path) -> None:
    folder = a_run(tmp_path / "run <b>name</b>")
    plain = [tag for tag, _ in page_of(folder).tags]
    JsonLines(folder / "samples.jsonl").append(a_line("harmless"))
    expected = [tag for tag, _ in page_of(folder).tags]
    assert len(expected) > len(plain)
    JsonLines(folder / "samples.jsonl").replace([a_line(HOSTILE)])
    (folder / "settings.toml").write_text(f'name = "{HOSTILE}"')
    log = MetricsLog(folder / "metrics.jsonl")
    log.step(replace(METRICS, step=4, dropped_by={HOSTILE: 3}, shares={HOSTILE: 0.5}, seconds={HOSTILE: 1.0}))
    page = page_of(folder)
    tags = [tag for tag, _ in page.tags]
    assert tags.count("script") == 1, "our own"
    assert not {"img", "b/"} & set(tags)
    assert set(tags) <= {*expected, "details", "summary", "pre"}
    assert not [attributes for _, attributes in page.tags if any(name.startswith("on") for name in attributes)]
    assert page.texts.count(HOSTILE) >= 4, "shown as it was written, braces too"
    assert "49" not in page.texts


def test_the_page_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    folder = a_run(tmp_path)
    JsonLines(folder / "samples.jsonl").append(a_line())
    text = write_report(folder).read_text(encoding="utf-8")
    assert not [tag for tag, attributes in Page(text).tags if {"src", "href", "srcset", "data"} & set(attributes)]
    assert "http" not in text.replace("http-equiv", "")
    assert "default-src 'none'" in text
    assert "url(" not in text
    assert [path.name for path in folder.glob("*.html")] == ["report.html"]


@pytest.mark.parametrize(
    "title",
    [
        "Reward",
        "Held-out score with its 95 % interval",
        "Response length",
        "Entropy",
        "Loss",
        "Gradient norm",
        "KL rollout ‖ trainer (k3)",
        "Extreme tokens, F(2)",
        "Routing rows",
        "Expert ids verified",
        "Staleness",
        "Clipped and masked",
        "Speed",
        "Time by phase",
        "Memory",
        "Dropped rollouts by reason",
        "Tokens",
        "dual_clipped",
    ],
)
def test_every_figure_of_a_step_has_its_curve(tmp_path: Path, title: str) -> None:
    page = page_of(a_run(tmp_path))
    labels = [attributes.get("aria-label") for tag, attributes in page.tags if tag == "svg"]
    assert f"{title} by step" in labels


def test_what_was_never_measured_has_no_curve(tmp_path: Path) -> None:
    page = page_of(a_run(tmp_path))
    assert "KL to the reference by step" not in [attributes.get("aria-label") for _, attributes in page.tags]


def test_kl_is_told_with_replay_and_without_and_the_account_adds_up(tmp_path: Path) -> None:
    """I10, I3."""
    texts = page_of(a_run(tmp_path)).texts
    assert "with replay; 0.001 through the live router, 10 times as much" in texts
    assert "trained + 6 left out = 36 sampled" in texts
    MetricsLog(tmp_path / "metrics.jsonl").step(replace(METRICS, step=4, tokens_trained=9))
    assert "trained + 8 left out ≠ 48 sampled" in page_of(tmp_path).texts


def test_samples_show_kind_version_and_gap_of_each_token(tmp_path: Path) -> None:
    folder = a_run(tmp_path)
    JsonLines(folder / "samples.jsonl").append(a_line())
    page = page_of(folder)
    spans = [(a["class"], a["title"]) for tag, a in page.tags if tag == "span" and "title" in a]
    assert spans == [
        ("context", "context, 3 tokens"),
        ("trained gap-4", "trained by policy 4; log-prob: engine -0.5, trainer -1.5, gap -1"),
        ("sampled", "sampled by policy 5; log-prob: engine -0.25"),
        ("omitted", "3120 tokens are not shown"),
        ("trained gap-4", "trained by policy 5; log-prob: engine nan, trainer -inf, gap +nan"),
    ]
    assert [text for text in page.texts if text.startswith("policy ") and text[7:].isdigit()][-2:] == [
        "policy 4",
        "policy 5",
    ]


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_a_run_that_has_hardly_begun_has_a_page(tmp_path: Path, steps: int) -> None:
    page = page_of(a_run(tmp_path, steps=steps))
    assert ("no step has ended yet" in page.texts) == (steps == 0)
    assert [tag for tag, _ in page.tags].count("svg") > (0 if steps == 0 else 10)


def test_a_run_under_way_may_be_looked_at(tmp_path: Path) -> None:
    folder = a_run(tmp_path)
    with (folder / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 4, "rew')
    assert "Step 3 in full" in page_of(folder).texts


def test_a_folder_without_a_run_and_a_run_of_another_version_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"holds no metrics\.jsonl; give the run\.dir"):
        write_report(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(SchemaMismatch, match=r"metrics\.jsonl"):
        write_report(tmp_path)


numbers = st.none() | st.floats(allow_nan=True, allow_infinity=True, width=32)


@given(
    data=st.integers(1, 1000).flatmap(lambda n: st.tuples(st.just(n), st.lists(numbers, min_size=1, max_size=6))),
    stacked=st.booleans(),
    log=st.booleans(),
    dots=st.booleans(),
)
@example(data=(1, [-1.666666691745777e28]), stacked=False, log=False, dots=False)  # its ticks are another step apart
def test_every_curve_lies_within_its_picture(
    data: tuple[int, list[float | None]], stacked: bool, log: bool, dots: bool
) -> None:
    """Whatever was measured: nothing, infinities, one point, a thousand."""
    length, values = data
    if stacked:  # counts and seconds
        values = [abs(value) if value is not None and math.isfinite(value) else 0.0 for value in values]
    line = tuple(values[i % len(values)] for i in range(length))
    drawn = draw(Chart("t", tuple(range(1, length + 1)), (Series("s", line),), stacked=stacked, log=log, dots=dots))
    if drawn is None:
        assert not any(value is not None and math.isfinite(value) for value in line)
        return
    coordinates = drawn.series[0].path.replace("M", " ").replace("L", " ").replace("Z", " ").split()
    xs, ys = list(map(float, coordinates[::2])), list(map(float, coordinates[1::2]))
    assert all(0 <= x <= WIDTH for x in xs)
    assert all(0 <= y <= HEIGHT for y in ys)
    assert all(0 <= tick.at <= HEIGHT for tick in drawn.y_ticks)
    assert all(0 <= tick.at <= WIDTH for tick in drawn.x_ticks)
    assert len(drawn.hover) <= 400


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (math.nan, "–"), (0.0, "0"), (1.5, "1.5"), (9999, "9999"), (12345, "12.35k"), (2.5e9, "2.5G")],
)
def test_figures_read_well(value: float | None, text: str) -> None:
    assert figure(value) == text
