"""Chat messages to prompt text, by the model's own Jinja template.

The environment is the one that templates are written for (sandboxed, ``trim_blocks``, ``raise_exception``,
``strftime_now``, ``tojson`` without HTML escapes, loop controls, ``generation`` blocks); see "Chat templates" in the
documentation of Hugging Face transformers.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NoReturn

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from eagleray.core.errors import ConfigError, InvalidRequest
from eagleray.text.tokenizer import Tokenizer, read_json

Message = Mapping[str, Any]

_PROBE: Final = "7c1f-probe"


class ChatTemplate:
    """A compiled template. ``source`` None: the model has none, and chat requests are refused."""

    def __init__(self, source: str | None, bos_token: str | None = None, eos_token: str | None = None) -> None:
        """Raises ``ConfigError`` when the template is not valid Jinja."""
        self._tokens = {"bos_token": bos_token or "", "eos_token": eos_token or ""}
        try:
            self._template = None if source is None else _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise ConfigError("chat_template", "(template)", f"is not valid Jinja: {error}") from None
        self._takes_parts = self._template is not None and self._shows_only_parts()
        self._renamed_roles = {} if "developer" in (source or "") else {"developer": "system"}  # OpenAI's newer name

    @classmethod
    def from_folder(cls, path: str | Path, tokenizer: Tokenizer) -> ChatTemplate:
        """The template of a model folder: chat_template.jinja, else the one in tokenizer_config.json, else none."""
        return cls(_find_source(Path(path)), tokenizer.bos_token, tokenizer.eos_token)

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Prompt text. Text parts are joined for templates that show strings (nearly all).

        With ``continue_final_message`` the prompt ends right after the last message's text. Raises
        ``InvalidRequest`` for what the template refuses, for parts other than text, and when there is no template.
        """
        if self._template is None:
            raise InvalidRequest("This model has no chat template; send the prompt to /v1/completions instead.")
        shown = [self._shown(message, index) for index, message in enumerate(messages)]
        try:
            text = self._template.render(
                **{**self._tokens, **(variables or {})},
                messages=shown, tools=tools, add_generation_prompt=add_generation_prompt,
            )  # fmt: skip
        except Exception as error:  # a template is a program: it may raise anything over odd messages
            reason = str(error) or type(error).__name__
            raise InvalidRequest(
                f"messages: the model's chat template refuses them: {reason}", param="messages"
            ) from None
        return _cut_after(text, joined_text(messages[-1].get("content"))) if continue_final_message else text

    def _shown(self, message: Message, index: int) -> dict[str, Any]:
        """The message as the template gets it."""
        try:
            text = joined_text(message.get("content"))
        except InvalidRequest as error:
            raise InvalidRequest(error.message, param=f"messages[{index}].content") from None
        role = message.get("role", "")
        content = [{"type": "text", "text": text}] if self._takes_parts else text
        return {**message, "role": self._renamed_roles.get(role, role), "content": content}

    def _shows_only_parts(self) -> bool:
        """True for templates that read ``content`` as a list of parts and show nothing of a plain string."""

        def shows(content: object) -> bool:
            assert self._template is not None
            try:
                return _PROBE in self._template.render(**self._tokens, messages=[{"role": "user", "content": content}])
            except Exception:  # refused: not this form
                return False

        return not shows(_PROBE) and shows([{"type": "text", "text": _PROBE}])


def joined_text(content: object) -> str:
    """The text of a message's ``content``: a string, a list of text parts, or nothing.

    Raises ``InvalidRequest`` for a part that is not text.
    """
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(_part_text(part) for part in content) if isinstance(content, Sequence) else _refuse(content)


def _part_text(part: object) -> str:
    if isinstance(part, Mapping) and part.get("type") in ("text", "input_text", "refusal"):
        text = part.get("refusal" if part["type"] == "refusal" else "text")
        if isinstance(text, str):
            return text
    return _refuse(part)


def _refuse(part: object) -> NoReturn:
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    message = f"messages: content part of type {kind!r} cannot be served; this model reads text only."
    raise InvalidRequest(message, param="messages")


def _cut_after(rendered: str, content: str) -> str:
    for shown in (content, content.strip()):  # many templates trim what they show
        begin = rendered.rfind(shown)
        if shown and begin >= 0:
            return rendered[: begin + len(shown)]
    message = "continue_final_message: the last message has no text, or the chat template does not show it as it is."
    raise InvalidRequest(message, param="continue_final_message")


def _find_source(folder: Path) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    for name in ("tokenizer_config.json", "chat_template.json"):
        template = read_json(folder / name).get("chat_template")
        if isinstance(template, list):  # several named ones
            template = next((entry["template"] for entry in template if entry.get("name") == "default"), None)
        if isinstance(template, str):
            return template
    return None


class _GenerationBlocks(Extension):
    """``{% generation %}`` marks the assistant's text for training; a server shows what is inside."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own interface)

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationBlocks]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda layout: datetime.datetime.now().strftime(layout)
    return environment


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
