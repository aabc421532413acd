"""Files mapped in huge pages."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import pytest

from eagleray.core.clock import ManualClock, SystemClock
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
        return map_for_reading(file, SystemClock())


def has_whole_content(mapping: mmap.mmap) -> bool:
    return mapping[:] == SMALL_PIECE * NUM_PIECES


@pytest.fixture
def huge_pages(tmp_path: Path) -> None:
    """Skips where a file of this size does not come back in huge pages."""
    other = tmp_path / "other"
    write_in_pieces(other, NUM_PIECES)
    with other.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        with mapped_file._map(file.fileno(), other.stat().st_size) as mapping:
            if share_in_huge_pages(mapping) < 0.9:
                pytest.skip("this file system, or so little memory, gives no huge pages")


@pytest.mark.usefixtures("huge_pages")
def test_a_file_in_small_pages_is_read_again_into_huge_ones(path: Path) -> None:
    with map_path(path) as mapping:
        assert share_in_huge_pages(mapping) >= 0.5
        assert has_whole_content(mapping)


@pytest.mark.usefixtures("huge_pages")
def test_of_several_that_start_together_all_have_huge_pages(path: Path) -> None:
    with ThreadPoolExecutor(3) as pool:
        mappings = list(pool.map(map_path, [path] * 3))
    for mapping in mappings:
        assert share_in_huge_pages(mapping) >= 0.5
        mapping.close()


def test_what_others_have_mapped_stays_as_it_is(path: Path) -> None:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as others:
        assert has_whole_content(others)
        with map_path(path) as mapping:
            assert share_in_huge_pages(mapping) < 0.1
            assert has_whole_content(mapping) and has_whole_content(others)


def test_where_small_pages_come_back_the_rest_is_not_read_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dropped: list[tuple[int, ...]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda descriptor, *rest: dropped.append(rest))  # the cache keeps them
    with map_path(path) as mapping:
        assert share_in_huge_pages(mapping) < 0.1
        assert has_whole_content(mapping)
    assert [length for _, length, _ in dropped] == [mapped_file._SAMPLE_BYTES], "and one sample told enough"


class HurryingClock(ManualClock):
    """On which every deadline has passed when it is looked at again."""

    def now_s(self) -> float:
        self.advance(mapped_file._ALONE_DEADLINE_S + 1)
        return super().now_s()


def test_who_holds_the_file_for_too_long_is_not_waited_for(path: Path) -> None:
    with path.open("rb") as held, path.open("rb") as file:
        fcntl.flock(held, fcntl.LOCK_EX)
        with map_for_reading(file, HurryingClock()) as mapping:
            assert has_whole_content(mapping)


def test_a_file_that_cannot_be_locked_is_mapped_without(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(file: BinaryIO, operation: int) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with map_path(path) as mapping:
        assert has_whole_content(mapping)


def test_a_small_file_is_mapped_without_a_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped_file, "share_in_huge_pages", None)
    small = tmp_path / "small"
    small.write_bytes(SMALL_PIECE)
    with map_path(small) as mapping:
        assert mapping[:] == SMALL_PIECE
