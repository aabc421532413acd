"""How weights follow their gradients: Muon for the matrices of a layer, AdamW for its norms and the output rows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

import torch
from torch import nn

from eagleray.training.trainee import Trainee

_BETAS: Final = (0.9, 0.95)
_MAX_GRADIENT_NORM: Final = 1.0
_REST_SHARE: Final = 0.3  # of the learning rate: AdamW moves every weight by about as much, Muon a matrix as a whole


class HeadOptimizer:
    """Both as one. Muon (Jordan et al., 2024, as torch has it) needs about half the tokens that AdamW alone does."""

    def __init__(self, trainee: Trainee) -> None:
        matrices = [w for name, w in trainee.weights.items() if w.ndim == 2 and name not in trainee.output_layers]
        rest = [w for name, w in trainee.weights.items() if w.ndim < 2 or name in trainee.output_layers]
        self._weights: Iterable[nn.Parameter] = [*matrices, *rest]
        self._parts: list[tuple[torch.optim.Optimizer, float]] = [
            (torch.optim.AdamW(rest, betas=_BETAS, weight_decay=0.0), _REST_SHARE)
        ]
        if matrices:
            muon = torch.optim.Muon(matrices, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
            self._parts.append((muon, 1.0))

    def step(self, loss: torch.Tensor, learning_rate: float) -> None:
        """Move all weights once, down the gradient of ``loss``."""
        for optimizer, _ in self._parts:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self._weights, _MAX_GRADIENT_NORM)
        for optimizer, share in self._parts:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * share
            optimizer.step()

    def state(self) -> list[dict[str, Any]]:
        return [optimizer.state_dict() for optimizer, _ in self._parts]

    def load_state(self, state: list[dict[str, Any]]) -> None:
        for (optimizer, _), part in zip(self._parts, state, strict=True):
            optimizer.load_state_dict(part)
