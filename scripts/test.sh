#!/usr/bin/env bash
# Set up, then run the tests:  scripts/test.sh [PYTEST ARGUMENTS]
# Without arguments: every test but those marked slow, which scripts/long.sh runs. Paths are relative to the clone.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
set_up
cd "$root"
if [ $# -eq 0 ]; then set -- -m "not slow"; fi
exec "$bin/pytest" "$@"
