#!/bin/sh
# build.sh OUT: makes OUT/scenarios. Needs JDK 17 or newer, protoc, and the packages that README.md names.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1/generated" "$1/classes"
out=$(cd "$1" && pwd)
plugin=$(command -v grpc_java_plugin)
protoc -I "$here/../../protos" -I "$here/../protos" --java_out="$out/generated" \
    --plugin=protoc-gen-grpc-java="$plugin" --grpc-java_out="$out/generated" \
    pagewire/v1/inference.proto google/rpc/error_details.proto  # Debian's package of the latter is older than ErrorInfo
jars=
for name in grpc-api grpc-core grpc-context grpc-stub grpc-protobuf grpc-protobuf-lite grpc-netty protobuf protobuf-util \
    proto-google-common-protos gson guava perfmark-api jctools-core opencensus-api jsr305 \
    geronimo-annotation-1.3-spec netty-buffer netty-codec netty-codec-http netty-codec-http2 netty-codec-socks netty-common \
    netty-handler netty-handler-proxy netty-resolver netty-transport netty-transport-native-unix-common; do
    jars="$jars:/usr/share/java/$name.jar"
done
javac -nowarn -Xlint:-options -d "$out/classes" -cp "$jars" "$here"/*.java $(find "$out/generated" -name '*.java')
cat >"$out/scenarios" <<EOF
#!/bin/sh
exec java -XX:TieredStopAtLevel=1 -XX:+UseSerialGC -cp "$out/classes$jars" Scenarios "\$@"
EOF
chmod +x "$out/scenarios"
