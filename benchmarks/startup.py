"""Start a service, time its phases, let it answer, and look at the memory of every process that it has.

    python benchmarks/startup.py --repeats 3 -- --prefill 1 --decode 1
    python benchmarks/startup.py --random-qwen3 --json startup.json -- --dtype bfloat16

What follows ``--`` goes to ``eagleray serve``. With ``--random-qwen3`` a checkpoint of the shape of Qwen3-0.6B, with
a smaller vocabulary and random weights, is made first and served.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import selectors
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import httpx
import torch
from interference import MAX_OTHERS_SHARE, Attempt, attempts, mark
from process_cpu import mapped_bytes, smaps_of
from provenance import Provenance, provenance
from report import Section, to_markdown
from safetensors.torch import save_file

from eagleray.workers.step_loop import LONG_IDLE_S

READY_DEADLINE_S: Final = 300.0
STOP_DEADLINE_S: Final = 60.0
ANSWER_DEADLINE_S: Final = 240.0
NUM_REQUESTS: Final = 16  # at once: fills the steps of the workers
_PHASE: Final = re.compile(r"^ *[\d.]+ s  ([\w ]+): ([\d.]+) s$")
_WORKER: Final = re.compile(r"^ *[\d.]+ s  (prefill|decode) \w+: (process .*)$")
_PLANNED: Final = re.compile(r"^ *[\d.]+ s  memory: ([\d.]+)([KMGT]iB)")
_UNITS: Final = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_READY: Final = re.compile(r"^ *([\d.]+) s  ready: (\S+) at (\S+)$")
_ROLLUP_KEYS: Final = ("Rss", "Pss", "Private_Clean", "Private_Dirty")

QWEN3: Final = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 32000, "hidden_size": 1024,
    "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8,
    "head_dim": 128, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "hidden_act": "silu",
    "tie_word_embeddings": True, "attention_bias": False, "torch_dtype": "bfloat16", "eos_token_id": 2,
}  # fmt: skip


@dataclass(frozen=True)
class ProcessMemory:
    """Bytes, of one process. What it shares with others counts whole in resident, in parts in proportional."""

    name: str
    resident_bytes: int
    proportional_bytes: int
    unique_bytes: int
    weights_bytes: int  # resident, of mapped weights: packed ones and checkpoints
    kv_bytes: int  # resident, of KV pools: its own, and those that it has read from
    allocated_bytes: int  # resident, of no file or no more as in the file: what Python and libraries have made
    torch_bytes: int  # resident, of torch's files, as they are there
    ray_bytes: int  # resident, of Ray's files, as they are there

    @property
    def beyond_bytes(self) -> int:
        """What the program itself takes: no weights, no KV."""
        return self.resident_bytes - self.weights_bytes - self.kv_bytes


@dataclass(frozen=True)
class Start:
    phases_s: dict[str, float]  # as printed; of workers the longest
    ready_s: float  # from the command to the line that says so
    idle: list[ProcessMemory]
    used: list[ProcessMemory]  # after it has answered
    rested: list[ProcessMemory]  # and when it has been idle for some time after that
    others_share: float  # of the cores, what other processes used until then
    planned_bytes: float = 0.0  # that the service has said it needs at most; 0: it has not


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    with tempfile.TemporaryDirectory(prefix="eagleray-startup-") as folder:
        serve = [*options.serve]
        if options.random_qwen3:
            write_random_qwen3(Path(folder))
            serve += ["--model", folder]
        starts = [undisturbed_start(serve) for _ in range(options.repeats)]
    origin = provenance()
    if options.json:
        content = {"origin": asdict(origin), "starts": [asdict(start) for start in starts]}
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(render(origin, starts))
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="starts, one after the other")
    parser.add_argument("--random-qwen3", action="store_true", help="serve random weights of Qwen3-0.6B's shape")
    parser.add_argument("--json", type=Path, help="write everything there")
    parser.add_argument("serve", nargs="*", help="options of eagleray serve, after --")
    return parser.parse_args(arguments)


def write_random_qwen3(folder: Path) -> None:
    """A bfloat16 checkpoint with the demo model's tokenizer, whose ids all fit."""
    from eagleray.core.config import DEMO_MODEL_PATH
    from eagleray.models.random_weights import random_model
    from eagleray.models.registry import load_model_config
    from eagleray.models.weight_names import checkpoint_views

    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((DEMO_MODEL_PATH / name).read_bytes())
    (folder / "config.json").write_text(json.dumps(QWEN3), encoding="utf-8")
    views = checkpoint_views(random_model(load_model_config(folder), seed=0, dtype=torch.bfloat16))
    save_file({name: view.clone() for name, view in views.items()}, folder / "model.safetensors", {"format": "pt"})


