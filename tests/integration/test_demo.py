"""The demo, shortened: the whole loop as processes, its report against the ledger, a trainer killed half-way."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

VERBATIM = Path(sys.executable).with_name("verbatim")
SHORT = (
    *("--warmup-steps", "12"),
    *("--set", "rollouts.groups_per_step=2"),
    *("--set", "rollouts.group_size=4"),
    *("--set", "evaluation.num_tasks=8"),
)
REPORT_KEYS = {
    "reward_before",
    "reward_after",
    "tokens_sampled",
    "tokens_trained",
    "rows_verified_share",
    "kl_with_replay",
    "kl_without_replay",
    "extreme_share_with_replay",
    "extreme_share_without_replay",
    "policy_versions",
    "seconds",
    "peak_rss_bytes",
}


@pytest.mark.timeout(240)
def test_a_demo_whose_trainer_was_killed_goes_on_and_loses_no_token(tmp_path: Path) -> None:
    """I3, I5, I10: every sampled token is trained once, the version of each is known, every row is verified."""
    data = tmp_path / "run"
    killed = _demo(data, steps=3)
    assert killed.stderr is not None
    for line in killed.stderr:
        if line.startswith("step 1/3"):
            _trainer_of(killed.pid).send_signal(signal.SIGKILL)
            break
    rest = killed.communicate(timeout=60)[1]
    assert killed.returncode == 1, rest
    assert "train ended with SIGKILL" in rest

    again = _demo(data, steps=3)
    out, err = again.communicate(timeout=200)
    assert again.returncode == 0, err
    report = json.loads(out.splitlines()[-1])
    assert report.keys() >= REPORT_KEYS
    assert report["steps"] == 3
    assert report["tokens_sampled"] == report["tokens_trained"] > 0
    assert report["rows_verified_share"] == 1.0
    assert report["policy_versions"] == [0, 1, 2]
    assert report["kl_with_replay"] <= report["kl_without_replay"]
    assert _tokens_in_ledger(data / "ledger", purpose="train") == report["tokens_sampled"] + report["tokens_unrewarded"]
    steps = [json.loads(line).get("step") for line in (data / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [step for step in steps if step is not None] == [1, 2, 3]


def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "demo.json").write_text(json.dumps({"seed": 5, "warmup_steps": 12}))
    demo = _demo(tmp_path, steps=1, seed=6)
    _, err = demo.communicate(timeout=60)
    assert demo.returncode == 2
    assert "choose another --data" in err
    assert len(err.splitlines()) == 1


def _demo(data: Path, *, steps: int, seed: int = 5) -> subprocess.Popen[str]:
    words = ("demo", "--json", "--seed", str(seed), "--steps", str(steps), "--data", str(data), *SHORT)
    return subprocess.Popen(
        [VERBATIM, *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "COLUMNS": "200"},
    )


def _trainer_of(pid: int) -> psutil.Process:
    (trainer,) = (child for child in psutil.Process(pid).children() if "train" in child.cmdline())
    return trainer


def _tokens_in_ledger(folder: Path, *, purpose: str) -> int:
    """Output tokens as SQLite alone counts them: another reader than the one the report uses."""
    database = sqlite3.connect(f"file:{folder / 'ledger.sqlite'}?mode=ro", uri=True)
    try:
        (count,) = database.execute(
            "SELECT sum(length(output_token_ids) / 4) FROM turns JOIN session_labels USING (session_id)"
            " WHERE name = CAST('purpose' AS BLOB) AND value = CAST(? AS BLOB)",
            (purpose,),
        ).fetchone()
    finally:
        database.close()
    return int(count)
