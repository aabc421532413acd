"""Speed of linear layers in every format, beside torch's own, on weights that no cache holds.

Candidates take turns, and each counts with its best time. Weights are several copies in rotation, so that they come
from memory; with few rows their bytes per second are to be compared with the read bandwidth measured first.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, get_args

import torch

from eagleray.kernels.cache_folder import kernel_folder
from eagleray.kernels.linear.panels import PanelLinearFormat, PanelWeights
from eagleray.kernels.native.build import supported_levels
from eagleray.kernels.native.library import load_library

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from provenance import provenance

Product = Callable[[torch.Tensor], torch.Tensor]

# out_features, in_features of Qwen3-0.6B, and a slice of its head.
SHAPES: Final = {
    "qkv": (4096, 1024),
    "o": (1024, 2048),
    "gate_up": (6144, 1024),
    "down": (1024, 3072),
    "head": (32000, 1024),
}
_BITS: Final = {"bfloat16": 16, "w8a8": 8, "int8": 8, "int4": 4}
_ROTATED_BYTES: Final = 512 * 2**20
_MAX_COPIES: Final = 16


def read_bandwidth() -> float:
    """Bytes per second of summing a tensor of 1 GiB, best of five."""
    data = torch.ones(2**27, dtype=torch.int64)
    return data.nbytes / min(_seconds(lambda _: data.sum(), data) for _ in range(5))


def _seconds(product: Product, x: torch.Tensor) -> float:
    start = time.perf_counter()
    product(x)
    return time.perf_counter() - start


def candidates(weight: torch.Tensor, level: str, num_threads: int, copies: int) -> dict[str, list[Product]]:
    """Copies of every product by name; ours begin with the name of the format."""
    library = load_library(level, kernel_folder(), num_threads)
    products: dict[str, list[Product]] = {}
    for weights in get_args(PanelWeights):
        linear_format = PanelLinearFormat(library, weights)
        products[weights] = [linear_format.bind(linear_format.pack(weight, None)) for _ in range(copies)]
    clones = [weight.clone() for _ in range(copies)]
    products["torch bfloat16"] = [lambda x, w=clone: torch.nn.functional.linear(x, w) for clone in clones]
    try:
        packed = [torch.ops.mkldnn._reorder_linear_weight(clone) for clone in clones]
    except (AttributeError, RuntimeError):
        return products
    pointwise = torch.ops.mkldnn._linear_pointwise
    products["oneDNN bfloat16"] = [lambda x, p=p: pointwise(x, p, None, "none", [], "") for p in packed]
    return products


def best_seconds(products: dict[str, list[Product]], x: torch.Tensor, repeats: int) -> dict[str, float]:
    best = dict.fromkeys(products, float("inf"))
    for repeat in range(repeats + 1):  # the first one warms up
        for name, copies in products.items():
            seconds = _seconds(copies[repeat % len(copies)], x)
            if repeat:
                best[name] = min(best[name], seconds)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--level", default=supported_levels()[0], choices=supported_levels())
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 32, 512, 1024])
    parser.add_argument("--repeats", type=int, default=20)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    bandwidth = read_bandwidth()
    print(f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, commit {provenance().git_commit}, {platform.machine()}")
    print(f"level {arguments.level}, threads {arguments.threads}, reads {bandwidth / 1e9:.1f} GB/s")
    print(f"{'shape':16} {'rows':>5} {'product':16} {'ms':>8} {'GB/s':>6} {'of reads':>8} {'TFLOP/s':>8}")
    for shape in arguments.shapes:
        out_features, in_features = SHAPES[shape]
        size = out_features * in_features
        weight = (torch.randn(out_features, in_features) * 0.05).bfloat16()
        copies = max(1, min(_MAX_COPIES, _ROTATED_BYTES // (2 * size)))
        products = candidates(weight, arguments.level, arguments.threads, copies)
        for rows in arguments.rows:
            x = torch.randn(rows, in_features).bfloat16()
            for name, seconds in best_seconds(products, x, arguments.repeats).items():
                rate = size * _BITS[name.split()[-1]] / 8 / seconds
                flops = 2 * rows * size / seconds
                print(
                    f"{shape:16} {rows:5} {name:16} {seconds * 1e3:8.3f} {rate / 1e9:6.1f} {rate / bandwidth:8.0%} "
                    f"{flops / 1e12:8.2f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
