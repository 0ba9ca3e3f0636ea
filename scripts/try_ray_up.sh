#!/usr/bin/env bash
# A real `ray up` on one machine:  scripts/try_ray_up.sh [--quick] [--keep] [--install]
#
# Three hosts, each a network, pid, mount, uts and ipc namespace with an sshd of its own and nothing shared but files;
# Ray's provider `local`, cluster/ray/local.yaml with the addresses filled in. P and D run on different hosts, a client
# outside the cluster gets the tokens of a local run, then the host of D loses power under load and the work goes on,
# token by token the same, on what is left; `biphase down`; nothing is left behind, which is looked at last.
#
#   --quick    without the loss of power and `ray submit`
#   --keep     leave the logs (their folder is printed)
#   --install  install sshd and rsync with apt-get where they are lacking
#
# Needs root, `ip netns`, unshare, sshd and rsync; says in one line what is lacking (exit code 3).
set -euo pipefail
{ # read as a whole before it runs
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

quick= keep= install=
for word in "$@"; do
  case $word in
    --quick) quick=1 ;;
    --keep) keep=1 ;;
    --install) install=1 ;;
    -h | --help) sed -n '2,/^set -/{/^set -/!s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; exit 0 ;;
    *) die "unknown argument $word; --help lists them" ;;
  esac
done

lacking() {
  [ "$(id -u)" -eq 0 ] || { echo "root"; return; }
  local tool
  for tool in ip unshare ssh ssh-keygen rsync; do command -v "$tool" >/dev/null || { echo "$tool"; return; }; done
  [ -x /usr/sbin/sshd ] || { echo "sshd (openssh-server)"; return; }
  if ! unshare --mount --pid --uts --ipc --fork true 2>/dev/null; then echo "the right to make namespaces"; return; fi
  if ! ip netns add "bpr-probe-$$" 2>/dev/null; then echo "the right to \`ip netns add\`"; return; fi
  ip link add "bprp$(($$ % 10000))" type veth peer name eth0 netns "bpr-probe-$$" 2>/dev/null || echo "veth devices"
  ip link del "bprp$(($$ % 10000))" 2>/dev/null || true
  ip netns del "bpr-probe-$$"
}
if [ -n "$install" ] && [ "$(id -u)" -eq 0 ] && { [ ! -x /usr/sbin/sshd ] || ! command -v rsync >/dev/null; }; then
  apt-get update -qq && apt-get install -y -qq --no-install-recommends openssh-server openssh-client rsync iproute2 >/dev/null
fi
missing=$(lacking)
if [ -n "$missing" ]; then
  say "try_ray_up.sh: cannot run here, $missing is lacking"
  exit 3
fi
set_up

id=$(($$ % 200 + 20))
net=10.77.$id prefix=bpr$id bridge=bpr${id}b
export TMPDIR=/tmp
base=$(mktemp -d /tmp/biphase-ray-up.XXXXXX)
began=$(date +%s.%N)
python=$bin/python
ssh_options=(-i "$base/key" -o BatchMode=yes -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR
  -o ConnectTimeout=5)
local_name=try-ray-up-$$

seconds_since() { echo "$(date +%s.%N) $1" | awk '{ printf "%.1f", $1 - $2 }'; }
step_began=$began
step() { # done: what has just been done
  printf '%6s s  %s\n' "$(seconds_since "$step_began")" "$*"
  step_began=$(date +%s.%N)
}
host_ip() { echo "$net.1$1"; }
on() { local host=$1; shift; ssh "${ssh_options[@]}" "root@$(host_ip "$host")" "$@"; }

# The launching side of `ray up`, in a mount and pid namespace of its own: what it leaves in /tmp (ssh's sockets, Ray's
# state files) and the ssh masters that outlive a command stay in there and end with it.
outside() {
  unshare --mount --pid --fork --kill-child --mount-proc bash "$base/outside.sh" "$@"
}

