"""One copy of equal lists of tools: all sessions of an agent send the same one, and each keeps it as long as it lives.

Equal is what is the same JSON text, order of keys and spelling of numbers included, so that a template shows the same.
"""

from __future__ import annotations

from collections import OrderedDict

import orjson

from gateway.contracts.generation import JsonValue

_MOST = 64
_MOST_BYTES = 65_536
"""A longer list is kept by the session that sends it: together these are held for good."""

_known: OrderedDict[bytes, tuple[JsonValue, ...]] = OrderedDict()


def shared_tools(tools: tuple[JsonValue, ...]) -> tuple[JsonValue, ...]:
    """These tools, or equal ones that came before; nobody changes either."""
    if not tools:
        return tools
    try:
        text = orjson.dumps(tools)
    except orjson.JSONEncodeError:  # an integer beyond 64 bits
        return tools
    if len(text) > _MOST_BYTES:
        return tools
    found = _known.setdefault(text, tools)
    _known.move_to_end(text)
    if len(_known) > _MOST:
        _known.popitem(last=False)
    return found
