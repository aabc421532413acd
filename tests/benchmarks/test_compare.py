"""Engines in turn: the protocol with their processes, what is kept, and what the tables say."""

from __future__ import annotations

import json
import sys
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from pathlib import Path

import pytest
from compare import main
from comparison import Case, Comparison, Measurement, Piece, read_comparison, sections, write_comparison
from contenders import CONTENDERS, default_pythons
from driver import Driver, DriverError, start_driver
from floors import Machine, Work
from provenance import provenance
from report import to_markdown

PREFILL = Case("prefill", 1, 100, 1)
DECODE = Case("decode", 4, 32, 11)
DRIVER = """
import sys
sys.path.insert(0, {peers!r})
from protocol import run_driver

def start(options):
    print("what an engine prints is no answer")
    if options.settings.get("broken"):
        raise ValueError("no such setting")
    return lambda prompts, n: [n - options.settings.get("missing", 0)] * len(prompts), {{"engine": "fake"}}

run_driver(start)
"""


@pytest.fixture
def fake_engine(tmp_path: Path, replay_script: Path):
    """Starts a driver of an engine that computes nothing, with these settings."""
    script = tmp_path / "run_fake.py"
    script.write_text(DRIVER.format(peers=str(replay_script.parent / "peers")))

    def start(**settings: object) -> AbstractAsyncContextManager[Driver]:
        limits = dict.fromkeys(("--threads", "--max-num-seqs", "--max-model-tokens", "--kv-memory-bytes"), "1")
        arguments = {"--model": "none", "--settings": json.dumps(settings), **limits}
        return start_driver(Path(sys.executable), script, arguments, {}, tmp_path / "log")

    return start


async def test_an_engine_answers_whatever_it_prints(fake_engine):
    async with fake_engine() as driver:
        assert (await driver.ready(30))["engine"] == "fake"
        assert await driver.generate([[1, 2], [3, 4]], 5, 30) >= 0
        assert await driver.generate([[1]], 1, 30) >= 0


async def test_what_an_engine_has_loaded_is_seen(fake_engine):
    async with fake_engine() as driver:
        await driver.ready(30)
        assert driver.has_loaded("python") and not driver.has_loaded("tcmalloc")
        assert driver.share_in_huge_pages("no such file") is None


async def test_an_engine_that_is_killed_gives_no_more_answers(fake_engine):
    async with fake_engine() as driver:
        await driver.ready(30)
        driver.kill()
        with pytest.raises((DriverError, ConnectionError)):
            await driver.generate([[1]], 1, 30)


async def test_an_engine_that_does_not_start_says_why(fake_engine):
    async with fake_engine(broken=True) as driver:
        with pytest.raises(DriverError, match="no such setting"):
            await driver.ready(30)


async def test_an_answer_of_another_length_is_no_measurement(fake_engine):
    async with fake_engine(missing=1) as driver:
        await driver.ready(30)
        with pytest.raises(DriverError, match="asked for 5"):
            await driver.generate([[1]], 5, 30)


def measured(contender: str, case: Case, duration_s: float, first_token_s: float = 0.0, is_kept: bool = True):
    share = 0.01 if is_kept else 0.5
    return Measurement(contender, "bfloat16", 1, case, duration_s, first_token_s, share, is_kept, Work(1e9, 1e9))


def piece(*measurements: Measurement) -> Piece:
    machine = Machine(read_bytes_per_s=10e9, flop_per_s=1e12)
    said = {"start_s": 1.0, "version": "1", "kv": "8 bits", "has_tcmalloc": True}
    engines = {each.contender: said for each in measurements}
    return Piece(provenance(), "tiny", 2, {"bfloat16": machine}, engines, {"vllm": "no Python"}, measurements)


def tables(comparison: Comparison) -> str:
    return to_markdown(sections(comparison))


def test_prefill_counts_prompt_tokens_and_decode_those_after_the_first():
    assert measured("a", PREFILL, 0.5).tokens_per_s == 200
    assert measured("a", DECODE, duration_s=3.0, first_token_s=1.0).tokens_per_s == 4 * 10 / 2


def test_the_floor_is_the_slower_of_reading_and_multiplying():
    machine = Machine(read_bytes_per_s=10e9, flop_per_s=1e12)  # 0.1 s to read, 0.001 s to multiply
    assert measured("a", DECODE, 3.0, 1.0).floor_tokens_per_s(machine) == pytest.approx(40)


