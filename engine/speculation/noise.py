"""The noise with which the target will choose, for those who guess: it is known before the logits are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eagleray.engine.execution.verified import VerifiedRun
from eagleray.kernels.sampling.noise import row_keys, token_noise


@dataclass(frozen=True, slots=True)
class ChoiceNoise:
    """Implements ``Noise`` for a batch of requests; greedy ones among them have none.

    The target takes the argmax of logit / temperature + noise. A guesser whose logits are like the target's finds the
    same token when it adds the same noise.
    """

    temperature_B: Tensor  # float32; 1 for greedy requests
    is_random_B: Tensor  # bool
    seed_B: Tensor  # int64
    choice_B: Tensor
    position_B: Tensor  # index in the request of its next token

    @classmethod
    def of(cls, runs: Sequence[VerifiedRun], device: torch.device | str) -> ChoiceNoise | None:
        """None when every request is greedy."""
        params = [run.run.spec.sampling for run in runs]
        if all(param.is_greedy for param in params):
            return None
        return cls(
            torch.tensor([1.0 if param.is_greedy else param.temperature for param in params], device=device),
            torch.tensor([not param.is_greedy for param in params], device=device),
            torch.tensor([param.seed or 0 for param in params], dtype=torch.int64, device=device),
            torch.tensor([run.run.spec.choice for run in runs], dtype=torch.int64, device=device),
            torch.tensor([run.run.end + len(run.sampled) for run in runs], dtype=torch.int64, device=device),
        )

    def scale(self, logits_BFC: Tensor) -> Tensor:
        return logits_BFC / self.temperature_B[:, None, None]

    def perturb(self, scaled_BFC: Tensor, target_ids_BFC: Tensor, depth: int) -> Tensor:
        keys_B = row_keys(self.seed_B, self.choice_B, self.position_B + depth - 1)
        noise_BFC = token_noise(keys_B[:, None, None], target_ids_BFC)
        return scaled_BFC + noise_BFC * self.is_random_B[:, None, None]


def noise_vectors(runs: Sequence[VerifiedRun], length: int) -> list[list[int]]:
    """Seeds and choices of B ``runs``, and positions of ``length`` guesses after each, those of one depth together."""
    return [
        [run.run.spec.sampling.seed or 0 for run in runs],
        [run.run.spec.choice for run in runs],
        [run.num_known + depth for depth in range(length) for run in runs],
    ]


def temperatures(runs: Sequence[VerifiedRun], device: torch.device | str) -> Tensor:
    """float32 [B], as in ``SharedNoise``."""
    params = [run.run.spec.sampling for run in runs]
    values = [0.0 if each.is_greedy else each.temperature for each in params]  # integers are as good, where offline
    return torch.tensor(values, dtype=torch.float32, device=device)
