from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import BinaryIO

import pytest
import torch

from eagleray.core.clock import ManualClock, SystemClock
from eagleray.kernels.linear.api import PackedLinear
from eagleray.models import packed_folder, packed_weights
from eagleray.models.packed_folder import PackedFolder
from eagleray.models.packed_weights import PackedWeightFiles, PackedWeightsUnavailable
from tests.support.mappings import mapped_kib, needs_smaps

LIMIT_BYTES = 64 * 2**20
LAYOUT = "rows"
NUM_LARGE_ELEMENTS = 4 * 2**20
WAIT_S = 30.0


def packed(seed: int = 0) -> list[tuple[str, PackedLinear]]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(5, 3, generator=generator)
    panels, bias = weight.bfloat16(), torch.randn(7, generator=generator)
    return [
        ("a", PackedLinear({"weight": weight, "bias": bias}, 5, 3)),
        ("b.c", PackedLinear({"panels": panels}, 4, 3)),
    ]


def never() -> Iterator[tuple[str, PackedLinear]]:
    raise AssertionError("was packed again")


def files(folder: Path, model: str = "model", limit_bytes: int = LIMIT_BYTES) -> PackedWeightFiles:
    return PackedWeightFiles(folder, model, limit_bytes, SystemClock())


def values(found: object) -> dict[str, object]:
    """What can be compared with ``==``."""
    linears = dict(found)  # type: ignore[call-overload]
    return {
        name: (
            linear.out_features,
            linear.in_features,
            {key: (t.dtype, t.tolist()) for key, t in linear.tensors.items()},
        )
        for name, linear in linears.items()
    }


def test_what_was_packed_is_read_back_and_not_packed_again(tmp_path: Path) -> None:
    first = files(tmp_path / "made").get(LAYOUT, packed)
    again = files(tmp_path / "made").get(LAYOUT, never)
    assert values(first) == values(again) == values(packed())
    assert [path.suffix for path in (tmp_path / "made").iterdir()] == [".packed"]


def test_models_and_layouts_are_kept_apart(tmp_path: Path) -> None:
    for seed, (model, layout) in enumerate([("m", "x"), ("m", "y"), ("n", "x")]):
        found = files(tmp_path, model).get(layout, lambda seed=seed: packed(seed))
        assert values(found) == values(packed(seed))


@pytest.mark.parametrize("damage", ["cut", "flipped", "index", "empty"])
def test_a_damaged_file_is_not_taken_for_a_whole_one(tmp_path: Path, damage: str) -> None:
    files(tmp_path).get(LAYOUT, packed)
    (path,) = tmp_path.iterdir()
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        content[4] ^= 1
    if damage == "index":
        content[-60] ^= 1
    path.write_bytes({"cut": content[:-1], "empty": b""}.get(damage, bytes(content)))
    assert values(files(tmp_path).get(LAYOUT, packed)) == values(packed())
    assert values(files(tmp_path).get(LAYOUT, never)) == values(packed())


def test_an_error_while_packing_leaves_nothing_behind(tmp_path: Path) -> None:
    def fail() -> Iterator[tuple[str, PackedLinear]]:
        yield packed()[0]
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        files(tmp_path).get(LAYOUT, fail)
    assert list(tmp_path.iterdir()) == []


def test_weights_over_the_limit_are_refused_and_leave_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(PackedWeightsUnavailable, match="has room for 100 bytes"):
        files(tmp_path, limit_bytes=100).get(LAYOUT, packed)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 1000

    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage)
    with pytest.raises(PackedWeightsUnavailable, match="has room for 0 bytes"):
        files(tmp_path).get(LAYOUT, packed)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PackedWeightsUnavailable, match="file/folder"):
        files(tmp_path / "file" / "folder").get(LAYOUT, packed)


def test_what_was_used_longest_ago_goes_first(tmp_path: Path) -> None:
    limit_bytes = 30_000  # two of them
    for age, model in ((30, "a"), (20, "b")):
        files(tmp_path, model, limit_bytes).get(LAYOUT, packed)
        for path in tmp_path.iterdir():
            if path.stat().st_mtime_ns > 10**18:
                os.utime(path, ns=(10**17 - age, 10**17 - age))
    assert max(path.stat().st_size for path in tmp_path.iterdir()) * 2 <= limit_bytes
    files(tmp_path, "a", limit_bytes).get(LAYOUT, never)
    files(tmp_path, "c", limit_bytes).get(LAYOUT, packed)
    files(tmp_path, "a", limit_bytes).get(LAYOUT, never)
    files(tmp_path, "b", limit_bytes).get(LAYOUT, packed)


def test_who_waits_too_long_for_another_process_is_refused(tmp_path: Path) -> None:
    class Impatient(ManualClock):
        def now_s(self) -> float:
            self.advance(packed_weights._PACKING_DEADLINE_S)
            return super().now_s()

    def ask_meanwhile() -> list[tuple[str, PackedLinear]]:
        with pytest.raises(PackedWeightsUnavailable, match="another process that does not end"):
            PackedWeightFiles(tmp_path, "model", LIMIT_BYTES, Impatient()).get(LAYOUT, never)
        return packed()

    assert values(files(tmp_path).get(LAYOUT, ask_meanwhile)) == values(packed())


