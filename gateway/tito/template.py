"""The model's chat template: a conversation in, the prompt's text out, as transformers' `apply_chat_template` gives it.

The environment is transformers' (5.23) in behaviour: an immutable sandbox, trimmed blocks, `tojson` without HTML
escaping, `raise_exception`, `strftime_now`, loop controls, generation blocks, named special tokens as variables, keys
of a message that are null left out, reasoning visible under each of its three names. Equality is property-tested.
Five things are added, which engines do and templates expect: arguments of tool calls, which agents send as JSON text,
are objects for a template that shows those otherwise than text; text parts are one text for a template that knows no
parts, and text is a part for one that knows nothing else; a developer is a system for one that shows no developer (and
both stand with the first message where a template shows no other one); where a template raises because an assistant has
no content, it gets ""; parts that are no text are only named (`{"type": "image"}`).

A template is untrusted input: it sees plain JSON values only and reaches no file and no attribute of Python objects.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from gateway.contracts.errors import ConfigurationError, TemplateRaised
from gateway.contracts.generation import JsonValue, MediaKind
from gateway.contracts.media import MEDIA_KEYS, media_kind
from gateway.tito.conversation import Conversation
from gateway.tito.model_files import read_json_object, read_special_tokens

REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
"""Where a message may carry reasoning; the first is the name that templates read."""

_TEMPLATE_FILE = "chat_template.jinja"
_NAMED_TEMPLATES_FOLDER = "additional_chat_templates"
_DEFAULT, _TOOL_USE = "default", "tool_use"
_ROLES = ("system", "developer", "user", "assistant", "tool")
_NEEDLE = "needle7"
_PROBE_TOOL = {
    "type": "function",
    "function": {
        "name": "probe",
        "description": "Looks.",
        "parameters": {
            "type": "object",
            "properties": {"key": {"type": "string", "description": "What for."}},
            "required": ["key"],
        },
    },
}
_METHODS_WITHOUT_SEARCH = frozenset(("get", "items", "keys", "values", "pop", "append", "strip", "lstrip", "rstrip"))
_MARKUP = re.compile(r"[<>\[\]|｜]..|..[<>\[\]|｜]")

_GIVEN_VARIABLES = frozenset(
    ("messages", "tools", "documents", "add_generation_prompt", "raise_exception", "strftime_now", "namespace")
) | {"range", "dict", "lipsum", "cycler", "joiner"}

# What code inside a template can raise when it meets a conversation that it was not written for.
_TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)


class ContentForms(NamedTuple):
    """Whether a template shows content that is a text, and content that is a list of text parts."""

    text: bool
    parts: bool


class ChatTemplate:
    """One or several named templates of a model, compiled once.

    texts: by their names; special_tokens: what they see of them. fingerprint: sha256 hex of the default template's
    text. source: all texts, one after the other.
    looked_for: markup that a template compares texts with or searches in them (`</think>`, `<tool_response>`).
    """

    def __init__(self, templates: Mapping[str, str], *, special_tokens: Mapping[str, str]) -> None:
        """Raises ConfigurationError for a template that does not compile, or when none is the default."""
        if _DEFAULT not in templates:
            raise ConfigurationError(f"no default chat template among {sorted(templates)}")
        self.texts: Mapping[str, str] = dict(templates)
        self.fingerprint: str = hashlib.sha256(templates[_DEFAULT].encode()).hexdigest()
        self.source: str = "\n".join(templates.values())
        self.looked_for: tuple[str, ...] = _looked_for(self.source)
        self.special_tokens: Mapping[str, str] = dict(special_tokens)
        self._content_forms: dict[str, ContentForms] = {}
        self._shows_others: dict[tuple[str, bool], bool] = {}
        self._media_shown: dict[tuple[str, MediaKind], tuple[str | None, str | None]] = {}
        self._compiled = {name: _compile(text, name=name) for name, text in templates.items()}

    @classmethod
    def load(cls, model_path: Path) -> ChatTemplate:
        """From chat_template.jinja, or `chat_template` of tokenizer_config.json; raises ConfigurationError."""
        templates = _read_templates(model_path)
        if not templates:
            raise ConfigurationError(
                f"{model_path}: no chat template; put {_TEMPLATE_FILE} there, or chat_template in tokenizer_config.json"
            )
        try:
            return cls(templates, special_tokens=read_special_tokens(model_path))
        except ConfigurationError as error:
            raise ConfigurationError(f"{model_path}: {error.message}") from error

    def render(self, conversation: Conversation, *, add_generation_prompt: bool = True) -> str:
        """The conversation's text; raises TemplateRaised with the template's own message where it refuses."""
        messages = [_template_message(message) for message in conversation.messages]
        messages = [self._in_known_form(_with_named_media(message)) for message in self._with_known_roles(messages)]
        if self.wants_argument_objects:
            messages = [_with_argument_objects(message, _parsed_or_text) for message in messages]
        try:
            return self._render(conversation, messages, add_generation_prompt=add_generation_prompt)
        except TemplateRaised:
            completed = self._completed(messages)
            if completed == messages:
                raise
        return self._render(conversation, completed, add_generation_prompt=add_generation_prompt)

    @cached_property
    def wants_argument_objects(self) -> bool:
        """Whether tool-call arguments must be objects, as engines give them: the template shows an object as the model
        would write it, and its text otherwise. Where both come out alike, the agent's own text is kept."""
        value = {"key": _NEEDLE}
        shown_text, shown_object = self._try_call(json.dumps(value)), self._try_call(value)
        shows_object = shown_object is not None and _NEEDLE in shown_object and "{'key'" not in shown_object
        return shows_object and shown_object != shown_text

    @cached_property
    def shows_tool_calls(self) -> bool:
        """Whether an assistant message's `tool_calls` appear in the text at all."""
        shown = self._try_call({"key": _NEEDLE} if self.wants_argument_objects else json.dumps({"key": _NEEDLE}))
        return shown is not None and _NEEDLE in shown

    def content_forms(self, role: str) -> ContentForms:
        """Which forms of content this role's messages may have."""
        if role not in self._content_forms:
            shows = [self._shows_content(role, content) for content in (_NEEDLE, [{"type": "text", "text": _NEEDLE}])]
            self._content_forms[role] = ContentForms(text=shows[0], parts=shows[1])
        return self._content_forms[role]

    def shows_media(self, role: str, kind: MediaKind) -> bool:
        """Whether something stands in the text for an image (a recording, a film) in this role's messages."""
        without, shown = self._with_media(role, kind)
        return shown not in (None, without) and not _is_printed({"type": kind.value}, shown or "")

    def placeholders(self, role: str, kind: MediaKind, texts: Iterable[str]) -> Mapping[str, int]:
        """Which of some texts (of tokens) stand in the text for an image (a recording, a film), and how often each."""
        if not self.shows_media(role, kind):
            return {}
        without, shown = (text or "" for text in self._with_media(role, kind))
        counts = {text: shown.count(text) - without.count(text) for text in texts if text in shown}
        return {text: count for text, count in counts.items() if count > 0}

    def _with_media(self, role: str, kind: MediaKind) -> tuple[str | None, str | None]:
        """A message without and with a part of that kind, each None where the template refuses it."""
        key = (role, kind)
        if key not in self._media_shown:
            text: dict[str, JsonValue] = {"type": "text", "text": _NEEDLE}
            self._media_shown[key] = (
                self._try_content(role, [text]),
                self._try_content(role, [text, {"type": kind.value}]),
            )
        return self._media_shown[key]

    def _shows_content(self, role: str, content: JsonValue) -> bool:
        shown = self._try_content(role, content) or ""
        # A list is not shown by printing it, neither as Python nor as JSON does.
        return _NEEDLE in shown and f"'text': '{_NEEDLE}'" not in shown and f'"text": "{_NEEDLE}"' not in shown

    def _try_content(self, role: str, content: JsonValue) -> str | None:
        """A conversation with one message of a role that has this content; None where the template refuses it."""
        message: dict[str, JsonValue] = {"role": role, "content": content}
        user: dict[str, JsonValue] = {"role": "user", "content": "question"}
        if role != "user":
            user = self._in_known_form(user)
        before, after = [user], []
        if role == "user":
            before = []
        elif role in ("system", "developer"):
            before, after = [], [user]
        elif role == "tool":
            call = {"id": "call00001", "type": "function", "function": {"name": "probe", "arguments": {"key": "value"}}}
            before = [user, {"role": "assistant", "content": "", "tool_calls": [call]}]
            message |= {"tool_call_id": "call00001", "name": "probe"}
        try:
            return self._render(
                Conversation((), tools=(_PROBE_TOOL,)), [*before, message, *after], add_generation_prompt=False
            )
        except TemplateRaised:
            return None

    def _in_known_form(self, message: dict[str, JsonValue]) -> dict[str, JsonValue]:
        """Text and text parts are the same to an agent, and not to every template."""
        content, role = message.get("content"), message.get("role")
        if role not in _ROLES or not isinstance(content, str | list):
            return message
        forms = self.content_forms(role)
        if isinstance(content, list) and not forms.parts:
            return _with_joined_text(message)
        if isinstance(content, str) and forms.parts and not forms.text:
            return {**message, "content": [{"type": "text", "text": content}]}
        return message

    def _with_known_roles(self, messages: list[dict[str, JsonValue]]) -> list[dict[str, JsonValue]]:
        """I6: what developers say is shown: as a system's words where the template does not know developers, and with
        the first message of all where it shows no other one."""
        if not any(message.get("role") == "developer" for message in messages):
            return messages
        role = "developer" if any(self.content_forms("developer")) else "system"
        known: list[dict[str, JsonValue]] = []
        is_opening = True  # nobody but systems and developers has spoken yet
        for message in messages:
            is_opening = is_opening and message.get("role") in ("system", "developer")
            if message.get("role") != "developer":
                known.append(message)
            elif not known or self._shows_another(role, is_opening=is_opening):
                known.append({**message, "role": role})
            elif known[0].get("role") in ("system", "developer"):
                known[0] = {**known[0], "content": _joined(known[0].get("content"), message.get("content"))}
            else:
                known.insert(0, {**message, "role": role})
        return known

    def _shows_another(self, role: str, *, is_opening: bool) -> bool:
        """Whether a message of this role is shown that is not the first: behind a system message, or an exchange."""
        if (role, is_opening) not in self._shows_others:
            user: dict[str, JsonValue] = {"role": "user", "content": "question"}
            opening: list[dict[str, JsonValue]] = [{"role": "system", "content": "first"}]
            exchange = [user, {"role": "assistant", "content": "answer"}]
            messages = [*(opening if is_opening else exchange), {"role": role, "content": _NEEDLE}, user]
            try:
                shown = self._render(
                    Conversation(()), [*map(self._in_known_form, messages)], add_generation_prompt=False
                )
            except TemplateRaised:
                shown = ""
            self._shows_others[role, is_opening] = _NEEDLE in shown
        return self._shows_others[role, is_opening]

    @cached_property
    def strings(self) -> frozenset[str]:
        """All string constants of the source, stripped, in lower case: what a text could be compared with."""
        return frozenset(text.strip().lower() for text in _strings_in(_environment().parse(self.source)))

    @cached_property
    def searched(self) -> tuple[str, ...]:
        """String constants that texts may be searched for, or cut at, and that `looked_for` has not (no markup)."""
        return _searched(_environment().parse(self.source))

    @property
    def tells_time(self) -> bool:
        """Whether renders may differ from one day to the next."""
        return "strftime_now" in self.source

    @cached_property
    def undeclared_variables(self) -> tuple[str, ...]:
        """Names that a template reads and nobody must give: its own switches (and some of its locals), in order."""
        tree = _environment().parse(self.source)
        names = meta.find_undeclared_variables(tree)
        return tuple(sorted(names - _GIVEN_VARIABLES - self.special_tokens.keys()))

    def _completed(self, messages: Sequence[dict[str, JsonValue]]) -> list[dict[str, JsonValue]]:
        """I6: what agents may leave out, and some templates cannot do without. Absent content of an assistant is "",
        as engines have it; arguments that are not JSON are one field of an object."""
        completed = [{"content": "", **m} if m.get("role") == "assistant" else m for m in messages]
        if self.wants_argument_objects:
            completed = [_with_argument_objects(message, _parsed_or_wrapped) for message in completed]
        return completed

    def _try_call(self, arguments: JsonValue) -> str | None:
        call = {"id": "call00001", "type": "function", "function": {"name": "probe", "arguments": arguments}}
        messages: list[dict[str, JsonValue]] = [
            {"role": "user", "content": "question"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "call00001", "name": "probe", "content": "result"},
        ]
        try:
            return self._render(Conversation((), tools=(_PROBE_TOOL,)), messages, add_generation_prompt=False)
        except TemplateRaised:
            return None

    def _render(
        self, conversation: Conversation, messages: list[dict[str, JsonValue]], *, add_generation_prompt: bool
    ) -> str:
        name = _TOOL_USE if conversation.tools and _TOOL_USE in self._compiled else _DEFAULT
        variables: dict[str, JsonValue] = {"documents": None, **self.special_tokens, **conversation.template_arguments}
        variables["messages"] = messages
        variables["tools"] = list(conversation.tools) or None
        variables["add_generation_prompt"] = add_generation_prompt
        try:
            return self._compiled[name].render(variables)
        except _TEMPLATE_ERRORS as error:
            message = str(error) or type(error).__name__
            raise TemplateRaised(f"the model's chat template refuses this conversation: {message}") from error


