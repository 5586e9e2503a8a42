#!/usr/bin/env bash
#SBATCH --job-name=phi3_jax
#SBATCH --ntasks-per-node=1
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=TERM@120
#
# Trains on the nodes of a SLURM job, one process on each with all of its GPUs:
#
#   sbatch --nodes 2 --gpus-per-node 4 --time 08:00:00 scripts/slurm_train.sh --config FILE --parallel.fsdp -1
#
# from the folder that holds .venv (or set PHI3_JAX to the program). training.output_dir must be a folder that all
# nodes see. SIGTERM, which SLURM sends before it takes the nodes away and two minutes before the time limit, has the
# run save a checkpoint and end with status 143. A job that SLURM starts again resumes; one that ran out of time does
# when it is submitted again with --training.resume_from_checkpoint true.
#
# `scripts/slurm_train.sh --dry-run ...` prints the command of the job, in one or anywhere else.
set -euo pipefail

die() {
  echo "slurm_train.sh: $*" >&2
  exit 2
}

quote() { # one word for a shell: as it is where that is safe, else in single quotes
  case $1 in
    '' | *[!A-Za-z0-9_./:=@%+,-]*) printf "'%s'" "$(printf '%s' "$1" | sed "s/'/'\\\\''/g")" ;;
    *) printf '%s' "$1" ;;
  esac
}

dry_run=false
if [ "${1:-}" = --dry-run ]; then dry_run=true && shift; fi
[ $# -gt 0 ] || die "needs the arguments of phi3-jax train, such as --config FILE"
for argument in "$@"; do
  [ "$argument" != --dry-run ] || die "--dry-run stands among the arguments of phi3-jax train; put it first"
done

# sbatch runs a copy of this file, so that its own place says nothing.
program=${PHI3_JAX:-${SLURM_SUBMIT_DIR:-$PWD}/.venv/bin/phi3-jax}
nodes=${SLURM_JOB_NUM_NODES:-1} tasks=${SLURM_NTASKS:-${SLURM_JOB_NUM_NODES:-1}} gpus=${SLURM_GPUS_ON_NODE:-0}
[ "$tasks" -eq "$nodes" ] || die "the job has $tasks tasks on $nodes nodes, expected one on each: --ntasks-per-node 1"
if ! $dry_run; then
  [ -n "${SLURM_JOB_ID:-}" ] || die "this is no SLURM job; start it with sbatch, or add --dry-run"
  [ -x "$program" ] || die "$program: no such program; install phi3_jax there, or set PHI3_JAX"
fi

command=(srun "--nodes=$nodes" --ntasks-per-node=1 --kill-on-bad-exit=1 "$program" train "$@")
if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ]; then command+=(--training.resume_from_checkpoint true); fi
# JAX would give each task of a SLURM job a single GPU.
if [ "$gpus" -gt 0 ]; then command=(env "JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 $((gpus - 1)))" "${command[@]}"); fi

if $dry_run; then
  separator=''
  for word in "${command[@]}"; do
    printf '%s%s' "$separator" "$(quote "$word")"
    separator=' '
  done
  echo
else
  exec "${command[@]}"
fi
