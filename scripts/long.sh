#!/usr/bin/env bash
# What is too long for CI:  scripts/long.sh [PART...]   (no part: all of them; --help: the list)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

parts="tokens plans kernels aot mutations engine handoff overlap pipeline codecs drills start faults flip headless rayup recovery chaos shift"

# The oldest triton that is supported, beside the installed one.
old_triton=3.6.0

describe() {
  cat <<'END'
usage: scripts/long.sh [PART...]     (no part: all, one after the other)

  tokens     the tests marked slow: tokens against the reference and between modes, leaks after cancelled requests
  plans      every parallelism plan handing over to every other: tokens, and KV bit for bit
  kernels    every kernel test in Triton's interpreter (on the GPU where there is one), the long ones too, under the
             installed triton and under the oldest supported one
  aot        bench/aot.py: every kernel compiled for sm_80, 89, 90 and 100 without a GPU, under both tritons; writes the
             report under bench/results/aot
  mutations  every kernel broken on purpose, in a copy: its tests must turn red
  engine     bench/engine.py: the engine's speed against ceilings measured in the same run
  handoff    bench/handoff.py: KV payload rate of every transport beside what only moves the bytes; decode gaps during a pull
  overlap    bench/overlap.py: how much of a long prompt's handoff its prefill hides
  pipeline   bench/pipeline.py: what steps in flight are worth on a pipeline of stages
  codecs     bench/codec_quality.py: what each codec costs in bytes, logits and greedy tokens
  drills     bench/transfer_faults.py: ten thousand transfers per transport under injected faults
  start      bench/start.py: from `biphase serve` to the first token, first and later starts; idle processor use
  faults     bench/faults.py: workers killed and stopped, idle and busy; what the client sees and how soon
  flip       bench/flip.py: instances turn into the other role and back, idle and with requests aboard
  headless   bench/controller_dead.py: throughput with the controller dead, beside alive
  rayup      a real `ray up` on three hosts of this machine, a host lost under load; places on several hosts; a lost head, a
             lost supervisor; an update under running streams
  recovery   bench/recovery.py: kill, SIGSTOP and partition of every kind of process under load; lost requests, wrong tokens, gaps
  chaos      bench/chaos.py: fifteen minutes of faults at random under load
  shift      bench/live_shift.py: the P:D ratio following a load that turns, beside both fixed ratios
Each part prints its figures and exits with 1 when a bound is missed; at the end stands how long each has taken. Run them on
a machine with nothing else to do.
END
}

# Runs a command with the oldest triton ahead of the installed one; pip fetches it the first time.
with_old_triton() {
  local folder=$root/.venv-triton-$old_triton
  if [ ! -e "$folder/complete" ]; then
    say "installing triton $old_triton"
    rm -rf "$folder"
    "$bin/python" -m pip install -q --no-deps --target "$folder" "triton==$old_triton" && touch "$folder/complete" || return
  fi
  PYTHONPATH=$folder${PYTHONPATH:+:$PYTHONPATH} "$@"
}

# Both, whatever the first says.
both_tritons() {
  local failed=0
  with_old_triton "$@" || failed=1
  "$@" || failed=1
  return $failed
}

run() {
  case $1 in
    tokens) "$bin/pytest" -m slow ;;
    kernels) both_tritons "$bin/pytest" --long -q tests/kernels/on_triton ;;
    aot)
      local failed=0
      with_old_triton "$bin/python" bench/aot.py || failed=1
      "$bin/python" bench/aot.py --write || failed=1
      return $failed
      ;;
    mutations) "$bin/python" tests/kernels/on_triton/mutations ;;
    engine) "$bin/python" bench/engine.py --check ;;
    plans) "$bin/pytest" --long tests/e2e/test_any_to_any.py ;;
    handoff) "$bin/python" bench/handoff.py --check ;;
    overlap) "$bin/python" bench/overlap.py --check ;;
    pipeline) "$bin/python" bench/pipeline.py --check ;;
    codecs) "$bin/python" bench/codec_quality.py --check ;;
    drills) "$bin/python" bench/transfer_faults.py --check ;;
    start) "$bin/python" bench/start.py --check ;;
    faults) "$bin/python" bench/faults.py --check ;;
    flip) "$bin/python" bench/flip.py --repeat 5 --check ;;
    headless) "$bin/python" bench/controller_dead.py --check ;;
    rayup)
      local failed=0
      scripts/try_ray_up.sh || failed=1
      "$bin/pytest" --long tests/cluster/test_ray_hosts.py \
        tests/cluster/test_ray_head_lost.py tests/cluster/test_ray_survivors.py \
        tests/cluster/test_ray_deployment.py::test_an_update_renews_every_instance_under_running_streams || failed=1
      return $failed
      ;;
    recovery) "$bin/python" bench/recovery.py --check ;;
    chaos) "$bin/python" bench/chaos.py --minutes 15 --check ;;
    shift) "$bin/python" bench/live_shift.py --plot docs/live_shift.svg --check ;;
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
as_time() { printf '%d min %02d s' $(($1 / 60)) $(($1 % 60)); }

failed="" times="" SECONDS=0
for part in ${*:-$parts}; do
  say "== $part"
  began=$SECONDS
  run "$part" || failed="$failed $part"
  took=$(printf '%-10s %s' "$part" "$(as_time $((SECONDS - began)))")
  say "== $took"
  times+=$took$'\n'
done
say "${times}all        $(as_time "$SECONDS")"
[ -z "$failed" ] || { say "failed:$failed"; exit 1; }