def _read_templates(model_path: Path) -> dict[str, str]:
    """Name → text; files come before tokenizer_config.json, as in transformers."""
    templates = {file.stem: _read_text(file) for file in sorted((model_path / _NAMED_TEMPLATES_FOLDER).glob("*.jinja"))}
    if (model_path / _TEMPLATE_FILE).is_file():
        templates[_DEFAULT] = _read_text(model_path / _TEMPLATE_FILE)
    if templates:
        return templates
    entry = read_json_object(model_path / "tokenizer_config.json").get("chat_template")
    if isinstance(entry, str):
        return {_DEFAULT: entry}
    if isinstance(entry, list):
        return {str(named["name"]): str(named["template"]) for named in entry}
    return {str(name): str(text) for name, text in entry.items()} if isinstance(entry, dict) else {}


def _read_text(file: Path) -> str:
    try:
        return file.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{file}: cannot be read as UTF-8 text: {error}") from error


def _template_message(message: JsonValue) -> dict[str, JsonValue]:
    if not isinstance(message, dict):
        raise TemplateRaised(f"messages must be objects, one is {type(message).__name__}")
    shown = {key: value for key, value in message.items() if value is not None}
    if "content" not in shown and isinstance(shown.get("refusal"), str):
        shown["content"] = shown["refusal"]
    if isinstance(shown.get("content"), list):
        shown["content"] = [_as_text_part(part) for part in shown["content"]]
    reasoning = next((shown[key] for key in REASONING_KEYS if key in shown), None)
    if reasoning is not None:
        shown = {"thinking": reasoning, **shown, "reasoning_content": reasoning}
    return shown