write_helpers() {
  shared=("$(readlink -f "$bin/..")" "$("$python" -c 'import sys; print(sys.base_prefix)')" "$root")
  cat >"$base/init.sh" <<'C'
set -e # arguments: name, folder, what stays visible below the private /tmp and /root
h=$1 d=$2; shift 2
hostname "$h"
mount --make-rprivate /
for p in "$@"; do case $p in
  /tmp/* | /root/*) mkdir -p "$d$p"; mount --bind "$p" "$d$p" ;;
esac; done
mount --rbind "$d/root" /root
mount --rbind "$d/run" /run
mount -t tmpfs -o size=1g,mode=1777 tmpfs /dev/shm
mount --rbind "$d/tmp" /tmp # last: the folder itself is below /tmp
cd /
exec env -i HOME=/root PATH=/usr/sbin:/usr/bin:/sbin:/bin SHELL=/bin/bash /usr/sbin/sshd -D -e -f /run/sshd_config
C
  cat >"$base/outside.sh" <<C
set -e
mount --make-rprivate /
mkdir -p $base/cli/tmp $base/cli/home
for p in ${shared[*]} $base; do case \$p in
  /tmp/*) mkdir -p "$base/cli\$p"; mount --bind "\$p" "$base/cli\$p" ;;
esac; done
cd $base
mount --rbind $base/cli/tmp /tmp
export HOME=$base/cli/home RAY_TMPDIR=/tmp RAY_USAGE_STATS_ENABLED=0 PATH=$bin:/usr/sbin:/usr/bin:/sbin:/bin
unset RAY_ADDRESS RAY_AUTH_MODE RAY_AUTH_TOKEN RAY_UP_enable_autoscaler_v2
"\$@"
C
}

host_up() {
  local number=$1 h=$prefix-$1 ip d
  ip=$(host_ip "$number") d=$base/h$number
  mkdir -p "$d/tmp" "$d/root/.ssh" "$d/run/sshd"
  chmod 1777 "$d/tmp"; chmod 700 "$d/root" "$d/root/.ssh"; chmod 755 "$d/run" "$d/run/sshd"
  cp "$base/key.pub" "$d/root/.ssh/authorized_keys"; chmod 600 "$d/root/.ssh/authorized_keys"
  ssh-keygen -q -t ed25519 -N '' -f "$d/run/hostkey"
  printf '%s\n' "Port 22" "ListenAddress $ip" "HostKey /run/hostkey" "PidFile none" "PermitRootLogin prohibit-password" \
    "PasswordAuthentication no" "UsePAM no" "UseDNS no" >"$d/run/sshd_config"
  touch "$d/root/.bashrc"
  printf '%s\n' ". $bin/activate" "export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0" >"$d/root/.profile"
  ip netns add "$h"
  ip link add "${prefix}v$number" type veth peer name eth0 netns "$h"
  ip link set "${prefix}v$number" master "$bridge" up
  ip -n "$h" link set lo up
  ip -n "$h" addr add "$ip/24" dev eth0
  ip -n "$h" link set eth0 up
  setsid ip netns exec "$h" unshare --pid --fork --kill-child --mount-proc --mount --uts --ipc \
    bash "$base/init.sh" "$h" "$d" "${shared[@]}" >"$d/sshd.log" 2>&1 </dev/null &
  echo $! >"$d/pid"
  disown # its end is ours to bring about, nothing for the shell to tell
}

power_off() { # KILL: unshare ignores TERM; the host's first process, and with it every other, goes along
  local pid=$base/h$1/pid
  [ -f "$pid" ] && kill -KILL "$(cat "$pid")" 2>/dev/null || true
  rm -f "$pid"
}

hosts_down() {
  local number
  for number in 1 2 3; do
    power_off "$number"
    ip link del "${prefix}v$number" 2>/dev/null || true # `netns del` takes its time, the device would outlive it
    ip netns del "$prefix-$number" 2>/dev/null || true
  done
  ip link del "$bridge" 2>/dev/null || true
}

left_behind() {
  local pid what
  for pid in $(grep -ls "$base" /proc/[0-9]*/cmdline /proc/[0-9]*/environ 2>/dev/null | cut -d/ -f3 | sort -u); do
    what=$({ tr '\0' ' ' <"/proc/$pid/cmdline"; } 2>/dev/null) || continue # gone since
    case $what in "" | grep*) ;; *) [ "$pid" = $$ ] || echo "process $pid: ${what:0:120}" ;; esac
  done
  ip netns list | grep "^$prefix-" || true
  ip -o link | grep -o " $prefix[^:@]*" || true
  grep "$base" /proc/mounts || true
  [ -n "$keep" ] || [ ! -e "$base" ] || echo "$base"
}

