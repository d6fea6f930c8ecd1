#!/usr/bin/env bash
# Every measured table in one go, on a machine that needs no installation: torch, grpcio, transformers and, for a GPU,
# cupy. Kernels are compiled at first use.
#
#   benchmarks/run_all.sh OUT_FOLDER [--quick] [--tests] [--kernels] [-- OPTIONS OF benchmarks.run_rows]
#
#   --quick     fewer rows, one run each
#   --tests     the GPU tests first
#   --kernels   the kernels' times
# LIMIT_S (540) bounds everything; what is late is cut short and recorded as an error. Short tables come last. Files:
# offline.json, online.json, kernels.json, tests.log, logs.tgz.
set -u
out=${1:?usage: benchmarks/run_all.sh OUT_FOLDER [--quick] [--tests] [--kernels] [-- OPTIONS]}
shift
quick= tests= kernels=
while [ $# -gt 0 ]; do
  case $1 in
    --quick) quick=1 ;;
    --tests) tests=1 ;;
    --kernels) kernels=1 ;;
    --) shift; break ;;
    *) echo "unknown option $1" >&2; exit 2 ;;
  esac
  shift
done
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
begin=$SECONDS
limit=${LIMIT_S:-540}
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
export PAGEWIRE_KERNEL_CACHE=${PAGEWIRE_KERNEL_CACHE:-/tmp/pagewire-kernels}
left() { echo $((limit - (SECONDS - begin))); }

if ! "$python" -c 'import pagewire.v1.scheduler_pb2_grpc, pagewire.v1.worker_pb2_grpc' 2>"$out/stubs.log"; then
  if ! "$python" -m tools.generate_stubs; then
    tail -1 "$out/stubs.log"
    echo "the gRPC stubs in pagewire/v1 are missing or not usable here: run 'make protos' where grpcio-tools is, and bring the folder" >&2
    exit 2
  fi
fi
rm -f "$out/stubs.log"
missing=$("$python" - <<'PYTHON'
from importlib.util import find_spec
names = "grpc grpc_health grpc_reflection grpc_status numpy prometheus_client pydantic_settings rich structlog torch transformers typer uvloop"
print(" ".join(name for name in names.split() if find_spec(name) is None))
PYTHON
)
if [ -n "$missing" ]; then
  echo "missing Python packages: $missing" >&2
  exit 2
fi
command -v nvidia-smi >/dev/null && nvidia-smi --query-gpu=name,driver_version,memory.total,memory.used --format=csv,noheader

status=0
if [ -n "$tests" ]; then
  # The project's pytest settings name plugins that such a machine may lack; these tests need none of them.
  timeout -k 5 $(($(left) / 3)) "$python" -m pytest -c /dev/null --rootdir=. -p no:cacheprovider -q -m gpu --maxfail=10 \
    tests/kernels >"$out/tests.log" 2>&1 || status=1
  tail -5 "$out/tests.log"
fi
if [ -n "$kernels" ]; then
  timeout -k 5 $(($(left) / 3)) "$python" -m benchmarks.kernels --out "$out/kernels.json" >"$out/kernels.log" 2>&1 || status=1
  tail -3 "$out/kernels.log"
fi
rows=()
if [ -n "$quick" ]; then
  rows+=(--repeat 1 --workload decode-b1 decode-b32 decode-b256 alpaca-like-2000 --rate 10 --requests 60)
fi
budget=$(($(left) - 20))
timeout -k 10 $((budget + 15)) "$python" -m benchmarks.run_rows "$out" --limit-s "$budget" ${rows[@]+"${rows[@]}"} "$@" || status=1
if [ -d "$out/logs" ]; then
  tar -C "$out" -czf "$out/logs.tgz" logs && rm -r "$out/logs"
fi
echo "$((SECONDS - begin)) s; files in $out: $(ls "$out" | tr '\n' ' ')"
exit $status