def _as_text_part(part: JsonValue) -> JsonValue:
    """What a model refused with was its text."""
    if isinstance(part, dict) and part.get("type") == "refusal" and isinstance(part.get("refusal"), str):
        return {"type": "text", "text": part["refusal"]}
    return part


def _with_named_media(message: dict[str, JsonValue]) -> dict[str, JsonValue]:
    """Parts as engines show them to templates: no text is its kind alone, and nothing else has keys that look like it,
    so that there are as many placeholders as there are media."""
    content = message.get("content")
    if not isinstance(content, list) or not any(isinstance(part, dict) for part in content):
        return message
    return {**message, "content": [_named_part(part) for part in content]}


def _named_part(part: JsonValue) -> JsonValue:
    kind = media_kind(part)
    if kind is not None:
        return {"type": kind.value}
    if isinstance(part, dict) and part.keys() & MEDIA_KEYS:
        return {key: value for key, value in part.items() if key not in MEDIA_KEYS}
    return part


def _is_printed(part: Mapping[str, JsonValue], text: str) -> bool:
    """Whether a template printed a part instead of showing it."""
    return str(part)[1:-1] in text or json.dumps(part)[1:-1] in text


def _text_of(part: JsonValue) -> str | None:
    if not isinstance(part, dict) or part.get("type") != "text":
        return None
    text = part.get("text")
    return text if isinstance(text, str) else None


