"""`verbatim eval` as a process, with a gateway and the embedded engine as processes and lines in GSM8K's format."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from engines.launch import free_port
from gateway.client import SyncGatewayClient
from trainer.rollouts.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "trainer" / "rollouts" / "README.md"
COMMAND = (sys.executable, "-c", "import sys; from gateway.cli import main; sys.exit(main())")
PROBLEMS = (
    ("Janet has 16 eggs and eats 3. How many are left?", "She has 16-3=<<16-3=13>>13 eggs.\n#### 13"),
    ("A robe takes 2 bolts and half that much white. How many bolts?", "2/2=<<2/2=1>>1 and 2+1=<<2+1=3>>3.\n#### 3"),
    ("A box holds 48 clips; half are sold. How many were sold?", "They sold 48/2=<<48/2=24>>24.\n#### 24"),
)


class Served(NamedTuple):
    """Where the gateway answers, and a folder for settings and results."""

    url: str
    folder: Path


def started(name: str, *flags: str) -> tuple[subprocess.Popen[str], str]:
    process = subprocess.Popen([*COMMAND, name, *flags], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    assert "ready at" in line, line
    return process, line.split()[-1]


@pytest.fixture(scope="module")
def served(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("eval")
    for split, count in (("train", 9), ("test", 12)):
        rows = [dict(zip(("question", "answer"), PROBLEMS[i % 3], strict=True)) for i in range(count)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    engine, engine_url = started("engine", "--model", str(tiny_model), "--port", str(free_port()))
    try:
        flags = ("--model", str(tiny_model), "--port", str(free_port()), "--data", str(folder / "ledger"))
        gateway, url = started("serve", "--engine", f"sglang={engine_url}", *flags)
        try:
            yield Served(url, folder)
        finally:
            gateway.terminate()
            gateway.communicate(timeout=30)
    finally:
        engine.terminate()
        engine.communicate(timeout=30)


def settings(served: Served, recipe: str, *, rollouts: str = "") -> Path:
    name = re.sub(r"\W", "", Path(recipe).stem)
    file = served.folder / f"{name}.toml"
    file.write_text(
        f"""
        [run]
        dir = '{served.folder / "runs"}'
        name = "{name}"
        steps = 1
        [model]
        path = "unused"
        [gateway]
        url = "{served.url}"
        [sandbox]
        driver = "subprocess"
        [rollouts]
        recipe = '{recipe}'
        concurrency = 3
        max_turns = 1
        max_new_tokens = 12
        {rollouts}
        [evaluation]
        num_tasks = 12
        """
    )
    return file


def gsm8k(served: Served) -> Path:
    of_recipe = "{eval_shots = 1, validation_size = 2}"
    return settings(served, "gsm8k", rollouts=f"data = '{served.folder}'\n        recipe_settings = {of_recipe}")


def evaluating(config: Path, *flags: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*COMMAND, "eval", "--config", str(config), *flags],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "COLUMNS": "160"},
    )


def evaluate(config: Path, *flags: str, code: int = 0) -> tuple[str, str]:
    process = evaluating(config, *flags)
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    return out, err


def test_an_evaluation_that_was_killed_goes_on_and_asks_nothing_twice(served: Served) -> None:
    """I3: what was scored before the kill is what counts after it; what was cut off is asked again."""
    output = served.folder / "killed.json"
    config, flags = gsm8k(served), ("--output", str(output), "--set", "rollouts.max_new_tokens=200")
    with SyncGatewayClient(served.url) as gateway:
        killed = evaluating(config, *flags)
        assert killed.stderr is not None
        while not killed.stderr.readline().startswith("attempts 4/12"):
            assert killed.poll() is None
        earlier = {session["session_id"] for session in eval_sessions(gateway)}
        # Of one that has only begun, the finish cannot be on its way: that is cut for certain.
        while earlier >= {session["session_id"] for session in eval_sessions(gateway) if session["state"] == "open"}:
            assert killed.poll() is None
        killed.send_signal(signal.SIGKILL)
        killed.communicate(timeout=60)
        before = {session["session_id"]: session for session in eval_sessions(gateway)}
        evaluate(config, *flags)
        document = json.loads(output.read_text())
        after = {s["session_id"]: s for s in eval_sessions(gateway, run=document["name"])}
        assert_nobody_trains_on(gateway, document["name"])
    scored = {session_id for session_id, session in before.items() if session["reward"] is not None}
    unfinished = {session_id for session_id, session in before.items() if session["state"] == "open"}
    # A finish that was on its way when the process died may be recorded after that look: such an attempt is scored too.
    cut = {session_id for session_id in unfinished if after[session_id]["reward"] is None}
    assert cut - earlier, "the kill cut off none"
    counted = {record["session_id"] for record in document["records"]}
    assert 4 <= len(scored) < 12
    assert scored | (unfinished - cut) <= counted, "an attempt that was scored is not made again"
    assert {i: after[i]["created_at"] for i in before} == {i: before[i]["created_at"] for i in before}
    assert {after[session_id]["outcome"] for session_id in cut} == {"abandoned"}
    assert {session_id + ".again1" for session_id in cut} <= counted
    assert after.keys() == counted | cut
    assert {record["task_index"] for record in document["records"]} == set(range(12))
    assert document["figures"]["num_failed"] == 0


def eval_sessions(gateway: SyncGatewayClient, **labels: str) -> list[dict[str, Any]]:
    return gateway.sessions(labels={"purpose": "eval", **labels}, limit=1000)


def assert_nobody_trains_on(gateway: SyncGatewayClient, run_name: str) -> None:
    """A trainer's lease of a run of that name finds nothing, and the evaluation's consumer has left nothing."""
    all_of_it = {"run": run_name}
    training = {"run": run_name, "purpose": "train"}
    assert gateway.lease(consumer="trainer", limit=99, whole_groups=False, labels=training) is None
    assert gateway.lease(consumer=f"{run_name}.eval", limit=99, whole_groups=False, labels=all_of_it) is None


def test_the_file_holds_what_the_gateway_recorded_and_can_be_scored_again(served: Served) -> None:
    """I1: tokens and replies are those of the ledger, and the same replies give the same scores."""
    config, output = gsm8k(served), served.folder / "twice.json"
    # One at a time: which requests an engine computes together can turn the likeliest of two tokens that are near.
    alone = ("--set", "rollouts.concurrency=1")
    table, progress = evaluate(config, "--samples", "2", "--num-tasks", "3", "--output", str(output), *alone)
    assert "attempts 6/6" in progress
    for row in ("mean reward", "pass@1", "pass@2", "truncated", "tokens sampled", "seconds an attempt"):
        assert row in table
    document = json.loads(output.read_text())
    assert document["served"]["policy_version"] == 0
    assert document["settings"]["recipe"]["eval_shots"] == 1
    assert document["settings"]["rollouts"]["temperature"] == 0.0
    with SyncGatewayClient(served.url) as gateway:
        for record in document["records"]:
            [turn] = gateway.turns(record["session_id"])
            assert record["num_tokens"] == turn["num_output_tokens"]
            assert record["reply"] == turn["reply"]["content"] == record["messages"][-1]["content"]
            assert turn["sampling"]["temperature"] == 0.0
            assert len(turn["added_messages"]) == 4, "system, one example of two messages, the question"
            session = gateway.session(record["session_id"])
            assert session["labels"]["purpose"] == "eval"
            assert session["finish"]["metadata"]["verdict"] == record["verdict"]
    greedy = [[r["reply"] for r in document["records"] if r["task_index"] == i] for i in range(3)]
    assert all(a == b for a, b in greedy), "temperature 0"

    again, _ = evaluate(config, "--rescore", str(output))
    assert "0 of 6 changed" in again
    document["records"][0]["messages"] = [{"role": "assistant", "content": "\\boxed{13}"}]
    document["records"][0]["outcome"] = "completed"
    output.write_text(json.dumps(document))
    changed, _ = evaluate(config, "--rescore", str(output), "--output", str(served.folder / "scored.json"))
    assert "1 of 6 changed" in changed
    figures = json.loads((served.folder / "scored.json").read_text())["figures"]
    assert figures["verdicts"]["correct"] == 1
    assert figures["pass_at_1"]["mean"] == pytest.approx(0.5 / 3)


def test_a_finished_evaluation_is_shown_again_and_made_again_under_another_name(served: Served) -> None:
    config = gsm8k(served)
    names = []
    for flags in ((), (), ("--name", "once more")):
        evaluate(config, "--num-tasks", "2", *flags, "--output", str(served.folder / "shown.json"))
        document = json.loads((served.folder / "shown.json").read_text())
        names.append((document["name"], *(record["session_id"] for record in document["records"])))
    assert names[0] == names[1]
    assert set(names[0]).isdisjoint(names[2])


def test_a_recipe_with_tools_is_evaluated_in_sandboxes(served: Served) -> None:
    config, output = settings(served, "calculator"), served.folder / "calculator.json"
    evaluate(config, "--num-tasks", "4", "--greedy", "--output", str(output))
    document = json.loads(output.read_text())
    assert document["figures"]["num_rollouts"] == 4
    assert document["figures"]["num_failed"] == 0
    assert set(document["figures"]["verdicts"]) <= {"truncated", "no_answer", "format_error", "tool_error"}


def test_the_recipe_of_the_readme_runs(served: Served) -> None:
    """A recipe of the user's own, as the README shows one, found by `FILE.py:NAME`."""
    [example] = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    file = served.folder / "reversing.py"
    file.write_text(textwrap.dedent(example))
    output = served.folder / "reversing.json"
    evaluate(settings(served, f"{file}:Reversing"), "--num-tasks", "3", "--output", str(output))
    document = json.loads(output.read_text())
    assert document["recipe"] == f"{file}:Reversing"
    assert document["figures"]["num_rollouts"] == 3
    recipe = load_recipe(f"{file}:Reversing")
    [task] = recipe.eval_tasks(1)
    assert recipe.score(task, [{"role": "assistant", "content": task.facts}]).reward == 1.0
    assert recipe.score(task, [{"role": "assistant", "content": "x"}]).reward == 0.0


