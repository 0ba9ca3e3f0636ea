#!/usr/bin/env bash
# What is too long for CI:  scripts/long.sh [PART...]   (no part: all of them; --help: the list)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

parts="tokens engine handoff start faults"

describe() {
  cat <<'END'
usage: scripts/long.sh [PART...]     (no part: all, one after the other)

  tokens    the tests marked slow: tokens against the reference and between modes, leaks after cancelled requests
  engine    bench/engine.py: the engine's speed against ceilings measured in the same run
  handoff   bench/handoff.py: KV payload rate beside a bare gRPC stream and a bare socket; decode gaps during a pull
  start     bench/start.py: from `biphase serve` to the first token, first and later starts; idle processor use
  faults    bench/faults.py: workers killed and stopped, idle and busy; what the client sees and how soon

Each part prints its figures and exits with 1 when a bound is missed. Run them on a machine with nothing else to do.
END
}

run() {
  case $1 in
    tokens) "$bin/pytest" -m slow ;;
    engine) "$bin/python" bench/engine.py --check ;;
    handoff) "$bin/python" bench/handoff.py --check ;;
    start) "$bin/python" bench/start.py --check ;;
    faults) "$bin/python" bench/faults.py --check ;;
  esac
}

for part in "$@"; do
  case " $parts " in
    *" $part "*) ;;
    *) if [ "$part" = --help ] || [ "$part" = -h ]; then describe; exit 0; fi
       die "unknown part '$part'; parts: $parts" ;;
  esac
done

set_up
cd "$root"
failed=""
for part in ${*:-$parts}; do
  say "== $part"
  run "$part" || failed="$failed $part"
done
[ -z "$failed" ] || { say "failed:$failed"; exit 1; }