def _with_joined_text(message: dict[str, JsonValue]) -> dict[str, JsonValue]:
    """Text parts as one text, a line each; content with other parts stays, the template has to know them."""
    parts = message.get("content")
    if not isinstance(parts, list):
        return message
    texts = [text for part in parts if (text := _text_of(part)) is not None]
    if len(texts) < len(parts):
        return message
    return {**message, "content": "\n".join(texts)}


def _joined(first: JsonValue, second: JsonValue) -> JsonValue:
    """Two contents as one: texts with an empty line between them, else the parts of both."""
    if isinstance(first, str | None) and isinstance(second, str | None):
        return "\n\n".join(text for text in (first, second) if text)
    return [*_parts(first), *_parts(second)]


def _parts(content: JsonValue) -> list[JsonValue]:
    if isinstance(content, list):
        return content
    return [{"type": "text", "text": content}] if content else []


def _with_argument_objects(
    message: dict[str, JsonValue], as_object: Callable[[str], JsonValue]
) -> dict[str, JsonValue]:
    calls = message.get("tool_calls")
    if not isinstance(calls, list):
        return message
    return {**message, "tool_calls": [_call_with_object(call, as_object) for call in calls]}


def _call_with_object(call: JsonValue, as_object: Callable[[str], JsonValue]) -> JsonValue:
    if not isinstance(call, dict):
        return call
    function = call.get("function")
    if isinstance(function, dict):
        return {**call, "function": _call_with_object(function, as_object)}
    arguments = call.get("arguments")
    return {**call, "arguments": as_object(arguments)} if isinstance(arguments, str) else call


