"""Each check of the doctor finds the fault that is put before it, and says how to mend it."""

from __future__ import annotations

import asyncio
import json
import resource
import shutil
import socket
import subprocess
import sys
import types
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import grpc
import pytest

from pagewire.bundled import BUNDLED_MODEL
from pagewire.commands import doctor
from pagewire.doctor import gpu, installation, machine, model, service
from pagewire.doctor.check import Check
from pagewire.doctor.gpu import Driver, DriverError, Gpu
from pagewire.runtime import rich_status
from pagewire.terminal.figures import Answers
from pagewire.v1 import control_pb2
from tests.pagewire.test_top import answers
from tests.scheduler.peers import pool
from tools import generate_stubs

ROOT = Path(__file__).resolve().parents[2]
GIB = 1 << 30
H100 = Gpu("NVIDIA H100", (9, 0), 80 * GIB, 79 * GIB)
DRIVER = Driver((12, 8), (H100,))


def by_name(checks: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


def with_versions(monkeypatch: pytest.MonkeyPatch, **versions: str | None) -> None:
    """Has packages (with _ for -) in these versions, or not at all; others stay as they are."""
    named = {name.replace("_", "-"): version for name, version in versions.items()}
    real = installation.version

    def version(name: str) -> str | None:
        return named[name] if name in named else real(name)

    monkeypatch.setattr(installation, "version", version)
    monkeypatch.setattr(gpu, "version", version)


# Everything together


def test_every_check_that_is_bad_comes_with_a_mend() -> None:
    checks = list(doctor.run_checks())
    assert {check.name for check in checks} >= {"Python", "core packages", "gRPC stubs", "GPU", "memory", "weights"}
    assert all(check.mend for check in checks if check.state == "bad")


def test_a_bad_check_is_exit_code_1_with_its_line_and_in_json(tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pagewire.cli", "doctor", "--model", str(tmp_path), *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)

    people, script = run(), run("--json")
    assert (people.returncode, script.returncode) == (1, 1)
    (line,) = (line for line in people.stdout.splitlines() if "config.json" in line)
    assert line.startswith("bad")
    assert "download the model again" in line
    found = json.loads(script.stdout)
    assert found["ok"] is False
    (check,) = (check for check in found["checks"] if check["state"] == "bad")
    assert check["name"] == "model"


# The installation


def test_an_old_python_is_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation, "LEAST_PYTHON", (99, 0))
    assert installation.check_python().state == "bad"


def test_an_old_package_is_bad_and_a_missing_one_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    with_versions(monkeypatch, grpcio="1.80.0", torch=None)
    monkeypatch.setattr(installation, "required_versions", lambda: {"grpcio": ">=1.84.0"})
    core, _gateway, worker = installation.check_packages()
    assert core.state == "bad"
    assert core.found == "too old: grpcio 1.80.0 (needs >=1.84.0)"
    assert (worker.state, worker.found) == ("note", "missing: torch")
    assert "pagewire[worker]" in worker.mend


def test_a_mend_with_brackets_is_shown_whole(capsys: pytest.CaptureFixture[str]) -> None:
    doctor.show([Check("worker packages", "note", "missing: torch", "pip install 'pagewire[worker]'")])
    assert "pip install 'pagewire[worker]'" in capsys.readouterr().out


def test_local_parts_of_a_version_do_not_matter() -> None:
    assert installation.numbers("2.13.0+cpu") == (2, 13, 0)
    assert installation.numbers("1.9") < installation.numbers("1.84.0")


def test_stubs_that_are_missing_are_bad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation, "STUBS", tmp_path)
    assert installation.check_stubs().found == "missing"


def test_stubs_that_are_older_than_the_protos_are_bad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert installation.check_stubs().state == "ok"
    (tmp_path / "inference.proto").write_text('syntax = "proto3";')
    monkeypatch.setattr(installation, "PROTOS", tmp_path)
    stale = installation.check_stubs()
    assert (stale.state, stale.found, stale.mend) == ("bad", "older than protos/", "make protos")


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("The grpc package installed is at version 1.80.0, but the generated code depends on 1.84.0"),
        Exception("Detected incompatible Protobuf Gencode/Runtime versions when loading inference.proto"),
        ImportError("cannot import name 'runtime_version'"),
    ],
)
def test_stubs_that_do_not_fit_grpcio_or_protobuf_are_bad(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing(types.ModuleType):
        def __getattr__(self, name: str) -> object:
            raise error

    monkeypatch.delitem(sys.modules, "pagewire.v1.inference_pb2_grpc", raising=False)
    monkeypatch.setitem(sys.modules, "pagewire.v1", Refusing("pagewire.v1"))
    monkeypatch.setattr(installation.importlib.util, "find_spec", lambda _name: True)
    check = installation.check_stubs()
    assert check.state == "bad"
    assert check.found == f"do not import: {error}"
    assert "pip install --upgrade grpcio protobuf" in check.mend


def test_the_doctor_and_the_generator_agree_on_what_fresh_means() -> None:
    assert installation.protos_digest(installation.PROTOS) == generate_stubs.digest()
    assert generate_stubs.is_fresh()


def test_a_python_without_readline_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation.importlib.util, "find_spec", lambda _name: None)
    assert installation.check_line_editing().state == "note"


