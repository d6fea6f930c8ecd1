"""Runs the scenarios of `clients/scenarios.json`: `python scenarios.py ../scenarios.json service=127.0.0.1:50051`.

Prints one JSON object per scenario (id, verdict, observed); exits with 1 if one failed.
"""

from __future__ import annotations

import json
import sys
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from google.protobuf import json_format
from pagewire_client import Client, Progress, ServiceError

from pagewire.v1 import inference_pb2

Json = dict[str, Any]


def request_of(scenario: Json) -> inference_pb2.GenerateRequest:
    """The scenario's request (proto3 JSON), under an id that no other run uses."""
    request = json_format.ParseDict(scenario["request"], inference_pb2.GenerateRequest())
    request.request_id = f"{scenario['id']}-{uuid.uuid4().hex}"
    return request


class Collector:
    """Gathers responses into what a scenario observes, and checks that there is no gap and no repeat."""

    def __init__(self, request: inference_pb2.GenerateRequest) -> None:
        self.progress = Progress(max(1, request.sampling.n))
        self.sequences: dict[int, Json] = {}
        self.prompt_tokens = 0

    def add(self, response: inference_pb2.GenerateResponse) -> None:
        if response.HasField("prompt"):
            self.prompt_tokens = response.prompt.prompt_tokens
        if not self.progress.accept(response):
            return
        sequence = self.sequences.setdefault(response.index, {"token_ids": [], "text": "", "finish": ""})
        sequence["token_ids"].extend(response.token_ids)
        sequence["text"] += response.text
        if response.HasField("finish"):
            sequence["finish"] = inference_pb2.FinishReason.Name(response.finish.reason)

    def take(self, responses: Iterable[inference_pb2.GenerateResponse], after_tokens: int = 0) -> None:
        """Reads to the end, or until the first sequence has `after_tokens` tokens."""
        for response in responses:
            self.add(response)
            if after_tokens and self.progress.positions.get(0, 0) >= after_tokens:
                return

    def observed(self) -> Json:
        sequences = [self.sequences[index] for index in sorted(self.sequences)]
        indices = sorted(self.sequences)
        return {"code": "OK", "prompt_tokens": self.prompt_tokens, "indices": indices, "sequences": sequences}


def list_models(client: Client, scenario: Json) -> Json:
    fields = ("name", "ready", "max_model_len", "vocab_size")
    return {"models": [{name: getattr(model, name) for name in fields} for model in client.list_models()]}


def tokenize(client: Client, scenario: Json) -> Json:
    token_ids = client.tokenize(scenario["text"])
    return {"token_ids": token_ids, "text": client.detokenize(token_ids)}


def generate(client: Client, scenario: Json) -> Json:
    request = request_of(scenario)
    collector = Collector(request)
    timeout_ms = scenario.get("timeout_ms")
    collector.take(client.generate(request, timeout_s=timeout_ms / 1000 if timeout_ms else None))
    return collector.observed()


def repeat(client: Client, scenario: Json) -> Json:
    first, second = generate(client, scenario), generate(client, scenario)
    return {**first, "equal": first["sequences"] == second["sequences"]}


def cancel(client: Client, scenario: Json) -> Json:
    request = request_of(scenario)
    collector = Collector(request)
    call = client.generate(request)
    collector.take(call, scenario["after_tokens"])
    found = client.cancel(request.request_id)
    collector.take(call)
    finish = collector.sequences[0]["finish"]
    return {"found": found, "finish": finish, "found_again": client.cancel(request.request_id)}


def drop(client: Client, scenario: Json) -> Json:
    request = request_of(scenario)
    collector = Collector(request)
    call = client.generate(request)
    collector.take(call, scenario["after_tokens"])
    call.drop()
    client.list_models()  # once it is answered, the drop has arrived too: an Attach would keep the request alive
    collector.take(client.attach(request.request_id, collector.progress.positions))
    return {"finish": collector.sequences[0]["finish"]}


def duplicate(client: Client, scenario: Json) -> Json:
    request = request_of(scenario)
    call = client.generate(request)
    Collector(request).take(call, scenario["after_tokens"])
    try:
        Collector(request).take(client.generate(request))
        return {"code": "OK"}
    finally:
        call.drop()


def attach(client: Client, scenario: Json) -> Json:
    request = request_of(scenario)
    collector = Collector(request)
    call = client.generate(request, detached=True)
    collector.take(call, scenario["after_tokens"])
    call.drop()
    collector.take(client.attach(request.request_id, collector.progress.positions))
    again = Collector(request)
    again.take(client.attach(request.request_id))
    return {**collector.observed(), "whole_again": again.sequences == collector.sequences}


def attach_unknown(client: Client, scenario: Json) -> Json:
    Collector(inference_pb2.GenerateRequest()).take(client.attach(f"nobody-{uuid.uuid4().hex}"))
    return {"code": "OK"}


def resume(client: Client, scenario: Json) -> Json:
    request = request_of(scenario)
    collector = Collector(request)
    breaks: list[ServiceError] = []
    client.on_break = breaks.append
    collector.take(client.stream(request))
    return {**collector.observed(), "resumed": bool(breaks)}


def leave(client: Client, scenario: Json) -> Json:
    request = request_of(scenario)
    collector = Collector(request)
    responses = client.stream(request)
    collector.take(responses, scenario["after_tokens"])
    responses.close()
    collector.take(client.attach(request.request_id, collector.progress.positions))
    return {"finish": collector.sequences[0]["finish"]}


ACTIONS: dict[str, Callable[[Client, Json], Json]] = {
    "list_models": list_models,
    "tokenize": tokenize,
    "generate": generate,
    "repeat": repeat,
    "cancel": cancel,
    "drop": drop,
    "duplicate": duplicate,
    "attach": attach,
    "attach_unknown": attach_unknown,
    "resume": resume,
    "leave": leave,
}


def observe(client: Client, scenario: Json) -> Json:
    """What the action shows; an error with its details is an observation too."""
    try:
        return ACTIONS[scenario["action"]](client, scenario)
    except ServiceError as error:
        return {
            "code": error.code,
            "reason": error.reason,
            "fields": [path for path, _ in error.violations],
            "retry": error.retry_after_s is not None,
        }


def main() -> int:
    path, *pairs = sys.argv[1:]
    addresses = dict(pair.split("=", 1) for pair in pairs)
    failed = False
    earlier: dict[str, Json] = {}
    for scenario in json.loads(Path(path).read_text(encoding="utf-8"))["scenarios"]:
        place = scenario.get("at", "service")
        if place not in addresses:
            print(json.dumps({"id": scenario["id"], "verdict": "skipped", "observed": {}}), flush=True)
            continue
        with Client(addresses[place]) as client:
            observed = observe(client, scenario)
        earlier[scenario["id"]] = observed
        good = all(observed.get(key) == value for key, value in scenario["expect"].items())
        if "same_sequences_as" in scenario:
            good &= observed.get("sequences") == earlier[scenario["same_sequences_as"]].get("sequences")
        failed |= not good
        line = {"id": scenario["id"], "verdict": "pass" if good else "fail", "observed": observed}
        print(json.dumps(line, ensure_ascii=False), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
