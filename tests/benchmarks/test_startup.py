from __future__ import annotations

import os

import startup
from provenance import provenance

PRINTED = """   0.6 s  imports: 0.62 s
   0.6 s  memory: 3.7GiB, of which weights 15.3MiB
   0.6 s  starting the prefix index (valkey-server)
   3.1 s  Ray: 2.33 s
   6.2 s  prefill a: 1 of 74 tensors loaded
   6.3 s  prefill a: process 1.30 s, import 1.20 s, KV pool 0.01 s
   6.4 s  decode b: process 1.10 s, import 1.40 s, KV pool 0.00 s
   6.9 s  workers joined: 0.04 s
   6.9 s  ready: eagleray-demo at http://127.0.0.1:1"""


def test_phases_are_read_from_what_serve_prints_and_of_workers_the_longest() -> None:
    assert startup.phases_of(PRINTED.splitlines()) == {
        "imports": 0.62, "Ray": 2.33, "worker: process": 1.3, "worker: import": 1.4, "worker: KV pool": 0.01,
        "workers joined": 0.04,
    }  # fmt: skip


def test_what_the_service_plans_to_take_is_read_from_what_serve_prints() -> None:
    assert startup.planned_bytes_of(PRINTED.splitlines()) == 3.7 * 2**30
    assert startup.planned_bytes_of(["nothing of it"]) == 0


def test_memory_of_a_process_is_read_from_the_kernel() -> None:
    own = next(startup.memory_below(os.getpid()))
    assert own.resident_bytes >= own.proportional_bytes >= own.unique_bytes > 2**20
    assert own.resident_bytes % 4096 == 0
    known = own.allocated_bytes + own.torch_bytes + own.ray_bytes
    assert 2**20 < own.allocated_bytes < known <= own.beyond_bytes <= own.resident_bytes  # torch is loaded here


def test_what_others_used_during_the_starts_is_in_the_title() -> None:
    starts = [startup.Start({}, 1.0, [], [], [], share) for share in (0.01, 0.3, 0.02)]
    title = startup.render(provenance(), starts).splitlines()[0]
    assert title.endswith("others used at most 30.0% of the cores (disturbed)")
