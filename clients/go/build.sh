#!/bin/sh
# build.sh OUT: makes OUT/scenarios. Needs Go 1.19 or newer, protoc, and the packages that README.md names.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
out=$1
package=pagewire/v1  # import path of the generated package
mkdir -p "$out/src"
protoc -I "$here/../../protos" --go_out="$out/src" --go-grpc_out="$out/src" \
    --go_opt=Mpagewire/v1/inference.proto=$package --go-grpc_opt=Mpagewire/v1/inference.proto=$package \
    pagewire/v1/inference.proto
mkdir -p "$out/src/client" "$out/src/scenarios"
cp "$here"/client/*.go "$out/src/client/"
cp "$here"/scenarios/*.go "$out/src/scenarios/"
GO111MODULE=off GOPATH="$out:/usr/share/gocode" go build -o "$out/scenarios" scenarios