# The GPU


def test_no_driver_is_one_note() -> None:
    def ask() -> Driver:
        raise DriverError("no CUDA driver", "install it")

    (check,) = gpu.check_gpu(ask)
    assert (check.state, check.found, check.mend) == ("note", "no CUDA driver", "install it")


def test_a_sound_gpu_has_nothing_to_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    with_versions(monkeypatch, cupy_cuda12x="14.2.0", cupy_cuda13x=None, torch="2.13.0+cu128")
    monkeypatch.setitem(sys.modules, "cupy.cuda.nvrtc", types.SimpleNamespace(getVersion=lambda: (12, 8)))
    monkeypatch.setattr(resource, "getrlimit", lambda _which: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    checks = list(gpu.check_gpu(lambda: DRIVER))
    assert {check.state for check in checks} == {"ok"}
    assert by_name(checks)["NVRTC"].found == "12.8"


def test_a_gpu_that_is_too_old_is_bad() -> None:
    check = gpu.check_capability(replace(H100, name="Tesla V100", capability=(7, 0)))
    assert (check.state, check.found) == ("bad", "Tesla V100, compute capability 7.0")
    assert "8.0 (Ampere) or newer; use --device cpu" in check.mend


def test_the_least_capability_is_the_kernels_own() -> None:
    compile_module = pytest.importorskip("kernels.compile")
    assert gpu.OLDEST_CAPABILITY == compile_module.OLDEST_CAPABILITY


def test_a_gpu_that_others_have_filled_is_bad_and_one_that_is_half_full_is_noted() -> None:
    assert gpu.check_free_memory(replace(H100, free_bytes=GIB)).state == "bad"
    assert gpu.check_free_memory(replace(H100, free_bytes=30 * GIB)).state == "note"


def test_a_missing_cupy_names_the_extra_for_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    with_versions(monkeypatch, **{name.replace("-", "_"): None for name in gpu.CUPY_PACKAGES})
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda _name: None)
    assert gpu.check_cupy(DRIVER).mend == "pip install 'pagewire[cuda12]'"
    assert gpu.check_cupy(replace(DRIVER, cuda=(13, 1))).mend == "pip install 'pagewire[cuda13]'"


def test_a_cupy_for_a_newer_cuda_than_the_drivers_is_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    with_versions(monkeypatch, cupy_cuda13x="14.2.0", cupy_cuda12x=None)
    check = gpu.check_cupy(DRIVER)
    assert check.state == "bad"
    assert "the driver supports CUDA 12.8 only: cupy-cuda12x fits" in check.found
    assert check.mend == "pip uninstall cupy-cuda13x; pip install 'pagewire[cuda12]'"
    assert gpu.check_cupy(replace(DRIVER, cuda=(13, 0))).state == "ok"


def test_two_cupys_at_once_are_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    with_versions(monkeypatch, cupy_cuda13x="14.2.0", cupy_cuda12x="14.2.0")
    assert "overwrite each other" in gpu.check_cupy(DRIVER).found


def test_a_missing_nvrtc_is_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    def get_version() -> object:
        raise RuntimeError("CuPy failed to load libnvrtc.so.12\nmore")

    monkeypatch.setitem(sys.modules, "cupy.cuda.nvrtc", types.SimpleNamespace(getVersion=get_version))
    check = gpu.check_nvrtc()
    assert (check.state, check.found) == ("bad", "cannot be loaded: CuPy failed to load libnvrtc.so.12")


@pytest.mark.parametrize(
    ("torch", "state", "words"),
    [
        ("2.13.0+cpu", "bad", "has no CUDA"),
        ("2.13.0+cu130", "bad", "the driver supports CUDA 12.8 only"),
        ("2.13.0+cu126", "ok", "2.13.0"),
        ("2.13.0", "ok", "2.13.0"),
        (None, "note", "missing"),
    ],
)
def test_a_torch_that_does_not_fit_the_driver_is_bad(
    torch: str | None, state: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_versions(monkeypatch, torch=torch)
    check = gpu.check_torch(DRIVER)
    assert check.state == state
    assert words in check.found


def test_a_low_limit_on_locked_memory_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _which: (8 << 20, 8 << 20))
    check = gpu.check_locked_memory()
    assert (check.state, check.found) == ("note", "limit 8 MiB")


