#!/bin/sh
# build.sh OUT: makes OUT/scenarios. Needs the packages of requirements.txt in $PYTHON (default: python3).
set -eu
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3}
mkdir -p "$1"
out=$(cd "$1" && pwd)
"$python" -m grpc_tools.protoc -I "$here/../../protos" --python_out="$out" --pyi_out="$out" --grpc_python_out="$out" \
    pagewire/v1/inference.proto
cat >"$out/scenarios" <<EOF
#!/bin/sh
PYTHONPATH="$out" exec "$python" "$here/scenarios.py" "\$@"
EOF
chmod +x "$out/scenarios"
