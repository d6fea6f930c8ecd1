#!/bin/sh
# build.sh OUT: makes OUT/scenarios. Needs a C++17 compiler, protoc, and the packages that README.md names.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1"
out=$(cd "$1" && pwd)
protoc -I "$here/../../protos" -I "$here/../protos" --cpp_out="$out" \
    --plugin=protoc-gen-grpc="$(command -v grpc_cpp_plugin)" --grpc_out="$out" pagewire/v1/inference.proto
protoc -I "$here/../protos" --cpp_out="$out" google/rpc/status.proto google/rpc/error_details.proto
flags="-std=c++17 -O0 -Wall -Wextra -I$out $(pkg-config --cflags grpc++ protobuf)"
g++ $flags -c "$here/scenarios.cc" -o "$out/scenarios.o" &
one=$!
for name in pagewire/v1/inference.pb pagewire/v1/inference.grpc.pb google/rpc/status.pb google/rpc/error_details.pb; do
    g++ $flags -c "$out/$name.cc" -o "$out/$(basename "$name").o"
done
wait $one
g++ "$out"/*.o -o "$out/scenarios" $(pkg-config --libs grpc++ protobuf)
