#!/bin/bash
# two_nodes.sh RATE PROGRAM...     (root; iproute2; MPICH's wheel)
#
# Run an MPI program on two nodes that are joined by a slow link, all on this machine: two network namespaces with host
# names and /dev/shm of their own, and between them a pair of virtual interfaces that let RATE through in each direction
# (100mbit: as tc says it). RANKS (default 1) of the program run on each. For example
#
#     tests/network/two_nodes.sh 100mbit .venv/mpich/bin/python -m mpiml.examples.learning_apart wide
set -eu

# On a node: its number, and the words of a command, which are quoted for a shell as ssh has them.
on_node() {
    exec ip netns exec "$MPIML_TWO_NODES-$1" unshare --uts --ipc --mount sh -c \
        "hostname node-$1; mount -t tmpfs tmpfs /dev/shm; exec ${*:2}"
}

if [ -n "${MPIML_TWO_NODES:-}" ]; then # MPICH's launcher calls this file in the place of ssh: [options] HOST COMMAND...
    while [[ $1 == -* ]]; do shift; done
    on_node "${1##*.}" "${@:2}"
fi

[ $# -ge 2 ] || { sed -n '2s/^# //p' "$0" >&2; exit 2; }
rate=$1
shift
here=$(realpath "$0") link=mpiml0 net=10.77.0
export MPIML_TWO_NODES=mpiml-$$ UCX_TLS=tcp,self UCX_NET_DEVICES=$link # between nodes TCP, on this link
trap 'for i in 1 2; do ip netns del "$MPIML_TWO_NODES-$i" 2>/dev/null || true; done' EXIT

for i in 1 2; do ip netns add "$MPIML_TWO_NODES-$i"; done
ip link add $link netns "$MPIML_TWO_NODES-1" type veth peer name $link netns "$MPIML_TWO_NODES-2"
for i in 1 2; do
    node=$MPIML_TWO_NODES-$i
    ip -n "$node" address add $net.$i/24 dev $link
    ip -n "$node" link set lo up
    ip -n "$node" link set $link up
    ip netns exec "$node" tc qdisc add dev $link root tbf rate "$rate" burst 64kb latency 50ms
done
until [ "$(for i in 1 2; do ip -n "$MPIML_TWO_NODES-$i" link show $link; done | grep -c 'state UP')" = 2 ]; do
    sleep 0.1 # the kernel takes a moment, and MPI takes no link that is down
done

mpirun=$(dirname "$(command -v "$1")")/mpirun
launch=("$mpirun" -launcher ssh -launcher-exec "$here" -iface $link -hosts $net.1,$net.2 -ppn "${RANKS:-1}")
(on_node 1 "$(printf '%q ' "${launch[@]}" -n $((2 * ${RANKS:-1})) "$@")")
