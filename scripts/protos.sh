#!/usr/bin/env bash
# Regenerate the wire code in protos/ from the .proto files:  scripts/protos.sh [OUT_DIR]
# The generator is pinned so that its code loads under protobuf 6 and 7 (a runtime takes its own major's gencode and
# the one before).
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
out=${1:-$root/protos}
tools=$root/.venv-protos
if [ ! -x "$tools/bin/protoc-gen-mypy" ]; then
  python3 -m venv "$tools"
  "$tools/bin/pip" -q install grpcio-tools==1.76.0 mypy-protobuf==3.7.0
fi
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
cd "$root"
PATH="$tools/bin:$PATH" "$tools/bin/python" -m grpc_tools.protoc -Ibiphase/protos=protos \
  --python_out="$tmp" --mypy_out="quiet:$tmp" --grpc_python_out="$tmp" --mypy_grpc_out="quiet:$tmp" \
  biphase/protos/{common,router,worker,kv,controller}.proto
mkdir -p "$out"
cp "$tmp"/biphase/protos/*_pb2* "$out/"
rm -f "$out"/common_pb2_grpc.py*
