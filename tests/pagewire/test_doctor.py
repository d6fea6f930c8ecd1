"""Each check of the doctor says what it found and how to mend it."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from pagewire.commands import doctor
from tools import generate_stubs


def test_every_check_that_is_not_ok_comes_with_a_mend() -> None:
    checks = list(doctor.run_checks())
    assert {check.name for check in checks} >= {"Python", "core packages", "gRPC stubs", "GPU", "memory"}
    assert all(check.mend for check in checks if check.state == "bad")


def test_a_port_in_use_is_noted() -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        held = doctor.check_port(port, "gRPC")
    assert (held.state, held.found) == ("note", "address already in use")
    assert doctor.check_port(port, "gRPC").state == "ok"


def test_stubs_that_are_older_than_the_protos_are_bad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.check_stubs().state == "ok"
    (tmp_path / "inference.proto").write_text('syntax = "proto3";')
    monkeypatch.setattr(doctor, "PROTOS", tmp_path)
    stale = doctor.check_stubs()
    assert (stale.state, stale.found, stale.mend) == ("bad", "older than protos/", "make protos")


def test_the_doctor_and_the_generator_agree_on_what_fresh_means() -> None:
    assert doctor.protos_digest(doctor.PROTOS) == generate_stubs.digest()
    assert generate_stubs.is_fresh()


def test_an_old_package_is_bad_and_a_missing_one_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"grpcio": "1.80.0", "torch": None}
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: versions[name] if name in versions else real(name))
    monkeypatch.setattr(doctor, "_required_versions", lambda: {"grpcio": ">=1.84.0"})
    core, _gateway, worker = doctor.check_packages()
    assert core.state == "bad"
    assert core.found == "too old: grpcio 1.80.0 (needs >=1.84.0)"
    assert (worker.state, worker.found) == ("note", "missing: torch")
    assert "pagewire[worker]" in worker.mend


def test_a_mend_with_brackets_is_shown_whole(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = doctor.Check("worker packages", "note", "missing: torch", "pip install 'pagewire[worker]'")
    monkeypatch.setattr(doctor, "run_checks", lambda: iter([missing]))
    doctor.doctor()
    assert "pip install 'pagewire[worker]'" in capsys.readouterr().out


def test_local_parts_of_a_version_do_not_matter() -> None:
    assert doctor._numbers("2.13.0+cpu") == (2, 13, 0)
    assert doctor._numbers("1.9") < doctor._numbers("1.84.0")
