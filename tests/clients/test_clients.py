"""Every example client runs the scenarios of `clients/scenarios.json` against one real service, and the matrix in
`clients/README.md` says what came out."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest

from pagewire.v1 import inference_pb2, inference_pb2_grpc
from tests.clients import matrix
from tests.clients.breaking_proxy import breaking
from tests.clients.languages import CLIENTS, LANGUAGES, CannotBuild, Language
from tests.service import service

SCENARIOS = CLIENTS / "scenarios.json"
CUTS = (400, 700)
"""Bytes: behind gRPC's own opening, and before the end of a stream of 64 tokens, however it is packed."""
Outcome = dict[str, dict[str, Any]]
"""By scenario: verdict and what was observed."""


def scenarios() -> list[dict[str, Any]]:
    return json.loads(SCENARIOS.read_text(encoding="utf-8"))["scenarios"]


@dataclass
class Runs:
    """Runs each client once, when it is first asked for."""

    up: service.Service
    alone: str
    """Address of a gateway whose scheduler is not there."""
    builds: dict[str, Future[Path]]
    """By language, of those whose toolchain is there. They are made one after the other while others run."""
    folder: Path
    outcomes: dict[str, Outcome | str] = field(default_factory=dict)
    killed: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def address(self) -> str:
        return self.up.address

    def outcome(self, language: Language) -> Outcome | str:
        """What the client's runner printed, or why it could not be run."""
        if language.name not in self.outcomes:
            self.outcomes[language.name] = self._run(language)
        return self.outcomes[language.name]

    def of(self, language: Language) -> Outcome:
        """Skips the test, with the reason, where the language cannot be run."""
        outcome = self.outcome(language)
        if isinstance(outcome, str):
            pytest.skip(outcome)
        return outcome

    def _run(self, language: Language) -> Outcome | str:
        if missing := language.missing():
            return f"{language.name} is not run: {missing} not found"
        try:
            self.builds[language.name].result()
        except CannotBuild as error:
            return f"{language.name} is not run: {error}"
        with ExitStack() as stack:
            addresses = {"service": self.address, "alone": self.alone}
            for name, cuts in {"flaky-a": CUTS, "flaky-b": CUTS, "deaf": (0,)}.items():
                addresses[name] = stack.enter_context(breaking(lambda: self.address, *cuts)).address
            lines = language.run(SCENARIOS, addresses)
        return {line["id"]: line for line in lines}

    def with_a_killed_gateway(self) -> dict[str, dict[str, Any]]:
        """By language, the outcome of a stream whose gateway is killed in the midst of it. All stream at once."""
        if self.killed:
            return self.killed
        by_name = {scenario["id"]: scenario for scenario in scenarios()}
        expect = {"code": "OK", "resumed": True, "sequences": by_name["greedy-tokens"]["expect"]["sequences"]}
        scenario = {**by_name["resume-after-breaks"], "expect": expect}
        del scenario["same_sequences_as"]
        file = self.folder / "killed.json"
        file.write_text(json.dumps({"scenarios": [scenario]}))
        languages = [language for language in LANGUAGES if not isinstance(self.outcome(language), str)]
        with ThreadPoolExecutor(len(languages)) as executor, ExitStack() as stack:
            proxies = [stack.enter_context(breaking(lambda: self.address, CUTS[0])) for _ in languages]
            for proxy in proxies:
                proxy.may_cut.clear()
            calls = {
                language.name: executor.submit(language.run, file, {"flaky-a": proxy.address})
                for language, proxy in zip(languages, proxies, strict=True)
            }
            assert all(proxy.reached.wait(60) for proxy in proxies), "a client did not begin to stream"
            (gateway,) = self.up.ready["pids"]["gateways"]
            os.kill(gateway, signal.SIGKILL)
            for proxy in proxies:
                proxy.may_cut.set()
            self.killed = {name: call.result()[0] for name, call in calls.items()}
        return self.killed


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    folder = tmp_path_factory.mktemp("clients")
    builder = ThreadPoolExecutor(max_workers=1)
    builds = {language.name: builder.submit(language.build) for language in LANGUAGES if not language.missing()}
    log = folder / "gateway.log"
    command = [sys.executable, "-m", "pagewire.cli", "gateway", "--scheduler", f"unix:{folder}/nobody.sock"]
    with log.open("wb") as output:
        gateway = subprocess.Popen(
            [*command, "--listen", "127.0.0.1:0"],
            cwd=service.ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
        )
    up = None
    try:
        up = service.start(folder / "up", "--num-blocks", "512", "--max-num-seqs", "16")
        yield Runs(up, listening_address(log), builds, folder)
    finally:
        builder.shutdown(cancel_futures=True)
        gateway.terminate()
        gateway.wait(timeout=30)
        if up is not None:
            assert service.stop(up) == 0


def listening_address(log: Path) -> str:
    """Where a gateway listens, by its log."""
    deadline = time.monotonic() + service.START_LIMIT_S
    while True:
        for line in log.read_text().splitlines():
            event = json.loads(line)
            if event["event"] == "listening":
                return event["grpc"]
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)


@pytest.mark.parametrize("language", LANGUAGES, ids=lambda language: language.folder)
def test_every_scenario_passes_in(runs: Runs, language: Language) -> None:
    outcome = runs.of(language)
    assert list(outcome) == [scenario["id"] for scenario in scenarios()]
    assert {name: line for name, line in outcome.items() if line["verdict"] != "pass"} == {}


