"""Drives Triton's own client. It runs in a process of its own, because tritonclient needs another protobuf than ours.

    python triton_client.py ADDRESS

Every line of stdin is one thing to do, as a JSON object; every line of stdout is one thing seen.
"""

import json
import sys

import numpy as np
from tritonclient import grpc as triton
from tritonclient.utils import InferenceServerException


def say(kind: str, **more: object) -> None:
    """One line to the test. The whole line is one write: callbacks come on another thread."""
    sys.stdout.write(json.dumps({"kind": kind, **more}) + "\n")
    sys.stdout.flush()


def tensors(text: str) -> list[triton.InferInput]:
    tensor = triton.InferInput("text_input", [1], "BYTES")
    tensor.set_data_from_numpy(np.array([text.encode()], dtype=np.object_))
    return [tensor]


def shown(result: triton.InferResult) -> dict[str, object]:
    """An answer as plain values; an answer without outputs has none."""
    answer = result.get_response()
    text, ids, finish = (result.as_numpy(name) for name in ("text_output", "output_ids", "finish_reason"))
    return {
        "id": answer.id,
        "final": answer.parameters["triton_final_response"].bool_param,
        "text": None if text is None else text[0].decode(),
        "ids": None if ids is None else ids.tolist(),
        "finish": None if finish is None else finish[0].decode(),
    }


def streamed(result: triton.InferResult | None, error: InferenceServerException | None) -> None:
    """The stream's callback."""
    if error is not None or result is None:
        say("error", message=error.message(), status=error.status())
    else:
        say("response", **shown(result))


def main(address: str) -> None:
    with triton.InferenceServerClient(address) as client:
        model = client.get_model_metadata("tiny")
        say("model", name=model.name, ready=client.is_server_ready() and client.is_model_ready("tiny"))
        for line in sys.stdin:
            job = json.loads(line)
            kind, asked = job.pop("do"), job.pop("text", "")
            if kind == "infer":
                result = client.infer("tiny", tensors(asked), request_id=job.pop("id"), parameters=job or None)
                say("response", **shown(result))
            elif kind == "start":
                client.start_stream(callback=streamed, headers=job or None)
            elif kind == "ask":
                final = job.pop("empty_final", False)
                client.async_stream_infer(
                    "tiny",
                    tensors(asked),
                    request_id=job.pop("id"),
                    enable_empty_final_response=final,
                    parameters=job or None,
                )
            else:
                client.stop_stream(cancel_requests=kind == "cancel")
                say("stopped")


if __name__ == "__main__":
    main(sys.argv[1])
