"""Log-probabilities in the shapes of the two endpoints."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from eagleray.api.response_types import (
    ChatLogprobs,
    CompletionLogprobs,
    PromptLogprob,
    PromptLogprobs,
    TokenLogprob,
    TopLogprob,
)
from eagleray.core.messages import TokenLogprobs
from eagleray.text.tokenizer import Tokenizer

_LOWEST: Final = -9999.0  # JSON has no infinity; OpenAI's value for "never"

Scored = tuple[int, TokenLogprobs | None]  # a token and its log-probabilities; None for the first of a prompt


class LogprobsWriter:
    """Writes log-probabilities with the tokenizer's own spelling of tokens."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._hidden = tokenizer.special_token_ids if skip_special_tokens else frozenset()

    def chat(self, scores: Iterable[TokenLogprobs]) -> ChatLogprobs:
        """Of output tokens. The tokens' ``bytes`` spell the text: a token that is not shown has none."""
        return {"content": [self._chat_token(score) for score in scores], "refusal": None}

    def completion(self, scored: Sequence[Scored], offset: int) -> tuple[CompletionLogprobs, int]:
        """Of tokens that begin at character ``offset`` of the text; also the offset after them."""
        lists: CompletionLogprobs = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token_id, score in scored:
            lists["tokens"].append(self._name(token_id))
            lists["token_logprobs"].append(None if score is None else _finite(score.logprob))
            lists["top_logprobs"].append(None if score is None else self._best(score))
            lists["text_offset"].append(offset)
            offset += sum(byte & 0xC0 != 0x80 for byte in self._shown_bytes(token_id))  # characters that begin here
        return lists, offset

    def prompt(self, scores: Sequence[TokenLogprobs | None]) -> PromptLogprobs:
        """vLLM's ``prompt_logprobs``: by token id, null for the first token."""
        return [None if score is None else self._by_id(score) for score in scores]

    def _chat_token(self, score: TokenLogprobs) -> TokenLogprob:
        pairs = zip(score.top_ids, score.top_logprobs, strict=True)
        top = [self._chat_entry(token_id, logprob) for token_id, logprob in pairs]
        return {**self._chat_entry(score.token_id, score.logprob), "top_logprobs": top}

    def _chat_entry(self, token_id: int, logprob: float) -> TopLogprob:
        text = self._tokenizer.token_text(token_id)
        return {"token": text, "logprob": _finite(logprob), "bytes": list(self._shown_bytes(token_id))}

    def _best(self, score: TokenLogprobs) -> dict[str, float]:
        """The alternatives and the token itself, by name."""
        pairs = zip(score.top_ids, score.top_logprobs, strict=True)
        best = {self._name(token_id): _finite(logprob) for token_id, logprob in pairs}
        return best | {self._name(score.token_id): _finite(score.logprob)}

    def _by_id(self, score: TokenLogprobs) -> dict[str, PromptLogprob]:
        ranked = enumerate(zip(score.top_ids, score.top_logprobs, strict=True), start=1)
        entries = [(token_id, logprob, rank) for rank, (token_id, logprob) in ranked]
        entries.append((score.token_id, score.logprob, score.rank))
        return {
            str(token_id): {
                "logprob": _finite(logprob),
                "rank": rank,
                "decoded_token": self._tokenizer.token_text(token_id),
            }
            for token_id, logprob, rank in entries
        }

    def _shown_bytes(self, token_id: int) -> bytes:
        return b"" if token_id in self._hidden else self._tokenizer.token_bytes(token_id)

    def _name(self, token_id: int) -> str:
        """Unlike the text, different for two tokens that hold parts of characters (OpenAI's spelling)."""
        raw = self._tokenizer.token_bytes(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _finite(logprob: float) -> float:
    return max(logprob, _LOWEST)
