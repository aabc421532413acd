"""Offline use, without Ray: ``LLM(model).generate(prompts, SamplingParams(...))``, as in vLLM."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, cast

import msgspec

from eagleray.core.clock import SystemClock
from eagleray.core.config import Config, EngineConfig, parse_config
from eagleray.core.errors import ConfigError, EagleRayError, InvalidRequest
from eagleray.core.messages import TokenOutput
from eagleray.core.request import RequestSpec
from eagleray.core.sampling_params import SamplingParams
from eagleray.engine.checkpoint import check_checkpoint
from eagleray.engine.engine import Engine
from eagleray.engine.execution.executor import build_executor
from eagleray.engine.request_output import OutputCollector, RequestOutput
from eagleray.engine.speculation.build import build_draft_policy
from eagleray.text.chat_template import ChatTemplate
from eagleray.text.output import OutputText
from eagleray.text.tokenizer import Tokenizer

Prompt = str | Sequence[int] | Mapping[str, Any]  # text, token ids, {"prompt": ...} or {"prompt_token_ids": [...]}
Messages = Sequence[Mapping[str, Any]]

_STEP_DEADLINE_S: Final = 3600.0  # nobody waits for an answer as a client does: a large model's step may take minutes


class LLM:
    """A model and an engine in this process.

    Args:
        model: folder in Hugging Face format, or ``"demo"`` for the packaged model.
        dtype: ``"float32"``, ``"bfloat16"``, ``"float16"``, or ``"auto"``: the checkpoint's, but float32 on a CPU.
        max_model_len: longest prompt plus output, in tokens; None: the model's own limit.
        seed: what requests without a seed of their own are seeded from.
        num_threads: that compute, in native kernels and in torch; None: torch's default.
        progress: called while loading with (tensors loaded, tensors in all).
        quantization: of linear layers: ``"w8a8"``, ``"int8"`` or ``"int4"``; None: none.
        speculation: guess tokens ahead: fields of ``SpeculationConfig``, such as ``{"method": "ngram"}``.
        engine: any field of ``EngineConfig`` (``max_num_seqs``, ``block_size_tokens``, ``num_blocks``, ...);
            ``step_deadline_s`` is an hour here.

    With glibc, ``malloc`` keeps up to 256 MiB of freed memory from then on, in the whole process.

    Raises ``ConfigError`` for a checkpoint or a setting that cannot be served.
    """

    def __init__(
        self,
        model: str | Path = "demo",
        *,
        dtype: str = "auto",
        max_model_len: int | None = None,
        seed: int = 0,
        num_threads: int | None = None,
        progress: Callable[[int, int], None] | None = None,
        quantization: str | None = None,
        speculation: Mapping[str, Any] | None = None,
        **engine: Any,
    ) -> None:
        unknown = sorted(engine.keys() - EngineConfig.model_fields.keys())
        if unknown:
            known = ", ".join(EngineConfig.model_fields)
            raise ConfigError(
                unknown[0], engine[unknown[0]], f"LLM() does not know this argument; engine settings: {known}"
            )
        section = {"path": str(model), "dtype": dtype, "max_model_tokens": max_model_len, "quantization": quantization}
        settings = {"step_deadline_s": _STEP_DEADLINE_S, **engine}
        pools = {"prefill": {"replicas": 0}, "decode": {"engine": settings}}
        self._build(parse_config({"model": section, "speculation": speculation, **pools}), num_threads, progress)
        self._random = random.Random(seed)
        self._request_numbers = itertools.count()

    def _build(self, config: Config, num_threads: int | None, progress: Callable[[int, int], None] | None) -> None:
        model, engine, speculation = config.model, config.decode.engine, config.speculation
        check_checkpoint(model.folder)
        self._tokenizer = Tokenizer.from_folder(model.folder)
        self._template = ChatTemplate.from_folder(model.folder, self._tokenizer)
        executor = build_executor(model, engine, num_threads=num_threads, progress=progress, speculation=speculation)
        draft_policy = build_draft_policy(speculation, executor.has_draft_network)
        self._vocab_size = executor.model_config.vocab_size
        self._orders_by_priority = engine.scheduling_policy == "priority"
        self.engine = Engine(executor, engine, SystemClock(), self._new_text, draft_policy)

    def get_tokenizer(self) -> Tokenizer:
        return self._tokenizer

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = False,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Answer all prompts, batched; outputs in the order of the prompts.

        Args:
            prompts: one prompt or several: text, token ids, ``{"prompt": text}`` or ``{"prompt_token_ids": ids}``.
            sampling_params: for all prompts, or one for each; default ``SamplingParams()``.
            use_tqdm: show on standard error how many prompts are answered.
            priority: one number per prompt, the smaller the sooner; needs ``scheduling_policy="priority"``.

        Raises ``InvalidRequest`` naming the field, before anything is computed. Whatever else ends it early, be it
        ``KeyboardInterrupt``, all its blocks are free afterwards.
        """
        prompt_list = _as_list(prompts)
        params = _one_each(sampling_params, len(prompt_list))
        priorities = self._priorities(priority, len(prompt_list))
        batch = _Batch(self._tokenizer)
        for prompt, sampling, rank in zip(prompt_list, params, priorities, strict=True):
            batch.add(self._specs(prompt, sampling, rank), _text_of(prompt))
        self._run(batch, use_tqdm)
        return batch.outputs

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = False,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation or several, each rendered by the model's chat template. Raises as ``generate``."""
        if not messages:
            raise InvalidRequest("messages: is empty; give at least one message.", param="messages")
        several = [messages] if isinstance(messages[0], Mapping) else messages
        conversations = cast(Sequence[Sequence[Mapping[str, Any]]], several)
        texts = [
            self._template.render(
                conversation,
                add_generation_prompt=add_generation_prompt and not continue_final_message,
                continue_final_message=continue_final_message,
                tools=tools,
                variables=chat_template_kwargs,
            )
            for conversation in conversations
        ]
        # The template has written the special tokens already.
        prompts = [
            {"prompt": text, "prompt_token_ids": self._tokenizer.encode(text, add_special_tokens=False)}
            for text in texts
        ]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    # ---- parts

    def _priorities(self, priority: Sequence[int] | None, count: int) -> Sequence[int]:
        if priority is None:
            return [0] * count
        if not self._orders_by_priority:
            message = "priority: the scheduling policy ignores it; construct LLM(..., scheduling_policy='priority')."
            raise InvalidRequest(message, param="priority")
        if len(priority) != count:
            message = f"priority: {len(priority)} given for {count} prompts; give one for each prompt."
            raise InvalidRequest(message, param="priority")
        return priority

    def _specs(self, prompt: Prompt, sampling: SamplingParams, priority: int) -> list[RequestSpec]:
        """One spec per answer; the n answers of a prompt share its seed and differ by ``choice``."""
        token_ids = self._token_ids(prompt)
        if sampling.seed is None:
            sampling = msgspec.structs.replace(sampling, seed=self._random.getrandbits(62))
        number = next(self._request_numbers)
        return [
            RequestSpec(
                request_id=f"{number}.{choice}",
                token_ids=token_ids,
                num_prompt_tokens=len(token_ids),
                sampling=sampling,
                eos_token_ids=self._tokenizer.eos_token_ids,
                choice=choice,
                priority=priority,
            )
            for choice in range(sampling.n)
        ]

    def _token_ids(self, prompt: Prompt) -> tuple[int, ...]:
        content = _content_of(prompt)
        token_ids = tuple(self._tokenizer.encode(content) if isinstance(content, str) else content)
        for token_id in token_ids:
            if not 0 <= token_id < self._vocab_size:
                raise InvalidRequest(
                    f"prompt_token_ids: {token_id} is outside the vocabulary of {self._vocab_size} tokens.",
                    param="prompt_token_ids",
                )
        return token_ids

    def _new_text(self, spec: RequestSpec) -> OutputText:
        return OutputText(self._tokenizer, spec.sampling, spec.token_ids[: spec.num_prompt_tokens])

    def _run(self, batch: _Batch, show_progress: bool) -> None:
        try:
            for spec in batch.take_ready():
                self.engine.add(spec)
            with _progress_bar(len(batch.outputs), show_progress) as advance:
                while self.engine.has_work:
                    outcome = self.engine.step()
                    if outcome.is_idle:
                        raise EagleRayError("the engine has work that it cannot schedule")
                    advance(sum(batch.take(output) for output in outcome.outputs))
                    for spec in batch.take_ready():
                        self.engine.add(spec)
        except BaseException:
            for request_id in batch.request_ids():
                self.engine.end(request_id)
            raise
        finally:
            self.engine.drain_cache_changes()  # nobody indexes an offline engine's blocks


