#!/usr/bin/env bash
# Put the code into its form: sorted imports, ruff's safe fixes, ruff's format.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
set_up
cd "$root"
"$bin/ruff" check --fix .
"$bin/ruff" format .
