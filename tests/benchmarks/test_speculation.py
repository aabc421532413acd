"""The benchmark of speculation: its arithmetic by hand, its prompts, and the whole program on the demo model."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import interference
import pytest
import speculation
import speculation_runs
from speculation import _config, _parser, main, methods_of
from speculation_figures import Figure, Pair, Ratio, figure
from speculation_report import IDLE, sections
from speculation_runs import (
    Contender,
    DecodingStep,
    Round,
    StepTimer,
    computing_on_one_core,
    in_short_turns,
    in_turns,
    read_prompts,
)

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


PLAIN = [
    DecodingStep(2, 0, 0.010, 0.0, wall_s=0.012),
    DecodingStep(2, 0, 0.012, 0.0, wall_s=0.016),
    DecodingStep(1, 0, 0.001, 0.0, wall_s=0.100),
]
GUESSING = [
    DecodingStep(2, 4, 0.015, 0.004, wall_s=0.021),
    DecodingStep(2, 4, 0.017, 0.006, wall_s=0.031),
    DecodingStep(1, 2, 0.001, 0.001, wall_s=0.100),  # the batch was not whole
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
    half = guessed([DecodingStep(2, 0, 0.011, 0.005, 0.1), DecodingStep(2, 4, 0.016, 0.005, 0.1)])
    assert half.bound == pytest.approx(2.0 * 0.011 / (0.5 * 0.016 + 0.5 * 0.011 + 0.005))
    assert guessed(depth=None).bound is None and guessed([]).bound is None


def test_the_bound_with_it_adds_to_either_step_what_its_wall_time_is_longer_than_computing_and_guessing() -> None:
    found = guessed()
    assert (found.outside_s, found.plain_outside_s) == pytest.approx((0.005, 0.003))
    assert found.bound_with_outside == pytest.approx(2.0 * (0.011 + 0.003) / (0.016 + 2 * 0.0025 + 0.005))
    assert guessed(depth=None).bound_with_outside is None and guessed([]).bound_with_outside is None


def test_disturbed_rounds_are_left_out_and_marked_where_there_are_no_others() -> None:
    plain = [replace(taken("none", 8.0, PLAIN), others_share=share) for share in (0.02, 0.5)]
    guessing = [taken("x", 4.0, GUESSING), replace(taken("x", 1.0, GUESSING, answer=(9,)), others_share=0.5)]
    guessing[0] = replace(guessing[0], others_share=0.02, prefill_s=1.0)
    found = figure(plain, guessing, 2)
    assert (found.speed_up.mean, found.others_share, len(found.counted_pairs), len(found.pairs)) == pytest.approx(
        (2.0, 0.02, 1, 2)
    )
    assert (found.num_differing_answers, found.prefill_share) == (0, 0.25)
    disturbed = figure(plain[1:], guessing[1:], 2)
    assert (disturbed.speed_up.mean, disturbed.others_share) == pytest.approx((8.0, 0.5))
    rows = sections([found, disturbed])[0].rows
    assert ["1 of 2" in row for row in rows] == [True, False]
    assert ["50.0% (disturbed)" in row for row in rows] == [False, True]


class _Answering:
    """A contender that only notes when it is asked, and what."""

    def __init__(self, name: str, asked: list[tuple[str, int]]) -> None:
        self.name, self._asked = name, asked

    def answer(self, prompts: Sequence[Sequence[int]], batch: int, max_tokens: int) -> Round:
        self._asked.append((self.name, prompts[0][0]))
        return Round(self.name, batch, 1.0, len(self._asked), None, [], [])


def _ask_in_turns(
    monkeypatch: pytest.MonkeyPatch, repeats: int, shares: list[float]
) -> tuple[list[list[Round]], list[str]]:
    """Rounds of A, B and C, and who was asked when: name and first prompt. Others use these shares of the cores."""
    left = iter(shares)
    monkeypatch.setattr(interference, "OtherProcesses", lambda tree_pid: SimpleNamespace(share=lambda: next(left)))
    asked: list[tuple[str, int]] = []
    contenders = [_Answering(name, asked) for name in "ABC"]
    rounds = in_turns(contenders, [[0], [1], [2], [3]], batch=1, max_tokens=8, repeats=repeats)  # type: ignore[arg-type]
    return rounds, [f"{name}{prompt}" for name, prompt in asked]


def test_every_repeat_begins_with_another_contender_and_another_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds, asked = _ask_in_turns(monkeypatch, 3, [0.0, 0.01, 0.02])
    assert asked == ["A0", "B0", "C0", "B1", "C1", "A1", "C2", "A2", "B2", "A3", "B3", "C3"]
    assert [[found.contender for found in repeat] for repeat in rounds] == [["A", "B", "C"]] * 3
    assert [[found.others_share for found in repeat] for repeat in rounds] == [[0.0] * 3, [0.01] * 3, [0.02] * 3]


def test_a_disturbed_repeat_is_tried_again_by_all_contenders(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds, asked = _ask_in_turns(monkeypatch, 1, [0.5, 0.5, 0.02])
    assert asked[3:12] == ["B1", "C1", "A1"] * 3
    assert [found.others_share for found in rounds[0]] == [0.02] * 3
    assert [found.num_tokens for found in rounds[0]] == [12, 10, 11]  # of the third attempt


def test_a_step_lasts_from_the_end_of_the_one_before_and_those_that_compute_prompts_are_prefill(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    times_s = iter((10.0, 10.5, 10.75))
    monkeypatch.setattr(speculation_runs, "time", SimpleNamespace(perf_counter=lambda: next(times_s)))
    executor = dict.fromkeys(
        ("layout", "model_identity", "draft_identity", "num_blocks", "num_host_blocks", "max_model_tokens"), 0
    )
    timer = StepTimer(SimpleNamespace(**executor))  # type: ignore[arg-type]
    result = SimpleNamespace(verify_s=0.125, draft_s=0.0625)
    prompt, decoding = (SimpleNamespace(num_tokens=n, num_rows=n + 2, samples=True) for n in (5, 1))
    timer.note(SimpleNamespace(runs=(prompt, decoding)), result)  # type: ignore[arg-type]
    timer.note(SimpleNamespace(runs=(decoding,)), result)  # type: ignore[arg-type]
    assert timer.prefill_s == 0.5
    assert timer.steps == [DecodingStep(1, 2, 0.125, 0.0625, wall_s=0.25)]
    assert timer.steps[0].outside_s == 0.0625


def test_the_speed_up_is_the_geometric_mean_of_pairs_with_students_interval() -> None:
    ratio = Ratio.of_pairs([Pair(2.0, 1.0, 0.0), Pair(8.0, 2.0, 0.0), Pair(4.0, 1.0, 0.0)])  # 2, 4, 4
    logs = [math.log(2), math.log(4), math.log(4)]
    mean = sum(logs) / 3
    half = 4.303 * math.sqrt(sum((log - mean) ** 2 for log in logs) / 2 / 3)
    assert (ratio.mean, ratio.low, ratio.high) == pytest.approx(
        (math.exp(mean), math.exp(mean - half), math.exp(mean + half))
    )
    assert guessed().speed_up == Ratio(2.0, 2.0, 2.0)


def test_a_single_pair_has_no_interval() -> None:
    assert Ratio.of_pairs([Pair(3.0, 2.0, 0.0)]) == Ratio(1.5, None, None)


def test_of_several_sets_of_engines_each_counts_once() -> None:
    """However often their turns agree: they differ for as long as they live."""
    pairs = [Pair(2.0, 1.0, 0.0, engines=0)] * 50 + [Pair(4.0, 1.0, 0.0, engines=1), Pair(1.0, 1.0, 0.0, engines=1)]
    one_each = Ratio.of_pairs([Pair(2.0, 1.0, 0.0), Pair(2.0, 1.0, 0.0)])
    assert Ratio.of_pairs(pairs) == one_each == Ratio(2.0, 2.0, 2.0)


def test_answers_that_differ_are_counted() -> None:
    plain, other = taken("none", 1.0, PLAIN), taken("x", 1.0, GUESSING, answer=(1, 2, 9, 9))
    assert (guessed().num_differing_answers, figure([plain], [other], 2).num_differing_answers) == (0, 2)


def test_controllers_have_a_table_of_their_own_without_a_bound_but_with_the_answers_that_differ() -> None:
    adaptive = figure([taken("none", 2.0, PLAIN)], [taken("x, adaptive", 1.0, GUESSING, answer=(1, 2, 9, 9))], None)
    always, controllers = sections([guessed(), adaptive])
    assert always.header[-1] == controllers.header[-1] == "differing answers"
    assert (always.rows[0][-1], controllers.rows[0][-1]) == ("0", "2")
    assert [row[0] for row in always.rows] == [row[0] for row in controllers.rows] == ["x"]
    assert "bound" in always.header and "bound" not in controllers.header
    assert len(always.rows[0]) == len(always.header) and len(controllers.rows[0]) == len(controllers.header)


def test_there_is_a_table_only_of_what_was_measured() -> None:
    idle = figure([taken("none", 2.0, PLAIN)], [taken(f"x{IDLE}", 2.0, PLAIN)], None)
    assert [section.header[0] for section in sections([guessed()])] == ["always guessing"]
    *_, kept = sections([guessed(), idle])
    assert kept.header[0] == "kept, never guessing" and [row[0] for row in kept.rows] == ["x"]


def test_the_default_prompts_are_64_held_out_chats_for_the_demo_models_template() -> None:
    path = _parser().parse_args([]).prompts
    assert path.name == "demo_held_out.jsonl"
    assert all(len(json.loads(line)["messages"][-1]["content"]) <= 500 for line in path.read_text().splitlines())
    prompts = read_prompts(path, DEMO_MODEL_PATH)
    assert len(prompts) == 64 and len(set(map(tuple, prompts))) == len(prompts)


def test_prompts_at_a_temperature_have_seeds_of_their_own_which_are_the_same_in_every_round() -> None:
    config = _config(_parser().parse_args(["--batches", "2"]))
    contender = Contender("none", config, None, temperature=1.0)
    prompt = read_prompts(_parser().parse_args([]).prompts, DEMO_MODEL_PATH)[0]
    first, second = (contender.answer([prompt, prompt], 2, max_tokens=64).answers for _ in range(2))
    contender.close()
    assert first == second and first[0] != first[1]


def test_in_short_turns_answers_follow_one_another_and_nothing_is_left_after_them() -> None:
    config = _config(_parser().parse_args(["--batches", "2"]))
    contenders = [Contender("none", config, None), Contender("another", config, None)]
    prompts = read_prompts(_parser().parse_args([]).prompts, DEMO_MODEL_PATH)[:3]
    turns = in_short_turns(contenders, prompts, 2, max_tokens=24, num_turns=4, untimed=1, num_steps=5)
    assert [[taken.contender for taken in turn] for turn in turns] == [["none", "another"]] * 4
    decoding = [step for turn in turns for taken in turn for step in taken.steps]
    assert [step.num_requests for step in decoding].count(2) > len(decoding) / 2
    assert all(0 < taken.num_tokens <= 2 * 5 for turn in turns for taken in turn)
    plain_rounds, other_rounds = zip(*turns, strict=True)
    assert figure(plain_rounds, other_rounds, None).num_differing_answers is None
    for contender in contenders:
        assert not contender._engine.has_work
        contender.close()


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
    random = [f"{name}, random weights (cost only)" for name in ("eagle", "medusa", "draft_model")]
    chains = ["eagle3 draft", *random]
    assert list(methods) == [*chains, *(f"{name}, tree of 15" for name in chains)]
    for name, fields in methods.items():
        config = SpeculationConfig(**fields)
        assert read_draft(config.folder, target).method == fields["method"]
        assert draft_shape(config).max_nodes == (15 if "tree" in name else 3)


def _measure_nothing(options: argparse.Namespace) -> Iterator[list[Figure]]:
    """A figure for every name in --only."""
    for name in options.only:
        yield [replace(guessed(), contender=name)]


def _contenders(result: Path) -> list[list[str]]:
    """Of every piece."""
    pieces = json.loads(result.read_bytes())["pieces"]
    return [[figure["contender"] for figure in piece["figures"]] for piece in pieces]


def test_a_table_grows_piece_by_piece_and_shows_of_a_row_measured_again_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(speculation, "measure", _measure_nothing)
    result = tmp_path / "result.json"
    words = ["--markdown", "--json", str(result), "--add"]
    assert main([*words, "--only", "a", "b"]) == 0
    assert main([*words, "--only", "b", "c", "--trees", "--batches", "1"]) == 0
    assert _contenders(result) == [["a", "b"], ["b", "c"]]
    table = capsys.readouterr().out.split("\n\n")[-1]
    assert [line.split(" | ")[0] for line in table.splitlines()[2:]] == ["| a", "| b", "| c"]


@pytest.mark.parametrize("other", [("--depth", "5"), ("--temperature", "0.7"), ("--verification", "rejection")])
def test_rows_of_other_options_are_not_added(
    other: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(speculation, "measure", _measure_nothing)
    result = tmp_path / "result.json"
    words = ["--json", str(result), "--add", "--only", "a"]
    assert main(words) == 0
    assert main([*words, *other]) == 2
    error = capsys.readouterr().err
    assert other[0].removeprefix("--") in error and other[1] in error
    assert _contenders(result) == [["a"]]


def test_a_file_that_is_no_report_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = tmp_path / "result.json"
    result.write_text('{"figures": []}')
    assert main(["--json", str(result), "--add"]) == 2
    assert "result.json" in capsys.readouterr().err and result.read_text() == '{"figures": []}'


def test_rejection_measures_no_trees_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    methods = {}

    def keep_methods(options: argparse.Namespace) -> Iterator[list[Figure]]:
        methods.update(methods_of(options, load_model_config(DEMO_MODEL_PATH), tmp_path))
        yield []

    monkeypatch.setattr(speculation, "measure", keep_methods)
    assert main(["--verification", "rejection", "--temperature", "0.7", "--trees", "--markdown"]) == 0
    said = capsys.readouterr()
    assert "trees are left out" in said.err
    assert "temperature 0.7, verification by rejection" in said.out
    configs = [SpeculationConfig(**fields) for fields in methods.values()]
    assert len(configs) == 3 and all(config.verification == "rejection" for config in configs)


@pytest.mark.slow
def test_the_program_measures_the_demo_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = tmp_path / "result.json"
    few = ("--num-prompts", "2", "--max-tokens", "8", "--repeats", "2", "--batches", "2", "--only", "ngram")
    assert main([*few, "--markdown", "--json", str(result)]) == 0
    assert "| ngram | 2 |" in capsys.readouterr().out
    always, adaptive = json.loads(result.read_bytes())["pieces"][0]["figures"]
    assert (always["contender"], adaptive["contender"]) == ("ngram", "ngram, adaptive")
    assert always["num_differing_answers"] == adaptive["num_differing_answers"] == 0
    assert main([*few, "--controller-only", "--markdown", "--json", str(result)]) == 0
    (adaptive,) = json.loads(result.read_bytes())["pieces"][0]["figures"]
    assert (adaptive["contender"], adaptive["depth"]) == ("ngram, adaptive", None)
    assert "always" not in capsys.readouterr().out


def test_a_model_that_is_not_there_is_one_line_on_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", "/nowhere"]) == 2
    assert "model.path" in capsys.readouterr().err


def test_engines_are_built_as_often_as_it_is_asked_and_each_set_says_which_it_is(tmp_path: Path) -> None:
    options = ["--only", "ngram", "--controller-only", "--batches", "1", "--max-tokens", "8", "--num-prompts", "2"]
    options += ["--turn-steps", "8", "--repeats", "2", "--engines", "2", "--json", str(tmp_path / "found.json")]
    assert main(options) == 0
    (piece,) = json.loads((tmp_path / "found.json").read_text())["pieces"]
    (found,) = piece["figures"]
    assert [pair["engines"] for pair in found["pairs"]] == [0, 0, 1, 1]


def test_a_turn_in_which_the_machine_stood_still_does_not_count() -> None:
    usual, pause = DecodingStep(2, 0, 1e-3, 0.0, 1e-3), DecodingStep(2, 0, 1e-3, 0.0, 60e-3)
    plain = [taken("none", 1.0, [usual] * 9) for _ in range(3)]
    others = [taken("x", 1.0, [usual] * 9), taken("x", 4.0, [usual] * 8 + [pause]), taken("x", 1.0, [usual] * 9)]
    found = figure(plain, others, None)
    assert [pair.has_paused for pair in found.pairs] == [False, True, False]
    assert len(found.counted_pairs) == 2 and found.speed_up.mean == pytest.approx(1.0)


@pytest.mark.skipif(sys.platform != "linux" or len(os.sched_getaffinity(0)) < 2, reason="one core, or no Linux")
def test_threads_compute_on_one_core_and_have_all_again_afterwards() -> None:
    before, stop = os.sched_getaffinity(0), threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    assert thread.native_id is not None
    with computing_on_one_core():
        (core,) = os.sched_getaffinity(thread.native_id)
        assert core in before and core not in os.sched_getaffinity(0)
    assert os.sched_getaffinity(thread.native_id) == os.sched_getaffinity(0) == before
    stop.set()
    thread.join()


def test_no_engines_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--engines", "0"])
    assert "--engines 0: take 1 or more" in capsys.readouterr().err
