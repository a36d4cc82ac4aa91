"""Settings: TOML into dataclasses, wrong keys and values named with what would be right, overrides, and printing."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

import pytest

from gateway.contracts.errors import ConfigurationError
from gateway.contracts.settings import (
    ENGINE_KEY_VARIABLE,
    build_settings,
    engine_key,
    load_settings,
    settings_toml,
)


class Colour(StrEnum):
    RED = "red"
    BLUE = "blue"


@dataclass(frozen=True, slots=True)
class Inner:
    learning_rate: float = 1e-3
    colour: Colour = Colour.RED


@dataclass(frozen=True, slots=True)
class Outer:
    model: Path
    port: int = 8000
    name: str | None = None
    verbose: bool = False
    engines: tuple[str, ...] = ()
    labels: dict[str, str] = field(default_factory=dict)
    inner: Inner = field(default_factory=Inner)


def load(tmp_path: Path, text: str, *overrides: str) -> Outer:
    file = tmp_path / "settings.toml"
    file.write_text(text)
    return load_settings(Outer, file=file, overrides=overrides)


def test_a_file_becomes_the_dataclass(tmp_path: Path) -> None:
    found = load(
        tmp_path,
        'model = "m"\nengines = ["a", "b"]\nlabels = {run = "1"}\n[inner]\nlearning_rate = 1\ncolour = "blue"\n',
    )
    assert found == Outer(
        Path("m"), engines=("a", "b"), labels={"run": "1"}, inner=Inner(learning_rate=1.0, colour=Colour.BLUE)
    )


def test_what_is_printed_reads_back_equal(tmp_path: Path) -> None:
    settings = Outer(
        Path("/models/é"), name='with "quotes"\n', engines=("x",), labels={"a b": "c"}, inner=Inner(colour=Colour.BLUE)
    )
    assert load(tmp_path, settings_toml(settings)) == settings


def test_overrides_win_over_the_file_and_read_as_toml_or_text(tmp_path: Path) -> None:
    found = load(
        tmp_path, 'model = "m"\nport = 1\n', "port=2", "inner.learning_rate=0.5", "name=plain text", 'engines=["z"]'
    )
    assert (found.port, found.inner.learning_rate, found.name, found.engines) == (2, 0.5, "plain text", ("z",))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('model = "m"\nprot = 1\n', "unknown key 'prot'; did you mean 'port'"),
        ('model = "m"\nzzz = 1\n', "known keys: engines, inner"),
        ('model = "m"\n[inner]\nlearning_rat = 1\n', "inner: unknown key 'learning_rat'; did you mean 'learning_rate'"),
        ("port = 1\n", "'model' is required"),
        ('model = "m"\nport = "1"\n', "port: expected int, got '1'"),
        ('model = "m"\nport = true\n', "port: expected int, got True"),
        ('model = "m"\nverbose = 1\n', "verbose: expected bool, got 1"),
        ('model = "m"\nengines = "a"\n', "engines: expected a list"),
        ('model = "m"\nengines = ["a", []]\n', r"engines\[1\]: expected str"),
        ('model = "m"\ninner = 3\n', "inner: expected a table"),
        ('model = "m"\nlabels = 3\n', "labels: expected a table"),
        ('model = "m"\n[inner]\ncolour = "green"\n', "'green' is none of red, blue"),
        ("model = \n", "not valid TOML"),
    ],
)
def test_a_wrong_file_is_named_with_what_is_wrong(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        load(tmp_path, text)


def test_a_missing_or_unreadable_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no such settings file"):
        load_settings(Outer, file=tmp_path / "missing.toml")
    with pytest.raises(ConfigurationError, match="cannot be read"):
        load_settings(Outer, file=tmp_path)
    (tmp_path / "binary.toml").write_bytes(b"model = '\xff'\n")
    with pytest.raises(ConfigurationError, match="not valid TOML"):
        load_settings(Outer, file=tmp_path / "binary.toml")


@pytest.mark.parametrize("override", ["port", "=1", "port.deeper=1"])
def test_a_wrong_override_is_named(tmp_path: Path, override: str) -> None:
    with pytest.raises(ConfigurationError, match=r"--set|port"):
        load(tmp_path, 'model = "m"\nport = 1\n', override)


def test_an_override_cannot_smuggle_in_a_second_key(tmp_path: Path) -> None:
    found = load(tmp_path, 'model = "m"\n', "name=1\nport = 5")
    assert found.port == 8000


def test_defaults_need_no_file() -> None:
    assert build_settings(Outer, {"model": "m"}, where="flags") == Outer(Path("m"))


@pytest.mark.parametrize(("text", "key"), [(None, None), ("", None), (" secret\n", "secret")])
def test_the_engines_key_is_read_alike_wherever_it_is_read(
    text: str | None, key: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file's last line end is no part of it."""
    monkeypatch.delenv(ENGINE_KEY_VARIABLE, raising=False)
    if text is not None:
        monkeypatch.setenv(ENGINE_KEY_VARIABLE, text)
    assert engine_key() == key


@pytest.mark.parametrize("text", ["schlüssel", "two\nlines"])
def test_an_engines_key_that_no_header_can_carry_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENGINE_KEY_VARIABLE, text)
    with pytest.raises(ConfigurationError, match=ENGINE_KEY_VARIABLE):
        engine_key()
