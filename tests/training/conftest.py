from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from eagleray.core.config import ModelConfigSection
from eagleray.models.decoder import Decoder
from eagleray.models.random_weights import save_random_checkpoint
from eagleray.text.fake import save_byte_tokenizer
from eagleray.training.run import Documents, RunSettings, build_trainer, load_target
from eagleray.training.texts import Document
from eagleray.training.trainer import Trainer, TrainingPlan

TARGET = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 259, "hidden_size": 32,
    "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "torch_dtype": "float32", "hidden_act": "silu",
}  # fmt: skip

NewSettings = Callable[..., RunSettings]
NewTrainer = Callable[[RunSettings], Trainer]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a small target."""
    folder = tmp_path_factory.mktemp("target")
    save_random_checkpoint(folder, TARGET, seed=3)
    save_byte_tokenizer(folder)
    return folder


@pytest.fixture
def new_settings(folder: Path, tmp_path: Path) -> NewSettings:
    """Of a run with the small target; plan and head as ``changes`` say."""

    def settings(*, plan: dict[str, float] | None = None, **changes: object) -> RunSettings:
        usual = {"num_epochs": 3, "batch_tokens": 128, "learning_rate": 0.02, "check_every_steps": 6, "chain_length": 3}
        fields: dict[str, object] = {
            "model": ModelConfigSection(path=str(folder)),
            "method": "eagle3",
            "data": (),
            "output": tmp_path / "head",
            "plan": TrainingPlan(**(usual | (plan or {}))),  # type: ignore[arg-type]
            "num_guesses": 3,
        }
        return RunSettings(**(fields | changes))  # type: ignore[arg-type]

    return settings


@pytest.fixture(scope="session")
def documents() -> list[Document]:
    """Forty of different lengths, in which a token says a lot about the one after it."""
    return [_document(number, 12 + number % 9) for number in range(40)]


@pytest.fixture
def new_trainer(documents: list[Document]) -> NewTrainer:
    def trainer(settings: RunSettings) -> Trainer:
        return build_trainer(settings, Documents(documents[8:], documents[:8]), load_target(settings))

    return trainer


@pytest.fixture
def target(new_settings: NewSettings) -> Decoder:
    return load_target(new_settings())


def _document(number: int, length: int) -> Document:
    token_ids: Sequence[int] = [(7 * number + 5 * position) % 50 for position in range(length)]
    return Document(tuple(token_ids), num_prompt_tokens=1 + number % 4)
