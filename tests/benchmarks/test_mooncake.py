from __future__ import annotations

import gzip
import statistics
from pathlib import Path

import pytest
from measure import percentile
from mooncake import (
    INPUT_TOKENS,
    OUTPUT_TOKENS,
    TIMESTAMP_STEP_MS,
    TraceError,
    TraceRequest,
    generate_trace,
    read_trace,
)

ROWS = [
    '{"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [0, 1]}',
    '{"timestamp": 3000, "input_length": 512, "output_length": 7, "hash_ids": [0]}',
    '{"timestamp": 3000, "input_length": 1, "output_length": 1, "hash_ids": [2]}',
]


@pytest.fixture(params=["trace.jsonl", "trace.jsonl.gz"])
def trace_file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / request.param
    content = "\n".join(ROWS).encode() + b"\n"
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.fixture(scope="module")
def generated() -> list[TraceRequest]:
    return generate_trace(12_000, seed=7)


def block_hit_ratio(rows: list[TraceRequest]) -> float:
    seen: set[int] = set()
    hits = 0
    for row in rows:
        hits += next((i for i, hash_id in enumerate(row.hash_ids) if hash_id not in seen), len(row.hash_ids))
        seen.update(row.hash_ids)
    return hits / sum(len(row.hash_ids) for row in rows)


def test_a_file_is_read_plain_and_compressed(trace_file: Path):
    rows = read_trace(trace_file)
    assert rows[0] == TraceRequest(0, 600, 5, (0, 1))
    assert [row.timestamp for row in rows] == [0, 3000, 3000]


def test_a_slice_begins_and_ends_where_it_was_asked_to(trace_file: Path):
    assert [row.output_length for row in read_trace(trace_file, start=1, count=1)] == [7]
    assert len(read_trace(trace_file, start=1, count=100)) == 2


def test_a_slice_behind_the_end_is_an_error_that_says_so(trace_file: Path):
    with pytest.raises(TraceError, match="no row from 3 on"):
        read_trace(trace_file, start=3)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ('{"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [0]}', "1 hash_ids do not go together"),
        ('{"timestamp": 0, "input_length": 0, "output_length": 5, "hash_ids": []}', "input_length=0"),
        ('{"timestamp": 0, "input_length": 9, "hash_ids": [0]}', "missing required field `output_length`"),
        ("no json", "malformed"),
    ],
)
def test_a_malformed_row_is_named_by_its_line(tmp_path: Path, row: str, problem: str):
    path = tmp_path / "bad.jsonl"
    path.write_text(f"{ROWS[0]}\n{row}\n")
    with pytest.raises(TraceError, match=f"line 2: .*{problem}"):
        read_trace(path)


def test_a_missing_file_is_an_error_that_names_it(tmp_path: Path):
    with pytest.raises(TraceError, match=r"nowhere\.jsonl: cannot be read"):
        read_trace(tmp_path / "nowhere.jsonl")


def test_generated_rows_are_valid_in_the_format(generated: list[TraceRequest]):
    assert all(len(row.hash_ids) == -(-row.input_length // 512) for row in generated)
    assert all(row.output_length >= 1 for row in generated)
    assert all(row.timestamp % TIMESTAMP_STEP_MS == 0 for row in generated)


def test_equal_generated_ids_have_equal_prefixes(generated: list[TraceRequest]):
    parents: dict[int, int | None] = {}
    for row in generated:
        for parent, hash_id in zip((None, *row.hash_ids), row.hash_ids, strict=False):
            assert parents.setdefault(hash_id, parent) == parent


def test_generated_lengths_have_the_published_quantiles_and_means(generated: list[TraceRequest]):
    for published, mean, values in (
        (INPUT_TOKENS, 12_035, [row.input_length for row in generated]),
        (OUTPUT_TOKENS, 343, [row.output_length for row in generated]),
    ):
        ordered = sorted(values)
        for share, value in published:
            assert percentile(ordered, share) == pytest.approx(value, rel=0.15 if 0.05 < share < 0.95 else 0.3, abs=5)
        assert statistics.fmean(values) == pytest.approx(mean, rel=0.1)


def test_generated_arrivals_have_the_published_rate_and_bursts(generated: list[TraceRequest]):
    seconds = generated[-1].timestamp / 1000
    assert len(generated) / seconds == pytest.approx(3.4, rel=0.05)
    assert len(generated) / len({row.timestamp for row in generated}) == pytest.approx(10.2, rel=0.05)


def test_generated_prompts_share_prefixes_as_the_published_ones_do(generated: list[TraceRequest]):
    assert {row.hash_ids[0] for row in generated} == {0}
    assert block_hit_ratio(generated) == pytest.approx(0.366, abs=0.02)


def test_a_seed_names_the_requests_whatever_their_number(generated: list[TraceRequest]):
    assert generate_trace(50, seed=7) == generated[:50]
    assert generate_trace(50, seed=8) != generated[:50]


def test_the_published_trace_has_the_statistics_that_the_generator_aims_at(published_trace: Path):
    rows = read_trace(published_trace)
    assert len(rows) == 12_031
    assert block_hit_ratio(rows) == pytest.approx(0.3664, abs=0.0001)
    lengths = sorted(row.input_length for row in rows)
    assert [percentile(lengths, share) for share, _ in INPUT_TOKENS] == pytest.approx(
        [value for _, value in INPUT_TOKENS], rel=0.001
    )