def test_tables_show_medians_of_what_was_not_disturbed_over_all_pieces():
    first = piece(measured("eagleray-bf16", PREFILL, 0.5), measured("eagleray-bf16", PREFILL, 9, is_kept=False))
    second = piece(measured("eagleray-bf16", PREFILL, 0.25), measured("transformers", PREFILL, 1.0))
    shown = tables(Comparison((first, second)))
    assert "| eagleray-bf16 | 300.0 (30%) |" in shown  # of 200 and 400; the floor is 1,000
    assert "| transformers | 4.00 |" in shown  # of the piece that has both
    assert "| eagleray-bf16 | 200.0 to 400.0 |" in shown
    assert "| eagleray-bf16 | 1 | bfloat16 | 8 bits | yes | - | 1.0 | 2 | 1 | 1.0% |" in shown
    assert "| vllm | no Python |" in shown


def test_those_that_were_not_measured_in_the_same_rounds_are_not_compared():
    first = piece(measured("eagleray-bf16", PREFILL, 0.5), measured("vllm", PREFILL, 1.0))
    second = piece(measured("transformers", PREFILL, 1.0))
    shown = tables(Comparison((first, second)))
    assert "| vllm | 2.00 |" in shown and "| transformers | 100.0 (10%) |" in shown
    assert "| transformers | 2.00 |" not in shown


def test_the_floor_is_that_of_the_format_that_is_computed_in():
    found = piece(measured("transformers", PREFILL, 0.5))
    slow = Machine(read_bytes_per_s=20e9, flop_per_s=1e9)
    comparison = Comparison((replace(found, machines={**found.machines, "float32": slow}),))
    assert comparison.machine("bfloat16").flop_per_s == 1e12 and comparison.machine("float32").flop_per_s == 1e9
    assert comparison.machine("bfloat16").read_bytes_per_s == 20e9
    assert "1.00 TFLOP/s in bfloat16, 0.00 TFLOP/s in float32" in comparison.title()


def test_a_contender_that_was_always_disturbed_has_no_figure():
    shown = tables(Comparison((piece(measured("transformers", PREFILL, 1.0, is_kept=False)),)))
    assert "tokens/s" not in shown and "no Python" in shown


def test_a_comparison_is_read_as_it_was_written(tmp_path: Path):
    comparison = Comparison((piece(measured("transformers", DECODE, 3.0, 1.0)),))
    write_comparison(tmp_path / "all.json", comparison)
    assert tables(read_comparison(tmp_path / "all.json")) == tables(comparison)


def test_engines_are_chosen_by_name_and_every_other_one_has_a_reason():
    pythons = default_pythons(vllm=None, transformers=Path("python"))
    names = ["transformers", "vllm", "eagleray-int8"]
    assert [each.name for each in pythons.chosen(names)] == ["transformers", "eagleray-int8"]
    left_out = pythons.left_out(names)
    assert left_out["vllm"] == "no --vllm-python was given"
    assert left_out["eagleray-bf16"] == "not named in --engines"
    assert left_out.keys() | {"transformers", "eagleray-int8"} == {contender.name for contender in CONTENDERS}


@pytest.mark.parametrize("engine", ["eagleray", "vllm", "openvino", "transformers"])
def test_every_engine_is_compared_in_float32_too(engine: str):
    assert {each.dtype for each in CONTENDERS if each.engine == engine} == {"bfloat16", "float32"}


def test_every_contender_has_a_name_of_its_own_and_a_driver():
    assert len({contender.name for contender in CONTENDERS}) == len(CONTENDERS)
    assert all(contender.driver.exists() for contender in CONTENDERS)


@pytest.mark.slow
def test_the_command_compares_two_engines_in_two_pieces(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    common = ["--folder", str(tmp_path), "--shape", "tiny", "--transformers-python", sys.executable, "--repeats", "1"]
    common += ["--prefill-tokens", "64", "--decode-tokens", "8", "--batches", "2", "--max-others", "1000"]
    common += ["--json", str(tmp_path / "all.json"), "--add", "--markdown"]
    main([*common, "--engines", "eagleray-bf16"])
    main([*common, "--engines", "transformers"])
    shown = capsys.readouterr().out
    assert "| eagleray-bf16 |" in shown and "| transformers |" in shown
    assert "times as fast as" not in shown  # they were not measured in the same rounds
    main([*common, "--engines", "eagleray-f32", "transformers-f32"])
    assert "| eagleray-f32, times as fast as | prefill 64 | decode 2 |" in capsys.readouterr().out