# The machine


def test_little_memory_is_bad_and_a_containers_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable: {64 * GIB // 1024} kB\n")
    monkeypatch.setattr(machine, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    assert machine.check_memory().found == "64.0 GiB available"
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text(f"{3 * GIB}\n")
    assert machine.check_memory().state == "ok"
    (tmp_path / "memory.max").write_text(f"{4 * GIB}\n")
    limited = machine.check_memory()
    assert (limited.state, limited.found) == ("bad", "1.0 GiB available")
    (tmp_path / "meminfo").unlink()
    (tmp_path / "memory.max").unlink()
    assert machine.check_memory().state == "note"


def test_little_shared_memory_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(machine, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage(64 << 20, 0, 64 << 20))
    check = machine.check_shared_memory()
    assert (check.state, check.found) == ("note", "64 MiB")
    assert "--shm-size" in check.mend
    monkeypatch.setattr(machine, "SHARED_MEMORY", tmp_path / "nothing")
    assert machine.check_shared_memory().state == "note"


def test_a_temporary_folder_that_is_missing_is_bad_and_a_full_one_is_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage(GIB, GIB, 0))
    assert machine.check_temporary_folder().state == "note"
    monkeypatch.setattr(machine.tempfile, "gettempdir", lambda: str(tmp_path / "nothing"))
    check = machine.check_temporary_folder()
    assert (check.state, check.mend) == ("bad", "set TMPDIR to a folder that can be written to")


def test_a_low_limit_on_open_files_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _which: (256, 4096))
    check = machine.check_descriptors()
    assert (check.state, check.mend) == ("note", "ulimit -n 4096 allows more connections")


def test_a_port_in_use_is_noted() -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        held = machine.check_port(port, "gRPC")
    assert (held.state, held.found) == ("note", "address already in use")
    assert f":{port}" in held.mend
    assert machine.check_port(port, "gRPC").state == "ok"


def test_a_proxy_that_does_not_spare_this_machine_is_noted() -> None:
    assert machine.check_proxy({}).state == "ok"
    assert machine.check_proxy({"http_proxy": "http://proxy:3128"}).state == "note"
    assert machine.check_proxy({"http_proxy": "http://proxy:3128", "no_proxy": "localhost, 127.0.0.1"}).state == "ok"


def test_grpcs_fork_handlers_are_noted() -> None:
    assert machine.check_fork_safety({"GRPC_ENABLE_FORK_SUPPORT": "0"}).state == "ok"
    assert machine.check_fork_safety({"GRPC_ENABLE_FORK_SUPPORT": "true"}).state == "note"


def test_a_clock_that_was_never_set_is_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.time, "time", lambda: 5.0)
    check = machine.check_clock()
    assert (check.state, check.found) == ("bad", "1970-01-01 00:00:05 UTC cannot be")


# The model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound model that may be spoiled."""
    return Path(shutil.copytree(BUNDLED_MODEL, tmp_path / "model"))


def test_a_sound_model_has_nothing_to_mend(folder: Path) -> None:
    assert {check.state for check in model.check_model(str(folder), 8 * GIB)} == {"ok"}


def test_a_model_that_is_no_folder_or_has_no_configuration_is_bad(tmp_path: Path) -> None:
    (absent,) = model.check_model(str(tmp_path / "nothing"), None)
    (empty,) = model.check_model(str(tmp_path), None)
    (hub,) = model.check_model("owner/name", None)
    assert (absent.state, empty.state, hub.state) == ("bad", "bad", "note")
    (tmp_path / "config.json").write_text("{")
    (broken,) = model.check_model(str(tmp_path), None)
    assert broken.state == "bad"


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
            "is a pointer of Git LFS, not the file",
        ),
        (b"", "is cut off or no safetensors file"),
        (b"\xff" * 100, "is cut off or no safetensors file"),
        ((2).to_bytes(8, "little") + b"[]", "is no safetensors file"),
    ],
)
def test_weights_that_are_no_weights_are_bad(folder: Path, content: bytes, found: str) -> None:
    (folder / "model.safetensors").write_bytes(content)
    check = model.check_weights(folder)
    assert (check.state, check.found) == ("bad", f"model.safetensors {found}")