def test_a_file_that_is_evicted_while_the_folder_is_read_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, evicted, glob = tmp_path / "a.packed", tmp_path / "b.packed", Path.glob
    kept.write_bytes(b"1234")

    def glob_before_eviction(folder: Path, pattern: str) -> list[Path]:
        return [*glob(folder, pattern), evicted]

    monkeypatch.setattr(Path, "glob", glob_before_eviction)
    folder = PackedFolder(tmp_path)
    assert folder.file_sizes_bytes() == (4,)
    folder.evict(evicted, 0)
    assert not kept.exists()


def test_a_name_that_passed_to_another_file_before_the_lock_was_had_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial, flock = tmp_path / "a.partial", packed_folder.fcntl.flock
    partial.write_bytes(b"")

    def replaced_before(file: BinaryIO, operation: int) -> None:
        assert file.writable()  # NFS locks no other
        partial.rename(tmp_path / "whole")
        partial.write_bytes(b"another")
        flock(file, operation)

    monkeypatch.setattr(packed_folder.fcntl, "flock", replaced_before)
    PackedFolder(tmp_path).remove_abandoned()
    assert partial.read_bytes() == b"another"


def test_what_cannot_be_cleaned_is_in_nobodys_way(tmp_path: Path) -> None:
    (tmp_path / "folder.partial").mkdir()
    (tmp_path / "folder.packed").mkdir()
    found = files(tmp_path, limit_bytes=20_000).get(LAYOUT, packed)
    assert values(found) == values(packed())
    PackedFolder(tmp_path).evict(tmp_path / "none", 0)


def test_what_another_process_is_writing_stays(tmp_path: Path) -> None:
    def ask_for_another_meanwhile() -> list[tuple[str, PackedLinear]]:
        files(tmp_path, "another").get(LAYOUT, packed)
        return packed()

    files(tmp_path).get(LAYOUT, ask_for_another_meanwhile)
    assert values(files(tmp_path).get(LAYOUT, never)) == values(packed())


# ---- several processes


def large() -> list[tuple[str, PackedLinear]]:
    return [
        (
            "large",
            PackedLinear({"weight": torch.arange(NUM_LARGE_ELEMENTS, dtype=torch.float32)}, 1, NUM_LARGE_ELEMENTS),
        )
    ]


def hold_mapping(folder: Path, pipe: Connection) -> None:
    found = files(folder).get(LAYOUT, large)
    pipe.send(float(found["large"].tensors["weight"].sum()))
    pipe.recv()  # both have mapped it
    (path,) = folder.glob("*.packed")
    pipe.send(mapped_kib(path))
    pipe.recv()  # both have looked


def die_while_packing(folder: Path) -> None:
    def pack() -> Iterator[tuple[str, PackedLinear]]:
        yield large()[0]
        os.kill(os.getpid(), signal.SIGKILL)

    files(folder).get(LAYOUT, pack)


@pytest.fixture
def importable_by_children(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spawned processes import this module by its name, below the root of the repository."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2])


@needs_smaps
@pytest.mark.usefixtures("importable_by_children")
def test_two_processes_that_start_at_once_share_one_copy(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe() for _ in range(2)]
    processes = [context.Process(target=hold_mapping, args=(tmp_path, theirs)) for _, theirs in pipes]
    for process in processes:
        process.start()
    answers = []
    for _ in range(2):
        assert all(ours.poll(WAIT_S) for ours, _ in pipes)
        answers.append([ours.recv() for ours, _ in pipes])
        for ours, _ in pipes:
            ours.send("go on")
    for process in processes:
        process.join(WAIT_S)
        assert process.exitcode == 0
    sums, mappings = answers
    assert sums[0] == sums[1] > 0
    for mapping in mappings:
        whole_kib = NUM_LARGE_ELEMENTS * 4 // 1024
        assert mapping["Rss"] >= whole_kib
        assert mapping["Pss"] <= 0.6 * mapping["Rss"]
        assert mapping["Private_Dirty"] == mapping["Anonymous"] == 0


@pytest.mark.usefixtures("importable_by_children")
@pytest.mark.parametrize("next_model", ["model", "another"])
def test_a_process_that_dies_while_packing_is_in_nobodys_way(tmp_path: Path, next_model: str) -> None:
    process = multiprocessing.get_context("spawn").Process(target=die_while_packing, args=(tmp_path,))
    process.start()
    process.join(WAIT_S)
    assert process.exitcode == -signal.SIGKILL
    assert [path.suffix for path in tmp_path.iterdir()] == [".partial"]
    assert values(files(tmp_path, next_model).get(LAYOUT, packed)) == values(packed())
    assert [path.suffix for path in tmp_path.iterdir()] == [".packed"]