class _Batch:
    """The requests of one ``generate`` call and what has come of them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._collectors: dict[str, OutputCollector] = {}  # by the request id of every answer
        self._ready: list[RequestSpec] = []
        self._siblings: dict[str, list[RequestSpec]] = {}  # start when the first answer's prompt is cached
        self.outputs: list[RequestOutput] = []

    def add(self, specs: list[RequestSpec], prompt_text: str | None) -> None:
        first, *siblings = specs
        collector = OutputCollector(first.request_id.partition(".")[0], first, self._tokenizer, prompt_text)
        self._collectors.update((spec.request_id, collector) for spec in specs)
        self._ready.append(first)
        self._siblings[first.request_id] = siblings
        self.outputs.append(collector.output)

    def request_ids(self) -> Iterable[str]:
        return self._collectors

    def take_ready(self) -> list[RequestSpec]:
        ready, self._ready = self._ready, []
        return ready

    def take(self, output: TokenOutput) -> int:
        """Add new tokens to their answer; 1 when that finishes the whole request."""
        self._ready.extend(self._siblings.pop(output.request_id, ()))
        collector = self._collectors[output.request_id]
        collector.add(output)
        return int(collector.output.finished)


@contextmanager
def _progress_bar(total: int, show: bool) -> Iterator[Callable[[int], None]]:
    """Gives what counts further answered prompts, on a bar on standard error if ``show``."""
    if not show:
        yield lambda count: None
        return
    from rich.console import Console  # not needed by most uses
    from rich.progress import Progress

    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("prompts", total=total)
        yield lambda count: bar.advance(task, count)


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt may be text, a mapping or a list of token ids; anything else is a list of prompts."""
    if isinstance(prompts, str | Mapping):
        return [prompts]
    listed: list[Any] = list(prompts)
    return [listed] if listed and isinstance(listed[0], int) else listed


def _content_of(prompt: Prompt) -> str | Sequence[int]:
    """Text or token ids. Raises ``InvalidRequest`` for anything else."""
    content: Any = prompt
    if isinstance(prompt, Mapping):
        content = prompt.get("prompt_token_ids", prompt.get("prompt"))
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence) and all(isinstance(token_id, int) for token_id in content):
        return content
    message = f"prompt={prompt!r:.80}: give text, token ids, {{'prompt': text}} or {{'prompt_token_ids': ids}}."
    raise InvalidRequest(message, param="prompt")


def _text_of(prompt: Prompt) -> str | None:
    text = prompt.get("prompt") if isinstance(prompt, Mapping) else prompt
    return text if isinstance(text, str) else None


def _one_each(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if len(params) != count:
        raise InvalidRequest(
            f"sampling_params: {len(params)} given for {count} prompts; give one, or one for each prompt.",
            param="sampling_params",
        )
    return list(params)