def test_weights_that_are_cut_off_are_bad(folder: Path) -> None:
    path = folder / "model.safetensors"
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(size - 1)
    assert model.check_weights(folder).found == f"model.safetensors is cut off: {size - 1} of {size} bytes"


def test_missing_shards_are_named(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    assert model.check_weights(folder).found == "model.safetensors missing"
    shards = {"x": "a.safetensors", "y": "b.safetensors", "z": "c.safetensors"}
    (folder / model.INDEX_FILE).write_text(json.dumps({"weight_map": shards}))
    assert model.check_weights(folder).found == "b.safetensors and 1 more missing"
    (folder / model.INDEX_FILE).write_text("[]")
    assert model.check_weights(folder).state == "bad"


def test_a_missing_tokenizer_is_noted_and_a_broken_one_is_bad(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")
    assert model.check_tokenizer(folder).state == "bad"
    (folder / "tokenizer.json").unlink()
    assert "NO_TOKENIZER" in model.check_tokenizer(folder).mend


def test_a_missing_chat_template_is_noted(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text("{}")
    assert "NO_CHAT_TEMPLATE" in model.check_chat_template(folder).found
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert model.check_chat_template(folder).state == "ok"


def test_a_sequence_that_has_no_room_is_bad_and_its_bytes_are_told() -> None:
    config = {
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "hidden_size": 4096,
        "max_position_embeddings": 131072,
        "torch_dtype": "bfloat16",
    }
    tight = model.check_kv_space(config, 8 * GIB)
    assert tight.state == "bad"
    assert tight.found == "131072 bytes per token, 16.00 GiB for one sequence of 131072, 8.00 GiB are free"
    assert tight.mend.startswith("--max-model-len 32768 or less")
    assert "; 4 such sequences fit" in model.check_kv_space(config, 64 * GIB).found
    assert model.check_kv_space({"num_hidden_layers": 3}, GIB).state == "note"


# A running service


def judged(seen: Answers) -> dict[str, Check]:
    return by_name(list(service.judge(seen)))


def test_a_frozen_worker_is_bad() -> None:
    seen = answers()
    assert judged(seen)["worker w1"].state == "ok"
    seen.workers.workers[0].stalled = True
    seen.workers.workers[0].since_heartbeat_ns = 12_000_000_000
    check = judged(seen)["worker w1"]
    assert (check.state, "12.0 s ago" in check.found, "end its process" in check.mend) == ("bad", True, True)


def test_a_service_without_a_worker_is_bad() -> None:
    seen = answers()
    assert judged(replace(seen, workers=control_pb2.ListWorkersResponse()))["workers"].state == "bad"


def test_another_version_draining_full_pools_and_unlike_kernels_are_noted() -> None:
    seen = answers()
    seen.loads.draining = True
    (load,) = seen.loads.loads
    load.waiting, load.free_blocks, load.swapped, load.total_host_blocks = 5, 1, 2, 16
    other = seen.workers.workers.add(epoch=8)
    other.hello.worker_id, other.hello.kernel_version = "w2", "other"
    found = judged(seen)
    names = ("service", "admission", "KV pool of w1", "swap arena of w1", "kernels")
    assert {found[name].state for name in names} == {"note"}
    assert found["KV pool of w1"].found == "99 of 100 blocks used, 5 requests wait"


@pytest.mark.parametrize(
    ("code", "reason", "mend"),
    [
        (grpc.StatusCode.UNAVAILABLE, "NO_SCHEDULER", "its scheduler does not"),
        (grpc.StatusCode.UNAVAILABLE, "", "pagewire up"),
        (grpc.StatusCode.DEADLINE_EXCEEDED, "", "frozen or overloaded"),
        (grpc.StatusCode.UNIMPLEMENTED, "", "something else"),
    ],
)
def test_why_a_service_does_not_answer_decides_the_mend(code: grpc.StatusCode, reason: str, mend: str) -> None:
    error = service.StatusError(rich_status.StatusDetails(code, "a message", reason))
    check = service.unreachable(error)
    assert check.state == "bad"
    assert mend in check.mend


async def test_a_real_scheduler_is_asked_and_one_that_is_gone_is_bad(tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/scheduler.sock"
    async with pool(listen=address, heartbeat_timeout_s=600.0) as made:
        await made.worker()
        found = by_name(await asyncio.to_thread(lambda: list(service.check_service(address))))
        assert (found["service"].state, found["worker w1"].state) == ("ok", "ok")
    (gone,) = await asyncio.to_thread(lambda: list(service.check_service(address)))
    assert gone.state == "bad"
