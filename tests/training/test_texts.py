"""Data as users have it: every form becomes a prompt and an answer; what is wrong is named with file and line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eagleray.core.errors import ConfigError
from eagleray.text.fake import byte_tokenizer, chatml_template
from eagleray.training.texts import Document, TextReader

CHAT = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yes?"},
    {"role": "user", "content": "bye"},
    {"role": "assistant", "content": "ok"},
]


@pytest.fixture
def reader() -> TextReader:
    return TextReader(byte_tokenizer(), chatml_template(), max_tokens=200)


def read(reader: TextReader, file: Path, *records: object) -> list[tuple[str, str]]:
    """(prompt, answer) of all documents of the file that these lines make."""
    file.write_text("".join(json.dumps(record) + "\n\n" for record in records), encoding="utf-8")
    return [texts(reader, document) for document in reader.read([file])]


def texts(reader: TextReader, document: Document) -> tuple[str, str]:
    parts = (document.prompt, document.token_ids[document.num_prompt_tokens :])
    prompt, answer = (reader.tokenizer.decode(part, skip_special_tokens=False) for part in parts)
    return prompt, answer


def test_of_a_chat_the_last_answer_is_guessed(reader: TextReader, tmp_path: Path) -> None:
    [(prompt, answer)] = read(reader, tmp_path / "chats.jsonl", {"messages": CHAT})
    assert prompt.endswith("assistant\n") and "bye" in prompt and "yes?" in prompt
    assert answer.startswith("ok<|")


def test_a_chat_without_an_answer_is_a_prompt(reader: TextReader, tmp_path: Path) -> None:
    [(prompt, answer)] = read(reader, tmp_path / "chats.jsonl", {"messages": CHAT[:1]})
    assert prompt.endswith("assistant\n") and answer == ""


def test_conversations_mean_the_same_as_messages(reader: TextReader, tmp_path: Path) -> None:
    names = {"user": "human", "assistant": "gpt"}
    turns = [{"from": names[turn["role"]], "value": turn["content"]} for turn in CHAT]
    one, other = read(reader, tmp_path / "chats.jsonl", {"messages": CHAT}, {"conversations": turns})
    assert one == other


def test_prompts_and_completions_are_taken_as_they_are(reader: TextReader, tmp_path: Path) -> None:
    records = [{"prompt": "a b"}, {"prompt": "a b", "completion": " c"}]
    assert read(reader, tmp_path / "prompts.jsonl", *records) == [("a b", ""), ("a b", " c")]


def test_of_a_plain_text_the_first_quarter_is_given_and_a_long_one_is_cut(reader: TextReader, tmp_path: Path) -> None:
    text = "".join(chr(97 + number % 26) for number in range(280))
    file = tmp_path / "story.txt"
    file.write_text(text, encoding="utf-8")
    expected = [(text[:50], text[50:200]), (text[200:220], text[220:])]
    assert [texts(reader, document) for document in reader.read([file])] == expected
    assert read(reader, tmp_path / "texts.jsonl", {"text": text}) == expected


def test_what_leaves_no_room_for_an_answer_is_left_out(reader: TextReader, tmp_path: Path) -> None:
    assert len(read(reader, tmp_path / "prompts.jsonl", {"prompt": "a" * 200}, {"prompt": "a" * 199})) == 1
    with pytest.raises(ConfigError, match=r"--data=.*no prompt of 1 to 199 tokens is in it"):
        read(reader, tmp_path / "prompts.jsonl", {"prompt": "a" * 200})


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{'messages'", "is not JSON"),
        ("[1]", "is no object"),
        ('{"question": "hi"}', "none of the keys messages, conversations, prompt or text"),
        ('{"messages": []}', "none of the keys"),
        ('{"messages": [{"role": "user"}]}', "a turn without role or content"),
        ('{"conversations": [{"from": "human", "content": "hi"}]}', "a turn without from or value"),
    ],
)
def test_a_bad_line_is_named(reader: TextReader, tmp_path: Path, line: str, reason: str) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text('{"prompt": "fine"}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=rf"--data='.*bad\.jsonl:2': .*{reason}"):
        reader.read([file])


def test_a_file_that_cannot_be_read_is_named(reader: TextReader, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--data='.*nowhere\.txt': cannot be read as text"):
        reader.read([tmp_path / "nowhere.txt"])
    (tmp_path / "image.png").write_bytes(b"\x89PNG\xff")
    with pytest.raises(ConfigError, match=r"image\.png': cannot be read as text"):
        reader.read([tmp_path / "image.png"])
