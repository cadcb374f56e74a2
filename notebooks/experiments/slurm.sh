#!/bin/bash
# A study as an array of Slurm jobs, each with an equal share of the runs, and a last job that makes the table:
#   notebooks/experiments/slurm.sh 40 notebooks/experiments/three-scenarios.yaml class --out /scratch/me/results
# The jobs share the folder of --out (or s3://…). Started again, the same command runs what is missing. What a job asks
# of the cluster is in SBATCH_ARGS, for example SBATCH_ARGS="--time 4:00:00 --gpus 1 --account me".
#SBATCH --job-name=cl_lib
#SBATCH --output=slurm-%x-%A-%a.out
#SBATCH --cpus-per-task=1
#SBATCH --mem=4G
set -euo pipefail
export OMP_NUM_THREADS=1

if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then # a job of the array
    exec python -m cl_lib study "$@" --cell "$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT"
elif [ -n "${SLURM_JOB_ID:-}" ]; then # the last one
    exec python -m cl_lib study "$@" --collect
fi

if [ $# -lt 2 ] || ! [[ "$1" =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: $0 JOBS FILE [STUDY …] [--out DIR] [--seeds N] …" >&2
    exit 2
fi
jobs=$1
shift
python -m cl_lib study "$@" --check
# shellcheck disable=SC2086
array=$(sbatch --parsable --array="1-$jobs" ${SBATCH_ARGS:-} "$0" "$@")
# shellcheck disable=SC2086
sbatch --dependency="afterany:${array%%;*}" ${SBATCH_ARGS:-} "$0" "$@"
