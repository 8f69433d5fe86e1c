#!/usr/bin/env bash
# A cluster on one machine: runs lina on HOSTS network namespaces, one rank each, whose network interfaces have RATE.
#
#   scripts/testbed.sh HOSTS RATE LINA-ARGUMENTS...
#   scripts/testbed.sh 4 1gbit bench train examples/contention-mpi.toml
#
# RATE is tc's (1gbit, 500mbit, ...). The program is $LINA, or what `cargo build --release --features lina/mpi` made.
# $MPIRUN_ARGUMENTS are passed to mpirun. For tests of faults, $TESTBED_DOWN="HOST SECONDS" takes a host's interface
# down after so many seconds. Everything is removed again however the run ends. Needs root, iproute2 and Open MPI.
set -euo pipefail

refuse() { echo "testbed: $*" >&2; exit 2; }

# mpirun's remote shell calls this script as `testbed.sh __on PREFIX ADDRESS COMMAND...`.
if [ "${1:-}" = __on ]; then
    prefix=$2 address=$3
    shift 3
    # The hosts share a file system, but not their launchers' temporary files.
    export TMPDIR=${TMPDIR:-/tmp}/$prefix/${address##*.}
    mkdir -p "$TMPDIR"
    exec ip netns exec "$prefix-${address##*.}" bash -c "$*"
fi

[ $# -ge 3 ] || refuse "expected HOSTS RATE LINA-ARGUMENTS, for example: 4 1gbit bench train examples/contention-mpi.toml"
hosts=$1 rate=$2
shift 2
case $hosts in '' | *[!0-9]*) refuse "HOSTS is $hosts, expected a number from 1 to 200" ;; esac
[ "$hosts" -ge 1 ] && [ "$hosts" -le 200 ] || refuse "HOSTS is $hosts, expected a number from 1 to 200"
for program in ip tc; do
    command -v $program >/dev/null || refuse "$program is not on PATH, expected iproute2 to be installed"
done
command -v mpirun >/dev/null || refuse "mpirun is not on PATH, expected Open MPI (Debian and Ubuntu: openmpi-bin)"
[ "$(id -u)" = 0 ] || refuse "user $(id -un) may not make network namespaces, expected root"

here=$(cd "$(dirname "$0")" && pwd)
lina=${LINA:-${CARGO_TARGET_DIR:-$here/../target}/release/lina}
[ -x "$lina" ] || refuse "$lina is not there, expected it from: cargo build --release --features lina/mpi"
lina=$(realpath "$lina")

# The names and the network of this run, so that several can run side by side.
number=$(($$ % 250))
prefix=lina$number
network=10.77.$number

# A host's namespace, with everything in it.
remove() {
    trap - EXIT INT TERM HUP
    for i in $(seq 1 "$hosts"); do
        ip netns pids "$prefix-$i" 2>/dev/null | xargs -r kill -KILL 2>/dev/null || true
        ip link del "${prefix}w$i" 2>/dev/null || true
        ip netns del "$prefix-$i" 2>/dev/null || true
    done
    ip link del "$prefix" 2>/dev/null || true
    rm -rf "${TMPDIR:-/tmp}/$prefix"
}
trap remove EXIT
trap 'exit 130' INT TERM HUP

ip netns add "$prefix-1" 2>/dev/null || refuse "this kernel or container does not permit network namespaces"
ip link add "$prefix" type bridge || refuse "this kernel or container does not permit bridges"
ip link set "$prefix" up
ip addr add "$network.254/24" dev "$prefix"
list=
for i in $(seq 1 "$hosts"); do
    host=$prefix-$i wire=${prefix}w$i
    [ "$i" = 1 ] || ip netns add "$host"
    ip link add "$wire" type veth peer name eth0 netns "$host"
    ip link set "$wire" master "$prefix" up
    ip -n "$host" link set lo up
    ip -n "$host" link set eth0 up
    ip -n "$host" addr add "$network.$i/24" dev eth0
    # What the host receives, and what it sends. The burst is small, so that short messages are not faster than the
    # rate, and the queue long, so that nothing is lost: TCP's timeouts would be measured otherwise.
    tc qdisc add dev "$wire" root tbf rate "$rate" burst 32kb limit 8mb ||
        refuse "RATE is $rate, expected one of tc's, such as 1gbit"
    tc -n "$host" qdisc add dev eth0 root tbf rate "$rate" burst 32kb limit 8mb
    list=$list${list:+,}$network.$i:1
done

for i in $(seq 1 "$hosts"); do
    until [ "$(cat "/sys/class/net/${prefix}w$i/operstate")" = up ]; do sleep 0.05; done
done

if [ -n "${TESTBED_DOWN:-}" ]; then
    read -r host seconds <<<"$TESTBED_DOWN"
    (sleep "$seconds" && ip -n "$prefix-$host" link set eth0 down) &
fi

# Every host sees all cores: binding would put all ranks on the first. Launchers find a lost host within seconds.
# shellcheck disable=SC2086
mpirun --allow-run-as-root --bind-to none --host "$list" -np "$hosts" \
    --mca plm_rsh_agent "$here/testbed.sh __on $prefix" --mca routed direct \
    --mca btl tcp,self --mca btl_tcp_if_include eth0 --mca oob_tcp_if_include "$network.0/24" \
    --mca oob_tcp_keepalive_time 5 --mca oob_tcp_keepalive_intvl 5 --mca oob_tcp_keepalive_probes 2 \
    --mca mpi_yield_when_idle 1 ${MPIRUN_ARGUMENTS:-} "$lina" "$@" </dev/null &
mpirun=$!

# mpirun waits for a host that it cannot reach, even after every rank has said why and ended.
alone=0
while kill -0 "$mpirun" 2>/dev/null; do
    sleep 0.5
    running=$(ip netns pids "$prefix-1" | xargs -r ps -o stat=,args= -p | grep -c "^[^Z].*$lina" || true)
    [ "$running" = 0 ] && alone=$((alone + 1)) || alone=0
    if [ $alone -gt 20 ]; then
        kill -KILL "$mpirun" 2>/dev/null || true
        echo "testbed: every rank that can be reached has ended, and mpirun waits for another host; stopped it" >&2
    fi
done
wait "$mpirun"
