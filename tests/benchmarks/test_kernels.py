"""Kernels in turns: who is timed when, what is read beside attention, and what the units do."""

from __future__ import annotations

import attention
import pytest
import torch
from attention import DECODE, Case, pages_by_head, scattered, whole_blocks
from floors import Machine
from limits import Limits, ProductLimit
from linear import Row, Run, _num_copies, sections
from provenance import provenance
from report import to_markdown
from turns import time_in_turns


def test_ways_take_turns_and_the_first_round_is_not_timed():
    seen: list[tuple[str, int]] = []
    turns = time_in_turns({name: lambda number, name=name: seen.append((name, number)) for name in "ab"}, 0.0, 3)
    rounds = len(turns.times_s["a"])
    assert rounds == len(turns.times_s["b"]) == 3
    assert seen[-8:] == [(name, number) for number in range(seen[-1][1] - 3, seen[-1][1] + 1) for name in "ab"]
    assert turns.medians_s.keys() == {"a", "b"}


class _Noted(Limits):
    """Reads nothing, and notes what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, torch.Tensor, int]] = []

    def read(self, base: int, offsets: torch.Tensor, piece_bytes: int, together: int) -> None:
        self.asked.append((base, offsets, piece_bytes))


@pytest.mark.parametrize("way", [whole_blocks, pages_by_head])
def test_beside_attention_every_byte_of_keys_and_values_is_read_once(way, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(attention, "_COLD_BYTES", 1 << 20)  # two layers
    case, limits = Case(batch=2, prefix_tokens=63, new_tokens=1), _Noted()
    order = scattered(case, num_threads=2)
    way(limits, case, order)(0)
    assert len(limits.asked) == case.num_layers == 2
    read = sorted(
        base - order.pool.data_ptr() + offset for base, offsets, _ in limits.asked for offset in offsets.tolist()
    )
    piece_bytes = limits.asked[0][2]
    assert read == list(range(0, order.pool.nbytes, piece_bytes))


def test_cases_of_decoding_have_one_token_per_sequence():
    assert all(case.new_tokens == 1 for case in DECODE)


def test_the_units_multiply_and_memory_is_read():
    limits = Limits(num_threads=1)
    pieces = torch.ones(4, 64, dtype=torch.int64)
    limits.read(pieces.data_ptr(), torch.arange(4) * 512, piece_bytes=512, together=2)
    products = limits.products()
    assert products.int8_op_per_s >= products.bfloat16_flop_per_s >= 0


def test_weights_are_so_many_copies_that_no_cache_has_them():
    assert _num_copies(2**20) == 512 and _num_copies(2**40) == 1


def test_products_are_shown_beside_onednn():
    rows = [
        Row("o", 8, "eagleray, w8a8", 1e-3, [1e-3], 5e11, 4e9, 0.01),
        Row("o", 8, "oneDNN, reordered", 2e-3, [2e-3], 3e11, 2e9, 0.2),
    ]
    run = Run(provenance(), "amx", 2, Machine(8e9, 1e12), ProductLimit(6e12, 12e12), rows)
    shown = to_markdown(sections(run))
    assert "| 8 | eagleray, w8a8 | 1.000 | 0.50 | 4.0 | 50% | 2.00 | 1.0% |" in shown
    assert "| 1.00 | 20.0% (disturbed) |" in shown
    assert "6.00 TFLOP/s in bfloat16 and 12.00 TOP/s in int8" in run.title()
