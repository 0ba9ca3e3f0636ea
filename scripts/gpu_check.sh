#!/usr/bin/env bash
# Test and measure everything on the GPU of this machine, in one command:  scripts/gpu_check.sh [--out DIR] [--only PART...]
# Needs python3 (PYTHON=... names another, as .venv/bin/python) of 3.11 to 3.13 with torch >= 2.11, triton 3.6 to 3.9, numpy,
# pytest, safetensors, grpcio, protobuf, msgpack, xxhash and hypothesis; nothing is fetched. --help lists the parts.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
exec "${PYTHON:-python3}" "$root/bench/gpu_check.py" "$@"
