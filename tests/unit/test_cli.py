"""The command line: exit codes, one-line errors, help."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

VERBATIM = Path(sys.executable).with_name("verbatim")


def verbatim(*words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([VERBATIM, *words], capture_output=True, text=True, check=False, cwd=cwd, timeout=120)


def test_help_lists_every_command() -> None:
    result = verbatim("--help")
    assert result.returncode == 0
    for command in ("demo", "serve", "engine", "train", "eval"):
        assert command in result.stdout


def test_no_command_shows_help_and_exits_2() -> None:
    result = verbatim()
    assert result.returncode == 2
    assert "usage: verbatim" in result.stdout


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("engine", "--model", "nowhere", "--port", "1"), "nowhere"),
        (("serve", "--model", "nowhere", "--engine", "sglang=http://127.0.0.1:9", "--port", "1"), "nowhere"),
        (("train", "--config", "nowhere.toml"), "nowhere.toml: no such settings file"),
        (("eval", "--config", "nowhere.toml"), "nowhere.toml: no such settings file"),
        (("serve", "--port", "abc"), "--port: invalid int value: 'abc'"),
        (("demo", "--steps", "0"), "--steps is 0"),
        (("bogus",), "invalid choice: 'bogus'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(words: tuple[str, ...], says: str, tmp_path: Path) -> None:
    result = verbatim(*words, cwd=tmp_path)
    assert result.returncode == 2, result.stderr
    assert says in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("command", ["engine", "serve", "train"])
def test_unknown_setting_names_the_nearest_key(command: str, tmp_path: Path) -> None:
    probe = {
        "engine": ("prot = 1\n", "port"),
        "serve": ("prot = 1\n", "port"),
        "train": ("[modl]\npath = 'x'\n", "model"),
    }[command]
    config = tmp_path / "settings.toml"
    config.write_text(probe[0])
    result = verbatim(command, "--config", str(config))
    assert result.returncode == 2
    assert f"did you mean {probe[1]!r}" in result.stderr


def test_a_foreign_package_of_the_same_name_is_named(tmp_path: Path) -> None:
    intruder = tmp_path / "trainer"
    intruder.mkdir()
    (intruder / "__init__.py").write_text("")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from gateway.cli import main; sys.exit(main(['--help']))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert str(intruder) in result.stderr
