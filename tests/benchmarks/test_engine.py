"""The offline benchmark: its floors by hand, its counters, and the whole program on the demo model."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
from engine_report import Profile, Run, StepSplit, Timing, figure_of, sections
from engine_runs import BenchmarkEngine, CallCounter, KernelClock, Operation
from floors import Machine, Work, bytes_per_weight, shortest_load_s, step_work
from provenance import provenance
from report import to_markdown

from eagleray.core.config import parse_config
from eagleray.models.model_config import ModelConfig
from engine import _count_calls, main

CONFIG = ModelConfig(
    model_type="llama", vocab_size=10, hidden_size=4, intermediate_size=6, num_layers=2, num_heads=2, num_kv_heads=1,
    head_dim=3, max_position_embeddings=64, sliding_window=(None, None), dtype="bfloat16",
)  # fmt: skip
WEIGHTS = 2 * (4 * 6 + 4 * 3 + 4 * 3 + 6 * 4 + 3 * 4 * 6)  # of both layers: query, key, value, output, gate, up, down
HEAD = 10 * 4


def test_a_decoding_step_reads_all_weights_once_and_the_kv_of_every_sequence() -> None:
    work = step_work(CONFIG, "bfloat16", bytes_per_weight=2.0, first=7, last=8, batch=3)
    kv_bytes_per_token = 2 * 2 * 1 * 3 * 2  # layers, key and value, heads, head_dim, bytes
    assert work.num_bytes == 2 * (WEIGHTS + HEAD) + 3 * 8 * kv_bytes_per_token
    attention = 3 * 8 * 2 * (2 * 2 * 2 * 3)  # sequences, keys, layers, two products of two operations, heads, head_dim
    assert work.flop == 2 * 3 * (WEIGHTS + HEAD) + attention


def test_a_prompt_in_chunks_is_as_many_operations_as_in_one_piece_but_for_the_head() -> None:
    def flop(first: int, last: int) -> float:
        return step_work(CONFIG, "bfloat16", 2.0, first, last, 1).flop

    assert flop(0, 5) + flop(5, 9) == flop(0, 9) + 2 * HEAD


def test_a_load_takes_a_step_per_prompt_and_those_that_only_decode() -> None:
    lengths = {"requests": 4, "concurrency": 2, "prompt": 64, "output": 11}
    decode, prefill = step_work(CONFIG, "bfloat16", 2.0, 69, 70, 2), step_work(CONFIG, "bfloat16", 2.0, 0, 64, 1)
    reading = shortest_load_s(CONFIG, "bfloat16", Machine(1e9, 1e30), **lengths)
    assert reading == pytest.approx(20 * decode.num_bytes / 1e9)
    computing = shortest_load_s(CONFIG, "bfloat16", Machine(1e30, 1e9), **lengths)
    assert computing == pytest.approx((20 * decode.flop + 4 * prefill.flop) / 1e9)


def test_no_step_is_shorter_than_its_bytes_or_its_operations_take() -> None:
    machine = Machine(read_bytes_per_s=10.0, flop_per_s=100.0)
    assert machine.floor_s(Work(num_bytes=50.0, flop=100.0)) == 5.0
    assert machine.floor_s(Work(num_bytes=50.0, flop=1000.0)) == 10.0


@pytest.mark.parametrize(
    ("dtype", "quantization", "expected"),
    [("float32", "none", 2), ("bfloat16", "none", 2), ("float32", "int8", 1.0), ("bfloat16", "int4", 0.5)],
)
def test_weights_have_as_many_bytes_as_they_need(dtype: str, quantization: str, expected: float) -> None:
    assert bytes_per_weight(CONFIG, dtype, quantization) == expected


def test_of_kernels_that_call_each_other_the_innermost_is_timed_once() -> None:
    clock = KernelClock()
    seen: list[float] = []
    inner = clock.timed(lambda: None, "inner")
    outer = clock.timed(lambda: (inner(), seen.append(clock.by_operation["inner"].seconds)), "outer")
    outer()
    taken = clock.taken()
    assert list(taken) == ["inner"] and taken["inner"].seconds == seen[0] > 0


def test_products_are_told_apart_by_their_size_and_their_operations_counted() -> None:
    clock = KernelClock()
    linear = clock.timed(lambda *arguments: None, "linear")
    panel_linear = clock.timed(lambda *arguments: None, "panel_linear")
    for rows in (3, 5):
        linear(*[0] * 7, rows, 8, 16, 1)
    panel_linear(*[0] * 4, 3, *[0] * 9, 1, 2, 8, 16, 1)
    taken = clock.taken()
    assert taken["linear 8 x 16"].flop == 2 * (3 + 5) * 8 * 16
    assert taken["linear 8 x 16"].weight_bytes == 2 * 4 * 8 * 16  # two calls, in float32
    assert taken["panel_linear 8 x 16"].weight_bytes == 8 * 16  # in 8 bits
    assert not clock.taken()
    with pytest.raises(ValueError, match="shorter"):
        linear(0, 0, 0)  # not as many as the declaration in C has


def test_what_a_step_costs_is_told_apart_from_what_each_of_its_sequences_costs() -> None:
    splits = [
        StepSplit(8, 0.05, 0.9, 1.0, 0.0),
        StepSplit(32, 0.1, 0.00134, 2800, 0.0),
        StepSplit(2, 0.03, 0.00104, 400, 0.1),
    ]
    shown = to_markdown(sections(Run(provenance(), "tiny", "bfloat16", {}, [Machine(1e9, 1e12)], [], splits, [])))
    assert "| outside, us, batch 2 to 32 (disturbed) | 1,020 | 10 |" in shown
    assert "| calls, batch 2 to 32 | 240 | 80 |" in shown


def test_a_figure_is_the_median_of_what_nobody_disturbed_and_marked_where_there_is_none() -> None:
    timings = [Timing(10.0, 0.01, 20.0), Timing(1.0, 0.5, 30.0), Timing(20.0, 0.06, 40.0)]
    figure = figure_of("decode 1", timings)
    assert (figure.tokens_per_s, figure.num_undisturbed, figure.is_disturbed) == (15.0, 2, False)
    disturbed = figure_of("decode 8", [Timing(1.0, 0.5, 4.0), Timing(3.0, 0.07, 4.0)])
    assert (disturbed.tokens_per_s, disturbed.is_disturbed) == (2.0, True)
    profile = Profile("a step of decode 8", 0.2, 10, {"linear": Operation(0.1, 2e11, 3e9)}, others_share=0.2)
    run = Run(provenance(), "tiny", "bfloat16", {}, [Machine(1e9, 1e12)], [figure, disturbed], [], [profile])
    shown = to_markdown(sections(run))
    assert "| decode 1 | 15.0 | 30 | 50.0% | 50.0% to 50.0% | 3 | 2 | 6.0% |" in shown
    assert "beside kernels" not in shown, "there are no two batches to tell a step from a sequence"
    assert "| decode 8, disturbed | 2.0 | 4 | 50.0% | 25.0% to 75.0% | 2 | 0 | 50.0% |" in shown
    assert "| a step of decode 8 (disturbed) |" in shown and "| linear | 10.00 | 2.00 | 30.0 |" in shown
    assert "| outside kernels | 10.00 | - | - |" in shown


def test_calls_are_counted_on_threads_too_and_only_while_it_is_entered() -> None:
    def work(times: int) -> None:
        for _ in range(times):
            abs(-1)

    def counted(times: int) -> int:
        with CallCounter() as counter:
            thread = threading.Thread(target=work, args=(times,))
            thread.start()
            thread.join(5.0)
        before = counter.num_calls
        work(1000)
        assert counter.num_calls == before
        return counter.num_calls

    assert 400 <= counted(600) - counted(100) <= 600


@pytest.mark.slow
def test_the_program_measures_the_demo_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = tmp_path / "result.json"
    few = ("--prefill-tokens", "40", "--decode-tokens", "3", "--batches", "1", "2", "--repeats", "1")
    assert main([*few, "--markdown", "--json", str(result)]) == 0
    assert "| decode 2" in capsys.readouterr().out
    written = json.loads(result.read_bytes())
    assert [figure["name"] for figure in written["figures"]] == ["prefill 40", "decode 1", "decode 2"]
    for split in written["splits"]:
        assert 0 < split["outside_s"] < split["step_s"] and split["num_calls"] > 0
    assert len(written["profiles"]) == 3
    for profile in written["profiles"]:
        assert profile["by_operation"]["linear 256 x 512"]["flop"] > 0 and "paged_attention" in profile["by_operation"]
        assert "run_program" not in profile["by_operation"]


@pytest.mark.slow
def test_steps_of_one_shape_take_the_same_calls_in_every_run() -> None:
    config = parse_config({"model": {"path": "demo"}, "prefill": {"replicas": 0}, "decode": {"num_threads": 1}})
    with CallCounter() as counter:
        engine = BenchmarkEngine(config, counter=counter)
        calls = [_count_calls(engine, 4) for _ in range(2)]
    engine.close()
    assert calls[0] == pytest.approx(calls[1], rel=0.02)


def test_a_result_that_could_not_be_written_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        main(["--json", str(tmp_path / "missing" / "result.json")])


def test_a_model_that_is_not_there_is_one_line_on_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", "/nowhere"]) == 2
    assert "model.path" in capsys.readouterr().err
