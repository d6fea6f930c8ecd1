#!/usr/bin/env bash
# The worker's inner loop on a machine with a CUDA device: tests, then times, in at most nine minutes.
#   benchmarks/gpu_engine.sh OUTPUT_FOLDER
# Needs torch, CuPy, transformers, rich, pydantic-settings and structlog; no gRPC. Each step has its own limit and writes as it goes,
# so a step that fails or is cut short leaves the others' results.
set -u
out=${1:?usage: benchmarks/gpu_engine.sh OUTPUT_FOLDER}
mkdir -p "$out"
export PYTHONUNBUFFERED=1 PAGEWIRE_KERNEL_CACHE=${PAGEWIRE_KERNEL_CACHE:-/tmp/pagewire-kernels}
cd "$(dirname "$0")/.."
# The project's pytest settings name plugins that such a machine may lack; these tests need none of them.
pytest="python3 -m pytest -c /dev/null --rootdir=. -p no:cacheprovider -q -m gpu"
step="python3 -m benchmarks.decode_step"

timeout 150 $pytest -x tests/worker/test_engine.py 2>&1 | tee "$out/engine_tests.log" | tail -40
# Without graphs first, and small: what fails here fails for reasons of its own.
timeout 90 $step --eager --batch 1 32 --steps 16 --out "$out/decode_eager.json" 2>&1 | tee "$out/decode_eager.log" | tail -12
timeout 150 $step --batch 1 8 32 128 256 --sampling greedy top-k-p penalties --steps 64 --host-blocks 2048 --swap-blocks 512 \
  --out "$out/decode_step.json" 2>&1 | tee "$out/decode_step.log" | tail -24
timeout 80 $step --batch 1 256 --steps 16 --profile 256 2>&1 | tee "$out/profile_256.log" | tail -45
timeout 80 $step --batch 1 --steps 16 --profile 1 2>&1 | tee "$out/profile_1.log" | tail -45