def test_an_attempt_that_cannot_be_scored_makes_the_command_fail_and_is_tried_again(served: Served) -> None:
    config = gsm8k(served)
    output = served.folder / "failed.json"
    flags = ("--num-tasks", "2", "--set", "rollouts.max_new_tokens=5000", "--output", str(output))
    tries: list[dict[str, Any]] = []
    for _ in range(2):
        _, err = evaluate(config, *flags, code=1)
        assert "2 of 2 attempts have no score" in err
        tries.append(json.loads(output.read_text()))
    assert tries[0]["figures"]["errors"] == {"context_length_exceeded": 2}
    assert [record["session_id"] + ".again1" for record in tries[0]["records"]] == [
        record["session_id"] for record in tries[1]["records"]
    ]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--set", "rollouts.recipe=chess"), "there is no 'chess'; there are calculator, gsm8k"),
        (("--set", "rollouts.recipe=nowhere.py:Chess"), "no file nowhere.py"),
        (("--set", "rollouts.data=nowhere"), "nowhere lacks train.jsonl and test.jsonl"),
        (("--set", "rollouts.recipe_settings.shots=3"), "unknown key 'shots'"),
        (("--set", "gateway.url=http://127.0.0.1:9"), "start it with `verbatim serve`"),
        (("--num-tasks", "0"), "say how many with --num-tasks"),
        (("--num-tasks", "-3"), "evaluation.num_tasks is -3"),
        (("--samples", "0"), "evaluation.samples is 0"),
        (("--rescore", "nowhere.json"), "nowhere.json"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(served: Served, flags: tuple[str, ...], says: str) -> None:
    _, err = evaluate(gsm8k(served), *flags, code=2)
    assert says in err
    assert len(err.strip().splitlines()) == 1
