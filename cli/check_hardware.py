"""What this machine has to compute with."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from eagleray.cli.finding import Finding, Level
from eagleray.cli.terminal import format_bytes
from eagleray.core.config import Config, with_cores
from eagleray.engine.execution.core_turns import count_cores
from eagleray.engine.execution.host_memory import available_host_bytes

_CPU_INFO: Final = Path("/proc/cpuinfo")
_USEFUL_FLAGS: Final = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimd")


def check_hardware(config: Config) -> list[Finding]:
    return [_check_cores(config), _check_cpu_flags(), check_kernels(config), _check_memory(), _check_cuda()]


def _check_cores(config: Config) -> Finding:
    cores = count_cores()
    config = with_cores(config, cores)
    threads = [pool.num_threads or 0 for pool in (config.prefill, config.decode) for _ in range(pool.replicas)]
    wanted = max(threads) if config.cores == "shared" else sum(threads)
    if wanted > cores:
        way_out = "fine to try things out; for speed lower prefill.replicas, decode.replicas or num_threads"
        return Finding(Level.WARN, "cores", f"{cores} for {wanted} threads that compute", way_out)
    when = ", in turns" if config.cores == "shared" else ""
    return Finding(Level.OK, "cores", f"{cores}, of which workers use {wanted}{when}")


def _check_cpu_flags() -> Finding:
    try:
        lines = _CPU_INFO.read_text(encoding="utf-8").splitlines()
    except OSError:
        return Finding(Level.OK, "CPU", "its features are not known here")
    flags = next((set(line.split()) for line in lines if line.startswith(("flags", "Features"))), set())
    found = [flag for flag in _USEFUL_FLAGS if flag in flags]
    if not found:
        return Finding(Level.WARN, "CPU", "has no vector instructions that help", "expect it to be slow")
    return Finding(Level.OK, "CPU", ", ".join(found))


def check_kernels(config: Config) -> Finding:
    """What workers compute with on the CPU. Compiles the native library, as the first worker would."""
    import torch  # takes seconds: not before it is needed

    from eagleray.kernels.linear.quantization import QuantizationUnsupported
    from eagleray.kernels.native.build import NativeUnavailable
    from eagleray.kernels.select import select_kernels

    choice, num_threads = config.decode.engine.kernels, with_cores(config, count_cores()).decode.num_threads or 1
    dtype = torch.float32 if config.model.dtype == "auto" else getattr(torch, config.model.dtype)
    try:
        kernels = select_kernels(
            "native" if choice == "auto" else choice, dtype, "cpu", num_threads, quantization=config.model.quantization
        )
    except NativeUnavailable as error:
        level = Level.WARN if choice == "auto" else Level.MISSING
        return Finding(level, "kernels", f"torch computes: {error}", "torch works too, at about half the speed")
    except QuantizationUnsupported as error:
        return Finding(Level.MISSING, "kernels", str(error), "leave model.quantization out, or change model.dtype")
    return Finding(Level.OK, "kernels", kernels.description)


def _check_memory() -> Finding:
    available = available_host_bytes()
    return Finding(Level.OK, "memory", "unknown" if available is None else f"{format_bytes(available)} available")


def _check_cuda() -> Finding:
    import torch  # takes seconds: not before it is needed

    if not torch.cuda.is_available():
        return Finding(Level.OK, "CUDA", "no device; workers compute on the CPU")
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return Finding(Level.OK, "CUDA", ", ".join(names))
