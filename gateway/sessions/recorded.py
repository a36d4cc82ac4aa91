"""A reply as the turn tree has it: of one turn, or of several that each went on where the one before broke off."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from msgspec import Struct
from msgspec.structs import replace

from gateway.contracts.experts import RoutedExperts
from gateway.contracts.generation import TokenIds, TopLogprob
from gateway.contracts.ports import Ledger
from gateway.contracts.replies import ParsedReply, ReplyFlag, ToolCall
from gateway.contracts.versions import VersionSpan, join_spans, shifted_spans
from gateway.sessions.messages import reasoning_of
from gateway.sessions.tree import Node


class WholeReply(Struct, frozen=True, eq=False):
    """A reply and its prompt, however many turns it took.

    prompt_token_ids int32[P], token_ids int32[C], logprobs float32[C]; version_spans cover [0, C); top_logprobs: a row
    for each token, () where none were asked for.
    """

    prompt_token_ids: TokenIds
    token_ids: TokenIds
    logprobs: npt.NDArray[np.float32]
    version_spans: tuple[VersionSpan, ...]
    top_logprobs: Sequence[Sequence[TopLogprob]]
    reply: ParsedReply

    def behind(self, begun: WholeReply) -> WholeReply:
        """This rest of a reply with what came before it; the prompt and the text are of the whole already."""
        spans = [*begun.version_spans, *shifted_spans(self.version_spans, len(begun.token_ids))]
        return replace(
            self,
            token_ids=np.concatenate([begun.token_ids, self.token_ids]),
            logprobs=np.concatenate([begun.logprobs, self.logprobs]),
            version_spans=join_spans(spans),
            top_logprobs=[*begun.top_logprobs, *self.top_logprobs],
        )


def recorded_reply(node: Node) -> WholeReply:
    """The whole reply that ends with this turn."""
    records = [part.record for part in node.reply_nodes()]
    num_tokens = sum(len(record.output_token_ids) for record in records)
    path = node.token_ids()
    spans: list[VersionSpan] = []
    shift = 0
    for record in records:
        spans += shifted_spans(record.version_spans, shift)
        shift += len(record.output_token_ids)
    return WholeReply(
        prompt_token_ids=path[: len(path) - num_tokens],
        token_ids=path[len(path) - num_tokens :],
        logprobs=np.concatenate([record.output_logprobs for record in records]),
        version_spans=join_spans(spans),
        top_logprobs=[row for record in records for row in record.top_logprobs],
        reply=_parsed(node),
    )


async def recorded_rows(ledger: Ledger, node: Node) -> RoutedExperts | None:
    """Routing rows of a whole reply, None where it has none; raises LedgerCorrupt."""
    records = [part.record for part in node.reply_nodes() if part.record.experts_stop > part.record.experts_start]
    rows = [await ledger.experts(record.session_id, record.turn_id) for record in records]
    return joined_rows([part for part in rows if part is not None])


def joined_rows(parts: Sequence[RoutedExperts]) -> RoutedExperts | None:
    """Rows that follow each other as one, None where they do not or there are none (I9)."""
    if not parts or any(one.stop != other.start for one, other in pairwise(parts)):
        return None
    return parts[0] if len(parts) == 1 else RoutedExperts(np.concatenate([part.ids for part in parts]), parts[0].start)


def _parsed(node: Node) -> ParsedReply:
    message, meta = node.record.reply, node.record.meta
    calls = [
        ToolCall(call["id"], call["function"]["name"], call["function"]["arguments"])
        for call in message.get("tool_calls", ())
    ]
    flags = tuple(ReplyFlag(flag) for flag in meta["flags"])
    return ParsedReply(message.get("content"), reasoning_of(message), tuple(calls), flags, meta["num_reasoning_tokens"])
