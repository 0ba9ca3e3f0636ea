#!/usr/bin/env bash
# Set up, then run the tests:  scripts/test.sh [PYTEST ARGUMENTS]
# Without arguments: all of them. Paths are relative to the clone.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
set_up
cd "$root"
exec "$bin/pytest" "$@"
