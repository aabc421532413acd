"""The packaged model with its packaged head, in sizes that tests with tiny models do not reach."""

from __future__ import annotations

from eagleray import LLM, SamplingParams


def test_long_prompts_get_the_tokens_that_they_get_without_guesses() -> None:
    prompts = ["def read(path):\n" + f"    value_{seed} = open(path).read()\n" * 40 for seed in range(3)]
    sampling, answers = SamplingParams(temperature=0.0, max_tokens=24), []
    for speculation in (None, {"method": "eagle3", "model": "demo", "adaptive": False}):
        llm = LLM("demo", num_threads=1, speculation=speculation, kv_memory_bytes=2**27)
        outputs = llm.generate(prompts, sampling)
        assert all(len(output.prompt_token_ids) > 256 for output in outputs)
        answers.append([output.outputs[0].token_ids for output in outputs])
        for answer in (output.outputs[0] for output in outputs):
            if speculation is None:
                assert answer.acceptance is None
            else:  # a step for each token, less those that were guessed; the prompt's step brings one as well
                assert answer.acceptance is not None
                assert answer.acceptance.num_steps + answer.acceptance.num_accepted_tokens >= len(answer.token_ids) - 1
                assert answer.acceptance.tokens_per_step > 1.5
    assert answers[0] == answers[1]
