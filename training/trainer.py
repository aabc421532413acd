"""The loop: documents in, a trained head out, and now and then how far its guesses get."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final

import torch

from eagleray.core.acceptance import Acceptance
from eagleray.core.errors import ConfigError
from eagleray.kernels.native.build import BFLOAT16_LEVELS, supported_levels
from eagleray.training.acceptance import measure_acceptance
from eagleray.training.batches import epoch_batches
from eagleray.training.checkpoint import load_checkpoint, save_checkpoint
from eagleray.training.lesson import Lesson, Teacher
from eagleray.training.loss import soft_cross_entropy
from eagleray.training.optimizer import HeadOptimizer
from eagleray.training.texts import Document
from eagleray.training.trainee import Trainee

_WARM_UP_SHARE: Final = 0.03  # of all steps
_DEPTH_DECAY: Final = 0.8  # weight of each guess compared with the one before: it is needed less often


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """How long, how fast, and in what portions."""

    num_epochs: int
    batch_tokens: int
    learning_rate: float
    check_every_steps: int
    chain_length: int  # for which held-out tokens per step are told
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Progress:
    """What to tell a user after a step."""

    step: int
    num_steps: int
    num_tokens: int  # of this step
    loss: float
    held_out: Acceptance | None = None  # at checks


def fastest_dtype() -> torch.dtype:
    """Of products on this CPU: without instructions for it bfloat16 takes ten times as long as float32."""
    return torch.bfloat16 if supported_levels()[0] in BFLOAT16_LEVELS else torch.float32


class Trainer:
    """One run. After ``resume`` it goes on as if it had never been interrupted, bit for bit on the same machine.

    ``computes_in`` is what products are computed in: this machine's fastest for a new run; a resumed one keeps its own.

    Args:
        trainee: is trained in place.
        documents, held_out: to learn from, and to be measured on.
        checkpoint: file that the state is written to at every check.
        settings: what else a resumed run must have in common with the interrupted one, by name.
    """

    def __init__(
        self,
        trainee: Trainee,
        teacher: Teacher,
        documents: Sequence[Document],
        held_out: Sequence[Document],
        plan: TrainingPlan,
        checkpoint: Path,
        settings: Mapping[str, Any],
    ) -> None:
        self.trainee = trainee
        self.teacher = teacher
        self._documents = documents
        self._held_out = held_out
        self._plan = plan
        self._checkpoint = checkpoint
        self._settings = {**settings, **asdict(plan)}
        self._optimizer = HeadOptimizer(trainee)
        self.computes_in = fastest_dtype()
        self._num_steps = sum(1 for _ in self._batches())
        self._step = 0

    def resume(self) -> None:
        """Go on from the checkpoint. Raises ``ConfigError``."""
        state = load_checkpoint(self._checkpoint, self._settings)
        self.computes_in = state.get("computes_in", torch.bfloat16)  # as all did that do not say
        with torch.no_grad():
            for name, weight in self.trainee.weights.items():
                weight.copy_(state["weights"][name])
        self._optimizer.load_state(state["optimizer"])
        self._step = int(state["step"])

    def run(self) -> Iterator[Progress]:
        """Train to the end, one step at a time."""
        for batch in islice(self._batches(), self._step, None):
            loss = self._learn(self.teacher.teach(batch))
            self._step += 1
            num_tokens = sum(len(document.token_ids) for document in batch)
            is_check = self._step % self._plan.check_every_steps == 0 or self._step == self._num_steps
            if is_check:
                self._save()
            yield Progress(self._step, self._num_steps, num_tokens, loss, self.measure() if is_check else None)

    def measure(self) -> Acceptance:
        """On the held-out documents."""
        plan = self._plan
        return measure_acceptance(self.trainee, self.teacher, self._held_out, plan.chain_length, plan.batch_tokens)

    def _batches(self) -> Iterator[list[Document]]:
        for epoch in range(self._plan.num_epochs):
            yield from epoch_batches(self._documents, self._plan.batch_tokens, self._plan.seed, epoch)

    def _learn(self, lesson: Lesson) -> float:
        total, weights = torch.zeros(()), 0.0
        with torch.autocast("cpu", torch.bfloat16, enabled=self.computes_in == torch.bfloat16):
            for depth, logits_RV in enumerate(self.trainee.guess(lesson), start=1):
                weight = _DEPTH_DECAY ** (depth - 1)
                loss = soft_cross_entropy(logits_RV, lesson.probabilities_NV, lesson.label_rows(depth))
                total = total + weight * loss
                weights += weight
        mean = total / weights
        if not mean.isfinite():
            raise self._diverged("the loss is")
        self._optimizer.step(mean, self._plan.learning_rate * learning_rate_share(self._step, self._num_steps))
        return mean.item()

    def _diverged(self, what: str) -> ConfigError:
        way_out = (
            f"in step {self._step + 1} {what} no number any more; begin anew with a lower one and another --output"
        )
        return ConfigError("--learning-rate", self._plan.learning_rate, way_out)

    def _save(self) -> None:
        if not all(bool(weight.isfinite().all()) for weight in self.trainee.weights.values()):
            raise self._diverged("some weights are")  # after a finite loss: the checkpoint before stays
        state: dict[str, Any] = {
            "settings": self._settings,
            "computes_in": self.computes_in,
            "weights": {name: weight.detach() for name, weight in self.trainee.weights.items()},
            "optimizer": self._optimizer.state(),
            "step": self._step,
        }
        save_checkpoint(self._checkpoint, state)


def learning_rate_share(step: int, num_steps: int) -> float:
    """A straight line up, then one down to nothing."""
    warm_up = max(1, round(num_steps * _WARM_UP_SHARE))
    return min((step + 1) / warm_up, (num_steps - step) / max(1, num_steps - warm_up))