def _parsed_or_text(text: str) -> JsonValue:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, dict) else text


def _parsed_or_wrapped(text: str) -> JsonValue:
    value = _parsed_or_text(text)
    return {"arguments": text} if isinstance(value, str) else value


class _Sandbox(ImmutableSandboxedEnvironment):
    """jinja2's own sandbox, with a short way for what templates do most: read a message's key, a loop's, a namespace's.

    The sandbox looks whether an attribute is safe each time; a plain dict has no attribute but its methods, a loop's
    facts are plain values, and of a namespace only those are read here. Half of a render's time was spent there.
    """

    def getattr(self, obj: JsonValue, attribute: str) -> JsonValue:
        """As the sandbox has it."""
        kind = type(obj)
        if kind is dict and attribute not in _DICT_ATTRIBUTES:
            return obj[attribute] if attribute in obj else self.undefined(obj=obj, name=attribute)
        if kind is LoopContext and attribute in _LOOP_FACTS:
            return getattr(obj, attribute)
        if kind is _GuardedNamespace and not attribute.startswith("_"):
            value = getattr(obj, attribute, None)
            if type(value) in _PLAIN_TYPES:
                return value
        return super().getattr(obj, attribute)


_DICT_ATTRIBUTES = frozenset(dir(dict))
_PLAIN_TYPES = frozenset((bool, int, str, list, dict))
_LOOP_FACTS = frozenset(("index", "index0", "first", "last", "length", "revindex", "revindex0", "depth", "depth0"))


