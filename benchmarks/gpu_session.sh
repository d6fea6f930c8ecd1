#!/usr/bin/env bash
# Everything about the kernels in one go on a machine with a CUDA device: tests, then times, in at most eight minutes.
#   benchmarks/gpu_session.sh OUTPUT_FOLDER
# Each step has its own limit and writes as it goes, so a step that fails or is cut short leaves the others' results.
set -u
out=${1:?usage: benchmarks/gpu_session.sh OUTPUT_FOLDER}
mkdir -p "$out"
export PYTHONUNBUFFERED=1 PAGEWIRE_KERNEL_CACHE=${PAGEWIRE_KERNEL_CACHE:-/tmp/pagewire-kernels}
cd "$(dirname "$0")/.."
# The project's pytest settings name plugins that such a machine may lack; kernel tests need none of them.
pytest="python3 -m pytest -c /dev/null --rootdir=. -p no:cacheprovider -q -m gpu"
workers=$(python3 -c 'import xdist' 2>/dev/null && echo "-n 6")

nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem,memory.used --format=csv | tee "$out/gpu.csv"
# First the smallest decode and prefill, alone and in the open: if they hang or crash, the rest is not worth its time.
timeout 60 $pytest -x tests/kernels/test_decode.py -k "float64 and 128-16" 2>&1 | tee "$out/first.log" | tail -30
timeout 60 $pytest -x tests/kernels/test_prefill.py -k "float64 and 128-16" 2>&1 | tee -a "$out/first.log" | tail -30
timeout 170 $pytest $workers tests/kernels --maxfail=20 2>&1 | tee "$out/tests.log" | tail -60
timeout 60 python3 -m benchmarks.kernels --only decode --only prefill --out "$out/kernels.json" 2>&1 | tee "$out/kernels.log" | tail -30
timeout 60 python3 -m benchmarks.kernels --only other --only swap --out "$out/kernels_other.json" 2>&1 | tee "$out/other.log" | tail -40
timeout 70 python3 -m benchmarks.kernels --only sweep --out "$out/sweep.json" 2>&1 | tee "$out/sweep.log" | tail -52
