#!/bin/bash
# nfs.sh PROGRAM...     (root; Debian's user-mode-linux, nfs-kernel-server, kmod, iproute2)
#
# Run PROGRAM... DIR1 DIR2, where both are one directory on an NFS server (4.2) as two clients see it: each has a cache,
# a network namespace and a host name of its own. The kernel of this machine need not know NFS: all of it runs in User
# Mode Linux, a kernel that is a process and sees the files of this machine. It has one core, 3 GiB, and slow system
# calls; its time limit is LIMIT (300) seconds. For example two ranks on two clients, which see the directory as /mnt:
#
#     tests/network/nfs.sh sh -c '.venv/mpich/bin/mpirun -n 2 unshare --mount sh -c \
#         "mount --bind /run/nfs/\$((PMI_RANK + 1)) /mnt; exec .venv/mpich/bin/python -m mpiml.train --out /mnt/run"'
set -eu
[ $# -ge 1 ] || { sed -n '2s/^# //p' "$0" >&2; exit 2; }
export PATH=$PATH:/usr/sbin:/sbin
for command in linux.uml rpc.nfsd modprobe ip; do
    command -v $command >/dev/null || { echo "no $command: apt-get install the packages that $0 names" >&2; exit 1; }
done

# The first process of that kernel: starts the server, mounts its directory twice, and runs the program.
first_process() {
    exec 2>"$work/start"
    mount -t proc proc /proc
    mount -t sysfs sysfs /sys
    for dir in /run /var/lib/nfs /dev/shm; do mkdir -p $dir && mount -t tmpfs tmpfs $dir; done
    mkdir -p /dev/pts /run/lib /run/export /run/nfs/{1,2}
    mount -t devpts devpts /dev/pts
    mount -t tmpfs tmpfs /run/export
    ln -s /usr/lib/uml/modules /run/lib/modules
    modprobe -d /run -a veth nfsd nfsv4
    mount -t nfsd nfsd /proc/fs/nfsd
    touch /var/lib/nfs/{etab,rmtab}
    exportfs -o rw,no_root_squash,no_subtree_check,fsid=0 '*:/run/export'
    rpc.mountd --no-nfs-version 3
    rpc.nfsd --no-nfs-version 3 4
    echo Y >/proc/fs/nfsd/v4_end_grace
    ip link set lo up
    for i in 1 2; do
        ip netns add client-$i
        ip link add nfs$i type veth peer name nfs netns client-$i
        ip address add 10.77.$i.1/24 dev nfs$i
        ip link set nfs$i up
        ip -n client-$i address add 10.77.$i.2/24 dev nfs
        ip -n client-$i link set nfs up
        nsenter --net=/run/netns/client-$i unshare --uts \
            sh -ec "hostname client-$i; mount -t nfs -o vers=4.2 10.77.$i.1:/ /run/nfs/$i"
    done
    stty -F /dev/tty0 -opost
    code=0
    "$@" /run/nfs/1 /run/nfs/2 >/dev/tty0 2>&1 || code=$?
    echo $code >"$work/status"
}

work=$(mktemp -d)
trap 'kill $! 2>/dev/null || true; rm -rf "$work"' EXIT
trap exit TERM INT
{
    export -p
    declare -f first_process
    echo "work=$work; cd '$PWD'; (set -e; first_process $(printf '%q ' "$@")); echo o >/proc/sysrq-trigger; sleep 9"
} >"$work/init"
timeout --foreground -k 5 "${LIMIT:-300}" linux.uml quiet mem=3G rootfstype=hostfs rootflags=/ rw init=/bin/bash \
    "uml_dir=$work" console=tty1 con=null con0=null,fd:1 con1=null,fd:2 ssl=null -- "$work/init" </dev/null \
    2>"$work/kernel" &
wait $! || true
[ -e "$work/status" ] || { tail -n 20 "$work"/{kernel,start} >&2; exit 1; }
exit "$(cat "$work/status")"
