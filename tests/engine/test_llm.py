"""The offline front: what it takes, what it gives back, and what it leaves behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from eagleray import LLM, RequestOutput, SamplingParams
from eagleray.core.errors import ConfigError, InvalidRequest
from eagleray.engine.scheduling.plan import StepHandle, StepPlan
from eagleray.models.random_weights import save_random_checkpoint
from eagleray.text.fake import save_byte_tokenizer

TINY_LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 259, "hidden_size": 32,
    "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "hidden_act": "silu", "torch_dtype": "float32",
}  # fmt: skip
GREEDY = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)
CHAT = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_random_checkpoint(folder, TINY_LLAMA, seed=1)
    save_byte_tokenizer(folder)
    return folder


@pytest.fixture
def new_llm(folder: Path) -> Callable[..., LLM]:
    return lambda **settings: LLM(folder, num_threads=1, **{"num_blocks": 64, **settings})


@pytest.fixture
def llm(new_llm: Callable[..., LLM]) -> LLM:
    return new_llm()


def texts(outputs: list[RequestOutput]) -> list[list[str]]:
    return [[answer.text for answer in output.outputs] for output in outputs]


def assert_nothing_is_held(llm: LLM) -> None:
    llm.engine.check_integrity()
    assert not llm.engine.has_work
    assert llm.engine.kv.pool.num_free == llm.engine.kv.pool.num_blocks


def test_a_prompt_may_be_text_token_ids_or_a_mapping_of_either(llm: LLM) -> None:
    ids = llm.get_tokenizer().encode("hello")
    forms: list[Any] = ["hello", ids, {"prompt": "hello"}, {"prompt_token_ids": ids}]
    outputs = [llm.generate(form, GREEDY) for form in forms]
    assert all(len(output) == 1 for output in outputs)
    assert [output[0].prompt for output in outputs] == ["hello", None, "hello", None]
    assert all(output[0].prompt_token_ids == ids for output in outputs)
    assert len({output[0].outputs[0].text for output in outputs}) == 1


def test_several_prompts_of_any_form_are_answered_in_their_order(llm: LLM) -> None:
    prompts: list[Any] = ["one", [50, 51], {"prompt": "three"}, (60,)]
    together = llm.generate(prompts, GREEDY)
    assert texts(together) == [texts(llm.generate(prompt, GREEDY))[0] for prompt in prompts[:3]] + [
        texts(llm.generate([60], GREEDY))[0]
    ]
    assert [output.request_id for output in together] == ["0", "1", "2", "3"]
    assert llm.generate([]) == []


def test_each_prompt_may_have_its_own_sampling_params(llm: LLM) -> None:
    params = [SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True) for count in (1, 4, 2)]
    outputs = llm.generate(["a", "b", "c"], params)
    assert [len(output.outputs[0].token_ids) for output in outputs] == [1, 4, 2]
    assert all(output.finished and output.outputs[0].finish_reason == "length" for output in outputs)


def test_without_sampling_params_sixteen_tokens_are_sampled(llm: LLM) -> None:
    answer = llm.generate("a")[0].outputs[0]
    assert len(answer.token_ids) == 16 or answer.finish_reason == "stop"


def test_unseeded_answers_differ_within_a_run_and_repeat_with_the_seed_of_the_llm(new_llm: Callable[..., LLM]) -> None:
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    runs = [texts(new_llm(seed=seed).generate(["same", "same"], params)) for seed in (3, 3, 4)]
    assert runs[0] == runs[1] != runs[2]
    assert runs[0][0] != runs[0][1]


def test_n_answers_share_the_prompts_blocks_and_differ(llm: LLM) -> None:
    output = llm.generate("x" * 40, SamplingParams(n=3, seed=1, max_tokens=6, ignore_eos=True))[0]
    assert [answer.index for answer in output.outputs] == [0, 1, 2]
    assert len({answer.text for answer in output.outputs}) == 3
    assert output.num_cached_tokens == 0


def test_a_repeated_prompt_reports_its_cached_tokens(llm: LLM) -> None:
    llm.generate("y" * 40, GREEDY)
    assert llm.generate("y" * 40, GREEDY)[0].num_cached_tokens == 32


def test_logprobs_hold_the_sampled_token_first_and_sum_up(llm: LLM) -> None:
    params = SamplingParams(seed=2, max_tokens=4, ignore_eos=True, logprobs=2, prompt_logprobs=1)
    output = llm.generate("abc", params)[0]
    answer = output.outputs[0]
    assert answer.logprobs is not None and output.prompt_logprobs is not None
    assert [next(iter(entry)) for entry in answer.logprobs] == answer.token_ids
    assert all(2 <= len(entry) <= 3 for entry in answer.logprobs)
    chosen = [entry[token_id] for entry, token_id in zip(answer.logprobs, answer.token_ids, strict=True)]
    assert answer.cumulative_logprob == pytest.approx(sum(logprob.logprob for logprob in chosen))
    assert all(entry.rank >= 1 for entry in chosen)
    assert output.prompt_logprobs[0] is None
    assert [next(iter(entry or ())) for entry in output.prompt_logprobs[1:]] == output.prompt_token_ids[1:]
    assert llm.generate("abc", GREEDY)[0].outputs[0].logprobs is None


def test_prompt_logprobs_are_whole_when_the_prompt_was_preempted_between_chunks(new_llm: Callable[..., LLM]) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, prompt_logprobs=0)
    prompts = ["e" * 20, "l" * 110]  # the first one's third block takes the place of the second in mid-prompt
    roomy = new_llm().generate(prompts, params)
    llm = new_llm(num_blocks=9, block_size_tokens=16, max_num_seqs=8, max_num_batched_tokens=9, watermark=0.0)
    tight = llm.generate(prompts, params)
    assert llm.engine.scheduler.num_preemptions
    for ours, theirs in zip(tight, roomy, strict=True):
        assert ours.prompt_logprobs is not None and theirs.prompt_logprobs is not None
        assert list(map(keys, ours.prompt_logprobs)) == list(map(keys, theirs.prompt_logprobs))


def keys(entry: dict[int, Any] | None) -> list[int]:
    return list(entry or ())


def test_a_stop_string_ends_the_answer_and_is_named(llm: LLM) -> None:
    always_a = {llm.get_tokenizer().encode("a")[0]: 100.0}
    answer = llm.generate("x", SamplingParams(stop="aaa", logit_bias=always_a, temperature=0.0))[0].outputs[0]
    assert (answer.text, answer.finish_reason, answer.stop_reason) == ("", "stop", "aaa")
    assert len(answer.token_ids) == 3


def test_the_end_of_sequence_token_ends_the_answer_unless_ignored(llm: LLM) -> None:
    end = llm.get_tokenizer().eos_token_ids[0]
    params = {"logit_bias": {end: 100.0}, "temperature": 0.0, "max_tokens": 3}
    stopped, ignored = llm.generate(["x", "x"], [SamplingParams(**params), SamplingParams(ignore_eos=True, **params)])
    assert (stopped.outputs[0].token_ids, stopped.outputs[0].finish_reason) == ([end], "stop")
    assert (ignored.outputs[0].token_ids, ignored.outputs[0].finish_reason) == ([end] * 3, "length")


def test_an_answer_without_a_limit_ends_with_the_models_length(new_llm: Callable[..., LLM]) -> None:
    llm = new_llm(max_model_len=40)
    answer = llm.generate([5] * 30, SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True))[0].outputs[0]
    assert (len(answer.token_ids), answer.finish_reason) == (10, "length")


def test_chat_applies_the_template_to_one_conversation_or_several(llm: LLM) -> None:
    one = llm.chat(CHAT, GREEDY)
    assert one[0].prompt == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert one[0].prompt_token_ids[0] == 1  # the special token, not its spelling
    two = llm.chat([CHAT, [*CHAT, {"role": "assistant", "content": "yo"}]], GREEDY)
    assert texts(two)[0] == texts(one)[0]
    assert len(two) == 2


def test_chat_continues_the_final_message_when_asked(llm: LLM) -> None:
    prompt = llm.chat([*CHAT, {"role": "assistant", "content": "Well,"}], GREEDY, continue_final_message=True)[0].prompt
    assert prompt is not None and prompt.endswith("assistant\nWell,")


def test_priority_decides_who_goes_first(new_llm: Callable[..., LLM]) -> None:
    llm = new_llm(scheduling_policy="priority", max_num_seqs=1)
    prompts = recorded_prompts(llm)
    llm.generate(["a", "b", "c"], SamplingParams(temperature=0.0, max_tokens=1), priority=[2, 0, 1])
    assert prompts == [llm.get_tokenizer().encode(text) for text in "bca"]


def recorded_prompts(llm: LLM) -> list[list[int]]:
    """The prompts in the order in which they are computed from now on."""
    prompts: list[list[int]] = []
    patch_submit(llm, lambda plan: prompts.extend(list(run.spec.token_ids) for run in plan.runs))
    return prompts


def patch_submit(llm: LLM, before: Callable[[StepPlan], object]) -> Callable[[], None]:
    """Call ``before`` with every plan; what it raises is raised by the step. Returns what undoes it."""
    executor: Any = llm.engine._executor
    submit = executor.submit

    def patched(plan: StepPlan) -> StepHandle:
        before(plan)
        return submit(plan)

    executor.submit = patched
    return lambda: setattr(executor, "submit", submit)


@pytest.mark.parametrize(
    ("prompts", "options", "param"),
    [
        ("", {}, "prompt"),
        (["fine", []], {}, "prompt"),
        (["fine", [259]], {}, "prompt_token_ids"),
        (["fine", [-1]], {}, "prompt_token_ids"),
        (["fine", "long" * 100], {}, "prompt"),
        (["fine", 3.5], {}, "prompt"),
        (["fine", {"text": "x"}], {}, "prompt"),
        (["fine", ["words", "nested"]], {}, "prompt"),
        (["a", "b"], {"sampling_params": [GREEDY]}, "sampling_params"),
        (["a", "b"], {"priority": [1, 2]}, "priority"),
    ],
)
def test_what_cannot_be_served_is_refused_before_anything_is_computed(
    llm: LLM, prompts: Any, options: dict[str, Any], param: str
) -> None:
    plans: list[StepPlan] = []
    patch_submit(llm, plans.append)
    with pytest.raises(InvalidRequest) as refusal:
        llm.generate(prompts, **options)
    assert refusal.value.param == param
    assert not plans
    assert_nothing_is_held(llm)
    assert len(llm.generate("fine", GREEDY)) == 1


def test_a_priority_for_each_prompt_is_asked_for(new_llm: Callable[..., LLM]) -> None:
    with pytest.raises(InvalidRequest, match="1 given for 2 prompts"):
        new_llm(scheduling_policy="priority").generate(["a", "b"], priority=[1])


def test_an_unknown_engine_setting_is_refused(new_llm: Callable[..., LLM]) -> None:
    with pytest.raises(ConfigError, match="gpu_memory"):
        new_llm(gpu_memory=1)


def test_a_chat_without_messages_is_refused(llm: LLM) -> None:
    with pytest.raises(InvalidRequest, match="messages"):
        llm.chat([])


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("the device is gone")])
def test_whatever_breaks_off_a_call_leaves_a_usable_engine(llm: LLM, error: BaseException) -> None:
    expected = texts(llm.generate(["a" * 40, "b"], GREEDY))
    steps = iter(range(3))

    def fail_later(plan: StepPlan) -> None:
        if next(steps, None) is None:
            raise error

    undo = patch_submit(llm, fail_later)
    with pytest.raises(type(error)):
        llm.generate(["a" * 40, "c" * 30, "d"], SamplingParams(n=2, max_tokens=20, ignore_eos=True, seed=1))
    undo()
    assert_nothing_is_held(llm)
    assert texts(llm.generate(["a" * 40, "b"], GREEDY)) == expected


def test_the_progress_bar_counts_answered_prompts_on_standard_error(
    llm: LLM, capsys: pytest.CaptureFixture[str]
) -> None:
    llm.generate(["a", "b"], GREEDY, use_tqdm=True)
    printed = capsys.readouterr()
    assert "100%" in printed.err and not printed.out
    llm.generate(["a", "b"], GREEDY)
    assert capsys.readouterr().err == ""


def test_the_demo_model_answers() -> None:
    llm = LLM("demo", dtype="float32", num_threads=1, num_blocks=64)
    text, chat = llm.generate("def add(a, b):", GREEDY)[0], llm.chat(CHAT, GREEDY)[0]
    assert text.outputs[0].text and chat.outputs[0].text
    assert chat.prompt is not None and chat.prompt.endswith("<|im_start|>assistant\n")
