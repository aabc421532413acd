"""The demo model's folder: what a server relies on, read without loading the weights."""

from __future__ import annotations

import json
import math
import re
import struct
from pathlib import Path
from typing import Any

import jinja2
import pytest
from tokenizers import Tokenizer

FOLDER = Path(__file__).parents[2] / "models" / "demo"
MAX_FOLDER_BYTES = 15_000_000
JSON_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")


def read_json(name: str) -> dict[str, Any]:
    content = json.loads((FOLDER / name).read_text("utf-8"))
    assert isinstance(content, dict)
    return content


def safetensors_header() -> dict[str, Any]:
    with (FOLDER / "model.safetensors").open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    assert isinstance(header, dict)
    return header


def render(messages: list[dict[str, Any]], **options: Any) -> str:
    template = jinja2.Environment().from_string(read_json("tokenizer_config.json")["chat_template"])
    return template.render(messages=messages, **options)


def test_folder_is_small_enough_for_a_repository() -> None:
    size_bytes = sum(path.stat().st_size for path in FOLDER.iterdir() if not path.name.startswith("draft"))
    assert size_bytes <= MAX_FOLDER_BYTES


def test_config_describes_a_llama() -> None:
    config = read_json("config.json")
    expected = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": 4096,
        "max_position_embeddings": 2048,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
    }
    assert {key: config[key] for key in expected} == expected


def test_weights_are_bf16_and_tied_ones_are_saved_once() -> None:
    header = safetensors_header()
    tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
    assert {entry["dtype"] for entry in tensors.values()} == {"BF16"}
    assert "lm_head.weight" not in tensors
    assert tensors["model.embed_tokens.weight"]["shape"] == [4096, 256]
    assert len(tensors) == 2 + 8 * 9
    parameters = sum(math.prod(entry["shape"]) for entry in tensors.values())
    assert (FOLDER / "model.safetensors").stat().st_size < 2 * parameters + 20_000


def test_tokenizer_round_trips_code_and_knows_the_special_tokens() -> None:
    tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == read_json("config.json")["vocab_size"]
    text = 'def f(x):\n\treturn {"é✓": x ** 2}  # 12345\n'
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    special = [tokenizer.token_to_id(token) for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")]
    assert special == [0, 1, 2]
    assert tokenizer.encode("<|im_start|>user\n").ids[0] == 1


def test_generation_stops_at_the_turn_and_at_the_text() -> None:
    assert set(read_json("generation_config.json")["eos_token_id"]) == {0, 2}
    assert read_json("config.json")["eos_token_id"] == 2


def test_chat_template_ends_with_the_generation_prompt() -> None:
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": [{"type": "text", "text": "Write a function."}]},
    ]
    turns = (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nhello<|im_end|>\n"
        "<|im_start|>assistant\nHello!<|im_end|>\n"
        "<|im_start|>user\nWrite a function.<|im_end|>\n"
    )
    assert render(messages, add_generation_prompt=True) == turns + "<|im_start|>assistant\n"
    assert render(messages) == turns


@pytest.mark.parametrize("name", [*JSON_FILES, "model.safetensors"])
def test_no_absolute_path_is_left_in_a_file(name: str) -> None:
    text = json.dumps(safetensors_header()) if name.endswith(".safetensors") else (FOLDER / name).read_text("utf-8")
    assert not re.search(r"/(home|root|tmp|work|Users|usr)/", text)
