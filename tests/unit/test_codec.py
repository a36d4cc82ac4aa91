"""The feed's safetensors body: read back equal, readable by safetensors itself, and damaged bodies named."""

from __future__ import annotations

import json
import struct
from dataclasses import fields, replace

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.contracts.codec import BODY_VERSION, decode_rollout, encode_rollout
from gateway.contracts.errors import IntegrityError, SchemaMismatch
from gateway.contracts.generation import LogprobKind
from gateway.contracts.records import FinishRecord, SessionOrigin, SessionRecord
from gateway.contracts.rollouts import FinishedRollout, LeftOut, PickReport
from gateway.contracts.samples import Segment, TurnSpan


def a_segment(num_tokens: int, *, routing: type[np.uint8] | type[np.uint16] | None, seed: int = 0) -> Segment:
    generator = np.random.default_rng(seed)
    sampled = generator.random(num_tokens) < 0.5
    high = 300 if routing is np.uint16 else 200
    return Segment(
        segment_id=f"a/b é:{seed}",
        turns=(TurnSpan("t0", 0, 1, num_tokens, True, "stop", 0.7, 1.0, -1),),
        token_ids=generator.integers(0, 2**31 - 1, num_tokens, dtype=np.int32),
        loss_mask=sampled,
        rollout_logprobs=np.where(sampled, -generator.random(num_tokens), np.nan).astype(np.float32),
        policy_version=np.where(sampled, 7, -1).astype(np.int32),
        routed_experts=None
        if routing is None
        else generator.integers(0, high, (num_tokens - 1, 3, 2)).astype(np.dtype(routing)),  # type: ignore[arg-type]
        routed_valid=generator.random(num_tokens - 1) < 0.5,
        logprob_kind=list(LogprobKind)[seed % 3],
    )


def a_rollout(*segments: Segment) -> FinishedRollout:
    session = SessionRecord(
        session_id="a/b é",
        group="g",
        group_size=4,
        task={"text": "lone \ud800 and 🙂", "big": 2**70},
        labels={"run": "1"},
        metadata={},
        sampling={},
        ttl_seconds=None,
        key_hash="",
        origin=SessionOrigin.ON_THE_SPOT,
        complete=False,
        gaps=(1, 3),
        created_at=1.5,
    )
    finish = FinishRecord("a/b é", "snap", None, "truncated", {"x": [None, 0.1]}, 2.5)
    trained = sum(int(segment.loss_mask.sum()) for segment in segments)
    pick = PickReport("final-path", trained + 9, trained, (LeftOut("no_logprob", 1, 2), LeftOut("undelivered", 3, 7)))
    return FinishedRollout(session, finish, segments, num_experts=512, reports={"turns": 3}, pick=pick)


def body_of(rollout: FinishedRollout) -> bytes:
    return b"".join(encode_rollout(rollout))


def assert_same(found: FinishedRollout, expected: FinishedRollout) -> None:
    assert (found.session, found.finish) == (expected.session, expected.finish)
    assert (found.num_experts, found.reports, found.pick) == (expected.num_experts, expected.reports, expected.pick)
    for one, other in zip(found.segments, expected.segments, strict=True):
        for field in fields(Segment):
            mine, theirs = getattr(one, field.name), getattr(other, field.name)
            if isinstance(theirs, np.ndarray):
                assert mine.dtype == theirs.dtype, field.name
                np.testing.assert_array_equal(mine, theirs, err_msg=field.name)
            else:
                assert mine == theirs, field.name


@given(st.lists(st.tuples(st.integers(1, 9), st.sampled_from([None, np.uint8, np.uint16])), max_size=4))
@settings(max_examples=60)
def test_a_rollout_is_read_back_equal(shapes: list[tuple[int, type[np.uint8] | type[np.uint16] | None]]) -> None:
    """I1, I9: NaN stays NaN, missing routing stays missing, one-token segments have no rows."""
    rollout = a_rollout(*(a_segment(n, routing=kind, seed=i) for i, (n, kind) in enumerate(shapes)))
    assert_same(decode_rollout(body_of(rollout)), rollout)


