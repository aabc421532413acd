"""Checkpoints with random weights in the shape of real models: what the engines of a comparison all read.

    python benchmarks/random_checkpoint.py qwen3-0.6b FOLDER

Speed depends on shapes and formats, not on what a model knows. Answers are noise, and they end when the noise says so:
ask for ``ignore_eos`` wherever an engine offers it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import string
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal, get_args

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from eagleray.models.random_weights import save_random_checkpoint

ShapeName = Literal["qwen3-0.6b", "tiny"]

END_TOKEN: Final = "<|endoftext|>"
FIRST_TEXT_TOKEN_ID: Final = 257  # below it: the end token and the 256 bytes; from it on, tokens of printable text

_SEED: Final = 0
_PRINTABLE: Final = string.digits + string.ascii_letters + string.punctuation  # a byte-level token spells these as is
_QWEN3: Final = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "head_dim": 128,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
# Qwen3-0.6B's layers under a vocabulary of 32,000: with its own of 151,936 a quarter of the weights is the head,
# more than larger models have. And one for tests.
SHAPES: Final[Mapping[ShapeName, Mapping[str, Any]]] = MappingProxyType(
    {
        "qwen3-0.6b": {
            **_QWEN3,
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "max_position_embeddings": 4096,
            "vocab_size": 32_000,
        },
        "tiny": {
            **_QWEN3,
            "head_dim": 32,
            "hidden_size": 64,
            "intermediate_size": 192,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
            "vocab_size": 1_024,
        },
    }
)


def checkpoint_folder(shape: ShapeName, cache: Path) -> Path:
    """The checkpoint of a shape, written below ``cache`` unless it is there."""
    folder = cache / f"{shape}-random"
    if not folder.exists():
        write_random_checkpoint(folder, shape)
    return folder


def write_random_checkpoint(folder: Path, shape: ShapeName) -> None:
    """Make ``folder`` a Hugging Face checkpoint: bfloat16 weights, the same every time, and a tokenizer that fills the
    vocabulary. It appears whole or not at all. Raises ``OSError`` when there is something else in its place."""
    config = SHAPES[shape]
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        save_random_checkpoint(unfinished, config, _SEED)
        (unfinished / "tokenizer_config.json").write_text(json.dumps(_tokenizer_settings(config)), encoding="utf-8")
        _filled_tokenizer(config["vocab_size"]).save(str(unfinished / "tokenizer.json"))
        unfinished.chmod(0o755)
        os.rename(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _tokenizer_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_TOKEN,
        "eos_token": END_TOKEN,
        "pad_token": END_TOKEN,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": config["max_position_embeddings"],
    }


def _filled_tokenizer(vocab_size: int) -> Tokenizer:
    """Byte-level BPE with exactly ``vocab_size`` tokens: every id decodes to text of its own."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = list(itertools.islice(_merges(), vocab_size - 1 - len(alphabet)))
    tokens = [END_TOKEN, *alphabet, *(left + right for left, right in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={token: id_ for id_, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END_TOKEN, special=True, normalized=False)])
    return tokenizer


def _merges() -> Iterator[tuple[str, str]]:
    """All pairs of printable characters, then each pair with a third: no two spell the same token."""
    pairs = [(left, right) for left in _PRINTABLE for right in _PRINTABLE]
    yield from pairs
    yield from ((left + right, third) for left, right in pairs for third in _PRINTABLE)


def main() -> int:
    parser = argparse.ArgumentParser(description="Write a checkpoint with random weights.")
    parser.add_argument("shape", choices=get_args(ShapeName))
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    write_random_checkpoint(options.folder, options.shape)
    return 0


if __name__ == "__main__":
    sys.exit(main())