class _GenerationBlocks(Extension):
    """`{% generation %} … {% endgeneration %}`, which marks what an assistant wrote; it renders as its body."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own declaration

    def parse(self, parser: Parser) -> nodes.Node:
        """The body in a scope of its own."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _GuardedNamespace(Namespace):
    """jinja2's `namespace`, without names that start with an underscore (they reach into Python objects)."""

    def __init__(*args: JsonValue, **attributes: JsonValue) -> None:
        self, *mappings = args
        values = dict(*mappings, **attributes)
        for name in values:
            _refuse_private(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: JsonValue) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: JsonValue) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a chat template may not set the attribute {name!r}")


def _looked_for(source: str) -> tuple[str, ...]:
    """String constants with some markup in them that are compared, assigned or passed, not just written."""
    try:
        tree = _environment().parse(source)
    except jinja2.TemplateSyntaxError:
        return ()  # `_compile` says so, with the template's name
    places = tree.find_all((nodes.Compare, nodes.Call, nodes.Filter, nodes.Test, nodes.Assign))
    constants = {constant.value for place in places for constant in place.find_all(nodes.Const)}
    return tuple(sorted(text for text in constants if isinstance(text, str) and _MARKUP.search(text)))


def _searched(tree: nodes.Template) -> tuple[str, ...]:
    """Arguments of methods and of `replace`, and the left side of `in`; not of `'content' in message`, and not space,
    which every text has."""
    texts: set[str] = set()
    for call in tree.find_all(nodes.Call):
        if isinstance(call.node, nodes.Getattr) and call.node.attr not in _METHODS_WITHOUT_SEARCH:
            texts.update(text for argument in call.args for text in _strings_in(argument))
    for change in tree.find_all(nodes.Filter):
        if change.name == "replace":
            texts.update(text for argument in change.args[:1] for text in _strings_in(argument))
    objects = {name.name for loop in tree.find_all(nodes.For) for name in _names_in(loop.target)}
    for comparison in tree.find_all(nodes.Compare):
        for operand in comparison.ops:
            names_key = isinstance(operand.expr, nodes.Name) and operand.expr.name in objects
            if operand.op in ("in", "notin") and not names_key:
                texts.update(_strings_in(comparison.expr))
    return tuple(sorted(text for text in texts if text.strip() and not _MARKUP.search(text)))


def _strings_in(node: nodes.Node) -> Iterator[str]:
    constants = (node,) if isinstance(node, nodes.Const) else node.find_all(nodes.Const)
    return (constant.value for constant in constants if isinstance(constant.value, str))


def _names_in(target: nodes.Node) -> Iterator[nodes.Name]:
    return iter((target,)) if isinstance(target, nodes.Name) else target.find_all(nodes.Name)


def _compile(text: str, *, name: str) -> jinja2.Template:
    try:
        template = _environment().from_string(text)
    except jinja2.TemplateSyntaxError as error:
        raise ConfigurationError(f"chat template {name!r}, line {error.lineno}: {error.message}") from error
    # jinja2 copies them for each render, and took a third of its time for that while they were a chain of maps.
    template.globals = dict(template.globals)
    return template


def _environment() -> _Sandbox:
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["namespace"] = _GuardedNamespace
    return environment


def _to_json(
    value: JsonValue,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _strftime_now(format_text: str) -> str:
    return datetime.now().strftime(format_text)
