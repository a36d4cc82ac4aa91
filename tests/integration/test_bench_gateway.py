"""The gateway's benchmarks on a small scale: what they measure has happened, in the engine and in the ledger."""

from __future__ import annotations

import argparse
import json
import sqlite3
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from benchmarks import gateway as bench_gateway
from benchmarks import scale as bench_scale
from benchmarks.load import charts
from benchmarks.load.contenders import Launch, Running, bare, floor, litellm, running, verbatim
from benchmarks.load.flight import Flight, fly
from benchmarks.load.history import at_length, whole_conversation
from benchmarks.load.script import Model, Workload, replies
from benchmarks.load.stage import Stage, staged
from gateway.contracts.errors import ConfigurationError, EngineUnavailable

WORKLOAD = Workload(turns=4, message_bytes=80)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    place = tmp_path_factory.mktemp("load")
    with staged(place / "stage", Model.made(place / "model"), WORKLOAD, "--tokens-per-event", "16") as made:
        yield made


@pytest.fixture(scope="module")
def served(stage: Stage) -> Iterator[Running]:
    place = stage.folder.parent
    with running(verbatim(stage.engine, stage.model.folder, place / "data"), place / "verbatim.log") as gateway:
        yield gateway


def recorded_turns(gateway: Running) -> int:
    with urllib.request.urlopen(f"http://127.0.0.1:{gateway.port}/metrics", timeout=20) as answer:
        lines = answer.read().decode().splitlines()
    return sum(int(float(line.split()[1])) for line in lines if line.startswith("verbatim_turns_total"))


def test_every_measured_turn_was_sampled_and_recorded(stage: Stage, served: Running) -> None:
    """I4: the figures are of turns that went through everything."""
    sampled, recorded = stage.engine.statistics()["requests"], recorded_turns(served)
    run = stage.measure(served, 4, seconds=0.5, number=1)
    assert run.errors == 0
    assert run.turns >= 4, "a turn of each session, at least"
    assert stage.engine.statistics()["requests"] - sampled == run.turns
    assert recorded_turns(served) - recorded == run.turns
    assert run.cpu_us > 50
    assert 0 < run.p50_ms <= run.p90_ms <= run.p99_ms
    assert run.rss_mb > 10
    engine = stage.measure(bare(stage.engine), 4, seconds=0.3, number=1)
    assert (engine.errors, engine.cpu_us) == (0, 0.0)
    assert engine.generator_us + engine.engine_us < run.cpu_us


def test_the_floor_stores_what_was_sampled(stage: Stage, tmp_path: Path) -> None:
    """It does what a turn must, or nothing could be held against it: each is on disk, behind the one it extends."""
    with running(floor(stage.engine, stage.model.folder, tmp_path / "data"), tmp_path / "log") as straight:
        run = stage.measure(straight, 3, seconds=0.5, number=1)
    assert run.errors == 0
    with sqlite3.connect(tmp_path / "data" / "floor.sqlite") as connection:
        columns = "turn_id, session_id, parent_id, number, prompt_ids, output_ids, logprobs"
        rows = connection.execute(f"select {columns} from turns order by session_id, number").fetchall()
    assert len(rows) == run.turns
    said = [reply.token_ids for reply in replies(stage.model, WORKLOAD)]
    turns = {(session_id, number): turn_id for turn_id, session_id, _, number, *_ in rows}
    for _, session_id, parent_id, number, prompt_ids, output_ids, logprobs in rows:
        assert parent_id == turns.get((session_id, number - 1))
        assert np.frombuffer(output_ids, np.int32).tolist() == said[number]
        assert len(logprobs) == len(output_ids)
        told = stage.model.tokenizer.decode(np.frombuffer(prompt_ids, np.int32), skip_special_tokens=False)
        assert told.startswith("\n" if number else "<|im_start|>"), "behind a reply's stop token, or from the start"
        assert told.endswith(stage.model.tokenizer.decode(stage.model.marker(), skip_special_tokens=False))


def test_a_turn_at_a_long_history_costs_its_parse_and_more(stage: Stage, served: Running) -> None:
    short = at_length(stage, served, 200, sessions=2, history_turns=1)
    long = at_length(stage, served, 3000, sessions=2, history_turns=1)
    assert long.body_bytes > short.body_bytes + 5000
    assert 0 < short.parse_us < short.cpu_us
    assert short.net_us == short.cpu_us - short.parse_us
    assert long.parse_us < long.cpu_us


