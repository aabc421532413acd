"""A tokenizer and a chat template with no files, for tests and demonstrations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as BackendTokenizer

from eagleray.text.chat_template import ChatTemplate
from eagleray.text.pieces import byte_alphabet
from eagleray.text.tokenizer import Tokenizer

END_OF_TEXT: Final = "<|endoftext|>"
START_OF_TURN: Final = "<|im_start|>"
END_OF_TURN: Final = "<|im_end|>"
SPECIAL_TOKENS: Final = (END_OF_TEXT, START_OF_TURN, END_OF_TURN)
FIRST_BYTE_ID: Final = len(SPECIAL_TOKENS)  # the token of byte b has the id FIRST_BYTE_ID + b

CHATML: Final = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


def byte_tokenizer() -> Tokenizer:
    """One token per byte and three special tokens: 259 in all. Answers end with ``<|im_end|>`` (id 2)."""
    return Tokenizer(_backend(), bos_token=END_OF_TEXT, eos_tokens=(END_OF_TURN, END_OF_TEXT), add_bos_token=False)


def chatml_template() -> ChatTemplate:
    """The template that goes with ``byte_tokenizer``."""
    return ChatTemplate(CHATML, END_OF_TEXT, END_OF_TURN)


def save_byte_tokenizer(folder: Path) -> None:
    """``byte_tokenizer`` and ``chatml_template`` as the files of a model folder."""
    _backend().save(str(folder / "tokenizer.json"))
    config = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TURN, "add_bos_token": False, "chat_template": CHATML}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    end_ids = [SPECIAL_TOKENS.index(END_OF_TURN), SPECIAL_TOKENS.index(END_OF_TEXT)]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": end_ids}), encoding="utf-8")


def _backend() -> BackendTokenizer:
    vocabulary = {token: id_ for id_, token in enumerate(SPECIAL_TOKENS)}
    vocabulary |= {char: FIRST_BYTE_ID + byte for byte, char in byte_alphabet().items()}
    backend = BackendTokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return backend