def test_safetensors_itself_reads_the_body() -> None:
    rollout = a_rollout(a_segment(5, routing=np.uint8), a_segment(3, routing=None, seed=1))
    tensors = safetensors.numpy.load(body_of(rollout))
    assert {name: (str(array.dtype), array.shape) for name, array in tensors.items()} == {
        "segments.0.token_ids": ("int32", (5,)),
        "segments.0.rollout_logprobs": ("float32", (5,)),
        "segments.0.policy_version": ("int32", (5,)),
        "segments.0.loss_mask": ("uint8", (5,)),
        "segments.0.routed_valid": ("uint8", (4,)),
        "segments.0.routed_experts": ("uint8", (4, 3, 2)),
        "segments.1.token_ids": ("int32", (3,)),
        "segments.1.rollout_logprobs": ("float32", (3,)),
        "segments.1.policy_version": ("int32", (3,)),
        "segments.1.loss_mask": ("uint8", (3,)),
        "segments.1.routed_valid": ("uint8", (2,)),
    }
    np.testing.assert_array_equal(tensors["segments.1.token_ids"], rollout.segments[1].token_ids)


def test_every_array_lies_aligned_in_the_body() -> None:
    """So that a reader may take views instead of copies, whatever the lengths before it."""
    rollout = a_rollout(*(a_segment(n, routing=np.uint16, seed=n) for n in (2, 3, 6)))
    for segment in decode_rollout(body_of(rollout)).segments:
        arrays = (segment.token_ids, segment.rollout_logprobs, segment.policy_version, segment.routed_experts)
        assert all(array is not None and array.flags.aligned for array in arrays)


def test_another_schema_version_is_refused() -> None:
    body = body_of(a_rollout(a_segment(4, routing=None)))
    other = body.replace(f'"schema_version":"{BODY_VERSION}"'.encode(), b'"schema_version":"9"')
    assert other != body
    with pytest.raises(SchemaMismatch, match="9"):
        decode_rollout(other)


def test_a_cut_body_is_refused_wherever_it_is_cut() -> None:
    body = body_of(a_rollout(a_segment(4, routing=np.uint8)))
    for length in [*range(64), *range(64, len(body), 37), len(body) - 1]:
        with pytest.raises(IntegrityError):
            decode_rollout(body[:length])


def with_header(body: bytes, change: str) -> bytes:
    """The body with one thing of its header changed."""
    (length,) = struct.unpack_from("<Q", body)
    header = json.loads(body[8 : 8 + length])
    name = "segments.0.token_ids"
    if change == "dtype":
        header[name]["dtype"] = "F64"
    elif change == "shape":
        header[name]["shape"] = [99]
    elif change == "offsets":
        header[name]["data_offsets"] = [4, 2]
    elif change == "tensor":
        del header[name]
    elif change == "entry":
        header[name] = None
    elif change == "metadata":
        del header["__metadata__"]["rollout"]
    elif change == "rollout":
        header["__metadata__"]["rollout"] = "{"
    elif change == "session":
        facts = json.loads(header["__metadata__"]["rollout"])
        del facts["session"]["session_id"]
        header["__metadata__"]["rollout"] = json.dumps(facts)
    else:
        header = ["no", "object"]
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body[8 + length :]


@pytest.mark.parametrize(
    "change", ["dtype", "shape", "offsets", "tensor", "entry", "metadata", "rollout", "session", "list"]
)
def test_a_header_that_does_not_describe_a_rollout_is_an_integrity_error(change: str) -> None:
    body = body_of(a_rollout(a_segment(4, routing=np.uint8)))
    with pytest.raises(IntegrityError):
        decode_rollout(with_header(body, change))


def test_arrays_of_unequal_length_are_refused_on_reading() -> None:
    """I2."""
    segment = a_segment(4, routing=None)
    rollout = a_rollout(segment)
    with pytest.raises(IntegrityError):
        replace(segment, token_ids=segment.token_ids[:3])
    (length,) = struct.unpack_from("<Q", body_of(rollout))
    body = body_of(rollout)
    header = json.loads(body[8 : 8 + length])
    header["segments.0.token_ids"]["shape"] = [3]
    header["segments.0.token_ids"]["data_offsets"][1] -= 4
    text = json.dumps(header).encode()
    with pytest.raises(IntegrityError):
        decode_rollout(struct.pack("<Q", len(text)) + text + body[8 + length :])


def test_a_rollout_whose_masks_and_account_disagree_is_refused() -> None:
    """I3: a sampled token is trained or left out for a reason, never neither or both."""
    rollout = a_rollout(a_segment(6, routing=None))
    with pytest.raises(IntegrityError, match="I3"):
        replace(rollout, segments=())
    with pytest.raises(IntegrityError, match="10 sampled tokens, 7 trained and 2 left out"):
        PickReport("all", 10, 7, (LeftOut("no_logprob", 1, 2),))
    body = body_of(rollout)
    trained = rollout.num_trained_tokens
    damaged = body.replace(b'num_trained_tokens\\":%d' % trained, b'num_trained_tokens\\":%d' % (trained + 1))
    assert damaged != body
    with pytest.raises(IntegrityError, match="I3"):
        decode_rollout(damaged)
