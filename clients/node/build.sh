#!/bin/sh
# build.sh OUT: installs the pinned packages in OUT, checks the types and makes OUT/scenarios. Needs Node.js 20 and npm.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1"
out=$(cd "$1" && pwd)
cp "$here"/*.js "$here"/*.json "$out/"
cd "$out"
npm ci --ignore-scripts --no-audit --no-fund --loglevel=error || exit 69  # EX_UNAVAILABLE: npm cannot fetch
npx tsc
cat >scenarios <<EOF
#!/bin/sh
PAGEWIRE_ROOT="$here/../.." exec node "$out/scenarios.js" "\$@"
EOF
chmod +x scenarios
