#!/usr/bin/env bash
# Preemption by swap, by recompute and by cost, where a load needs 1.5, 2 and 4 times the KV memory there is. A GPU with CuPy.
#   benchmarks/pressure.sh OUT_FOLDER
# The online load at 30 requests/s holds about 2,000 blocks of 16 tokens at once on an H100. Each row is a service of its own.
set -u
out=${1:?usage: benchmarks/pressure.sh OUT_FOLDER}
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
cd "$(dirname "$0")/.." || exit 2
export PAGEWIRE_HOST_BLOCKS=4096
for blocks in ${BLOCKS:-1333 1000 500}; do
  for mode in ${MODES:-auto swap recompute}; do
    PAGEWIRE_PREEMPTION_MODE=$mode timeout -k 10 100 "${PYTHON:-python3}" -m benchmarks.run_rows "$out/$blocks-$mode" --limit-s 90 \
      --repeat 1 --workload --rate 30 --requests "${REQUESTS:-300}" --at session --max-num-seqs 192 --token-budget 2048 \
      --num-blocks "$blocks" >"$out/$blocks-$mode.log" 2>&1
    echo "$blocks blocks, $mode: $(tail -1 "$out/$blocks-$mode.log")"
  done
done
"${PYTHON:-python3}" - "$out" <<'PYTHON'
import json, sys
from pathlib import Path
out = Path(sys.argv[1])
files = {path.parent.name: json.loads(path.read_text()) for path in sorted(out.glob("*/online.json"))}
first = next(iter(files.values()))
rows = [{"num_blocks": int(name.split("-")[0]), "mode": name.split("-")[1], **file["rows"][0]} for name, file in files.items()]
about = {key: first[key] for key in ("gpu", "cpu", "versions", "commit", "model", "seeds")}
(out / "pressure.json").write_text(json.dumps({**about, "command": "benchmarks/pressure.sh OUT", "rows": rows}, indent=1) + "\n")
PYTHON
