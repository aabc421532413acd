"""The benchmark of speculation: its arithmetic by hand, its prompts, and the whole program on the demo model."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from speculation import _parser, main, methods_of, sections
from speculation_figures import Figure, Ratio, figure
from speculation_runs import DecodingStep, Round, read_prompts

from eagleray.core.acceptance import Acceptance
from eagleray.core.config import DEMO_MODEL_PATH, SpeculationConfig
from eagleray.core.errors import ConfigError
from eagleray.engine.speculation.shape import draft_shape
from eagleray.models.draft_heads.read import read_draft
from eagleray.models.registry import load_model_config


def taken(
    contender: str, duration_s: float, steps: list[DecodingStep], answer: tuple[int, ...] = (1, 2, 3, 4)
) -> Round:
    acceptance = None
    if contender != "none":
        acceptance = Acceptance(
            num_steps=4, num_draft_tokens=8, num_accepted_tokens=4, drafts_per_position=(4, 4),
            accepted_per_position=(3, 1), verify_s=0.0, draft_s=0.0,
        )  # fmt: skip
    return Round(contender, 2, duration_s, 8, acceptance, (answer, answer), steps)


PLAIN = [DecodingStep(2, 0, 0.010, 0.0), DecodingStep(2, 0, 0.012, 0.0), DecodingStep(1, 0, 0.001, 0.0)]
GUESSING = [
    DecodingStep(2, 4, 0.015, 0.004),
    DecodingStep(2, 4, 0.017, 0.006),
    DecodingStep(1, 2, 0.001, 0.001),  # the batch was not whole
]


def guessed(steps: list[DecodingStep] = GUESSING, depth: int | None = 2) -> Figure:
    plain = [taken("none", 2.0, PLAIN), taken("none", 4.0, PLAIN)]
    return figure(plain, [taken("x", 1.0, steps), taken("x", 2.0, steps)], depth)


def test_times_are_medians_of_steps_of_the_whole_batch() -> None:
    found = guessed()
    assert (found.decode_s, found.verify_s, found.draft_s_per_token) == pytest.approx((0.011, 0.016, 0.0025))
    assert (found.tokens_per_step, found.rate_per_position) == (2.0, (0.75, 0.25))


def test_the_bound_is_tokens_per_step_over_the_time_that_a_step_takes_beside_a_plain_one() -> None:
    assert guessed().bound == pytest.approx(2.0 * 0.011 / (0.016 + 2 * 0.0025))
    half = guessed([DecodingStep(2, 0, 0.011, 0.005), DecodingStep(2, 4, 0.016, 0.005)])
    assert half.bound == pytest.approx(2.0 * 0.011 / (0.5 * 0.016 + 0.5 * 0.011 + 0.005))
    assert guessed(depth=None).bound is None and guessed([]).bound is None


def test_the_speed_up_is_the_geometric_mean_of_pairs_with_students_interval() -> None:
    ratio = Ratio.of_pairs([2.0, 8.0, 4.0], [1.0, 2.0, 1.0])  # 2, 4, 4
    logs = [math.log(2), math.log(4), math.log(4)]
    mean = sum(logs) / 3
    half = 4.303 * math.sqrt(sum((log - mean) ** 2 for log in logs) / 2 / 3)
    assert (ratio.mean, ratio.low, ratio.high) == pytest.approx(
        (math.exp(mean), math.exp(mean - half), math.exp(mean + half))
    )
    assert guessed().speed_up == Ratio(2.0, 2.0, 2.0)


def test_a_single_pair_has_no_interval() -> None:
    assert Ratio.of_pairs([3.0], [2.0]) == Ratio(1.5, None, None)


def test_answers_that_differ_are_counted() -> None:
    plain, other = taken("none", 1.0, PLAIN), taken("x", 1.0, GUESSING, answer=(1, 2, 9, 9))
    assert (guessed().num_differing_answers, figure([plain], [other], 2).num_differing_answers) == (0, 2)


def test_controllers_have_a_table_of_their_own_without_a_bound() -> None:
    adaptive = figure([taken("none", 2.0, PLAIN)], [taken("x, adaptive", 1.0, GUESSING)], None)
    always, controllers = sections([guessed(), adaptive])
    assert [row[0] for row in always.rows] == [row[0] for row in controllers.rows] == ["x"]
    assert "bound" in always.header and "bound" not in controllers.header
    assert len(always.rows[0]) == len(always.header) and len(controllers.rows[0]) == len(controllers.header)


def test_the_default_prompts_are_chats_for_the_demo_models_template() -> None:
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "prompts" / "demo.jsonl"
    prompts = read_prompts(path, DEMO_MODEL_PATH)
    assert 16 <= len(prompts) <= 32 and len(set(map(tuple, prompts))) == len(prompts)


def test_a_line_that_is_no_prompt_is_named(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "fish"}\n{"text": "fish"}\n')
    with pytest.raises(ConfigError, match=r"prompts\.jsonl:2"):
        read_prompts(path, DEMO_MODEL_PATH)


def test_rows_name_drafts_with_random_weights_and_trees_and_every_draft_fits_the_model(tmp_path: Path) -> None:
    options = _parser().parse_args(
        ["--random", "eagle", "medusa", "draft_model", "--trees", "--only", "eagle3", "eagle", "medusa", "draft_model"]
    )
    target = load_model_config(DEMO_MODEL_PATH)
    methods = methods_of(options, target, tmp_path)
    chains = ["eagle3 draft", "eagle, random weights", "medusa, random weights", "draft_model, random weights"]
    assert list(methods) == [*chains, *(f"{name}, tree of 15" for name in chains)]
    for name, fields in methods.items():
        config = SpeculationConfig(**fields)
        assert read_draft(config.folder, target).method == fields["method"]
        assert draft_shape(config).max_nodes == (15 if "tree" in name else 3)


@pytest.mark.slow
def test_the_program_measures_the_demo_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = tmp_path / "result.json"
    few = ("--num-prompts", "2", "--max-tokens", "8", "--repeats", "2", "--batches", "2", "--only", "ngram")
    assert main([*few, "--markdown", "--json", str(result)]) == 0
    assert "| ngram | 2 |" in capsys.readouterr().out
    always, adaptive = json.loads(result.read_bytes())["figures"]
    assert (always["contender"], adaptive["contender"]) == ("ngram", "ngram, adaptive")
    assert always["num_differing_answers"] == adaptive["num_differing_answers"] == 0


def test_a_model_that_is_not_there_is_one_line_on_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", "/nowhere"]) == 2
    assert "model.path" in capsys.readouterr().err
