"""Tensors of the Open Inference Protocol to Python values and back, in both of its forms: typed and raw contents.

Lengths are looked at before elements, and nothing is trusted that the bytes do not bear out.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Any

import grpc

from gateway.errors import Reason, RequestError
from pagewire.v1 import open_inference_pb2 as oip

MAX_DIMENSIONS = 8
LENGTH = struct.Struct("<I")

TYPES: dict[str, tuple[str, str]] = {
    "BOOL": ("?", "bool_contents"),
    "INT8": ("b", "int_contents"),
    "INT16": ("h", "int_contents"),
    "INT32": ("i", "int_contents"),
    "INT64": ("q", "int64_contents"),
    "UINT8": ("B", "uint_contents"),
    "UINT16": ("H", "uint_contents"),
    "UINT32": ("I", "uint_contents"),
    "UINT64": ("Q", "uint64_contents"),
    "FP32": ("f", "fp32_contents"),
    "FP64": ("d", "fp64_contents"),
    "BYTES": ("", "bytes_contents"),
}
"""struct's letter and the field of InferTensorContents, by datatype. FP16 and BF16 are nothing that a request needs."""


def wrong(message: str) -> RequestError:
    """A message whose tensors contradict themselves."""
    return RequestError(grpc.StatusCode.INVALID_ARGUMENT, Reason.MALFORMED_MESSAGE, message)


def read(request: oip.ModelInferRequest) -> dict[str, Sequence[Any]]:
    """The elements of every input tensor, by name. Raises RequestError where shape, type and contents do not agree."""
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise wrong(f"raw_input_contents: has {len(raw)} entries for {len(request.inputs)} inputs")
    found: dict[str, Sequence[Any]] = {}
    for place, tensor in enumerate(request.inputs):
        at = f"inputs[{place}]"
        if tensor.datatype not in TYPES:
            raise wrong(f"{at}.datatype: must be one of {', '.join(TYPES)}")
        if tensor.name in found:
            raise wrong(f"{at}.name: is that of another input too")
        if len(tensor.shape) > MAX_DIMENSIONS or any(size < 0 for size in tensor.shape):
            raise wrong(f"{at}.shape: must have at most {MAX_DIMENSIONS} sizes, none below 0")
        count = math.prod(tensor.shape)
        if raw:
            if tensor.HasField("contents"):
                raise wrong(f"{at}.contents: must not be set beside raw_input_contents")
            found[tensor.name] = _unpacked(at, tensor.datatype, count, raw[place])
        else:
            values = getattr(tensor.contents, TYPES[tensor.datatype][1])
            if len(values) != count:
                raise wrong(f"{at}.contents: has {len(values)} elements of {tensor.datatype}, its shape has {count}")
            found[tensor.name] = values
    return found


def add(
    response: oip.ModelInferResponse, name: str, datatype: str, shape: Sequence[int], values: Sequence[Any], raw: bool
) -> None:
    """Adds an output tensor.

    Args:
        response: to add to.
        name: the tensor's.
        datatype: one of `TYPES`.
        shape: sizes, whose product is the number of values.
        values: elements in row-major order; bytes for BYTES.
        raw: as raw contents, which Triton's clients need; otherwise typed, as the request was.
    """
    tensor = response.outputs.add(name=name, datatype=datatype, shape=shape)
    letter, contents = TYPES[datatype]
    if not raw:
        getattr(tensor.contents, contents).extend(values)
    elif datatype == "BYTES":
        response.raw_output_contents.append(b"".join(LENGTH.pack(len(value)) + value for value in values))
    else:
        response.raw_output_contents.append(struct.pack(f"<{len(values)}{letter}", *values))


def _unpacked(at: str, datatype: str, count: int, data: bytes) -> Sequence[Any]:
    if datatype == "BYTES":
        return _texts(at, count, data)
    size = struct.calcsize(f"<{TYPES[datatype][0]}")
    if len(data) != count * size:
        raise wrong(f"{at}: has {len(data)} raw bytes, its shape needs {count * size}")
    return struct.unpack(f"<{count}{TYPES[datatype][0]}", data)


def _texts(at: str, count: int, data: bytes) -> list[bytes]:
    """Elements that each have their length in front."""
    found: list[bytes] = []
    position = 0
    while position < len(data):
        end = position + LENGTH.size
        if end <= len(data):
            end += LENGTH.unpack_from(data, position)[0]
        if end > len(data) or len(found) == count:
            break
        found.append(data[position + LENGTH.size : end])
        position = end
    if position != len(data) or len(found) != count:
        raise wrong(f"{at}: its raw bytes are not {count} elements of BYTES, each with its length in front")
    return found
