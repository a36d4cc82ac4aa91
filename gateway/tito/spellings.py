"""Texts that libraries and tokenizers spell differently, if they differ at all."""

from __future__ import annotations

import random
import re
import unicodedata
from collections.abc import Iterator, Sequence

TEXTS = (
    "Hello, world! It's a test; isn't it? They'll say WE'VE won.",
    " leading", "trailing  ", "two  three   four    spaces", "\ttab\t\ttabs", "line\nline\n\nline\r\nline\n   indented",
    " \n \n", "\u00a0no-break\u2003em\u200bzero\u3000wide",
    "0 7 42 123 1234 12345678901234567890 3.14159 -1e-9 0xFF 1,000,000.00 12:34:56",
    "naïve café Ångström Straße ŒUVRE", "e\u0301 and é, ﬁ and fi, Ａ and A, ² and 2",
    "Быстрая лиса. Γρήγορη αλεπού. سريع الثعلب. שועל מהיר. तेज़ लोमड़ी। จิ้งจอกเร็ว",
    "快速的棕色狐狸。日本語のテキスト、カタカナ。한국어 텍스트입니다.", "😀👍🏽👩‍👩‍👧‍👦🇩🇪❤️‍🔥 ∑∫√≈ →⇒ ░▒▓ \U00020000",
    "def f(x: int) -> str:\n    return f\"{x!r:>10}\"  # why\n\n\nclass A(B):\n\tpass\n",
    '{"name": "f", "arguments": {"a": [1, 2.5, null, true], "b": "\\n\\u00e9"}}',
    "for (int i=0;i<n;++i){a[i]+=b[i]<<2;}//x\nSELECT * FROM t WHERE a='b';</div><br/>&amp;",
    "<s></s><unk><pad><|endoftext|><|im_start|>user\n<|im_end|>\n<think>\n\n</think>\n<tool_call>[INST][/INST]<0x0A>",
    "▁metaspace ▁▁two Ġbyte Ċlevel ##piece </w>", "antidisestablishmentarianism-pneumonoultramicroscopic",
    "http://example.org/a_b-c?d=e&f=%20#g user@example.org C:\\dir\\file.txt ~/.x",
    "$E=mc^2$ \\frac{a}{b} **bold** `x`",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaa!!!!!!!!!----------==========", "CamelCaseWord snake_case_word SCREAMING-kebab",
)  # fmt: skip
"""A short set: spaces, digits, scripts, emoji, code, markup."""

_WORDS_AT_ONCE = 24
_NUM_WORDS_ALONE = 3_000
_CHARACTERS_AT_ONCE = 256
_BRIDGE = re.compile(r"[!-&(-/:-@\[-`{-~][A-Za-z]+")
_RANGES = (
    (0x1, 0x3400, 1),
    (0x3400, 0xA000, 64),
    (0xA000, 0xAC00, 1),
    (0xAC00, 0xD7A4, 64),
    (0xD7A4, 0xD800, 1),
    (0xE000, 0xF900, 64),
    (0xF900, 0x17000, 1),
    (0x17000, 0x18B00, 64),
    (0x18B00, 0x20000, 1),
    (0x20000, 0x34000, 64),
    (0xE0000, 0xE0200, 1),
    (0xF0000, 0x110000, 4096),
)
"""Code points, with their distance where many in a row are alike."""

_NUM_MIXTURES = 1_500
_NUM_RANDOM = 300
_CODE = (
    "import os\n\n\ndef main() -> None:\n\tprint(f\"{os.environ['A']!r}\")\n\n    # a  \nif __name__ == '__main__':\n",
    '#include <stdio.h>\r\nint main(void)\r\n{\r\n  for(;;){ printf("%5.2f\\n", 3.14); }\r\n}\r\n',
    "<div class=\"a-b\">\n  <!-- c --> &nbsp;&#8364;</div>\n\n```rust\nfn f<'a>(x: &'a str) {}\n```\n",
    "| a | b |\n|---|:-:|\n# T\n\n* x\n  1. y",
    '{"role":"tool","content":"{\\"a\\": [1.0e-3, -2]}","x":null}\n{"é":"\\u00e9\\ud83d\\ude00"}',
    "I'm you're we've he'll she'd it's I'M YOU'RE WE'VE HE'LL IT'S ’s ’S o'clock rock'n'roll ''s 'ſ 'K",
    "ls -la /tmp/*.py | grep -v '^#' > out.txt 2>&1 && echo \"$HOME\"; $(cat x) `y`",
    "2026-11-21T22:05:00Z 192.168.0.1 1,234,567.89 10^-3 0b1010 0o17 1_000 12.5% $5 №5 5° 5′ ½ ¼ Ⅳ ④ ٣٤ ३४",
)
_COMBINED = (
    "e\u0301", "é", "A\u030a", "Å", "\u212b", "ﬁ", "ﬃ", "ß", "ẞ", "ſ", "İ", "ı", "i\u0307", "ǅ",
    "n\u0303o", "\u1e9b\u0323", "한", "\u1112\u1161\u11ab", "が", "か\u3099", "ｶﾞ", "Ａ１", "①",
    "㍿", "\u0928\u093c", "क्षि", "\u0627\u0644\u0644\u0647", "ﷺ", "👩‍👩‍👧‍👦",
    "👍🏽", "🇩🇪🇫🇷", "❤️‍🔥", "1️⃣", "🏴\U000e0067\U000e0062\U000e007f",
    "a\u0300\u0316\u0301\u0327", "\u200d", "\u200b\u200c\u2060\ufeff", "\u202eabc\u202c", "\u0000",
    "\u0001\u001f\u007f\u0080\u009f", "\ufffd", "\ufffe\uffff", "\ue000", "\U0010ffff",
    "\u2028\u2029\u0085\u000b\u000c", "\u180e", "\u00ad", "x\u20dd", "\U0001d54f\U0001d7d8",
    "\u3400\u4e00\u9fff\U00020000", "〇々ゝー", "ไม่เป็นไร", "မြန်မာ",
    "ខ្មែរ",
)  # fmt: skip


