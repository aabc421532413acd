"""Files mapped in huge pages."""

from __future__ import annotations

import mmap
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from eagleray.models import mapped_file
from eagleray.models.mapped_file import map_for_reading, share_in_huge_pages

SMALL_PIECE = bytes(range(256)) * 16  # a page
NUM_PIECES = 17_000  # a little more than is worth it


def write_in_pieces(path: Path, num_pieces: int) -> None:
    with path.open("wb", buffering=0) as file:
        for _ in range(num_pieces):
            file.write(SMALL_PIECE)
        os.fsync(file.fileno())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file that the page cache has in small pages."""
    path = tmp_path / "weights"
    write_in_pieces(path, NUM_PIECES)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapping:
        if share_in_huge_pages(mapping) > 0.1:
            pytest.skip("this system has no small pages of it, or does not tell")
    return path


def map_path(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return map_for_reading(file)


def has_whole_content(mapping: mmap.mmap) -> bool:
    return mapping[:] == SMALL_PIECE * NUM_PIECES


def test_a_file_in_small_pages_is_read_again_into_huge_ones(path: Path, tmp_path: Path) -> None:
    write_in_pieces(tmp_path / "other", NUM_PIECES // 8)
    with (tmp_path / "other").open("rb") as file:
        if not mapped_file._would_be_huge(file.fileno()):
            pytest.skip("this file system gives no huge pages")
    with map_path(path) as mapping:
        assert share_in_huge_pages(mapping) >= 0.5
        assert has_whole_content(mapping)


def test_of_several_that_start_together_all_have_huge_pages(path: Path, tmp_path: Path) -> None:
    write_in_pieces(tmp_path / "other", NUM_PIECES // 8)
    with (tmp_path / "other").open("rb") as file:
        if not mapped_file._would_be_huge(file.fileno()):
            pytest.skip("this file system gives no huge pages")
    with ThreadPoolExecutor(3) as pool:
        mappings = list(pool.map(map_path, [path] * 3))
    assert all(share_in_huge_pages(mapping) >= 0.5 for mapping in mappings)


def test_what_others_have_mapped_stays_as_it_is(path: Path) -> None:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as others:
        assert has_whole_content(others)
        with map_path(path) as mapping:
            assert share_in_huge_pages(mapping) < 0.1
            assert has_whole_content(mapping) and has_whole_content(others)


def test_where_small_pages_come_back_the_rest_is_not_read_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped_file, "_would_be_huge", lambda descriptor: False)
    with map_path(path) as mapping:
        assert share_in_huge_pages(mapping) < 0.1
        assert has_whole_content(mapping)


def test_a_small_file_is_mapped_without_a_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped_file, "share_in_huge_pages", None)
    small = tmp_path / "small"
    small.write_bytes(SMALL_PIECE)
    with map_path(small) as mapping:
        assert mapping[:] == SMALL_PIECE
