"""Which layers of a model have experts, under the names that families give their rules."""

from __future__ import annotations

import pytest

from gateway.contracts.dimensions import ModelDimensions, dimensions_of
from gateway.contracts.generation import JsonValue

SIX = {"num_hidden_layers": 6, "num_experts": 8, "num_experts_per_tok": 2}


@pytest.mark.parametrize(
    ("rule", "layers"),
    [
        ({}, (0, 1, 2, 3, 4, 5)),
        ({"first_k_dense_replace": 1, "moe_layer_freq": 1}, (1, 2, 3, 4, 5)),  # DeepSeek-V3
        ({"first_k_dense_replace": 0, "moe_layer_freq": 2}, (0, 2, 4)),
        ({"moe_layer_freq": [0, 1, 1, 0, 1, 1]}, (1, 2, 4, 5)),  # MiMo
        ({"mlp_only_layers": [0, 3], "decoder_sparse_step": 1}, (1, 2, 4, 5)),  # Qwen3-MoE
        ({"mlp_only_layers": [], "decoder_sparse_step": 2}, (1, 3, 5)),
        ({"num_dense_layers": 2}, (2, 3, 4, 5)),  # AFMoE, LFM2-MoE
        ({"interleave_moe_layer_step": 2, "moe_layers": None}, (1, 3, 5)),  # Llama 4
        ({"moe_layers": [1, 4]}, (1, 4)),
        ({"expert_layer_period": 2, "expert_layer_offset": 1}, (1, 3, 5)),  # Jamba
        ({"moe_layer_interval": 1, "moe_layer_start_index": 1, "moe_layer_end_index": -1}, (1, 2, 3, 4, 5)),  # Ernie
        ({"mlp_layer_types": ["dense", "sparse", "sparse", "sparse", "sparse", "dense"]}, (1, 2, 3, 4)),
        ({"hybrid_override_pattern": "MEM*ME"}, (1, 5)),  # Nemotron-H
    ],
)
def test_layers_with_experts_follow_each_familys_rule(rule: dict[str, JsonValue], layers: tuple[int, ...]) -> None:
    assert dimensions_of(SIX | rule).moe_layers == layers


def test_dense_layers_at_the_beginning_make_another_model() -> None:
    """I2: rows of equal size, and other layers in them."""
    ours, theirs = dimensions_of(SIX | {"vocab_size": 400}), dimensions_of(SIX | {"first_k_dense_replace": 2})
    assert ours.differences(theirs) == (("layers with experts", "0-5", "2-5"),)


def test_dimensions_that_one_side_does_not_know_do_not_differ() -> None:
    known = dimensions_of(SIX | {"vocab_size": 400})
    assert known.differences(ModelDimensions()) == ()
    assert known.differences(ModelDimensions(vocab_size=401)) == (("vocabulary", "400", "401"),)
    dense = dimensions_of({"num_hidden_layers": 6})
    assert [name for name, *_ in known.differences(dense)] == [
        "experts a layer",
        "experts a token",
        "layers with experts",
    ]


def test_a_text_model_inside_another_configuration_is_the_one_that_counts() -> None:
    config = {"num_hidden_layers": 3, "vocab_size": 7, "text_config": {**SIX, "vocab_size": 400}}
    assert dimensions_of(config) == ModelDimensions(6, (0, 1, 2, 3, 4, 5), 8, 2, 400)
