"""Raw prompts find recorded tokens: across half characters and spelling rules of tokenizers, and apart from chats."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors, trainers

from gateway.contracts.errors import InvalidRequest
from gateway.contracts.examples import example_turn
from gateway.contracts.generation import Finish, FinishReason, LogprobKind
from gateway.contracts.records import Attachment, MatchTier, RootContext, SegmentReason, TurnRecord
from gateway.contracts.replies import ContentDelta
from gateway.contracts.versions import VersionSpan
from gateway.sessions.attach import attach
from gateway.sessions.model import ServedModel
from gateway.sessions.raw import RawPlace, TokenPaths, attach_raw, check_ids
from gateway.sessions.tree import TurnTree
from gateway.tito.conversation import HistoryPolicy
from gateway.tito.tokenizer import ChatTokenizer
from gateway.wire.request import RawPrompt

END = "<|im_end|>"


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> ChatTokenizer:
    return ChatTokenizer.load(tiny_model)


@pytest.fixture(scope="module")
def spaced_tokenizer() -> ChatTokenizer:
    """As SentencePiece models are converted: a space before every text, and a first token of its own."""
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<unk>", *alphabet], show_progress=False)
    made.train_from_iterator(["What is 48/2? The answer is 24. user assistant"], trainer)
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    description = json.loads(made.to_str())
    description["added_tokens"] = [token for token in description["added_tokens"] if token["content"] == "<unk>"]
    made = Tokenizer.from_str(json.dumps(description))
    made.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in ("<s>", END)])
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", made.token_to_id("<s>"))]
    )
    return ChatTokenizer(made.to_str().encode(), eos_token="<|im_end|>")


class Recording:
    """A tree of raw turns, as `run_turn` records them."""

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self.tokenizer = tokenizer
        self.tree = TurnTree()
        self.paths = TokenPaths(self.tree)

    def find(self, prompt: str | Sequence[int]) -> RawPlace:
        raw = (
            RawPrompt(text=prompt) if isinstance(prompt, str) else RawPrompt(token_ids=np.array(prompt, dtype=np.int32))
        )
        return attach_raw(self.tree, self.paths, raw, self.tokenizer)

    def answer(self, prompt: str | Sequence[int], output: Sequence[int]) -> TurnRecord:
        """One turn, whose parent must be the one before it."""
        found = self.find(prompt)
        assert (found.place.parent is None) == (len(self.tree) == 0)
        parent = found.place.parent
        turn = record(
            len(self.tree),
            None if parent is None else parent.record.turn_id,
            found.added_ids(self.tokenizer).tolist(),
            output,
            added_messages=(found.message(self.tokenizer),),
        )
        self.tree.add(turn)
        return turn


def record(
    index: int, parent_id: str | None, prompt: Sequence[int], output: Sequence[int], **fields: Any
) -> TurnRecord:
    first = SegmentReason.FIRST if parent_id is None else None
    values: dict[str, Any] = {
        "turn_id": f"turn-{index}",
        "attachment": Attachment(parent_id, parent_id, MatchTier.NONE, first),
        "root": RootContext((), {}) if parent_id is None else None,
        "added_messages": ({"role": "prompt", "content": "p"},),
        "reply": {"role": "assistant", "content": "r"},
        "prompt_token_ids": np.array(prompt, dtype=np.int32),
        "output_token_ids": np.array(output, dtype=np.int32),
        "output_logprobs": np.zeros(len(output), dtype=np.float32),
        "version_spans": (VersionSpan(0, len(output), 0),) if output else (),
        "logprob_kind": LogprobKind.RAW,
        "meta": {"certified_by": "raw"},
    }
    return example_turn(index, **values | fields)


def test_a_character_that_two_turns_share_is_found_whole(tokenizer: ChatTokenizer) -> None:
    """I1: a reply cut inside a character goes on; the text of both turns has the character."""
    first, *rest = tokenizer.encode("🙂").tolist()
    assert rest
    recording = Recording(tokenizer)
    recording.answer("so", [first])
    recording.answer([*recording.tree["turn-0"].token_ids().tolist(), *rest], tokenizer.encode(" it").tolist())
    found = recording.find("so🙂 it is")
    assert found.place.parent is recording.tree["turn-1"]
    assert found.added == " is"


def test_a_reply_cut_inside_a_character_is_found_as_it_was_shown(tokenizer: ChatTokenizer) -> None:
    """I1: the client saw U+FFFD; what was sampled stays."""
    recording = Recording(tokenizer)
    recording.answer("so", tokenizer.encode("🙂").tolist()[:1])
    found = recording.find("so\ufffd and?")
    assert found.place.parent is recording.tree["turn-0"]
    assert found.added == " and?"


def test_texts_go_on_under_a_tokenizer_that_decodes_other_spaces(spaced_tokenizer: ChatTokenizer) -> None:
    """I1: what was sent counts as it was sent; BOS is put before a text once, and not twice where it stands."""
    assert spaced_tokenizer.opening == "<s>"
    recording = Recording(spaced_tokenizer)
    text = f"What is{END}user"
    assert spaced_tokenizer.decode(spaced_tokenizer.encode(text)) != text
    first = recording.answer(text, spaced_tokenizer.encode_after(f" The answer{END}").tolist())
    assert first.prompt_token_ids[0] == spaced_tokenizer.token_id("<s>")
    second = recording.answer(f"{text} The answer{END}assistant", spaced_tokenizer.encode_after("24.").tolist())
    assert second.prompt_token_ids.tolist() == spaced_tokenizer.encode_after("assistant").tolist()
    assert recording.find(f"<s>{text} The answer{END}assistant24. is").added == " is"
    bare = RawPrompt(text=text, adds_special_tokens=False)
    assert attach_raw(recording.tree, recording.paths, bare, spaced_tokenizer).place.parent is None


def test_the_text_of_a_prompt_of_ids_is_found_too(spaced_tokenizer: ChatTokenizer) -> None:
    recording = Recording(spaced_tokenizer)
    ids = spaced_tokenizer.encode("<s>What is").tolist()
    recording.answer(ids, spaced_tokenizer.encode_after(" The").tolist())
    path = recording.tree["turn-0"].token_ids().tolist()
    recording.answer([*path, *spaced_tokenizer.encode_after(" answer").tolist()], [spaced_tokenizer.eos_token_ids[0]])
    found = recording.find(spaced_tokenizer.decode(recording.tree["turn-1"].token_ids()) + "more")
    assert (found.place.parent, found.added) == (recording.tree["turn-1"], "more")


def test_no_chat_finds_a_raw_turn(tokenizer: ChatTokenizer) -> None:
    """I1: messages that look just like what stands for a raw prompt are another conversation."""
    recording = Recording(tokenizer)
    turn = recording.answer("so", [5])
    messages = [*turn.added_messages, turn.reply, {"role": "user", "content": "more"}]
    place = attach(recording.tree, messages, RootContext((), {}))
    assert (place.parent, place.follows, place.reason) == (None, None, SegmentReason.NO_MATCH)


def test_the_deepest_path_wins_and_of_equal_paths_the_delivered_one() -> None:
    """I3: siblings that sampled the same are told apart by what the agent saw."""
    tree = TurnTree()
    tree.add(record(0, None, [1, 2], [3]))
    for index in (1, 2, 3):
        tree.add(record(index, "turn-0", [4], [5]))
    tree.mark_delivered("turn-2", 1.0)
    paths = TokenPaths(tree)

    def parent(*ids: int) -> str | None:
        node = paths.by_ids(np.array(ids, dtype=np.int32))
        return None if node is None else node.record.turn_id

    assert parent(1, 2, 3, 4, 5) == parent(1, 2, 3, 4, 5, 6) == "turn-2"
    assert parent(1, 2, 3, 4) == parent(1, 2, 3) == "turn-0"
    assert parent(1, 2) is None
    tree.add(record(4, "turn-3", [], [6]))
    assert parent(1, 2, 3, 4, 5, 6) == "turn-4"
    tree.add(record(5, "turn-4", [7], []))  # sampled nothing: there is nothing to go on from
    assert parent(1, 2, 3, 4, 5, 6, 7) == "turn-4"


@pytest.mark.parametrize(("ids", "said"), [([1, 400], "400 (at index 1)"), ([-1], "-1"), ([], "empty")])
def test_ids_that_a_model_does_not_have_are_refused_by_name(ids: list[int], said: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_ids(np.array(ids, dtype=np.int32), vocab_size=400)
    assert said in caught.value.message


def test_a_plain_reply_keeps_markup_and_space_and_is_cut_at_its_stop_string(tiny_model: Path) -> None:
    model = ServedModel.load(tiny_model, history_policy=HistoryPolicy.KEEP)
    text = "\n <think>\nso\n</think>\n<tool_call> x </tool_call> \nObservation:"
    ids = model.tokenizer.encode(text).tolist()
    parser = model.plain_parsing.start(prompt_ids=[1], tools=({},), stop=("Observation:",))
    shown = [delta for token_id in ids for delta in parser.feed([token_id])]
    late, reply = parser.finish(Finish(FinishReason.STOP, "Observation:"))
    assert reply.content == text.partition("Observation:")[0]
    assert "".join(delta.text for delta in [*shown, *late] if isinstance(delta, ContentDelta)) == reply.content
    assert (reply.reasoning, reply.tool_calls, reply.flags) == (None, (), ())
