#!/usr/bin/env bash
# One prefill and one decode instance under Ray, two questions, and who did what:  scripts/demo.sh [biphase serve FLAGS]
# Stops everything that it started, after Ctrl-C or a failure too.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
set_up

name=demo-$$
export BIPHASE_RUN_DIR
BIPHASE_RUN_DIR=$(mktemp -d "${TMPDIR:-/tmp}/biphase-demo.XXXXXX")

# Of what was refused (exit code 2) the line on the terminal says everything, unless something broke behind it.
logs_help() {
  if [ "$status" -eq 2 ]; then
    grep -rqs Traceback "$BIPHASE_RUN_DIR"
  else
    [ -n "$(find "$BIPHASE_RUN_DIR" -name '*.log' -size +0)" ]
  fi
}

clean_up() {
  local status=$?
  trap - EXIT
  trap '' INT TERM
  "$bin/biphase" stop --name "$name" 2>/dev/null || true
  if [ $status -ne 0 ] && [ $status -ne 130 ] && logs_help; then
    say "demo.sh: failed; the logs are below $BIPHASE_RUN_DIR"
  else
    rm -rf "$BIPHASE_RUN_DIR"
  fi
  exit $status
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# An instance asks Ray for one CPU; on a machine with a single one the two share it.
cpus=()
if [ "$(nproc)" -lt 2 ]; then cpus=(--cpus 0); fi

"$bin/biphase" serve --model smollm2 --prefill 1 --decode 1 --port 0 --detach --name "$name" "${cpus[@]}" "$@"
address=$("$bin/biphase" status --name "$name" --json | "$bin/python" -c '
import json, sys
print(json.load(sys.stdin)["router_addresses"][0])')
"$bin/python" "$root/scripts/demo_ask.py" "$address"