def undisturbed_start(serve: Sequence[str]) -> Start:
    """The first one that others leave alone, or the last of three."""
    for attempt in attempts(MAX_OTHERS_SHARE, os.getpid()):
        start = measure_start(serve, attempt)
    return start


def measure_start(serve: Sequence[str], attempt: Attempt) -> Start:
    """Start, look, ask, look again, wait, look once more, stop. The attempt ends when it has answered: what processes
    used is not known of all of them when they are gone, and who only waits cannot be disturbed."""
    start_s = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "eagleray.cli", "serve", "--port", "0", *serve],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    try:
        lines, address, model = _wait_until_ready(process)
        ready_s = time.monotonic() - start_s
        idle = list(memory_below(process.pid))
        _ask(address, model)
        used = list(memory_below(process.pid))
        others_share = attempt.end()
        time.sleep(LONG_IDLE_S + 2.0)
        rested = list(memory_below(process.pid))
        return Start(phases_of(lines), ready_s, idle, used, rested, others_share, planned_bytes_of(lines))
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=STOP_DEADLINE_S)


def _wait_until_ready(process: subprocess.Popen[bytes]) -> tuple[list[str], str, str]:
    """Everything printed until then, the address, and the model's name."""
    assert process.stdout is not None
    printed, until_s = "", time.monotonic() + READY_DEADLINE_S
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while selector.select(until_s - time.monotonic()):
            part = os.read(process.stdout.fileno(), 65536).decode()
            if not part:
                break
            printed += part
            for line in printed.splitlines():
                if found := _READY.match(line):
                    return printed.splitlines(), found[3], found[2]
    raise SystemExit(f"the service was not ready in time:\n{printed}")


def _ask(address: str, model: str) -> None:
    def ask(number: int) -> None:
        words = " ".join(f"word{number}-{index}" for index in range(100))
        body = {"model": model, "prompt": words, "max_tokens": 32, "temperature": 0.8, "seed": number}
        httpx.post(f"{address}/v1/completions", json=body, timeout=ANSWER_DEADLINE_S).raise_for_status()

    with ThreadPoolExecutor(NUM_REQUESTS) as threads:
        list(threads.map(ask, range(NUM_REQUESTS)))


def phases_of(lines: Sequence[str]) -> dict[str, float]:
    """Phase -> seconds. Workers start at the same time: of each of their phases the longest."""
    phases: dict[str, float] = {}
    for line in lines:
        if found := _WORKER.match(line):
            for part in found[2].split(", "):
                name, duration = part.removesuffix(" s").rsplit(" ", 1)
                phases[f"worker: {name}"] = max(phases.get(f"worker: {name}", 0.0), float(duration))
        elif found := _PHASE.match(line):
            phases[found[1]] = float(found[2])
    return phases


def planned_bytes_of(lines: Sequence[str]) -> float:
    """Of all processes together; 0 when none is printed."""
    found = next(filter(None, map(_PLANNED.match, lines)), None)
    return float(found[1]) * _UNITS[found[2]] if found else 0.0


def memory_below(pid: int) -> Iterator[ProcessMemory]:
    """Of a process and all that descend from it, the largest first."""
    found = [memory for below in _descendants(pid) if (memory := _memory_of(below)) is not None]
    yield from sorted(found, key=lambda memory: -memory.resident_bytes)


