#!/usr/bin/env bash
# The static checks: ruff lint, ruff format, mypy strict. Changes no source.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
set_up
cd "$root"

# Type checkers do not follow an editable install's import hook; they see the packages through this view.
rm -rf .view
mkdir -p .view/biphase
for folder in $(sed -n 's/^"biphase\.[a-z_]*" = "\([a-z_]*\)"$/\1/p' pyproject.toml); do
  ln -s "../../$folder" ".view/biphase/$folder"
done

failed=0
"$bin/ruff" check . || failed=1
"$bin/ruff" format --check . || failed=1
"$bin/mypy" || failed=1
exit $failed
