"""`verbatim doctor --model`: whether a model's routing can be replayed, and on what that was proved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from gateway.cli import main
from tests.tiny_moe import ARCHITECTURES, TINY


def folder_of(path: Path, architecture: str, **values: Any) -> Path:
    AutoConfig.for_model(architecture, **values).save_pretrained(path)
    return path


def report(capsys: pytest.CaptureFixture[str], folder: Path) -> dict[str, Any]:
    assert main(["doctor", "--model", str(folder), "--json"]) == 0
    replay: dict[str, Any] = json.loads(capsys.readouterr().out)["replay"]
    return replay


def test_a_served_folder_is_proved_with_its_own_weights(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    replay = report(capsys, tiny_model)
    assert replay == {
        "status": "supported",
        "routers": ["Qwen3MoeTopKRouter"],
        "layers": 4,
        "decoder_layers": 4,
        "left_alone": {},
        "experts": 8,
        "experts_per_token": 2,
        "dtype": "uint8",
        "selected_by": ["topk"],
        "witness": ["router output"],
        "override": [],
        "model_layers": 4,
        "bytes_per_token": 8,
        "proved_on": "the folder's own weights",
    }
    assert main(["doctor", "--model", str(tiny_model)]) == 0
    assert "supported: bitwise on its own routing" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("architecture", "values", "layers", "bytes_per_token"),
    [
        ("qwen3_moe", {"num_hidden_layers": 48}, 48, 384),
        ("deepseek_v3", {}, 61, 488),
        ("longcat_flash", {}, 28, 672),
        ("phimoe", {}, 32, 64),
    ],
)
def test_a_model_that_is_too_large_is_proved_on_few_narrow_layers_with_all_its_experts(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    architecture: str,
    values: dict[str, Any],
    layers: int,
    bytes_per_token: int,
) -> None:
    replay = report(capsys, folder_of(tmp_path, architecture, **values))
    assert (replay["status"], replay["model_layers"], replay["bytes_per_token"]) == (
        "supported",
        layers,
        bytes_per_token,
    )
    assert replay["proved_on"].startswith("random weights of its first ")


def test_a_dense_model_has_nothing_to_replay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {k: v for k, v in TINY.items() if "expert" not in k and k != "moe_intermediate_size"}
    folder = folder_of(tmp_path, "qwen3", **sizes)
    assert report(capsys, folder)["status"] == "dense"
    assert main(["doctor", "--model", str(folder)]) == 0
    assert "dense: nothing to replay" in capsys.readouterr().out


def test_a_model_that_cannot_be_replayed_is_said_to_be_unsupported_with_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    replay = report(capsys, folder_of(tmp_path, "jetmoe", **{**TINY, **ARCHITECTURES.get("jetmoe", {})}))
    assert replay["status"] == "unsupported"
    assert "attention chooses experts too" in replay["reason"]


def test_an_architecture_that_transformers_does_not_know_is_unknown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "nobody_knows"}')
    assert report(capsys, tmp_path)["status"] == "unknown"
