"""Weight labels and policy versions: translated both ways, and never guessed."""

from __future__ import annotations

import pytest

from engines.weights.names import policy_version_of, weight_label
from gateway.contracts.errors import EngineProtocolError


@pytest.mark.parametrize("policy_version", [0, 12, 999_999, 1_000_000])
def test_our_labels_read_back(policy_version: int) -> None:
    """I5: the version in a record is the one that was published."""
    assert policy_version_of(weight_label(policy_version), {}) == policy_version


def test_what_was_remembered_counts_first() -> None:
    known = {"default": 4, "release-2": 7, "policy-000001": 9}
    assert [policy_version_of(label, known) for label in known] == [4, 7, 9]


def test_the_first_weights_and_plain_numbers_are_known() -> None:
    assert policy_version_of("default", {}) == 0
    assert policy_version_of("17", {}) == 17


@pytest.mark.parametrize("label", ["", "release-2", "policy-12", "policy-000012x", "-3", "1.5", "١٢"])
def test_other_labels_are_refused(label: str) -> None:
    """I9: no version is made up for weights that nobody published."""
    with pytest.raises(EngineProtocolError, match="no policy version"):
        policy_version_of(label, {})


def test_negative_versions_have_no_label() -> None:
    with pytest.raises(ValueError, match="negative"):
        weight_label(-1)
