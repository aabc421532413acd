"""Speed of linear layers in every format, beside torch's own and oneDNN's with weights reordered before.

    python benchmarks/kernels/linear.py --threads 2 --json linear.json --markdown > linear.md

Products take turns, and each counts with its median. Weights are so many copies in rotation that they come from memory,
as in a model; with few rows their bytes per second are to be compared with the read bandwidth, with many rows their
operations per second with torch's largest product and with what the units do on data in the first-level cache.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, get_args

import msgspec
import torch
from limits import Limits, ProductLimit
from rich.console import Console

from eagleray.kernels.cache_folder import kernel_folder
from eagleray.kernels.linear.panels import PanelLinearFormat, PanelWeights
from eagleray.kernels.native.build import supported_levels
from eagleray.kernels.native.library import NativeLibrary, load_library

sys.path.append(str(Path(__file__).resolve().parent.parent))
from floors import Machine, measure_machine
from interference import mark
from provenance import Provenance, provenance
from report import Section, to_markdown, to_terminal
from turns import Action, Turns, time_in_turns

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
_TORCH: Final = "torch, F.linear"
_ONEDNN: Final = "oneDNN, reordered"
_ROTATED_BYTES: Final = 512 * 2**20  # of each way to multiply; a round reads of all of them


@dataclass(frozen=True)
class Row:
    """One product of one shape."""

    shape: str
    num_rows: int
    product: str
    median_s: float
    times_s: Sequence[float]
    flop_per_s: float
    weight_bytes_per_s: float
    others_share: float  # of the cores, what other processes used meanwhile


@dataclass(frozen=True)
class Run:
    """Everything about one run."""

    origin: Provenance
    level: str
    num_threads: int
    machine: Machine
    product_limit: ProductLimit
    rows: Sequence[Row]

    def title(self) -> str:
        return (
            f"linear layers, {self.level}, {self.num_threads} threads on {self.origin.num_cores} x {self.origin.cpu}, "
            f"commit {self.origin.git_commit}, {self.origin.date}; the machine reads "
            f"{self.machine.read_bytes_per_s / 1e9:.1f} GB/s; torch's largest product has "
            f"{self.machine.flop_per_s / 1e12:.2f} TFLOP/s in bfloat16"
            f"{mark(self.machine.others_share)}; {self.product_limit}"
        )


def our_products(weight: torch.Tensor, weights: PanelWeights, library: NativeLibrary) -> list[Product]:
    """Copies whose weights differ in nothing but their place."""
    linear_format = PanelLinearFormat(library, weights)
    packed = linear_format.pack(weight, None)
    num_copies = _num_copies(sum(tensor.nbytes for tensor in packed.tensors.values()))
    copies = (
        replace(packed, tensors={name: tensor.clone() for name, tensor in packed.tensors.items()})
        for _ in range(num_copies)
    )
    return [linear_format.bind(copy) for copy in copies]


def torch_products(weight: torch.Tensor) -> list[Product]:
    clones = [weight.clone() for _ in range(_num_copies(weight.nbytes))]
    return [lambda x, w=clone: torch.nn.functional.linear(x, w) for clone in clones]


def onednn_products(weight: torch.Tensor, num_rows: int) -> dict[str, list[Product]]:
    """Weights in the order that oneDNN wants for so many rows; none where it does not do that in bfloat16."""
    reorder, pointwise = torch.ops.mkldnn._reorder_linear_weight, torch.ops.mkldnn._linear_pointwise
    try:
        packed = [reorder(weight, num_rows) for _ in range(_num_copies(weight.nbytes))]
    except RuntimeError as error:
        print(f"without oneDNN: {error}", file=sys.stderr)
        return {}
    return {_ONEDNN: [lambda x, p=p: pointwise(x, p, None, "none", [], "") for p in packed]}


def _num_copies(num_bytes: int) -> int:
    return max(1, _ROTATED_BYTES // num_bytes)


def _rotating(products: Sequence[Product], x: torch.Tensor) -> Action:
    return lambda number: products[number % len(products)](x)


def measure_shape(shape: str, options: argparse.Namespace, library: NativeLibrary) -> list[Row]:
    out_features, in_features = SHAPES[shape]
    weight = (torch.randn(out_features, in_features) * 0.05).bfloat16()
    lasting = {f"eagleray, {name}": our_products(weight, name, library) for name in options.formats}
    lasting[_TORCH] = torch_products(weight)
    rows = []
    for num_rows in options.rows:
        x = torch.randn(num_rows, in_features).bfloat16()
        products = {**lasting, **onednn_products(weight, num_rows)}
        actions = {name: _rotating(copies, x) for name, copies in products.items()}
        rows += _rows(shape, num_rows, time_in_turns(actions, options.seconds))
    return rows


def _rows(shape: str, num_rows: int, turns: Turns) -> list[Row]:
    size = SHAPES[shape][0] * SHAPES[shape][1]
    return [
        Row(
            shape, num_rows, name, median_s, turns.times_s[name], 2 * num_rows * size / median_s,
            size * _BITS.get(name.split()[-1], 16) / 8 / median_s, turns.others_share,
        )
        for name, median_s in turns.medians_s.items()
    ]  # fmt: skip


def sections(run: Run) -> list[Section]:
    """One table per shape."""
    header = ("rows", "product", "ms", "TFLOP/s", "GB/s of weights", "of reads", "oneDNN's time over it", "others")
    onednn_s = {(row.shape, row.num_rows): row.median_s for row in run.rows if row.product == _ONEDNN}
    shown = []
    for shape in dict.fromkeys(row.shape for row in run.rows):
        out_features, in_features = SHAPES[shape]
        rows = [
            (
                str(row.num_rows), row.product, f"{row.median_s * 1e3:.3f}", f"{row.flop_per_s / 1e12:.2f}",
                f"{row.weight_bytes_per_s / 1e9:.1f}", f"{row.weight_bytes_per_s / run.machine.read_bytes_per_s:.0%}",
                f"{onednn_s[shape, row.num_rows] / row.median_s:.2f}" if onednn_s else "-",
                f"{row.others_share:.1%}{mark(row.others_share)}",
            )
            for row in run.rows
            if row.shape == shape
        ]  # fmt: skip
        shown.append(Section((f"{shape}, {in_features} x {out_features}: {header[0]}", *header[1:]), rows))
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0] if __doc__ else None,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--level", default=supported_levels()[0], choices=supported_levels(), help="of our kernels")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of every product")
    parser.add_argument("--formats", nargs="+", default=["bfloat16", "w8a8"], choices=get_args(PanelWeights))
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 32, 512, 1024], help="of activations")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each number of rows of each shape")
    parser.add_argument("--json", type=Path, help="write everything to this file")
    parser.add_argument("--markdown", action="store_true", help="print Markdown")
    options = parser.parse_args()
    machine, product_limit = measure_machine("bfloat16", options.threads), Limits(options.threads).products()
    torch.set_num_threads(options.threads)
    library = load_library(options.level, kernel_folder(), options.threads)
    rows: list[Row] = []
    for shape in options.shapes:
        print(f"measuring {shape}", file=sys.stderr)
        rows += measure_shape(shape, options, library)
        run = Run(provenance(), options.level, options.threads, machine, product_limit, rows)
        if options.json:
            options.json.write_bytes(msgspec.json.format(msgspec.json.encode(run)) + b"\n")
    if options.markdown:
        print(f"{run.title()}\n\n{to_markdown(sections(run))}")
    else:
        Console().print(run.title(), to_terminal(sections(run)), sep="\n", highlight=False, markup=False)


if __name__ == "__main__":
    main()
