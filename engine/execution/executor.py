"""The executor of one process: steps run in order on a thread of their own, so that the next one can be submitted, and
text of the last one be made, while one computes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from typing import Final

import torch

from eagleray.core.clock import SystemClock
from eagleray.core.config import Config, EngineConfig, ModelConfigSection, PoolConfig, SpeculationConfig
from eagleray.core.errors import ConfigError, EagleRayError
from eagleray.core.kv_layout import KVLayout
from eagleray.engine.execution.core_turns import CoreTurns, OwnCores
from eagleray.engine.execution.host_abilities import read_host_abilities
from eagleray.engine.execution.host_memory import available_host_bytes, keep_freed_memory
from eagleray.engine.execution.identity import compute_model_identity
from eagleray.engine.execution.kv_memory import num_blocks_for
from eagleray.engine.execution.kv_tensors import TORCH_DTYPES, KVTensors
from eagleray.engine.execution.memory_plan import format_size, plan_memory, require_room
from eagleray.engine.execution.runner import ModelRunner
from eagleray.engine.execution.weight_memory import LinearBytes, weight_bytes
from eagleray.engine.scheduling.plan import StepPlan, StepResult
from eagleray.engine.speculation.build import Target, build_proposer, build_token_rule, draft_identity
from eagleray.kernels.cache_folder import CacheFolderUnknown
from eagleray.kernels.linear.quantization import QuantizationUnsupported
from eagleray.kernels.native.build import NativeUnavailable
from eagleray.kernels.select import Kernels, select_kernels
from eagleray.models.loader import load_model
from eagleray.models.model_config import ModelConfig
from eagleray.models.packed_folder import packed_weights_folder
from eagleray.models.packed_weights import PackedWeightFiles
from eagleray.models.registry import load_model_config
from eagleray.models.weight_files import weight_files

_logger: Final = logging.getLogger(__name__)

_PREPARING_S: Final = 0.001  # that a step is waited for: one that copies blocks first may take longer


@dataclass(frozen=True, slots=True)
class LocalStep:
    """A step that was submitted."""

    future: Future[StepResult]
    deadline_s: float  # ``engine.step_deadline_s``

    def result(self) -> StepResult:
        """Wait for the step; raises what it met, or ``EagleRayError`` when it does not end before the deadline."""
        try:
            return self.future.result(self.deadline_s)
        except TimeoutError:
            if self.future.done():  # it was the step's own
                raise
        raise _has_not_ended(self.deadline_s)


class LocalExecutor:
    """Implements ``Executor`` on one model in this process."""

    def __init__(
        self,
        runner: ModelRunner,
        kv: KVTensors,
        *,
        num_host_blocks: int,
        model_config: ModelConfig,
        model_identity: str,
        draft_identity: str,
        max_model_tokens: int,
        thread: ThreadPoolExecutor,
        computes_with: str,
        step_deadline_s: float,
        turns: CoreTurns,
        has_draft_network: bool = False,
    ) -> None:
        self.kv = kv
        self.layout: KVLayout = kv.layout
        self.num_blocks = kv.num_blocks
        self.num_host_blocks = num_host_blocks
        self.model_config = model_config
        self.model_identity = model_identity
        self.draft_identity = draft_identity
        self.max_model_tokens = max_model_tokens
        self.has_draft_network = has_draft_network
        self.computes_with = computes_with
        self._runner = runner
        self._thread = thread
        self._step_deadline_s = step_deadline_s
        self._turns = turns
        self._last_step: Future[StepResult] | None = None  # they run in order

    def submit(self, plan: StepPlan) -> LocalStep:
        """Returns when the step computes or waits for its turn, or shortly. Whoever goes on in Python before that, with
        text and outputs of the step before, keeps the thread that prepares the step from the interpreter."""
        computes: SimpleQueue[None] = SimpleQueue()
        self._last_step = self._thread.submit(self._run, plan, partial(computes.put, None))
        with suppress(Empty):
            computes.get(timeout=_PREPARING_S)
        return LocalStep(self._last_step, self._step_deadline_s)

    def _run(self, plan: StepPlan, on_compute: Callable[[], None]) -> StepResult:
        try:
            with self._turns.turn(on_wait=on_compute):
                return self._runner.run(plan, on_compute)
        finally:
            on_compute()  # of a step that only copies, or has failed

    def close(self) -> None:
        """Finish the steps that were submitted, take no more, and give up the pool.

        Raises ``EagleRayError`` when they do not end within ``engine.step_deadline_s``; then the pool stays, because a
        step still computes in it.
        """
        self._thread.shutdown(wait=False)
        if self._last_step is not None and not wait((self._last_step,), self._step_deadline_s).done:
            raise _has_not_ended(self._step_deadline_s)
        self.kv.close()


def _has_not_ended(deadline_s: float) -> EagleRayError:
    return EagleRayError(
        f"engine.step_deadline_s={deadline_s:g}: a step has not ended within that time; end the process, or raise it "
        "if steps take so long"
    )


def build_executor(
    model: ModelConfigSection,
    engine: EngineConfig,
    device: str = "cpu",
    num_threads: int | None = None,
    shared_kv: bool = False,
    progress: Callable[[int, int], None] | None = None,
    end_phase: Callable[[str], None] = lambda name: None,
    kernels: Kernels | None = None,
    speculation: SpeculationConfig | None = None,
    turns: CoreTurns | None = None,
) -> LocalExecutor:
    """Load a checkpoint and allocate its KV pools.

    Args:
        num_threads: that compute, in native kernels and in torch; None leaves torch's default.
        shared_kv: put the pool where another process of this host can read it (host memory only).
        progress: called after each tensor with (tensors loaded, tensors in all), on the thread that will compute.
        end_phase: called with the name of each part of the work when it is done, on that thread too.
        kernels: to compute with; None: those that ``engine.kernels`` selects.
        speculation: guess tokens, as configured.
        turns: when steps may compute; None: at any time.

    Raises ``ConfigError`` for a checkpoint that cannot be served, or pools that do not fit.
    """
    # OpenMP keeps helpers for every thread that ever computed. Once there are more of them than cores, none spins for
    # work any more and every operation waits for one to wake up: so loading, too, computes on the thread of the steps.
    set_num_threads = None if num_threads is None else partial(torch.set_num_threads, num_threads)
    thread = ThreadPoolExecutor(1, "eagleray-step", initializer=set_num_threads)
    try:
        loading = thread.submit(
            _load,
            model,
            engine,
            device,
            shared_kv,
            progress,
            end_phase,
            kernels,
            speculation,
            turns or OwnCores(),
            thread,
        )
        if not wait((loading,), model.load_deadline_s).done:
            way_out = f"{model.path} is not loaded after so long; raise it, or put the checkpoint on a faster disk"
            raise ConfigError("model.load_deadline_s", model.load_deadline_s, way_out)
        return loading.result(timeout=0)
    except BaseException:
        thread.shutdown(wait=False)
        raise


def _load(
    model: ModelConfigSection,
    engine: EngineConfig,
    device: str,
    shared_kv: bool,
    progress: Callable[[int, int], None] | None,
    end_phase: Callable[[str], None],
    kernels: Kernels | None,
    speculation: SpeculationConfig | None,
    turns: CoreTurns,
    thread: ThreadPoolExecutor,
) -> LocalExecutor:
    config = load_model_config(model.folder)
    config.resolve_max_model_tokens(model.max_model_tokens)  # refused before seconds have gone into loading
    dtype = config.resolve_dtype(model.dtype, device)
    kernels = kernels or _select_kernels(model, engine, dtype, device)
    end_phase("kernels")
    _check_weights_fit(model, config, dtype, kernels)
    identity = compute_model_identity(model.folder, model.revision, model.quantization)
    packed_files = _packed_weight_files(model, identity)
    try:
        decoder = load_model(model.folder, config, TORCH_DTYPES[dtype], device, progress, kernels, packed_files)
    except QuantizationUnsupported as error:
        raise ConfigError("model.quantization", model.quantization, f"{error}; choose another") from None
    proposer = None if speculation is None else build_proposer(speculation, Target(decoder, dtype, kernels))
    end_phase("weights")
    draft_groups = () if proposer is None else proposer.groups
    layout = KVLayout(engine.block_size_tokens, (decoder.layer_group(dtype), *draft_groups))
    num_blocks = engine.num_blocks or num_blocks_for(layout, _kv_memory_bytes(model, engine, config, speculation))
    max_model_tokens = _resolve_max_model_tokens(model, config, num_blocks * engine.block_size_tokens)
    kv = KVTensors(layout, num_blocks, device, shared_kv)
    host_kv = KVTensors(layout, engine.num_host_blocks) if engine.num_host_blocks else None
    end_phase("KV pool")
    choose = build_token_rule(speculation, kernels)
    keep_freed_memory()
    return LocalExecutor(
        ModelRunner(decoder, kv, host_kv, device, kernels, SystemClock(), proposer, choose),
        kv,
        num_host_blocks=engine.num_host_blocks,
        model_config=config,
        model_identity=identity,
        draft_identity=draft_identity(speculation),
        max_model_tokens=max_model_tokens,
        thread=thread,
        computes_with=kernels.description,
        step_deadline_s=engine.step_deadline_s,
        turns=turns,
        has_draft_network=proposer is not None and proposer.has_network,
    )


def _kv_memory_bytes(
    model: ModelConfigSection, engine: EngineConfig, config: ModelConfig, speculation: SpeculationConfig | None
) -> int:
    """As configured, or planned as for a service of this one worker."""
    if engine.kv_memory_bytes is not None:
        return engine.kv_memory_bytes
    pool = PoolConfig(replicas=1, engine=engine)
    alone = Config(model=model, prefill=PoolConfig(replicas=0, engine=engine), decode=pool, speculation=speculation)
    host = read_host_abilities()
    return plan_memory(alone, config, available_host_bytes(), runtime_bytes=0, host=host).decode_kv_bytes


def _check_weights_fit(model: ModelConfigSection, config: ModelConfig, dtype: str, kernels: Kernels) -> None:
    """Where torch computes, weights may take twice what they take with native kernels."""
    needed_bytes = weight_bytes(config, dtype, LinearBytes(is_native=False, quantization=model.quantization))
    available_bytes = available_host_bytes()
    if not kernels.is_native and available_bytes is not None and needed_bytes > available_bytes:
        way_out = (
            f"the weights take {format_size(needed_bytes)} with these kernels, {format_size(available_bytes)} are "
        )
        way_out += "free; install a C compiler, or take a smaller model"
        raise ConfigError("engine.kernels", kernels.description, way_out)


def _packed_weight_files(model: ModelConfigSection, identity: str) -> PackedWeightFiles | None:
    """Below the user's cache folder; None if there shall be none, or no such folder."""
    if not model.packed_weights_bytes:
        return None
    try:
        folder = packed_weights_folder()
    except CacheFolderUnknown as error:
        _logger.warning("packed weights are not kept: %s", error)
        return None
    # The identity of a large checkpoint comes from samples: one that was changed in place tells by its files' times.
    stats = [path.stat() for path in weight_files(model.folder)]
    times = " ".join(f"{stat.st_size}@{stat.st_mtime_ns}" for stat in stats)
    return PackedWeightFiles(folder, f"{identity} {times}", model.packed_weights_bytes, SystemClock())


def _select_kernels(model: ModelConfigSection, engine: EngineConfig, dtype: str, device: str) -> Kernels:
    num_threads = torch.get_num_threads()
    try:
        kernels = select_kernels(
            engine.kernels, TORCH_DTYPES[dtype], device, num_threads, quantization=model.quantization
        )
    except NativeUnavailable as error:
        raise ConfigError("engine.kernels", engine.kernels, f"{error}; or set it to auto") from None
    except QuantizationUnsupported as error:
        raise ConfigError("model.quantization", model.quantization, f"{error}; or leave it out") from None
    _logger.info("kernels: %s", kernels.description)
    return kernels


def _resolve_max_model_tokens(model: ModelConfigSection, config: ModelConfig, capacity_tokens: int) -> int:
    """What the user set, which must be possible, or else as much as model and pool allow."""
    require_room(model.max_model_tokens, capacity_tokens)
    return min(config.resolve_max_model_tokens(model.max_model_tokens), capacity_tokens)
