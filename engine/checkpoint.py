"""What must hold of a checkpoint before anything is started on it."""

from __future__ import annotations

from pathlib import Path

from eagleray.core.errors import ConfigError
from eagleray.models.model_config import ModelConfig
from eagleray.models.registry import load_model_config
from eagleray.text.tokenizer import Tokenizer


def check_checkpoint(folder: Path) -> ModelConfig:
    """Read what is cheap to read. Raises ``ConfigError`` naming the field that cannot be served."""
    if not folder.is_dir():
        way_out = "there is no such folder; give the folder of a checkpoint: nothing is downloaded from a hub"
        raise ConfigError("model.path", str(folder), way_out)
    config = load_model_config(folder)
    Tokenizer.from_folder(folder).check_fits(config.vocab_size)
    return config
