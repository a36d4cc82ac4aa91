"""What is kept of a session's latest calls says what a look at everything would, whatever came before."""

from __future__ import annotations

import random

import numpy as np
import orjson
import pytest

from gateway.contracts.examples import example_turn
from gateway.contracts.generation import TokenIds
from gateway.contracts.records import Attachment, MatchTier, RootContext, SegmentReason
from gateway.contracts.versions import VersionSpan
from gateway.sessions.recent import Recent, RecentBudget
from gateway.sessions.tree import Node, TurnTree

LONG = 4096
"""Tokens from which on a prompt's JSON is kept."""


def some_ids(generator: random.Random, number: int) -> TokenIds:
    return np.array([generator.randrange(200_000) for _ in range(number)], dtype=np.int32)


def recorded(tree: TurnTree, parent: Node | None, added: TokenIds, output: TokenIds) -> Node:
    parent_id = None if parent is None else parent.record.turn_id
    attachment = Attachment(parent_id, None, MatchTier.NONE, None if parent else SegmentReason.FIRST)
    turn = example_turn(
        tree.take_index(),
        attachment=attachment,
        root=RootContext((), {}) if parent is None else None,
        prompt_token_ids=added,
        output_token_ids=output,
        output_logprobs=np.zeros(len(output), dtype=np.float32),
        version_spans=(VersionSpan(0, len(output), 0),) if len(output) else (),
    )
    return tree.add(turn)


@pytest.mark.parametrize("seed", range(30))
def test_the_written_prompt_is_the_prompt_whatever_the_agent_did(seed: int) -> None:
    """I1 through forks, new segments, turns that came to nothing, empty replies and a budget that is too small."""
    generator = random.Random(seed)
    recent, tree, nodes = Recent(), TurnTree(), list[Node | None]([None])
    budget = RecentBudget(generator.choice((10**9, 60_000)))
    num_written = num_short = 0
    for _ in range(40):
        extends = nodes[-1] if generator.random() < 0.8 else generator.choice(nodes)
        pieces = () if extends is None else recent.token_ids(extends)
        added = some_ids(generator, generator.choice((0 if pieces else 1, 7, 300, 5_000)))
        prompt = np.concatenate([*pieces, added])
        written = recent.write(extends, added, prompt)
        if written is None:
            num_short += 1
            assert len(prompt) < LONG
        else:
            num_written += 1
            assert written.ids is prompt
            assert orjson.loads(written.text) == prompt.tolist()
        budget.note(recent)
        if generator.random() < 0.8:  # else nothing was sampled
            node = recorded(tree, extends, added, some_ids(generator, generator.choice((0, 1, 40))))
            recent.keep(node, prompt)
            nodes.append(node)
            budget.note(recent)
    assert num_written
    assert num_short


def test_who_has_no_room_forgets_the_text_also_of_a_prompt_that_is_on_its_way() -> None:
    generator = random.Random(0)
    recent, other = Recent(), Recent()
    ids = some_ids(generator, LONG)
    written = recent.write(None, ids, ids)
    assert written is not None
    budget = RecentBudget(len(written.text) + 100)
    budget.note(recent)
    assert orjson.loads(written.text) == ids.tolist()
    assert other.write(None, ids, ids) is not None
    budget.note(other)
    assert (written.text, recent.num_bytes) == (b"", 0)
    assert other.num_bytes > 0
