"""The text of one request's output: detokenising and stop strings together."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from eagleray.core.sampling_params import SamplingParams
from eagleray.text.detokenizer import IncrementalDetokenizer
from eagleray.text.stop import StopChecker
from eagleray.text.tokenizer import Tokenizer


class TokenText(msgspec.Struct, frozen=True):
    text: str  # what this token releases; earlier tokens' text may come with it
    stop_reason: str | None = None  # the stop string that it completes: the output ends here


class OutputText:
    """Text of one output, token by token. Its whole state is a function of the tokens pushed."""

    def __init__(self, tokenizer: Tokenizer, sampling: SamplingParams, prompt_token_ids: Iterable[int]) -> None:
        self._detokenizer = IncrementalDetokenizer(tokenizer, prompt_token_ids, sampling.skip_special_tokens)
        self._checker = StopChecker(sampling.stop, sampling.include_stop_str_in_output)
        self._min_tokens = sampling.min_tokens
        self._num_tokens = 0
        self._stopped = False

    def push(self, token_id: int) -> TokenText:
        """Take the next token. A stop string completed before ``min_tokens`` tokens are there does not count."""
        self._num_tokens += 1
        released, stop = self._checker.push(self._detokenizer.push(token_id), self._num_tokens >= self._min_tokens)
        self._stopped = stop is not None
        return TokenText(released, stop)

    def finish(self) -> str:
        """What was held back, when the output ends for another reason than a stop string (else empty)."""
        if self._stopped:
            return ""
        released, _ = self._checker.push(self._detokenizer.flush(), self._num_tokens >= self._min_tokens)
        return released + self._checker.flush()

    def replay(self, output_token_ids: Iterable[int]) -> None:
        """Take tokens whose text was released elsewhere; goes on as if it had been released here."""
        for token_id in output_token_ids:
            self.push(token_id)
