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
# What needs gRPC's headers is one translation unit: they take most of the time.
cat >"$out/all.cc" <<EOF
#include "pagewire/v1/inference.pb.cc"
#include "pagewire/v1/inference.grpc.pb.cc"
#include "$here/scenarios.cc"
EOF
g++ $flags "$out/all.cc" "$out/google/rpc/status.pb.cc" "$out/google/rpc/error_details.pb.cc" -o "$out/scenarios" \
    $(pkg-config --libs grpc++ protobuf)
