"""The small world of the simulated agents: what users ask, tools say and models write, and the text to train on."""

from __future__ import annotations

from typing import Any

QUESTIONS = (
    "What is 48/2? Use the calculator.",
    "Please list the files in the folder and count the lines of each.",
    "Why does the test fail, and how would you repair it?",
    "Translate this into French: the weather is fine today.",
    "Write a function that sorts a list of names.",
    "i",
    "  Look at this:\n\n    def f(x):\n        return x + 1\n",
    "Und wie heißt das auf Deutsch?\n",
    "北京今天的天气怎么样？",
    "Ça va? Très bien, merci 🙂🙃",
    "Привет, как дела?",
    "x = 1\r\ny = 2\t# tabs and returns",
)
"""What users say."""

RESULTS = (
    "24",
    '{"ok": true, "lines": [1, 2, 3]}',
    "total 8\n-rw-r--r-- 1 root root 12 main.py\n-rw-r--r-- 1 root root 90 test_main.py\n",
    "Traceback (most recent call last):\n  File \"main.py\", line 3, in <module>\nNameError: name 'y' is not defined",
    "",
    " done \n",
    "error: no such file",
    "温度 21°C, 🌤",
    "\n\n1 passed in 0.03s\n",
)
"""What tools answer."""

SENTENCES = (
    "The answer is 24.",
    "Let me look at the files first.",
    "I will run the tests and then repair the function.",
    "It fails because the name is not defined.",
    " Fine.\n",
    "Here is the list:\n\n1. main.py\n2. test_main.py\n",
    "Le temps est beau aujourd'hui.",
    "今天天气很好。",
    "Das heißt Wörterbuch — naïve café, über.",
    "🙂🙃 done",
    "def sort_names(names: list[str]) -> list[str]:\n    return sorted(names)",
    "So 3*3 = 9, 12*7 = 84 and 48+24 = 72.",
)
"""What models write."""

THOUGHTS = (
    "Divide first.",
    "Okay, the user wants a number. I should call the tool.",
    "Hmm, let me think.\n\nThe file is missing, so I must list the folder.",
    "用户想知道天气。",
    "Step 1: read. Step 2: write. 🤔",
)
"""What models think."""

SYSTEMS = ("Be brief.", "You are a careful assistant. Use the tools.", "Antworte auf Deutsch.\n", "")
"""What system messages say."""

ARGUMENTS: tuple[dict[str, Any], ...] = (
    {"expression": "48/2"},
    {"path": "main.py", "limit": 3},
    {"query": "wie heißt das", "options": {"deep": [1, 2.5, None], "exact": True}},
    {},
    {"text": 'a "quoted" line\nand another', "emoji": "🙂"},
    {"code": "</arg_value> <b>bold</b> {{ x }}", "n": 10**18},
)
"""What calls are made with."""

CORPUS = [
    *QUESTIONS,
    *RESULTS,
    *SENTENCES,
    *THOUGHTS,
    *SYSTEMS,
    *(str(arguments) for arguments in ARGUMENTS),
    '{"type": "function", "function": {"name": "calculator", "description": "Works out an expression.", "parameters": '
    '{"type": "object", "properties": {"expression": {"type": "string"}}, "required": ["expression"]}}}',
    "user assistant system tool developer model function arguments parameters name description result response",
    "The quick brown fox jumps over the lazy dog while the careful agent reads every file that the folder holds.",
    "Tokens in, tokens out: what was sampled is kept, what was sent is what was recorded, and nothing is made again.",
] * 3
"""What vocabularies are trained on."""
