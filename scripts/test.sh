#!/usr/bin/env bash
# Set up, then run the tests:  scripts/test.sh [PYTEST ARGUMENTS]
# Without arguments: all of them, three files at a time, since much of a test of processes is waiting. Paths are relative to
# the clone.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
set_up
cd "$root"
# Some shells set it. Hundreds of processes would compile the sources anew, up to a second each.
unset PYTHONDONTWRITEBYTECODE
[ $# -gt 0 ] || set -- -n 3 --dist loadfile --no-loadscope-reorder
exec "$bin/pytest" "$@"
