from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as BackendTokenizer
from tokenizers import decoders, models, processors
from transformers import PreTrainedTokenizerFast

from eagleray.core.errors import ConfigError
from eagleray.text.fake import END_OF_TURN, FIRST_BYTE_ID, byte_tokenizer
from eagleray.text.tokenizer import Tokenizer

TEXTS = st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from("👩‍👩‍👧東京é e\u0301</>\n")), max_size=40)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_byte_level_decoding_equals_transformers_on_any_tokens(data: st.DataObject, byte_level, byte_level_library):
    theirs = PreTrainedTokenizerFast(tokenizer_object=byte_level_library, bos_token="<s>", eos_token="</s>")
    ids = data.draw(st.lists(st.integers(0, byte_level.vocab_size - 1), max_size=30))
    skip = data.draw(st.booleans())
    assert byte_level.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)


@settings(max_examples=100, deadline=None)
@given(text=TEXTS)
def test_sentencepiece_decoding_equals_transformers_on_any_text(text: str, sentencepiece, sentencepiece_library):
    theirs = PreTrainedTokenizerFast(tokenizer_object=sentencepiece_library, bos_token="<s>", eos_token="</s>")
    ids = sentencepiece.encode(text)
    assert ids == theirs.encode(text)
    assert sentencepiece.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


@settings(max_examples=100, deadline=None)
@given(text=TEXTS)
def test_text_survives_encoding_and_decoding(text: str, tokenizer: Tokenizer):
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_token_bytes_spell_the_text(tokenizer: Tokenizer):
    ids = tokenizer.encode("a 東 👩", add_special_tokens=False)
    assert b"".join(map(tokenizer.token_bytes, ids)).decode().lstrip() == "a 東 👩"


def test_the_fake_tokenizer_has_one_token_per_byte():
    tokenizer = byte_tokenizer()
    assert tokenizer.encode(f"A{END_OF_TURN}") == [FIRST_BYTE_ID + ord("A"), 2]
    assert tokenizer.vocab_size == 259
    assert tokenizer.decode([FIRST_BYTE_ID + 0xE6, FIRST_BYTE_ID + 0x9D, FIRST_BYTE_ID + 0xB1, 2]) == "東"
    assert tokenizer.token_bytes(9999) == b""


def write_folder(folder: Path, **tokenizer_config: object) -> None:
    tokenizer_file = json.loads(byte_tokenizer()._backend.to_str())
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_file))
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))


def test_a_folder_gives_special_tokens_and_all_ends_of_an_answer(tmp_path: Path):
    write_folder(tmp_path, bos_token={"content": "<|endoftext|>"}, eos_token="<|im_end|>")
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 0]}')
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert (tokenizer.bos_token_id, tokenizer.eos_token, tokenizer.eos_token_ids) == (0, "<|im_end|>", (2, 0))


def test_the_end_of_an_answer_is_read_from_config_json_where_nothing_else_says_it(tmp_path: Path):
    write_folder(tmp_path)
    (tmp_path / "config.json").write_text('{"eos_token_id": 1}')
    assert Tokenizer.from_folder(tmp_path).eos_token_ids == (1,)


@pytest.mark.parametrize(("rule", "expected"), [(True, [0, 68]), (False, [68]), (None, [68])])
def test_the_first_token_follows_tokenizer_config(tmp_path: Path, rule: bool | None, expected: list[int]):
    write_folder(tmp_path, bos_token="<|endoftext|>", add_bos_token=rule)
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.encode("A") == expected
    assert tokenizer.encode("A", add_special_tokens=False) == [68]


def test_a_first_token_that_tokenizer_config_switches_off_is_left_out():
    backend = byte_tokenizer()._backend
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    assert Tokenizer(backend).encode("A") == [0, 68]
    assert Tokenizer(backend, bos_token="<|endoftext|>", add_bos_token=False).encode("A") == [68]


def test_a_missing_file_is_refused_by_name(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"tokenizer\.json cannot be read"):
        Tokenizer.from_folder(tmp_path)


def test_a_special_token_outside_the_vocabulary_is_refused_by_name(tmp_path: Path):
    write_folder(tmp_path, eos_token="<|nope|>")
    with pytest.raises(ConfigError, match=r"eos_token='<\|nope\|>'"):
        Tokenizer.from_folder(tmp_path)


def test_a_decoder_of_another_family_is_refused():
    backend = BackendTokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    backend.decoder = decoders.WordPiece()
    with pytest.raises(ConfigError, match="WordPiece"):
        Tokenizer(backend)


def test_a_tokenizer_with_more_ids_than_the_model_is_refused_naming_both():
    byte_tokenizer().check_fits(byte_tokenizer().vocab_size)
    with pytest.raises(ConfigError, match="vocab_size=256: the tokenizer has ids up to 258"):
        byte_tokenizer().check_fits(256)
