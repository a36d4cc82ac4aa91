"""A call as a JSON object with a name and arguments, as Hermes, Llama and Mistral write it."""

from __future__ import annotations

from collections.abc import Mapping

from gateway.tito.parsing.calls import WrittenCall
from gateway.tito.parsing.json_text import Written, strict_json


def call_of_members(members: Mapping[str, Written]) -> WrittenCall:
    """The call of an object's members: `name`, and `arguments` or `parameters`, kept as written.

    An `id` is the call's. Raises ValueError, KeyError or RecursionError for what is no call.
    """
    name = members["name"].value
    written = members["arguments" if "arguments" in members else "parameters"]
    arguments, value = written.text, written.value
    if type(value) is str:
        arguments = value  # some models write the object as a JSON string
        value = strict_json(arguments)
    if type(name) is not str or not name or type(value) is not dict:
        raise ValueError("a call has a name and an object of arguments")
    name.encode()  # a lone surrogate, which JSON can spell, is no text: UnicodeEncodeError is a ValueError
    call_id = members["id"].value if "id" in members else None
    return WrittenCall(name, arguments, call_id if type(call_id) is str else None)
