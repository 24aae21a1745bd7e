# shellcheck shell=bash
# What differs from site to site, and what all scripts here share; they read this file. README.md explains it.

# module load python mpich                      # the site's own MPI and Python, if you use them
PYTHON=${PYTHON:-.venv/mpich/bin/python}
PROGRAM=${PROGRAM:--m mpiml.train}              # or a program of yours that calls mpiml.api.train
LAUNCH=${LAUNCH:-srun --mpi=pmi2 --cpu-bind=cores}   # this is the line to change for mpirun:
# LAUNCH=${LAUNCH:-mpirun -n $SLURM_NTASKS}

# The same for a part of the job's ranks, packed onto nodes: scaling studies fill in the numbers.
LAUNCH_SOME="${LAUNCH/ -n $SLURM_NTASKS/} -n {ranks}"
[[ $LAUNCH != srun* ]] || LAUNCH_SOME+=" -N {nodes}"

# The run directory: the same when SLURM starts a job again, another for each task of an array.
OUT=${OUT:-runs/$SLURM_JOB_NAME-${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}}${SLURM_ARRAY_TASK_ID:+-$SLURM_ARRAY_TASK_ID}

# Threads that BLAS may start; how many it uses is the setting --threads, for the results depend on it.
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}
export OPENBLAS_NUM_THREADS=$OMP_NUM_THREADS MKL_NUM_THREADS=$OMP_NUM_THREADS

# srun does not take over the job's --cpus-per-task. Not for mpirun: it starts one process per node by srun, and
# all ranks of the node would have to live on that one's cores.
[[ $LAUNCH != srun* ]] || export SRUN_CPUS_PER_TASK=$OMP_NUM_THREADS

# A run ends itself in time if it knows the job's end. Older versions of SLURM do not tell it.
if [[ -z ${SLURM_JOB_END_TIME:-} ]] && end=$(squeue --noheader --job "$SLURM_JOB_ID" --format %e); then
    SLURM_JOB_END_TIME=$(date --date "$end" +%s) && export SLURM_JOB_END_TIME
fi

# everywhere COMMAND: run it once on each node, for at most `limit` seconds if that is set.
everywhere() {
    local nodes=${SLURM_JOB_NUM_NODES:-1}
    ${limit:+timeout -k 5 "$limit"} srun --nodes="$nodes" ${SLURM_JOB_NODELIST:+--nodelist="$SLURM_JOB_NODELIST"} \
        --ntasks="$nodes" --ntasks-per-node=1 --cpus-per-task=1 --overlap "$@"
}

# stage_software: copy the virtual environment of $PYTHON, and mpiml into it, to the directory $STAGE of each node, such
# as /dev/shm: one archive that SLURM hands from node to node. Each rank looks up some 1,600 files there as it starts,
# instead of on a file system that all nodes share. Modules of yours are still taken from the job's directory. The copy
# goes when the job ends; a job that is killed leaves it behind.
stage_software() {
    local to=$STAGE/mpiml-$SLURM_JOB_ID prefix site from
    read -r prefix site from < <("$PYTHON" -c 'import mpiml, pathlib, sys, sysconfig
if sys.prefix != sys.base_prefix:
    site = pathlib.Path(sysconfig.get_path("purelib")).relative_to(sys.prefix)
    print(sys.prefix, site, pathlib.Path(mpiml.__file__).parents[1])')
    if [[ -z $from ]]; then
        echo "STAGE=$STAGE: $PYTHON has no mpiml, or is in no virtual environment: it stays where it is" >&2
        return
    fi
    # shellcheck disable=SC2064  # the names as they are now
    trap "everywhere rm -rf '$to' '$to.tar' '$to.all'" EXIT
    if tar -cf "$to.all" --transform "s,^mpiml,$site/mpiml,SH" -C "$prefix" . -C "$from" mpiml &&
        sbcast --force "$to.all" "$to.tar" && everywhere bash -c \
        "mkdir -p '$to' && tar -xf '$to.tar' -C '$to' && echo '$PWD' >'$to/$site/here.pth'"; then
        PYTHON=$to/bin/python
        [[ $PROGRAM != -m* ]] || export PYTHONSAFEPATH=1   # or Python would look into this directory first
    else
        echo "STAGE=$STAGE: could not copy the software there; $PYTHON is used where it is" >&2
    fi
    everywhere rm -f "$to.tar" "$to.all"
}

# train FLAGS: start the run, or go on with it. Call it in a subshell, which becomes the launcher: a signal to it
# is one to the launcher, and both srun and mpirun pass SIGUSR1 on to the ranks.
train() {
    # shellcheck disable=SC2086  # the launcher and the program are several words each
    exec $LAUNCH "$PYTHON" $PROGRAM --resume --out "$OUT" ${SLURM_ARRAY_TASK_ID:+--seed "$SLURM_ARRAY_TASK_ID"} "$@"
}

# study MODE FLAGS: a scaling study on 1, 2, 4, ... ranks, up to all of the job's, or go on with it; then its report.
study() {
    local ranks=1 more
    for ((more = 2; more < SLURM_NTASKS; more *= 2)); do ranks+=,$more; done
    "$PYTHON" -m mpiml.scaling run --mode "$1" --ranks "$ranks,$SLURM_NTASKS" --out "$OUT" \
        --launcher "$LAUNCH_SOME" "${@:2}"
    rm -f "$OUT/scaling.json"
    "$PYTHON" -m mpiml.scaling report "$OUT"
    more=$(result open scaling.json)
    echo "$OUT: jobs of the study that are open: ${more:-unknown, for there is no report}"
    [[ $more == 0 ]]
}

# verdict: what became of the run: done, saved (stopped, and further than before), or failed. It is taken from
# result.json and the checkpoints: launchers may lose exit codes, and one that cannot start leaves an old result.
verdict() {
    case $(result status) in
        'done') echo 'done' ;;
        stopped) if [[ $(newest) != "$BEFORE" ]]; then echo saved; else echo failed; fi ;;
        *) echo failed ;;
    esac
}

# outcome CODE: a line on the run, which ended with that exit code.
outcome() {
    local reason
    reason=$(result reason)
    echo "exit code $1; $OUT: $(result status), step $(result step)${reason:+, $reason}"
}

# result KEY [FILE]: what result.json, or another file of the run directory, says; nothing if it says nothing.
result() {
    "$PYTHON" -c 'import json, sys; found = json.load(open(sys.argv[1]))[sys.argv[2]]
print("" if found is None else found)' "$OUT/${2:-result.json}" "$1" 2>/dev/null
}

# newest: the newest checkpoint.
newest() {
    local files=("$OUT"/checkpoints/step-*)
    echo "${files[-1]}"
}
BEFORE=$(newest)
[[ -z ${STAGE:-} ]] || stage_software
