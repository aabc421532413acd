from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from emulation import emulated_levels, load_emulated

from eagleray.kernels.native.build import NativeUnavailable, supported_levels
from eagleray.kernels.native.library import NativeLibrary, load_library


@pytest.fixture(scope="session")
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture(scope="session")
def load(cache_folder: Path) -> Callable[..., NativeLibrary]:
    """The library of any level, emulated where this CPU lacks it; without a compiler the test is skipped."""

    def load(level: str = supported_levels()[0], num_threads: int = 1) -> NativeLibrary:
        try:
            if level in emulated_levels():
                return load_emulated(level, cache_folder, num_threads)
            return load_library(level, cache_folder, num_threads)
        except NativeUnavailable as error:
            pytest.skip(str(error))

    return load


@pytest.fixture(
    params=[*supported_levels(), *(pytest.param(level, marks=pytest.mark.slow) for level in emulated_levels())]
)
def library(request: pytest.FixtureRequest, load: Callable[..., NativeLibrary]) -> NativeLibrary:
    """The library of every level, one after the other."""
    return load(request.param)