@pytest.mark.parametrize("language", LANGUAGES, ids=lambda language: language.folder)
def test_a_verdict_of_a_client_is_what_its_observation_says(runs: Runs, language: Language) -> None:
    outcome = runs.of(language)
    for scenario in scenarios():
        observed = outcome[scenario["id"]]["observed"]
        assert scenario["expect"]
        assert {key: observed[key] for key in scenario["expect"]} == scenario["expect"]
        if same := scenario.get("same_sequences_as"):
            assert observed["sequences"] == outcome[same]["observed"]["sequences"]


def test_a_client_without_its_toolchain_is_skipped_with_what_is_missing(runs: Runs) -> None:
    language = Language("Cobol", "cobol", ("no-such-compiler",), ("/no/such/library",))
    with pytest.raises(pytest.skip.Exception, match="Cobol is not run: no-such-compiler, /no/such/library not found"):
        runs.of(language)


def test_all_clients_see_the_same_tokens_and_text(runs: Runs) -> None:
    seen: dict[str, Any] = {}
    for language in LANGUAGES:
        outcome = runs.outcome(language)
        for name, line in outcome.items() if isinstance(outcome, dict) else ():
            if "sequences" in line["observed"]:
                assert seen.setdefault(name, line["observed"]["sequences"]) == line["observed"]["sequences"]
    assert "two-samples" in seen


def test_the_expected_tokens_do_not_hang_on_rounding(runs: Runs) -> None:
    """The literal tokens hold on any machine if no token was chosen by a hair."""
    (scenario,) = (scenario for scenario in scenarios() if scenario["id"] == "greedy-tokens")
    request = inference_pb2.GenerateRequest(
        text=scenario["request"]["text"],
        sampling=inference_pb2.SamplingParams(temperature=0),
        stop=inference_pb2.StopParams(max_tokens=scenario["request"]["stop"]["max_tokens"], ignore_eos=True),
        output=inference_pb2.OutputOptions(logprobs=2),
    )
    with grpc.insecure_channel(runs.address) as channel:
        responses = list(inference_pb2_grpc.InferenceServiceStub(channel).Generate(request))
    tokens = [token for response in responses for token in response.token_ids]
    assert tokens == scenario["expect"]["sequences"][0]["token_ids"]
    places = [place for response in responses for place in response.logprobs]
    assert min(place.top_logprobs[0] - place.top_logprobs[1] for place in places) > 1e-3


def test_the_python_client_needs_nothing_of_pagewire(runs: Runs) -> None:
    (python,) = (language for language in LANGUAGES if language.folder == "python")
    runs.of(python)
    folder = python.build().parent
    program = "import pagewire_client, pagewire; print(pagewire.__file__, *pagewire.__path__)"
    environment = {**os.environ, "PYTHONPATH": f"{folder}:{python.source}"}
    command = [sys.executable, "-P", "-c", program]
    shown = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert shown.stdout.split() == ["None", str(folder / "pagewire")], "another pagewire than the generated stubs"


def test_a_killed_gateway_is_survived_by_every_client_without_a_gap(runs: Runs) -> None:
    outcomes = runs.with_a_killed_gateway()
    assert outcomes
    assert {name: line for name, line in outcomes.items() if line["verdict"] != "pass"} == {}


@pytest.mark.parametrize(("folder", "block", "suffix"), [("python", "python", "py"), ("node", "js", "mjs")])
def test_the_lines_of_its_readme_stream_text(runs: Runs, tmp_path: Path, folder: str, block: str, suffix: str) -> None:
    (language,) = (language for language in LANGUAGES if language.folder == folder)
    runs.of(language)
    built = language.build().parent
    lines = (language.source / "README.md").read_text().split(f"```{block}\n")[1].split("```")[0]
    assert "127.0.0.1:50051" in lines
    program = tmp_path / f"readme.{suffix}"
    program.write_text(lines.replace("127.0.0.1:50051", runs.address).replace("'./", f"'{built}/"))
    environment = {**os.environ, "PYTHONPATH": f"{built}:{language.source}", "PAGEWIRE_ROOT": str(service.ROOT)}
    command = [sys.executable, "-P"] if folder == "python" else ["node"]
    shown = subprocess.run([*command, str(program)], env=environment, capture_output=True, text=True, check=False)
    (greedy,) = (scenario for scenario in scenarios() if scenario["id"] == "greedy-tokens")
    assert shown.stdout.startswith(greedy["expect"]["sequences"][0]["text"][:60]), shown.stderr


def test_the_matrix_says_what_ran(runs: Runs) -> None:
    columns = {}
    for language in LANGUAGES:
        outcome = runs.outcome(language)
        if isinstance(outcome, dict):
            lines = {**outcome, "resume-after-a-killed-gateway": runs.with_a_killed_gateway()[language.name]}
            columns[language.name] = {name: line["verdict"] for name, line in lines.items()}
    if os.environ.get("PAGEWIRE_UPDATE_MATRIX"):
        matrix.write(columns)
    committed = matrix.read()
    assert {name: committed.get(name) for name in columns} == columns, (
        "clients/README.md says something else than what ran: PAGEWIRE_UPDATE_MATRIX=1 make test ARGS=tests/clients"
    )