def _descendants(pid: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        except OSError:
            continue  # it has ended
        children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    pids = [pid]
    for parent in pids:
        pids += children.get(parent, [])
    return pids


def _memory_of(pid: int) -> ProcessMemory | None:
    """None when it has ended."""
    folder = Path(f"/proc/{pid}")
    try:
        arguments = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").split()
        rollup = (folder / "smaps_rollup").read_text(encoding="ascii")
        smaps = smaps_of(pid)
    except OSError:
        return None
    fields = {name: int(kib) * 1024 for name, kib in re.findall(r"^(\w+): +(\d+) kB$", rollup, re.MULTILINE)}
    resident, proportional, *unique = (fields.get(name, 0) for name in _ROLLUP_KEYS)
    weights, kv = _resident_of(smaps, ".packed", ".safetensors"), _resident_of(smaps, "memfd:eagleray-kv")
    allocated, name = mapped_bytes(smaps, "")["Anonymous"], _short_name(arguments)
    files = (_as_in_files(smaps, "/torch/"), _as_in_files(smaps, "/ray/"))
    return ProcessMemory(name, resident, proportional, sum(unique), weights, kv, allocated, *files)


def _as_in_files(smaps: str, name: str) -> int:
    fields = mapped_bytes(smaps, name)
    return fields["Rss"] - fields["Anonymous"]


def _resident_of(smaps: str, *names: str) -> int:
    return sum(mapped_bytes(smaps, name)["Rss"] for name in names)


def _short_name(arguments: Sequence[str]) -> str:
    """Ray's own name of a replica, or the program or script that runs."""
    scripts = [word for word in arguments[:3] if not word.startswith("-")]
    return next((word for word in arguments if "ray::" in word), Path(scripts[-1]).name if scripts else "")


def render(origin: Provenance, starts: Sequence[Start]) -> str:
    """Medians of the phases, and the memory of the last start."""
    names = list(starts[-1].phases_s)
    rows = [(name, _seconds([start.phases_s.get(name, 0.0) for start in starts])) for name in names]
    rows.append(("ready, from the command on", _seconds([start.ready_s for start in starts])))
    others_share = max(start.others_share for start in starts)
    title = (
        f"{origin.command}, {origin.num_cores} x {origin.cpu}, commit {origin.git_commit}, {origin.date}; others used "
        f"at most {others_share:.1%} of the cores{mark(others_share)}"
    )
    header = (
        "process", "resident", "proportional", "unique", "weights", "KV", "beyond weights and KV", "allocated",
        "files of torch", "files of Ray", "other files",
    )  # fmt: skip
    tables = [Section(("phase, median of starts", f"s ({len(starts)} starts)"), rows)]
    last = starts[-1]
    all_times = (("when ready", last.idle), ("after answers", last.used), ("idle again", last.rested))
    sums = [_mebibytes(sum(memory.proportional_bytes for memory in memories)) for _, memories in all_times]
    header_of_plan = ("all processes, MiB", "planned", *(f"proportional {when}" for when, _ in all_times))
    tables.append(Section(header_of_plan, [("together", _mebibytes(last.planned_bytes), *sums)]))
    for when, memories in all_times:
        tables.append(Section((f"{header[0]}, MiB {when}", *header[1:]), [_row(memory) for memory in memories]))
    return f"{title}\n\n{to_markdown(tables)}"


def _seconds(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def _row(memory: ProcessMemory) -> tuple[str, ...]:
    known = (memory.allocated_bytes, memory.torch_bytes, memory.ray_bytes)
    sizes = (
        memory.resident_bytes, memory.proportional_bytes, memory.unique_bytes, memory.weights_bytes, memory.kv_bytes,
        memory.beyond_bytes, *known, memory.beyond_bytes - sum(known),
    )  # fmt: skip
    return (memory.name, *map(_mebibytes, sizes))


def _mebibytes(num_bytes: float) -> str:
    return f"{num_bytes / 2**20:.0f}"


if __name__ == "__main__":
    sys.exit(main())