def test_a_conversation_is_held_against_one_encode_of_its_final_text(tmp_path: Path, stage: Stage) -> None:
    workload = Workload(turns=10)
    with staged(tmp_path / "stage", stage.model, workload) as own:
        launch = verbatim(own.engine, own.model.folder, tmp_path / "data")
        with running(launch, tmp_path / "log") as gateway:
            whole = whole_conversation(own, gateway, turns=10, tokens=2000, steps=5)
    assert len(whole.turn_us) == 5
    assert whole.cpu_seconds == pytest.approx(sum(whole.turn_us) * 2 / 1e6)
    assert 1500 < whole.final_tokens < 2500
    assert whole.encodes == whole.cpu_seconds / whole.encode_seconds > 0


def test_turns_in_flight_are_held_against_the_engines_own_time(tmp_path: Path, stage: Stage) -> None:
    flags = ("--ms-per-max-token", "1", "--spread", "--tokens-per-event", "8")
    flight = Flight(sessions=20, turns=2, from_ms=300, to_ms=400, ramp_seconds=0.1)
    with staged(tmp_path / "stage", stage.model, Workload(turns=2), *flags) as slow:
        launch = verbatim(slow.engine, slow.model.folder, tmp_path / "data")
        with running(launch, tmp_path / "log") as gateway:
            landed = fly(slow, "verbatim", [gateway], flight)
    assert (landed.turns, landed.errors, landed.peak_in_flight) == (40, 0, 20)
    assert (landed.added_ms >= 0).all()
    assert landed.added_ms.min() < 300, "the engine's own time is not in it"
    assert landed.figures()["descriptors"] > 20


def test_who_does_not_come_up_is_told_with_what_it_said(tmp_path: Path) -> None:
    launch = Launch("nobody", ("sh", "-c", "echo no such model; exit 3"), 1, "/ready", "/", {})
    said = "nobody ended with 3 before it served: no such model"
    with pytest.raises(EngineUnavailable, match=said), running(launch, tmp_path / "log"):
        pass


def test_peers_that_are_not_installed_are_refused(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LITELLM", raising=False)
    with pytest.raises(ConfigurationError, match=r"litellm\[proxy\]"):
        litellm(stage.engine, tmp_path, program=str(tmp_path / "no-litellm"))


def test_the_floor_is_not_asked_for_what_it_does_not_do(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["gateway", "turns", "--peers", "floor", "--stream", "--output", "/dev/null"]
    monkeypatch.setattr("sys.argv", ["verbatim", "bench", *words])
    parser = argparse.ArgumentParser()
    bench_gateway.configure(parser)
    with pytest.raises(ConfigurationError, match="whole replies of the benchmark's own model only"):
        bench_gateway.run(parser.parse_args(words[1:]))


@pytest.mark.parametrize("module", [bench_gateway, bench_scale])
def test_unknown_parts_are_refused(module: object) -> None:
    parser = argparse.ArgumentParser()
    module.configure(parser)
    with pytest.raises(ConfigurationError, match="there is no part 'turn'"):
        module.run(parser.parse_args(["turn"]))


def test_results_name_workload_machine_and_targets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole command, tiny; pictures lie beside the results."""
    output = tmp_path / "figures.json"
    words = ["gateway", "turns", "--sessions", "1,2", "--rounds", "1", "--seconds", "0.3", "--output", str(output)]
    monkeypatch.setattr("sys.argv", ["verbatim", "bench", *words])
    parser = argparse.ArgumentParser()
    bench_gateway.configure(parser)
    code = bench_gateway.run(parser.parse_args(words[1:]))
    told = json.loads(output.read_text())["turns"]["default"]
    assert told["command"].startswith("verbatim bench gateway turns --sessions 1,2")
    assert set(told["figures"]) == {"engine", "verbatim"}
    assert told["figures"]["verbatim"]["1"]["p50_ms"]["median"] > 0
    assert "turns_per_second" in told["figures"]["verbatim"]["2"]
    assert told["measured_on"]["machine"]["cores"] >= 1
    assert {"added p50 in ms, 1 session", "errors"} == {target["name"] for target in told["targets"]}
    assert code == (0 if all(target["met"] for target in told["targets"]) else 1)
    assert "turns/s" in capsys.readouterr().out
    if charts.can_draw():
        assert "verbatim" in (tmp_path / "figures-turns.svg").read_text()
