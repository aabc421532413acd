"""The benchmark of hand-overs: the whole program, on few and small blocks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from handover import LAYOUTS, Hash, _hash_section, main
from report import to_markdown


def test_the_hash_is_shown_beside_memcpy() -> None:
    shown = to_markdown([_hash_section(Hash(num_bytes=4_194_304, memcpy=10.0, xxh3_128=7.5, others_share=0.2))])
    assert "| XXH3, 128 bits | 4.2 | 10.00 | 7.50 | 75% | 20.0% (disturbed) |" in shown


@pytest.mark.slow
def test_every_transport_hands_over_each_length(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = tmp_path / "result.json"
    few = ("--layouts", "demo", "--tokens", "16", "32", "--repeats", "2")
    assert main([*few, "--markdown", "--json", str(result)]) == 0
    shown, written = capsys.readouterr().out, json.loads(result.read_bytes())
    assert "| demo | 32 | 0.3 | tcp |" in shown and "| XXH3, 128 bits | 0.3 |" in shown
    block_bytes = LAYOUTS["demo"].block_bytes
    assert [(line["transport"], line["num_tokens"], line["num_bytes"]) for line in written["lines"]] == [
        (transport, 16 * num_blocks, num_blocks * block_bytes)
        for transport in ("shared_memory", "tcp", "loopback")
        for num_blocks in (1, 2)
    ]
    for line in written["lines"]:
        assert min(line[rate] for rate in ("memcpy", "verified", "unverified", "first")) > 0
    assert written["hash"]["num_bytes"] == 2 * block_bytes
    assert min(written["hash"][rate] for rate in ("memcpy", "xxh3_128")) > 0
