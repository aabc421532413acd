"""Cross-entropy to the target's whole distribution, without ever keeping more than one matrix of logits."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd import Function

_ROWS_AT_A_TIME: Final = 128  # whose float32 logits stay in a core's cache


class _SoftCrossEntropy(Function):
    """Autograd would keep several copies of the logits for the way back; its gradient takes the place of them all."""

    @staticmethod
    def forward(ctx: Any, logits_RV: Tensor, probabilities_NV: Tensor, rows_R: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        gradient_RV = torch.empty_like(logits_RV)
        for begin in range(0, len(rows_R), _ROWS_AT_A_TIME):
            part = slice(begin, begin + _ROWS_AT_A_TIME)
            wanted = probabilities_NV[rows_R[part]]
            wanted /= wanted.sum(-1, keepdim=True)
            logs = logits_RV[part].float().log_softmax(-1)
            total -= torch.dot(wanted.flatten(), logs.flatten())
            gradient_RV[part] = logs.exp_().sub_(wanted)
        ctx.save_for_backward(gradient_RV)
        return (total / max(1, len(rows_R))).float()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient_RV,) = ctx.saved_tensors
        return gradient_RV * (gradients[0] / max(1, len(gradient_RV))), None, None


def soft_cross_entropy(logits_RV: Tensor, probabilities_NV: Tensor, rows_R: Tensor) -> Tensor:
    """Mean over R of the cross-entropy between guesses and the rows of ``probabilities_NV`` that ``rows_R`` names.

    Args:
        logits_RV: of the head, differentiable.
        probabilities_NV: the target's, of the draft vocabulary; what it gives to other tokens is left out.
    """
    loss: Tensor = _SoftCrossEntropy.apply(logits_RV, probabilities_NV, rows_R)  # type: ignore[no-untyped-call]
    return loss
