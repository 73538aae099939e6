"""The chat template of a checkpoint: messages to the text of a prompt, without trust in either.

The template is code from a checkpoint and runs in jinja2's immutable sandbox. What a user wrote passes through it under
a random name, so that every special token in the result is known to be the template's own (MODEL.md section 6).
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from .tokenizer import read_json

DEFAULT_TEMPLATE = """\
{% if messages[0]['role'] != 'system' %}
{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{% for message in messages %}
{{ '<|im_start|>' ~ message['role'] ~ '\\n' }}
{%- if message['content'] is string %}
{{ message['content'] }}
{%- else %}
{% for part in message['content'] %}
{{ part['text'] if part['type'] == 'text' else '<|vision_start|><|' ~ part['type'] ~ '_pad|><|vision_end|>' }}
{%- endfor %}
{% endif %}
{{ '<|im_end|>\\n' }}
{%- endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\\n' }}
{%- endif %}
"""


@dataclass
class Masked:
    """Messages as a template gets them: `messages` with random names for texts, `plain` with the texts themselves.

    `texts` maps a name to its text.
    """

    messages: list[dict[str, Any]] = field(default_factory=list)
    plain: list[dict[str, Any]] = field(default_factory=list)
    texts: dict[str, str] = field(default_factory=dict)

    def name(self, text: str) -> str:
        """A random name for a text. White space around it stays, for templates that trim; so does an empty text."""
        core = text.strip()
        if not core:
            return text
        name = secrets.token_hex(16)
        self.texts[name] = core
        start = text.index(core)
        return text[:start] + name + text[start + len(core) :]


class _Generation(Extension):
    """`{% generation %}`, by which some templates mark what an assistant says, renders its body."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


class ChatTemplate:
    """A chat template in the dialect of transformers.

    Args:
        source: the template's text.
        name: what error messages call it.
        variables: special tokens by name (bos_token, eos_token, ...), which a template may use.
    """

    def __init__(
        self, source: str = DEFAULT_TEMPLATE, name: str = "chat template", variables: dict[str, str] | None = None
    ) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        self._name, self._variables = name, variables or {}
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ValueError(f"{name}: {error}") from None

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> ChatTemplate:
        """The template of a checkpoint; without one, the default, which writes what the released one does.

        It is looked for in processor_config.json, chat_template.json, chat_template.jinja and tokenizer_config.json, in
        the order of transformers.
        """
        directory = Path(directory)
        config = read_json(directory / "tokenizer_config.json") if (directory / "tokenizer_config.json").exists() else {}
        variables = {}
        for key, value in config.items():
            content = value.get("content") if isinstance(value, dict) else value
            if key.endswith("_token") and isinstance(content, str):
                variables[key] = content
        for name in ("processor_config.json", "chat_template.json", "chat_template.jinja", "tokenizer_config.json"):
            path = directory / name
            if not path.exists():
                continue
            source = path.read_text(encoding="utf-8") if path.suffix == ".jinja" else read_json(path).get("chat_template")
            if isinstance(source, list):  # several templates by name
                source = next((entry["template"] for entry in source if entry.get("name") == "default"), None)
            if source is None:
                continue
            if not isinstance(source, str):
                raise ValueError(f"{path}: chat_template: expected a string, got {type(source).__name__}")
            return cls(source, str(path), variables)
        return cls(variables=variables)

    def render(self, masked: Masked, special: Iterable[str]) -> list[tuple[bool, str]]:
        """The prompt as pieces (is a special token, text): only the template's own special tokens are marked as such.

        Raises:
            ValueError: the template failed, refused the messages, or changed a text beyond the white space around it.
        """
        now = datetime.now()
        rendered = self._render(masked.messages, now)
        names = re.compile("|".join(masked.texts) or r"(?!)")
        if names.sub(lambda match: masked.texts[match[0]], rendered) != self._render(masked.plain, now):
            raise ValueError(
                f"{self._name}: the template rewrites the text of messages (it cuts, escapes or compares it); expected "
                "one that passes text on, so that special tokens typed by a user can be told from its own"
            )
        pieces: list[tuple[bool, str]] = []
        tokens = re.compile("(" + "|".join(map(re.escape, sorted(special, key=len, reverse=True))) + ")")
        for i, piece in enumerate(tokens.split(rendered)):
            if piece:
                pieces.append((i % 2 == 1, piece if i % 2 else names.sub(lambda match: masked.texts[match[0]], piece)))
        return pieces

    def _render(self, messages: list[dict[str, Any]], now: datetime) -> str:
        try:
            return self._template.render(
                messages=messages,
                add_generation_prompt=True,
                tools=None,
                documents=None,
                strftime_now=now.strftime,
                **self._variables,
            )
        except Exception as error:  # a template is foreign code and may raise anything
            raise ValueError(f"{self._name}: {error}") from error
