"""What users have: files of chats, prompts or plain text. What becomes of it: tokens to go on from, and an answer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from eagleray.core.errors import ConfigError, InvalidRequest
from eagleray.text.chat_template import ChatTemplate
from eagleray.text.tokenizer import Tokenizer

FIELD: Final = "--data"
_KEYS: Final = "messages, conversations, prompt or text"
_ROLES: Final = {"human": "user", "gpt": "assistant"}  # ShareGPT's names for them; others are the template's
_PROMPT_SHARE: Final = 4  # of a plain text, one part in so many is what the model goes on from


@dataclass(frozen=True, slots=True)
class Document:
    """Tokens that are given, and those after them, which a draft head is to guess."""

    token_ids: tuple[int, ...]
    num_prompt_tokens: int

    @property
    def prompt(self) -> tuple[int, ...]:
        return self.token_ids[: self.num_prompt_tokens]


def digest(documents: Iterable[Document]) -> str:
    """Of their tokens, in this order."""
    hasher = hashlib.blake2b(digest_size=16)
    for document in documents:
        hasher.update(json.dumps(document.token_ids).encode())
    return hasher.hexdigest()


@dataclass(frozen=True, slots=True)
class TextReader:
    """Reads data files with the target's tokenizer and chat template."""

    tokenizer: Tokenizer
    template: ChatTemplate
    max_tokens: int  # of one document; a plain text that is longer becomes several

    @classmethod
    def of_model(cls, folder: Path, max_tokens: int) -> TextReader:
        """With what lies in a model's folder. Raises ``ConfigError``."""
        tokenizer = Tokenizer.from_folder(folder)
        return cls(tokenizer, ChatTemplate.from_folder(folder, tokenizer), max_tokens)

    def read(self, paths: Iterable[Path]) -> list[Document]:
        """All documents of the files in their order: one a line of ``.jsonl``, otherwise a plain text each.

        A line has one of the keys ``messages`` (OpenAI's roles and contents), ``conversations`` (ShareGPT's ``from``
        and ``value``), ``prompt`` with or without ``completion``, and ``text``. Of a chat the last answer is guessed;
        what does not leave room for an answer within ``max_tokens`` is left out.

        Raises:
            ConfigError: a file that cannot be read, with the line that is wrong.
        """
        documents = [document for path in paths for document in self._read_file(path)]
        if not documents:
            shown = ", ".join(map(str, paths))
            way_out = f"no prompt of 1 to {self.max_tokens - 1} tokens is in it; give more data, or raise --max-tokens"
            raise ConfigError(FIELD, shown, way_out)
        return documents

    def _read_file(self, path: Path) -> Iterator[Document]:
        try:
            content = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(FIELD, str(path), f"cannot be read as text ({error}); give UTF-8 files") from None
        if path.suffix != ".jsonl":
            yield from self._plain(content)
            return
        for number, line in enumerate(content.splitlines(), start=1):
            if line.strip():
                yield from self._read_line(line, f"{path}:{number}")

    def _read_line(self, line: str, place: str) -> Iterator[Document]:
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError(FIELD, place, f"is not JSON ({error}); write one object per line") from None
        if not isinstance(record, dict):
            raise ConfigError(FIELD, place, f"is no object; write one with {_KEYS}")
        if isinstance(record.get("text"), str):
            yield from self._plain(record["text"])
        elif isinstance(record.get("prompt"), str):
            yield from self._split(record["prompt"], str(record.get("completion", "")), add_special_tokens=True)
        else:
            yield from self._chat(_messages(record, place), place)

    def _plain(self, text: str) -> Iterator[Document]:
        token_ids = tuple(self.tokenizer.encode(text))
        for start in range(0, len(token_ids), self.max_tokens):
            part = token_ids[start : start + self.max_tokens]
            if len(part) >= _PROMPT_SHARE:
                yield Document(part, len(part) // _PROMPT_SHARE)

    def _chat(self, messages: Sequence[Mapping[str, Any]], place: str) -> Iterator[Document]:
        """Up to the last answer, or with nothing after it if there is no answer."""
        answered = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        asked = messages[: answered[-1]] if answered else messages
        try:
            prompt = self.template.render(asked, add_generation_prompt=True)
            whole = self.template.render(messages[: answered[-1] + 1], add_generation_prompt=False) if answered else ""
        except InvalidRequest as error:
            raise ConfigError(FIELD, place, f"the chat template refuses it: {error}") from None
        answer = whole.removeprefix(prompt) if whole.startswith(prompt) else ""
        yield from self._split(prompt, answer, add_special_tokens=False)  # the template has written them

    def _split(self, prompt: str, answer: str, *, add_special_tokens: bool) -> Iterator[Document]:
        given = self.tokenizer.encode(prompt, add_special_tokens=add_special_tokens)
        token_ids = [*given, *self.tokenizer.encode(answer, add_special_tokens=False)]
        if 0 < len(given) < self.max_tokens:
            yield Document(tuple(token_ids[: self.max_tokens]), len(given))


def _messages(record: Mapping[str, Any], place: str) -> list[dict[str, Any]]:
    """In the form of the OpenAI API. Raises ``ConfigError``."""
    if "conversations" in record:
        turns = record["conversations"]
        names = ("from", "value")
    else:
        turns = record.get("messages")
        names = ("role", "content")
    if not isinstance(turns, list) or not turns:
        raise ConfigError(FIELD, place, f"has none of the keys {_KEYS} with something in it")
    messages = []
    for turn in turns:
        if not isinstance(turn, dict) or not isinstance(turn.get(names[0]), str) or turn.get(names[1]) is None:
            raise ConfigError(FIELD, place, f"a turn without {names[0]} or {names[1]}; write both as text")
        messages.append({"role": _ROLES.get(turn[names[0]], turn[names[0]]), "content": turn[names[1]]})
    return messages
