#!/usr/bin/env bash
# Faults at random under load:  scripts/chaos.sh [bench/chaos.py ARGUMENTS]   (default: --minutes 15 --check)
# Needs root and `ip netns`: every process has a host of its own, and nothing of it is left afterwards.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
set_up
cd "$root"
[ $# -gt 0 ] || set -- --minutes 15 --check
exec "$bin/python" bench/chaos.py "$@"
