"""From what a user asked for to a trainer that is ready, and from a trained head to a folder that can be served."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal

import torch

from eagleray.core.config import ModelConfigSection
from eagleray.core.errors import ConfigError
from eagleray.engine.execution.identity import compute_model_identity
from eagleray.engine.execution.kv_tensors import TORCH_DTYPES
from eagleray.engine.llm import LLM
from eagleray.kernels.linear.quantization import QuantizationUnsupported
from eagleray.kernels.select import select_kernels
from eagleray.models.decoder import Decoder
from eagleray.models.draft_heads.draft_config import MedusaConfig
from eagleray.models.draft_heads.eagle_format import LAYER_IDS, authors_capture_layers
from eagleray.models.draft_heads.export import export_eagle3, export_medusa
from eagleray.models.draft_heads.tensor_names import DRAFT_TO_TARGET
from eagleray.models.loader import load_model
from eagleray.models.model_config import ModelConfig
from eagleray.models.registry import load_model_config
from eagleray.training.eagle3 import Eagle3Trainee
from eagleray.training.lesson import Teacher
from eagleray.training.medusa import MedusaTrainee
from eagleray.training.own_samples import SamplingSettings, read_own_samples, write_own_samples
from eagleray.training.start import (
    common_tokens,
    default_capture_layers,
    eagle3_config,
    warm_eagle3,
    warm_medusa,
)
from eagleray.training.texts import FIELD, Document, TextReader, digest
from eagleray.training.trainer import Trainer, TrainingPlan

_HELD_OUT_SHARE: Final = 20  # one document in so many, where the user has set none aside
_MAX_HELD_OUT: Final = 256
_MEDUSA_BLOCKS: Final = 1  # as in the paper
_BATCHED_TOKENS: Final = 1024  # of the engine that samples: answers are many and nobody waits for the first

OnProgress = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSettings:
    """What to train, for which target, on what. ``plan`` says how long."""

    model: ModelConfigSection
    method: Literal["eagle3", "medusa"]
    data: tuple[Path, ...]
    output: Path
    plan: TrainingPlan
    held_out: tuple[Path, ...] = ()  # none: a part of the data is set aside
    num_documents: int | None = None  # of the data, from its beginning; None: all
    max_tokens: int = 512  # of one document
    temperatures: tuple[float, ...] = (0.0, 0.7, 1.0)  # of the target's own answers; none: learn from those in the data
    capture_layers: tuple[int, ...] | None = None  # None: ``default_capture_layers``
    draft_vocab_size: int | None = None  # None: the target's
    num_guesses: int = 4

    @property
    def work_folder(self) -> Path:
        """Samples and checkpoint: what can go when the head is good."""
        return self.output / "training"

    @property
    def checkpoint(self) -> Path:
        return self.work_folder / "checkpoint.pt"


@dataclass(frozen=True, slots=True)
class Documents:
    """What a head learns from, and what it is measured on."""

    learned: list[Document]
    held_out: list[Document]


def check_head(settings: RunSettings) -> None:
    """Refuse, before the target answers prompts for hours, a head that it cannot have. Raises ``ConfigError``."""
    config = load_model_config(settings.model.folder)
    if settings.method == "eagle3":
        _eagle3_shape(settings, config)
    else:
        _medusa_config(settings, config)


def gather_documents(settings: RunSettings, report: OnProgress) -> Documents:
    """Read the data; unless switched off, the target then answers in its own words: greedily where it is measured.

    Raises:
        ConfigError: data that cannot be read or is too little.
    """
    reader = TextReader.of_model(settings.model.folder, settings.max_tokens)
    learned = reader.read(settings.data)[: settings.num_documents]
    if settings.held_out:
        held_out = reader.read(settings.held_out)[:_MAX_HELD_OUT]
    else:
        learned, held_out = _set_aside(learned, settings.plan.seed)
    if not settings.temperatures:
        documents = Documents(_answered(learned), _answered(held_out))
    else:
        documents = _own_answers(settings, learned, held_out, report)
    if not documents.learned or not documents.held_out:
        found = f"{len(documents.learned)} to learn from, {len(documents.held_out)} held out"
        raise ConfigError(FIELD, found, "documents with answers are too few; give more data")
    return documents


def load_target(settings: RunSettings) -> Decoder:
    """With the kernels and in the format that serve it. Raises ``ConfigError``."""
    model = settings.model
    config = load_model_config(model.folder)
    dtype = TORCH_DTYPES[config.resolve_dtype(model.dtype, "cpu")]
    num_threads = torch.get_num_threads()
    try:
        kernels = select_kernels("auto", dtype, "cpu", num_threads, quantization=model.quantization)
        return load_model(model.folder, config, dtype, "cpu", kernels=kernels)
    except QuantizationUnsupported as error:
        raise ConfigError("--quantization", model.quantization, f"{error}; give what will be served") from None


def target_identity(settings: RunSettings) -> str:
    """Of its content, and what it computes in: another target teaches something else."""
    model = settings.model
    return f"{compute_model_identity(model.folder, model.revision, model.quantization)} {model.dtype}"


def build_trainer(settings: RunSettings, documents: Documents, target: Decoder) -> Trainer:
    """A trainer before its first step. Raises ``ConfigError``."""
    build = _eagle3 if settings.method == "eagle3" else _medusa
    trainee, teacher = build(settings, documents.learned, target)
    in_common = {
        "target": target_identity(settings),
        "method": settings.method,
        "num_guesses": settings.num_guesses,
        "capture_layers": list(teacher.capture_layers),
        "draft_vocab_size": settings.draft_vocab_size,
        "documents": digest(documents.learned),
    }
    return Trainer(
        trainee, teacher, documents.learned, documents.held_out, settings.plan, settings.checkpoint, in_common
    )


def export_head(settings: RunSettings, trainer: Trainer) -> None:
    """Write the head into the output folder, in bfloat16 and the layout of its authors."""
    tensors = {name: weight.detach().to(torch.bfloat16) for name, weight in trainer.trainee.weights.items()}
    trainee, vocabulary_V = trainer.trainee, trainer.teacher.draft_vocabulary_V
    if isinstance(trainee, MedusaTrainee):
        export_medusa(settings.output, trainee.config, tensors, settings.model.name)
    elif isinstance(trainee, Eagle3Trainee):
        if vocabulary_V is not None:
            tensors[DRAFT_TO_TARGET] = vocabulary_V - torch.arange(len(vocabulary_V))
        export_eagle3(settings.output, trainee.config, tensors)


def layers_note(trainer: Trainer) -> str | None:
    """What whoever takes an EAGLE-3 head elsewhere should know of the layers that it reads."""
    layers, usual = trainer.teacher.capture_layers, authors_capture_layers(trainer.teacher.decoder.config.num_layers)
    if not layers or layers == usual:
        return None
    where = f"{LAYER_IDS} in config.json" + (", but not where SGLang looks, which cannot read layer 0" * (0 in layers))
    return (
        f"it reads the inputs of layers {_listed(layers)}, and says so as {where}; a server that does not read this "
        f"takes {_listed(usual)}, the authors' choice, and guesses badly"
    )


def _listed(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers))


def _answered(documents: Sequence[Document]) -> list[Document]:
    return [document for document in documents if len(document.token_ids) > document.num_prompt_tokens]


def _set_aside(documents: list[Document], seed: int) -> tuple[list[Document], list[Document]]:
    shuffled = random.Random(f"{seed} held out").sample(documents, len(documents))
    count = min(_MAX_HELD_OUT, max(1, len(documents) // _HELD_OUT_SHARE))
    return shuffled[count:], shuffled[:count]


def _own_answers(
    settings: RunSettings, learned: Sequence[Document], held_out: Sequence[Document], report: OnProgress
) -> Documents:
    greedy = SamplingSettings((0.0,), settings.max_tokens, settings.plan.seed, target_identity(settings))
    parts = (("held_out", held_out, greedy), ("samples", learned, replace(greedy, temperatures=settings.temperatures)))
    llm = LLM(
        settings.model.path,
        dtype=settings.model.dtype,
        quantization=settings.model.quantization,
        num_threads=torch.get_num_threads(),
        max_num_batched_tokens=_BATCHED_TOKENS,
        enable_prefix_caching=False,
    )
    answered = []
    for name, prompts, sampling in parts:
        path = settings.work_folder / f"{name}.jsonl"
        for num_answers, num_tokens in write_own_samples(llm, prompts, sampling, path):
            report(f"{name}: {num_answers} of {len(prompts)} answered, {num_tokens} tokens")
        answered.append(read_own_samples(path))
    return Documents(answered[1], answered[0])


def _eagle3(settings: RunSettings, documents: Sequence[Document], target: Decoder) -> tuple[Eagle3Trainee, Teacher]:
    config = target.config
    layers, size = _eagle3_shape(settings, config)
    vocabulary_V = None if size == config.vocab_size else common_tokens(documents, config.vocab_size, size)
    head = eagle3_config(config, layers, size)
    weights = warm_eagle3(head, config, settings.model.folder, vocabulary_V, settings.plan.seed)
    trainee = Eagle3Trainee(head, weights, target.embedding, settings.num_guesses)
    return trainee, Teacher(target, layers, vocabulary_V)


def _eagle3_shape(settings: RunSettings, target: ModelConfig) -> tuple[tuple[int, ...], int]:
    """The layers that the head reads, and the size of its vocabulary. Raises ``ConfigError``."""
    size = settings.draft_vocab_size or target.vocab_size
    if not 0 < size <= target.vocab_size:
        raise ConfigError("--draft-vocab-size", size, f"the target's vocabulary has {target.vocab_size} tokens")
    layers = settings.capture_layers or default_capture_layers(target.num_layers)
    if list(layers) != sorted(set(layers)) or not 0 <= layers[0] <= layers[-1] < target.num_layers:
        raise ConfigError("--capture-layers", layers, f"must rise and lie within 0 to {target.num_layers - 1}")
    return layers, size


def _medusa(settings: RunSettings, documents: Sequence[Document], target: Decoder) -> tuple[MedusaTrainee, Teacher]:
    config = _medusa_config(settings, target.config)
    return MedusaTrainee(config, warm_medusa(config, target.config, settings.model.folder)), Teacher(target, ())


def _medusa_config(settings: RunSettings, target: ModelConfig) -> MedusaConfig:
    """Raises ``ConfigError``."""
    size = target.vocab_size
    if settings.capture_layers is not None:
        raise ConfigError(
            "--capture-layers", settings.capture_layers, "Medusa reads the last layer alone; leave it out"
        )
    if settings.draft_vocab_size not in (None, size):
        way_out = f"Medusa's heads have the target's whole vocabulary, {size} tokens; leave it out"
        raise ConfigError("--draft-vocab-size", settings.draft_vocab_size, way_out)
    return MedusaConfig(settings.num_guesses, _MEDUSA_BLOCKS, target.hidden_size, size)
