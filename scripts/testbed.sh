#!/usr/bin/env bash
# A cluster on one machine: runs lina on HOSTS network namespaces, one rank each, whose network interfaces have RATE.
#
#   scripts/testbed.sh HOSTS RATE LINA-ARGUMENTS...
#   scripts/testbed.sh 4 1gbit bench train examples/contention-mpi.toml
#
# RATE is tc's (1gbit, 500mbit, ...). The program is $LINA, or what `cargo build --release --features lina/mpi` made.
# $MPIRUN_ARGUMENTS are passed to mpirun. For tests, $TESTBED_DOWN="HOST WHEN" takes a host's interface down after so many
# seconds or, if WHEN is a path, when a file or folder is there; $TESTBED_SLOW="HOST RATE" gives a host a rate of its own;
# $TESTBED_SLOW_LINK="HOST HOST RATE" limits what the first host sends to the second. Everything is removed again however
# the run ends. Needs root, iproute2 and Open MPI.
set -euo pipefail

refuse() { echo "testbed: $*" >&2; exit 2; }

# mpirun's remote shell calls this script as `testbed.sh __on PREFIX ADDRESS COMMAND...`.
if [ "${1:-}" = __on ]; then
    prefix=$2 address=$3
    shift 3
    host=${address##*.}
    # The hosts share a file system, but neither a name nor their launchers' temporary files.
    export TMPDIR=${TMPDIR:-/tmp}/$prefix/$host
    mkdir -p "$TMPDIR"
    exec ip netns exec "$prefix-$host" unshare --uts bash -c "echo h$host >/proc/sys/kernel/hostname; $*"
fi

[ $# -ge 3 ] || refuse "expected HOSTS RATE LINA-ARGUMENTS, for example: 4 1gbit bench train examples/contention-mpi.toml"
hosts=$1 rate=$2
shift 2
case $hosts in '' | *[!0-9]*) refuse "HOSTS is $hosts, expected a number from 1 to 200" ;; esac
[ "$hosts" -ge 1 ] && [ "$hosts" -le 200 ] || refuse "HOSTS is $hosts, expected a number from 1 to 200"
for program in ip tc unshare; do
    command -v $program >/dev/null || refuse "$program is not on PATH, expected iproute2 and util-linux to be installed"
done
command -v mpirun >/dev/null || refuse "mpirun is not on PATH, expected Open MPI (Debian and Ubuntu: openmpi-bin)"
[ "$(id -u)" = 0 ] || refuse "user $(id -un) may not make network namespaces, expected root"

here=$(cd "$(dirname "$0")" && pwd)
lina=${LINA:-${CARGO_TARGET_DIR:-$here/../target}/release/lina}
[ -x "$lina" ] || refuse "$lina is not there, expected it from: cargo build --release --features lina/mpi"
lina=$(realpath -s "$lina")

# The names and the network of this run, so that several can run side by side.
number=$(($$ % 250))
prefix=lina$number
network=10.77.$number

# A host's namespace, with everything in it.
remove() {
    trap - EXIT INT TERM HUP
    [ -z "${downer:-}" ] || kill "$downer" 2>/dev/null || true
    for i in $(seq 1 "$hosts"); do
        ip netns pids "$prefix-$i" 2>/dev/null | xargs -r kill -KILL 2>/dev/null || true
        ip link del "${prefix}w$i" 2>/dev/null || true
        ip netns del "$prefix-$i" 2>/dev/null || true
    done
    ip link del "${prefix}x" 2>/dev/null || true
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
read -r slow_host slow_rate <<<"${TESTBED_SLOW:-0 0}"
for i in $(seq 1 "$hosts"); do
    host=$prefix-$i wire=${prefix}w$i
    [ "$i" = "$slow_host" ] && host_rate=$slow_rate || host_rate=$rate
    [ "$i" = 1 ] || ip netns add "$host"
    ip link add "$wire" type veth peer name eth0 netns "$host"
    ip link set "$wire" master "$prefix" up
    ip -n "$host" link set lo up
    ip -n "$host" link set eth0 up
    ip -n "$host" addr add "$network.$i/24" dev eth0
    # What the host receives, and what it sends. The burst is small, so that short messages are not faster than the
    # rate, and the queue long, so that nothing is lost: TCP's timeouts would be measured otherwise.
    tc qdisc add dev "$wire" root tbf rate "$host_rate" burst 32kb limit 8mb ||
        refuse "RATE is $host_rate, expected one of tc's, such as 1gbit"
    tc -n "$host" qdisc add dev eth0 root tbf rate "$host_rate" burst 32kb limit 8mb
    list=$list${list:+,}$network.$i:1
done

for i in $(seq 1 "$hosts"); do
    until [ "$(cat "/sys/class/net/${prefix}w$i/operstate")" = up ]; do sleep 0.05; done
done

if [ -n "${TESTBED_SLOW_LINK:-}" ]; then
    read -r from to link_rate <<<"$TESTBED_SLOW_LINK"
    # A second interface that only this destination is reached through.
    ip link add "${prefix}x" type veth peer name eth1 netns "$prefix-$from"
    ip link set "${prefix}x" master "$prefix" up
    ip -n "$prefix-$from" link set eth1 up
    tc -n "$prefix-$from" qdisc add dev eth1 root tbf rate "$link_rate" burst 32kb limit 8mb
    ip -n "$prefix-$from" route add "$network.$to/32" dev eth1 src "$network.$from"
    until [ "$(cat "/sys/class/net/${prefix}x/operstate")" = up ]; do sleep 0.05; done
fi

if [ -n "${TESTBED_DOWN:-}" ]; then
    read -r host when <<<"$TESTBED_DOWN"
    case $when in
        *[!0-9.]*) wait_for_it() { until [ -e "$when" ]; do sleep 0.05; done; } ;;
        *) wait_for_it() { sleep "$when"; } ;;
    esac
    (wait_for_it && ip -n "$prefix-$host" link set eth0 down) &
    downer=$!
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
