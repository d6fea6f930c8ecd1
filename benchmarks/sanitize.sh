#!/usr/bin/env bash
# The kernel tests under compute-sanitizer on a machine with a CUDA device.
#   benchmarks/sanitize.sh OUTPUT_FOLDER [TOOL...]        tools: memcheck racecheck synccheck initcheck; default: the first two
# Every test file runs in a process of its own, JOBS (12) of them at a time, and at most LIMIT_S (540) seconds altogether.
# OUTPUT_FOLDER/sanitize.tsv has a line per tool and file: errors found, tests passed, failed and not reached. Exit code 1:
# something was found, failed or not reached. FILTER: a pytest -k expression.
set -u
out=${1:?usage: benchmarks/sanitize.sh OUTPUT_FOLDER [TOOL...]}
shift
tools=${*:-memcheck racecheck}
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
cd "$(dirname "$0")/.." || exit 2
export PYTHONUNBUFFERED=1 PAGEWIRE_KERNEL_CACHE=${PAGEWIRE_KERNEL_CACHE:-/tmp/pagewire-kernels}
command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer is not on the PATH" >&2; exit 2; }
begin=$SECONDS
limit=${LIMIT_S:-540}

check() {  # TOOL FILE
  local log="$out/$1-$(basename "$2" .py).log" left=$((limit - (SECONDS - begin)))
  [ "$left" -gt 5 ] || return
  # The project's pytest settings name plugins that such a machine may lack; kernel tests need none of them.
  timeout -k 5 "$left" compute-sanitizer --tool "$1" --print-limit 5 \
    python3 -m pytest -c /dev/null --rootdir=. -p no:cacheprovider -v -m gpu ${FILTER:+-k "$FILTER"} "$2" >"$log" 2>&1
}

for tool in $tools; do
  for file in $(grep -lE 'device: torch.device|cuda: torch.device' tests/kernels/test_*.py); do  # not the real sizes: they would not end
    while [ "$(jobs -rp | wc -l)" -ge "${JOBS:-12}" ]; do wait -n; done
    check "$tool" "$file" &
  done
done
wait

status=0
printf 'tool\tfile\terrors\tpassed\tfailed\tnot reached\n' | tee "$out/sanitize.tsv"
for log in "$out"/*-test_*.log; do
  name=$(basename "$log" .log)
  passed=$(grep -c ' PASSED' "$log")
  failed=$(grep -cE '^(FAILED|ERROR) ' "$log")
  selected=$(sed -nE 's|^collect.*/ ([0-9]+) selected.*|\1|p; s|^collected ([0-9]+) items$|\1|p' "$log" | tail -1)
  skipped=$(grep -c ' SKIPPED' "$log")
  errors=$(sed -nE 's/^=+ (ERROR|RACECHECK) SUMMARY: ([0-9]+) .*/\2/p' "$log" | tail -1)
  missed=$((${selected:-0} - passed - failed - skipped))
  printf '%s\t%s\t%s\t%s\t%s\t%s\n' "${name%%-*}" "${name#*-}" "${errors:-?}" "$passed" "$failed" "$missed" | tee -a "$out/sanitize.tsv"
  [ "${errors:-1}" = 0 ] && [ "$failed" = 0 ] && [ "$missed" = 0 ] || status=1
done
tar -C "$out" -czf "$out/sanitize-logs.tgz" $(cd "$out" && ls -- *.log) && rm "$out"/*.log
echo "$((SECONDS - begin)) s"
exit $status
