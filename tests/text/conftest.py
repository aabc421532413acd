"""Small tokenizers of the two families, trained in memory."""

from __future__ import annotations

import json

import pytest
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as BackendTokenizer

from eagleray.text.tokenizer import Tokenizer

CORPUS = [
    "The ray swims through the warm sea, and the eagle flies above it.",
    "Déjà vu: naïve café, 東京の空 и море, 👩‍👩‍👧 family, e\u0301 combining.",
    "<div class='a'>tags</div> and    runs of spaces\n\nand lines\t",
]
BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_level_backend() -> BackendTokenizer:
    backend = BackendTokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator(CORPUS * 3, trainer)
    return backend


def sentencepiece_backend() -> BackendTokenizer:
    """As Llama 2: a normalizer that puts a space first, bytes as a fallback, and a decoder that drops the space."""
    backend = BackendTokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<unk>", "<s>", "</s>", *BYTE_TOKENS], limit_alphabet=60
    )
    backend.train_from_iterator(CORPUS * 3, trainer)
    plain = BackendTokenizer.from_str(_with_plain_byte_tokens(backend))
    plain.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in ("<unk>", "<s>", "</s>")])
    return plain


def _with_plain_byte_tokens(backend: BackendTokenizer) -> str:
    """Byte tokens are ordinary vocabulary, not special: the trainer has no other way to get them in."""
    content = json.loads(backend.to_str())
    content["added_tokens"] = []
    return json.dumps(content)


@pytest.fixture(scope="session")
def byte_level() -> Tokenizer:
    return Tokenizer(byte_level_backend(), bos_token="<s>", eos_tokens=["</s>"])


@pytest.fixture(scope="session")
def sentencepiece() -> Tokenizer:
    return Tokenizer(sentencepiece_backend(), bos_token="<s>", eos_tokens=["</s>"])


@pytest.fixture(scope="session", params=["byte_level", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    found: Tokenizer = request.getfixturevalue(request.param)
    return found


@pytest.fixture(scope="session")
def byte_level_library() -> BackendTokenizer:
    return byte_level_backend()


@pytest.fixture(scope="session")
def sentencepiece_library() -> BackendTokenizer:
    return sentencepiece_backend()