clean_up() {
  local status=$?
  trap - EXIT
  trap '' INT TERM
  BIPHASE_RUN_DIR=$base/run "$bin/biphase" stop --now --name "$local_name" >/dev/null 2>&1 || true
  unset BIPHASE_RUN_DIR
  hosts_down
  [ $status -eq 0 ] || keep=1
  if [ -n "$keep" ]; then say "try_ray_up.sh: logs and files are in $base"; else rm -rf "$base"; fi
  local left tries
  for tries in 1 2 3 4 5 6 7 8 9 10; do
    left=$(left_behind)
    [ -n "$left" ] || break
    sleep 0.2
  done
  if [ -n "$left" ]; then
    say "try_ray_up.sh: left behind: $left"
    status=1
  else
    step "cleaned up: no process, namespace, mount$([ -n "$keep" ] || echo " or file") is left"
  fi
  printf '%6s s  in all, exit code %s\n' "$(seconds_since "$began")" "$status"
  exit $status
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

dashboard=$("$python" -c 'import aiohttp, opentelemetry' 2>/dev/null && echo 1 || true)
ask() { "$python" "$root/scripts/try_ray_up_ask.py" "$@"; }

ssh-keygen -q -t ed25519 -N '' -C try-ray-up -f "$base/key"
write_helpers
ip link add "$bridge" type bridge
ip addr add "$net.1/24" dev "$bridge"
ip link set "$bridge" up
for number in 1 2 3; do host_up $number; done
for number in 1 2 3; do
  for try in $(seq 100); do on $number true 2>/dev/null && break || sleep 0.1; done
  on $number true
done
step "three hosts are up, at $(host_ip 1) to $(host_ip 3)"

"$python" - "$root/cluster/ray" "$base" "$net" "$dashboard" <<'C'
"""The cluster files as they are, with this network's addresses, small hosts, and the environment that is there already."""
import secrets, sys
from pathlib import Path
import yaml
source, base, net = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
config = yaml.safe_load((source / "local.yaml").read_text())
head = config["provider"]["head_ip"]
config["cluster_name"] = f"try{net.rpartition('.')[2]}"
config["provider"].update(head_ip=f"{net}.11", worker_ips=[f"{net}.12", f"{net}.13"])
config["auth"] = {"ssh_user": "root", "ssh_private_key": str(base / "key")}
config["setup_commands"] = []  # the hosts share this machine's environment; they have no way out to install another
config["file_mounts"] = {"~/biphase/deploy.yaml": str(base / "deploy.yaml"), "~/.ray/auth_token": str(base / "auth_token")}
for key in ("head_start_ray_commands", "worker_start_ray_commands"):
    config[key] = [
        line.replace(head, f"{net}.11").replace("--wait 120", "--wait 300")
        .replace("ray start ", "RAY_raylet_start_wait_time_s=120 RAY_agent_register_timeout_ms=120000 ray start --num-cpus=1 --num-gpus=0 ")
        .replace("--include-dashboard=true", f"--include-dashboard={'true' if sys.argv[4] else 'false'}")
        for line in config[key]
    ]
(base / "cluster.yaml").write_text(yaml.safe_dump(config, sort_keys=False, width=1000))
deploy = yaml.safe_load((source / "deploy.yaml").read_text())
deploy |= {"max_model_len": 1024}
roles = {"gpus": 0, "cpus": 1, "threads": 1, "kv_memory": "256MiB"}
for role in ("prefill", "decode"):
    deploy[role] |= roles
(base / "deploy.yaml").write_text(yaml.safe_dump({**deploy, "device": "cpu"}))
(base / "local.yaml").write_text(
    yaml.safe_dump({**deploy, "device": "cpu", "host": "127.0.0.1", "port": 0, "controller_port": 0, "backend": "process"})
)
(base / "auth_token").write_text(secrets.token_hex(32))
(base / "auth_token").chmod(0o600)
C

export BIPHASE_RUN_DIR=$base/run
"$bin/biphase" serve "$base/local.yaml" --name "$local_name" --detach >"$base/local.log" 2>&1 || { tail "$base/local.log" >&2; exit 1; }
local_address=$("$bin/biphase" status --name "$local_name" --json |
  "$python" -c 'import json, sys; print(json.load(sys.stdin)["router_addresses"][0])')
ask record "$local_address" "$base/expected.json"
"$bin/biphase" stop --name "$local_name" >/dev/null
step "recorded the answers of a local run"

outside ray up -y "$base/cluster.yaml" --no-config-cache >"$base/ray-up.log" 2>&1 || { tail -30 "$base/ray-up.log" >&2; exit 1; }
grep -q "up: biphase" "$base/ray-up.log" || { tail -30 "$base/ray-up.log" >&2; die "no biphase after \`ray up\`"; }
step "\`ray up\` has returned: $(grep -o 'up: biphase.*' "$base/ray-up.log" | tail -1 | cut -c1-150)"
door=$(host_ip 1):8700
ask wait "$door" 300
step "a prefill and a decode instance are ready"

on 1 "bash --login -c 'biphase status --json'" >"$base/status.json"
read -r p_node d_node < <("$python" -c '
import json, sys
nodes = {it["name"]: it["node"] for it in json.load(open(sys.argv[1]))["processes"]}
print(nodes["prefill-0"], nodes["decode-0"])' "$base/status.json")
[ "$p_node" != "$d_node" ] || die "P and D are both on $p_node"
step "P is on $p_node, D on $d_node"
far=decode-0 far_node=$d_node # of the two at most one is on the head
[ "$d_node" != "$(host_ip 1)" ] || far=prefill-0 far_node=$p_node
on 1 "bash --login -c 'biphase logs $far'" >"$base/far.log" 2>&1 && grep "$far serves as a" "$base/far.log" >/dev/null ||
  { tail "$base/far.log" >&2; die "\`biphase logs $far\` on the head does not read its log on $far_node"; }
step "\`biphase logs $far\` on the head reads the log that is on $far_node"
ask check "$door" "$base/expected.json"
step "a client outside the cluster gets the tokens of the local run"

on 1 "bash --login -c 'RAY_ADDRESS=$(host_ip 1):6379 biphase serve ~/biphase/deploy.yaml --detach --wait 60'" |
  grep "already up" >/dev/null || die "\`biphase serve --detach --wait\` a second time did not say that it is up already"
step "serving the same again changes nothing"

if [ -z "$quick" ]; then
  cp "$base/expected.json" "$base/h1/root/expected.json"
  outside ray submit --no-config-cache "$base/cluster.yaml" "$root/scripts/try_ray_up_ask.py" check "$door" expected.json \
    >"$base/submit.log" 2>&1 || { tail -20 "$base/submit.log" >&2; die "\`ray submit\` failed"; }
  step "\`ray submit\` of a client script"
  if [ -n "$dashboard" ]; then
    on 1 "bash --login -c 'ray job submit --address http://127.0.0.1:8265 -- $python /root/try_ray_up_ask.py check $door /root/expected.json'" \
      >"$base/job.log" 2>&1 || { tail -20 "$base/job.log" >&2; die "\`ray job submit\` failed"; }
    step "\`ray job submit\` of a client script"
  else
    step "left out: \`ray job submit\` needs ray[default], which is not installed here"
  fi

  d_number=${d_node##*.1}
  ask load "$door" "$base/expected.json" "$base/streaming" >"$base/load.log" 2>&1 &
  load=$!
  while [ ! -e "$base/streaming" ] && kill -0 $load 2>/dev/null; do sleep 0.02; done
  ip link set "${prefix}v$d_number" down # first, so that no FIN or RST leaves
  power_off "$d_number"
  step "four streams run; the host of D has lost its power"
  wait $load && lost=0 || lost=$?
  cat "$base/load.log"
  [ $lost -eq 0 ] || die "the work did not go on token by token the same"
  step "all of them ended as in the local run"
  ask wait "$door" 300
  on 1 "bash --login -c 'biphase status'" >"$base/status-after.txt"
  step "D serves again: $(grep -o 'decode-0.*' "$base/status-after.txt" | head -1 | tr -s ' ' | cut -c1-110)"
fi

# a host without power cannot be told to stop, which `biphase down` says with exit code 1
outside biphase down -y "$base/cluster.yaml" >"$base/down.log" 2>&1 || [ -z "$quick" -a $? -eq 1 ] || { tail -20 "$base/down.log" >&2; die "\`biphase down\` failed"; }
step "\`biphase down\`"
for number in 1 2 3; do
  [ -f "$base/h$number/pid" ] || continue
  # sieved on this side: a grep over there may be listed as [grep], its arguments not yet set
  running=$(on $number 'ps -eo args --no-headers') || die "host $number cannot be asked what it runs"
  running=$(grep -v -e sshd -e "^ps " -e "^bash -c" <<<"$running" || true)
  [ -z "$running" ] || die "after \`biphase down\` host $number still runs: $running"
done
step "no process of biphase or Ray is left on the hosts"
exit 0
}
