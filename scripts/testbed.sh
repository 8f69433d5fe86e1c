#!/usr/bin/env bash
# A cluster on one machine: runs a rank in each of HOSTS network namespaces, whose network interfaces have RATE.
#
#   scripts/testbed.sh HOSTS RATE LINA-ARGUMENTS...
#   scripts/testbed.sh 4 1gbit bench train examples/contention-mpi.toml
#   scripts/testbed.sh --gpu HOSTS RATE LINA-ARGUMENTS...
#   scripts/testbed.sh --gpu 4 10gbit bench train examples/contention-gpu.toml
#
# RATE is tc's (1gbit, 500mbit, ...). The program is $LINA, or what `cargo build --release --features lina/mpi` (with --gpu,
# lina/cuda) made. $MPIRUN_ARGUMENTS are passed to mpirun.
#
# With --gpu, ranks are started with the variables that torchrun sets (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR,
# MASTER_PORT), so that $LINA may also be a Python whose arguments are a script with PyTorch. NCCL takes the hosts for
# different machines: it goes over their network interfaces even where they share a GPU. CUDA's MPS, where it is installed,
# lets their kernels run side by side.
#
# For tests, $TESTBED_DOWN="HOST WHEN" takes a host's interface down after so many seconds or, if WHEN is a path, when a file
# or folder is there; $TESTBED_SLOW="HOST RATE" gives a host a rate of its own; $TESTBED_SLOW_LINK="HOST HOST RATE" limits
# what the first host sends to the second. Everything is removed again however the run ends. Needs root and iproute2;
# without --gpu, Open MPI.
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

gpu=
if [ "${1:-}" = --gpu ]; then
    gpu=yes
    shift
fi
[ $# -ge 3 ] || refuse "expected HOSTS RATE LINA-ARGUMENTS, for example: 4 1gbit bench train examples/contention-mpi.toml"
hosts=$1 rate=$2
shift 2
case $hosts in '' | *[!0-9]*) refuse "HOSTS is $hosts, expected a number from 1 to 200" ;; esac
[ "$hosts" -ge 1 ] && [ "$hosts" -le 200 ] || refuse "HOSTS is $hosts, expected a number from 1 to 200"
if [ -n "$gpu" ]; then
    programs="ip tc" feature=lina/cuda
    # Large messages in large packets; a burst is what the system hands over between two looks at the clock.
    mtu=9000 shape="burst 4mb latency 20ms"
else
    programs="ip tc unshare" feature=lina/mpi
    # The burst is small, so that short messages are not faster than the rate, and the queue long, so that nothing is lost:
    # TCP's timeouts would be measured otherwise.
    mtu=1500 shape="burst 32kb limit 8mb"
fi
for program in $programs; do
    command -v "$program" >/dev/null || refuse "$program is not on PATH, expected iproute2 and util-linux to be installed"
done
[ -n "$gpu" ] || command -v mpirun >/dev/null ||
    refuse "mpirun is not on PATH, expected Open MPI (Debian and Ubuntu: openmpi-bin)"
[ "$(id -u)" = 0 ] || refuse "user $(id -un) may not make network namespaces, expected root"

here=$(cd "$(dirname "$0")" && pwd)
lina=${LINA:-${CARGO_TARGET_DIR:-$here/../target}/release/lina}
[ -x "$lina" ] || refuse "$lina is not there, expected it from: cargo build --release --features $feature"
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
    [ -z "${mps:-}" ] || echo quit | nvidia-cuda-mps-control >/dev/null 2>&1 || true
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
    ip link set "$wire" mtu "$mtu" master "$prefix" up
    ip -n "$host" link set lo up
    ip -n "$host" link set eth0 mtu "$mtu" up
    ip -n "$host" addr add "$network.$i/24" dev eth0
    # What the host receives, and what it sends.
    # shellcheck disable=SC2086
    tc qdisc add dev "$wire" root tbf rate "$host_rate" $shape ||
        refuse "RATE is $host_rate, expected one of tc's, such as 1gbit"
    # shellcheck disable=SC2086
    tc -n "$host" qdisc add dev eth0 root tbf rate "$host_rate" $shape
    list=$list${list:+,}$network.$i:1
done

for i in $(seq 1 "$hosts"); do
    until [ "$(cat "/sys/class/net/${prefix}w$i/operstate")" = up ]; do sleep 0.05; done
done

if [ -n "${TESTBED_SLOW_LINK:-}" ]; then
    read -r from to link_rate <<<"$TESTBED_SLOW_LINK"
    # A second interface that only this destination is reached through.
    ip link add "${prefix}x" type veth peer name eth1 netns "$prefix-$from"
    ip link set "${prefix}x" mtu "$mtu" master "$prefix" up
    ip -n "$prefix-$from" link set eth1 mtu "$mtu" up
    # shellcheck disable=SC2086
    tc -n "$prefix-$from" qdisc add dev eth1 root tbf rate "$link_rate" $shape
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

if [ -n "$gpu" ]; then
    if [ -n "${CUDA_MPS_PIPE_DIRECTORY:-}" ]; then
        echo "testbed: uses the MPS of $CUDA_MPS_PIPE_DIRECTORY" >&2
    elif command -v nvidia-cuda-mps-control >/dev/null; then
        export CUDA_MPS_PIPE_DIRECTORY=${TMPDIR:-/tmp}/$prefix/mps CUDA_MPS_LOG_DIRECTORY=${TMPDIR:-/tmp}/$prefix/mps-log
        mkdir -p "$CUDA_MPS_PIPE_DIRECTORY" "$CUDA_MPS_LOG_DIRECTORY"
        nvidia-cuda-mps-control -d && mps=yes || echo "testbed: MPS does not start; ranks of one GPU take turns" >&2
    else
        echo "testbed: nvidia-cuda-mps-control is not on PATH; ranks of one GPU take turns" >&2
    fi
    gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)
    [ "$gpus" -gt 0 ] || gpus=1
    export WORLD_SIZE=$hosts MASTER_ADDR=$network.1 MASTER_PORT=29500 NCCL_NET=Socket NCCL_SOCKET_IFNAME=eth0
    ranks=
    for i in $(seq 1 "$hosts"); do
        RANK=$((i - 1)) LOCAL_RANK=$(((i - 1) % gpus)) NCCL_HOSTID=$prefix-$i GLOO_SOCKET_IFNAME=eth0 \
            ip netns exec "$prefix-$i" "$lina" "$@" </dev/null &
        ranks="$ranks $! "
    done
    # Ranks that lose another say so and end; a program that waits instead is ended after half a minute.
    status=0 patience=150
    while [ -n "${ranks// /}" ] && [ $patience -gt 0 ]; do
        sleep 0.2
        for rank in $ranks; do
            kill -0 "$rank" 2>/dev/null && continue
            code=0
            wait "$rank" || code=$?
            [ $status != 0 ] || status=$code
            ranks=${ranks/ $rank /}
        done
        [ $status = 0 ] || patience=$((patience - 1))
    done
    exit $status
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
