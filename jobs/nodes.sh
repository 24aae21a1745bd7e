# shellcheck shell=bash
# What a job does that keeps its nodes when one fails (--no-kill): it reads site.sh, and then this.

# nodes_in LIST: the nodes of a list such as n[2-4], with commas between them.
nodes_in() { scontrol show hostnames "$1" | sort | paste -sd ,; }

# nodes_of_job: those that SLURM has not taken away from the running job; nothing if it does not answer.
nodes_of_job() {
    local list
    list=$(squeue --noheader --job "$SLURM_JOB_ID" --states running --format %N) && [[ -n $list ]] && nodes_in "$list"
}

# nodes_that_answer: those of them that start a process within a minute.
nodes_that_answer() {
    local nodes commas
    nodes=$(nodes_of_job) || return
    commas=${nodes//[^,]/}
    # shellcheck disable=SC2016  # a variable of the process
    limit=60 SLURM_JOB_NODELIST=$nodes SLURM_JOB_NUM_NODES=$((${#commas} + 1)) \
        everywhere bash -c 'echo "$SLURMD_NODENAME"' 2>/dev/null | sort | paste -sd ,
}

# use_nodes LIST: from now on `train` starts as many ranks on each node as before, on these nodes only.
use_nodes() {
    local ranks=$SLURM_NTASKS each=$((SLURM_NTASKS / SLURM_JOB_NUM_NODES)) nodes
    IFS=, read -ra nodes <<<"$1"
    NODES=$1
    export SLURM_JOB_NUM_NODES=${#nodes[@]} SLURM_NNODES=${#nodes[@]} SLURM_JOB_NODELIST=$1 SLURM_NODELIST=$1
    export SLURM_NTASKS=$((each * ${#nodes[@]})) SLURM_TASKS_PER_NODE="$each(x${#nodes[@]})"
    export SLURM_NPROCS=$SLURM_NTASKS
    export SLURM_OVERLAP=1   # SLURM may not know yet that the ranks of before are gone
    export HYDRA_HOST_FILE=${TMPDIR:-/tmp}/hosts-$SLURM_JOB_ID   # or MPICH's mpirun would take any nodes of the job
    printf "%s:$each\n" "${nodes[@]}" >"$HYDRA_HOST_FILE"
    LAUNCH=${LAUNCH/ -n $ranks/ -n $SLURM_NTASKS}
    [[ $LAUNCH != srun* ]] || LAUNCH+=" --nodes=$SLURM_JOB_NUM_NODES --ntasks=$SLURM_NTASKS --nodelist=$1"
}

# watch_nodes PID: see to it that the launcher ends if a node fails, and the job if it is the node of this script.
watch_nodes() {
    local other=${NODES##*,}
    watchers=
    [[ $NODES == *,* ]] || return   # SLURM itself requeues a job that loses its only node
    [[ $other != "$SLURMD_NODENAME" ]] || other=${NODES%%,*}
    end_if_stuck "$1" &>/dev/null &
    watchers=$!
    srun --nodes=1 --ntasks=1 --cpus-per-task=1 --overlap --nodelist="$other" bash -c \
        "$(declare -f nodes_in nodes_of_job requeue_without stand_by); POLL=$POLL; stand_by $SLURMD_NODENAME" &>/dev/null &
    watchers+=" $!"
    # shellcheck disable=SC2086  # two
    disown $watchers
}

# end_if_stuck PID: kill the launcher if it is there POLL seconds after SLURM has taken one of its nodes from the job.
end_if_stuck() {
    local left node
    while sleep "$POLL"; do
        left=$(nodes_of_job) || continue
        for node in ${NODES//,/ }; do [[ ,$left, == *,$node,* ]] || break 2; done
    done
    sleep "$POLL"
    kill -KILL "$1"
}

# stand_by HOST: requeue the job if the node HOST fails, on which its script runs. With --no-kill SLURM does not do that:
# the job would keep the other nodes until its time is up.
stand_by() {
    trap '' USR1
    trap 'requeue_without "$1"; exit' TERM   # the job ends at once if SLURM can reach the node, as when it is set down
    while sleep "$POLL"; do requeue_without "$1"; done
}

requeue_without() {
    local nodes
    if [[ $(sinfo --noheader --nodes "$1" --format %T) == down* ]] ||
        { nodes=$(nodes_of_job) && [[ ,$nodes, != *,$1,* ]]; }; then
        scontrol requeue "$SLURM_JOB_ID" && exit
    fi
}

POLL=${POLL:-60}   # seconds from one look at the nodes to the next
NODES=$(nodes_in "$SLURM_JOB_NODELIST")   # that `train` uses
