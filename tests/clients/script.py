"""What the scripted model says to the clients' questions: rules for `gateway_with_script.py`."""

from __future__ import annotations

import json
from typing import Any

NUM_TURNS = 5
"""Calls of the model in every conversation that begins with SEARCH, SHELL or TERMINAL."""

SEARCH = "Search."
ANSWER = "It is behind step 5."
SHELL_TOOLS = "Look around with your tool."
SHELL_TEXT = "Look around in your own words."
TERMINAL = "Count in the terminal."
PRINTING = "Print much in the terminal."
FLOODING = "Print far too much in the terminal."
RAMBLING = "Say too much in the terminal."
TALK = "Say one."


def thought(text: str, reply: str) -> str:
    """A reply behind reasoning."""
    return f"<think>\n{text}\n</think>\n{reply}"


def call(name: str, **arguments: Any) -> str:
    """One tool call as the model writes it."""
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def block(command: str) -> str:
    """One action of mini-swe-agent's text mode."""
    return f"THOUGHT: on.\n\n```mswea_bash_command\n{command}\n```"


def keys(*keystrokes: str, complete: bool = False) -> str:
    """One reply of terminus-2."""
    commands = [{"keystrokes": text, "duration": 0.1} for text in keystrokes]
    return json.dumps({"analysis": "so far", "plan": "on", "commands": commands, "task_complete": complete})


SUBMIT = "echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT"

# Commands are written so that what they print is not in the command itself.
RULES: list[dict[str, Any]] = [
    {"after": "\0", "reply": "hello"},
    {"after": SEARCH, "reply": thought("begin", call("look", step=1))},
    {"after": "found-1", "reply": thought("on", f"Two at once.\n{call('look', step=2)}\n{call('look', step=3)}")},
    {"after": "found-3", "reply": thought("more", call("look", step=4))},
    {"after": "found-4", "reply": call("look", step=5)},
    {"after": "found-5", "reply": thought("done", ANSWER)},
    {"after": SHELL_TOOLS, "reply": thought("begin", call("bash", command="printf 'tool-%s' a"))},
    {"after": "tool-a", "reply": thought("on", "Next.\n" + call("bash", command="printf 'tool-%s' b"))},
    {"after": "tool-b", "reply": call("bash", command="printf 'tool-%s' c > note; cat note")},
    {"after": "tool-c", "reply": thought("more", call("bash", command="ls; printf 'tool-%s' d"))},
    {"after": "tool-d", "reply": call("bash", command=SUBMIT)},
    {"after": SHELL_TEXT, "reply": thought("begin", block("printf 'text-%s' a"))},
    {"after": "text-a", "reply": block("printf 'text-%s' b")},
    {"after": "text-b", "reply": thought("on", block("printf 'text-%s' c > note; cat note"))},
    {"after": "text-c", "reply": block("ls; printf 'text-%s' d")},
    {"after": "text-d", "reply": thought("done", block(SUBMIT))},
    {"after": TERMINAL, "reply": thought("begin", keys("printf 'term-%s\\n' a\n"))},
    {"after": "term-a", "reply": thought("on", keys("printf 'term-%s\\n' b\n"))},
    {"after": "term-b", "reply": keys("printf 'term-%s\\n' c\n")},
    {"after": "term-c", "reply": thought("done", keys(complete=True))},
    {"after": "Are you sure you want to mark the task as complete?", "reply": keys(complete=True)},
    {"after": PRINTING, "reply": thought("begin", keys("seq 1 400; printf 'print-%s\\n' a\n"))},
    {"after": "print-a", "reply": keys("seq 1 400; printf 'print-%s\\n' b\n")},
    {"after": "print-b", "reply": keys("seq 1 400; printf 'print-%s\\n' c\n")},
    {"after": FLOODING, "reply": thought("begin", keys("seq 1 3000; printf 'flood-%s\\n' a\n"))},
    {"after": "flood-a", "reply": keys("seq 1 3000; printf 'flood-%s\\n' b\n")},
    {"after": "so far in order to continue.", "reply": thought("look back", "Numbers were printed.")},
    {"after": "so ask everything you need to know.", "reply": "Which numbers? And what is left?"},
    {"after": "And what is left?", "reply": thought("recall", "From one on. Only the end.")},
    {"after": "You can no longer ask questions.", "reply": keys("printf 'end-%s\\n' a\n")},
    {"after": "end-a", "reply": keys(complete=True)},
    {"after": RAMBLING, "reply": keys(*[f"echo {i}\n" for i in range(20)])},
    {"after": "Re-issue this request", "reply": keys(complete=True)},
    {"after": TALK, "reply": thought("begin", "One.")},
    {"after": "Say two.", "reply": thought("on", "Two.")},
    {"after": "Say three.", "reply": "Three."},
    {"after": "Say four.", "reply": thought("more", "Four.")},
    {"after": "Say five.", "reply": thought("done", "Five.")},
    {"after": "as an object", "reply": thought("so", '{"step": 7}')},
    {"after": "fails once", "reply": thought("again", ANSWER), "breaks": [0]},
    {"after": "breaks midway", "reply": "one two three four five six", "breaks": [4, 0, 0, 0]},
    {"after": "takes its time", "reply": "one two three four five six", "delay_seconds": 0.4},
    {"after": "too many", "reply": "come back later", "raises": "TooManyRequests"},
]
