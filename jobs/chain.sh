#!/bin/bash
# A run longer than a job may take, where jobs may not requeue themselves:  jobs/chain.sh 5 --epochs 1000
# Five jobs, each of which goes on where the one before stopped; if one fails, those after it are cancelled. Flags for
# sbatch go into SBATCH_TIMELIMIT, SBATCH_PARTITION, SBATCH_ACCOUNT and the like.
set -eu
links=$1
shift
export OUT=${OUT:-runs/chain-$(date +%Y%m%d-%H%M%S)}

job=
for ((link = 1; link <= links; link++)); do
    job=$(sbatch --parsable --kill-on-invalid-dep=yes ${job:+--dependency="afterok:$job"} jobs/train.sbatch "$@")
    job=${job%%;*}   # the name of the cluster may follow
    echo "$job"
done
echo "run directory: $OUT" >&2