def around(character: str, bridge: str) -> str:
    """A text whose ids tell what kind of character this is."""
    return f"{character}{character}{bridge}"


def character_groups() -> Iterator[str]:
    """Nearly every code point, some hundred at a time."""
    codes = [code for start, stop, step in _RANGES for code in range(start, stop, step)]
    for at in range(0, len(codes), _CHARACTERS_AT_ONCE):
        yield "".join(map(chr, codes[at : at + _CHARACTERS_AT_ONCE]))


def find_bridge(words: Sequence[str]) -> str:
    """A word that is one token with the sign before its letters (`[str`, `(x`): what stands before it decides how it is
    cut off, and libraries know the letters, marks and spaces of other versions of Unicode."""
    return next((word for word in words if _BRIDGE.fullmatch(word)), "(x")


def spelling_texts(words: Sequence[str], added: Sequence[str]) -> Iterator[str]:
    """The probe set: texts of the vocabulary's own tokens, of its added tokens, and all that libraries do differently.

    words: of tokens, as text. added: of added tokens. About ten thousand texts, the same ones each time.
    """
    yield ""
    yield from TEXTS
    yield from _CODE
    for text in added:
        yield from (text, f"a{text}b", f" {text} ", f"\n{text}\n", text + text, text[:-1], text[1:], text.upper())
        yield f"x  {text}  1{text}\t{text}é"
    yield "".join(added)
    yield " ".join(added)
    for start in range(0, len(words), _WORDS_AT_ONCE):
        group = words[start : start + _WORDS_AT_ONCE]
        yield from ("".join(group), " ".join(group), "\n".join(reversed(group)))
    yield from words[:: max(1, len(words) // _NUM_WORDS_ALONE)]
    fragments = [*_spaces(), *_digits(), *_characters(), *_COMBINED]
    yield from fragments
    yield from (f"a{fragment}b{fragment}" for fragment in fragments)
    yield from _long_texts()
    yield from ("\ud800", "a\udc00b")  # lone surrogates, which JSON can spell and UTF-8 cannot
    yield from _mixtures([*fragments, *words[:: max(1, len(words) // 512)], *added, *TEXTS, *_CODE])


def _spaces() -> Iterator[str]:
    for character in (" ", "\n", "\t", "\r\n", "\u00a0", "\u3000", " \n", "\n ", "\t "):
        for count in (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 64, 100):
            yield character * count
    for before in (" ", "  ", "   ", "\n", "\n\n", " \n", "\n  ", "\t"):
        for after in ("word", "Word", "1", ".", "é", "漢", "😀", "'s", "_", "<"):
            yield before + after
            yield after + before


def _digits() -> Iterator[str]:
    yield from ("1234567890123456789012345"[:length] for length in range(1, 26))
    yield from (
        "0001",
        "1 2 3",
        "1a2b3c",
        "a1",
        "1,2",
        "1.2.3",
        "²³",
        "٠١٢٣٤",
        "०१२३",
        "１２３",
        "𝟘𝟙𝟚",
        "½⅓",
        "ⅳⅤ",
        "①②③",
    )


def _characters() -> Iterator[str]:
    """Some code points of every general category, alone and between letters."""
    by_category: dict[str, list[int]] = {}
    for code in (*range(0x3000), *range(0x3000, 0x110000, 37)):
        if not 0xD800 <= code < 0xE000:
            by_category.setdefault(unicodedata.category(chr(code)), []).append(code)
    for codes in by_category.values():
        for code in codes[:: max(1, len(codes) // 16)]:
            yield chr(code)
            yield f"a{chr(code)}b {chr(code)}{chr(code)}1"


def _long_texts() -> Iterator[str]:
    for unit, count in (("a", 3_000), ("ab", 2_000), ("Ab1", 1_000), (" ", 2_000), ("\n", 1_000), ("漢", 1_000)):
        yield unit * count
    for unit, count in (("0", 1_000), ("=", 2_000), ("😀", 500), ("é", 1_000), ("\t ", 500), ("x y ", 1_000)):
        yield unit * count
    numbers = random.Random(7)
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    yield "".join(numbers.choices(alphabet, k=4_000))
    yield "".join(numbers.choices("01", k=1_000))


def _mixtures(fragments: Sequence[str]) -> Iterator[str]:
    numbers = random.Random(11)
    for _ in range(_NUM_MIXTURES):
        yield "".join(numbers.choices(fragments, k=numbers.randint(2, 10)))
    ranges = ((0x20, 0x7F), (0x20, 0x250), (0x20, 0x3000), (0x3000, 0xD800), (0xE000, 0x20000))
    for i in range(_NUM_RANDOM):
        low, high = ranges[i % len(ranges)]
        yield "".join(chr(numbers.randrange(low, high)) for _ in range(numbers.randint(1, 40)))
