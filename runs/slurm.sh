#!/usr/bin/env bash
# A training stage on several machines of a Slurm cluster: one torchrun on each node, which meet at the first of them.
#
#   sbatch runs/slurm.sh -m scripts.base_train -- --depth 26 --save-minutes 30
#   sbatch --nodes=4 --gpus-per-node=4 runs/slurm.sh -m scripts.mid_train -- --model-tag d26
#
# What follows the script is what would follow torchrun; `--resume` is added. Data, tokenizer and environment must be
# there (docs/running.md). Two minutes before the time limit the run saves a checkpoint; the job is then queued again and
# goes on from it, as it is by Slurm after a node failed. These variables may be set beforehand:
#   NPROC                processes on each node (default: its GPUs in the job, without any 1)
#   MAX_RESTARTS         how often processes that fail are started again within the job (default: 3)
#   RDZV_PORT            port of the meeting on the first node (default: derived from the job's number)
#   NCCL_SOCKET_IFNAME   network interface between the nodes, where the default is the wrong one; without GPUs
#                        GLOO_SOCKET_IFNAME
#SBATCH --job-name=nanochat
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=nanochat-%j.log
set -euo pipefail

if [ $# -eq 0 ]; then
    echo "say which stage: sbatch runs/slurm.sh -m scripts.base_train -- --depth 26" >&2
    exit 2
fi
cd "${SLURM_SUBMIT_DIR:-$PWD}"
# shellcheck source=/dev/null
source "${NANOCHAT_VENV:-.venv}/bin/activate"

first_node="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
nproc="${NPROC:-${SLURM_GPUS_ON_NODE:-1}}"
port="${RDZV_PORT:-$((20000 + SLURM_JOB_ID % 20000))}"
# With one store for all attempts, as is the default, a node that comes back would look for the ranks of before.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=110 # for the checkpoint, before torchrun kills what has not ended
export PYTHONUNBUFFERED=1

# In the background, so that this shell hears the signal and passes it on; a node that ends for good ends the others.
srun --kill-on-bad-exit=1 torchrun --nnodes="$SLURM_NNODES" --nproc_per_node="$nproc" \
    --max-restarts="${MAX_RESTARTS:-3}" --rdzv-backend=c10d --rdzv-endpoint="$first_node:$port" \
    --rdzv-id="$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}" "$@" --resume &
run=$! is_stopped=0 status=0
trap 'is_stopped=1; kill -TERM "$run"' TERM
wait "$run" || status=$?
if [ "$is_stopped" = 1 ]; then
    status=0
    wait "$run" || status=$?
    if [ "$status" -ne 0 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
fi
exit "$status"
