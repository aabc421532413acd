"""Write a training checkpoint as a model folder that servers can load."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch
from corpus import END_OF_TEXT, END_OF_TURN, SPECIAL_TOKENS
from safetensors.torch import save_file
from trainer import llama_config

CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' }}"
    "{%- if message['content'] is string %}"
    "{{- message['content'] }}"
    "{%- elif message['content'] %}"
    "{%- for part in message['content'] %}"
    "{%- if part['type'] == 'text' %}{{- part['text'] }}{%- endif %}"
    "{%- endfor %}"
    "{%- endif %}"
    "{{- '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
END_OF_TEXT_ID = SPECIAL_TOKENS.index(END_OF_TEXT)
END_OF_TURN_ID = SPECIAL_TOKENS.index(END_OF_TURN)


def config_json() -> dict[str, Any]:
    """``config.json``, with the fields that every Llama loader reads."""
    config = llama_config()
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "initializer_range": 0.02,
        "use_cache": True,
        "bos_token_id": END_OF_TEXT_ID,
        "eos_token_id": END_OF_TURN_ID,
        "pad_token_id": END_OF_TEXT_ID,
    }


def generation_config_json() -> dict[str, Any]:
    """``generation_config.json``: an answer ends with the turn or with the text."""
    return {
        "bos_token_id": END_OF_TEXT_ID,
        "eos_token_id": [END_OF_TURN_ID, END_OF_TEXT_ID],
        "pad_token_id": END_OF_TEXT_ID,
        "do_sample": True,
        "temperature": 0.7,
        "top_p": 0.95,
    }


def tokenizer_config_json() -> dict[str, Any]:
    """``tokenizer_config.json``, chat template included."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "added_tokens_decoder": {
            str(number): {
                "content": token,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": True,
            }
            for number, token in enumerate(SPECIAL_TOKENS)
        },
        "add_bos_token": False,
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TURN,
        "pad_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
        "model_max_length": llama_config().max_position_embeddings,
        "chat_template": CHAT_TEMPLATE,
    }


def export(checkpoint: Path, folder: Path) -> None:
    """Write the JSON files and the weights; the tokenizer is there already."""
    state = torch.load(checkpoint, weights_only=True, map_location="cpu")
    for name, content in (
        ("config.json", config_json()),
        ("generation_config.json", generation_config_json()),
        ("tokenizer_config.json", tokenizer_config_json()),
    ):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in state["masters"].items()}
    temporary = folder / "model.safetensors.partial"
    save_file(tensors, temporary, metadata={"format": "pt"})
    # A server that is starting reads the old weights or the new ones, never half of either.
    temporary.chmod(0o644)
    os.replace(temporary, folder / "model.safetensors")
    print(json.dumps(state["progress"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True, help="the folder to write to")
    arguments = parser.parse_args()
    export(arguments.checkpoint, arguments.model)


if __name__ == "__main__":
    main()
