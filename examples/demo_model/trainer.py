"""The demo model, its two optimizers, and the schedule of the learning rate.

The forward and backward passes run on bf16 weights; the optimizers work on
float32 copies of them, since a step is smaller than bf16 can resolve.  Muon takes
the matrices of the layers, AdamW the embedding and the norms.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as functional
from corpus import VOCABULARY_SIZE
from transformers import LlamaConfig, LlamaForCausalLM

LossFunction = Callable[[torch.Tensor], torch.Tensor]

WARM_UP_TOKENS = 500_000
DECAY_SHARE = 0.25
GRADIENT_NORM_LIMIT = 1.0


@dataclasses.dataclass
class Progress:
    """Where the run stands; saved with every checkpoint."""

    tokens_seen: int = 0
    steps: int = 0
    seconds_trained: float = 0.0
    decay_starts_at_tokens: int = 0
    decay_tokens: int = 0

    @property
    def is_decaying(self) -> bool:
        return self.tokens_seen >= self.decay_starts_at_tokens

    @property
    def ends_at_tokens(self) -> int:
        return self.decay_starts_at_tokens + self.decay_tokens

    def learning_rate_scale(self) -> float:
        """A trapezoid over the tokens seen: warm-up, constant, decay to zero."""
        if self.is_decaying:
            return max(0.0, (self.ends_at_tokens - self.tokens_seen) / self.decay_tokens)
        return min(1.0, (self.tokens_seen + 1) / WARM_UP_TOKENS)

    def count(self, rows: torch.Tensor, seconds: float) -> None:
        """Count one step; a row has one token more than it teaches."""
        self.tokens_seen += rows.shape[0] * (rows.shape[1] - 1)
        self.steps += 1
        self.seconds_trained += seconds

    def start_decay(self, decay_tokens: int | None) -> None:
        """Begin to decay now, unless that has begun already."""
        if not self.is_decaying:
            self.decay_starts_at_tokens = self.tokens_seen
            self.decay_tokens = decay_tokens or max(1, int(self.tokens_seen * DECAY_SHARE))


def llama_config() -> LlamaConfig:
    """The architecture: 6.95 million parameters, 13.9 MB in bf16."""
    return LlamaConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=0,
    )


class Trainer:
    """The bf16 model, its float32 copy and the two optimizers."""

    def __init__(self, muon_rate: float, adam_rate: float, compile_model: bool, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = LlamaForCausalLM(llama_config())
        for layer in self.model.model.layers:
            # Blocks that begin as the identity learn faster at this size.
            torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
            torch.nn.init.zeros_(layer.mlp.down_proj.weight)
        named = dict(self.model.named_parameters())
        self.masters = {name: p.detach().clone().float() for name, p in named.items()}
        self.model.bfloat16()
        matrices = [p for name, p in self.masters.items() if p.ndim == 2 and "layers" in name]
        others = [p for name, p in self.masters.items() if p.ndim != 2 or "layers" not in name]
        self.optimizers: list[tuple[torch.optim.Optimizer, float]] = [
            (torch.optim.Muon(matrices, lr=muon_rate, weight_decay=0.1), muon_rate),
            (
                torch.optim.AdamW(others, lr=adam_rate, betas=(0.9, 0.95), weight_decay=0.0),
                adam_rate,
            ),
        ]
        self.loss: LossFunction = torch.compile(self._loss, dynamic=False) if compile_model else self._loss

    def _loss(self, rows: torch.Tensor) -> torch.Tensor:
        logits = self.model(rows[:, :-1], use_cache=False).logits
        targets = rows[:, 1:].reshape(-1)
        return functional.cross_entropy(logits.reshape(-1, logits.shape[-1]).float(), targets)

    def step(self, rows: torch.Tensor, rate_scale: float) -> tuple[float, float]:
        """One update; returns the loss and the gradient's norm."""
        loss = self.loss(rows)
        torch.autograd.backward(loss)
        parameters = dict(self.model.named_parameters())
        for name, master in self.masters.items():
            gradient = parameters[name].grad
            assert gradient is not None
            master.grad = gradient.float()
        norm = torch.nn.utils.clip_grad_norm_(self.masters.values(), GRADIENT_NORM_LIMIT)
        for optimizer, rate in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * rate_scale
            optimizer.step()
        self.model.zero_grad(set_to_none=True)
        self.publish()
        return loss.item(), norm.item()

    @torch.no_grad()
    def publish(self) -> None:
        """Copy the float32 weights into the bf16 model."""
        for name, parameter in self.model.named_parameters():
            parameter.copy_(self.masters[name])

    def save(self, path: Path, progress: Progress) -> None:
        """Write a checkpoint; a reader sees the old one or the new one, whole."""
        state = {
            "masters": self.masters,
            "optimizers": [optimizer.state_dict() for optimizer, _ in self.optimizers],
            "progress": dataclasses.asdict(progress),
        }
        temporary = path.with_suffix(".partial")
        torch.save(state, temporary)
        os.replace(temporary, path)

    def load(self, path: Path) -> Progress:
        """Continue from a checkpoint."""
        state = torch.load(path, weights_only=True)
        with torch.no_grad():
            for name, master in self.masters.items():
                master.copy_(state["masters"][name])
        for (optimizer, _), saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.publish()
        return Progress(**state["progress"])

    @torch.no_grad()
    def held_out_loss(self, batches: dict[str, torch.Tensor]) -> dict[str, float]:
        """The loss on each kind of held-out text, in nats per token."""
        return {kind: self._loss(rows).item() for kind, rows in batches.items()}
