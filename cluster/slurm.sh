#!/usr/bin/env bash
# A run of any pmpd command over the nodes of a Slurm job:
#
#   sbatch --nodes=4 --gpus-per-node=8 cluster/slurm.sh label --model-path /shared/anyprec … --output-dir /shared/labels
#
# One Ray node per Slurm node, the head and the command on the first. The folder the job starts in (or PMPD_VENV)
# has the environment; results and models lie where all nodes see them. Submitted again, the run goes on.
#SBATCH --job-name=pmpd
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --signal=B:TERM@120
#SBATCH --open-mode=append
#SBATCH --requeue
set -euo pipefail

[ $# -gt 0 ] || { echo "usage: sbatch [--nodes=N …] $0 COMMAND [FLAGS]   (as for pmpd)" >&2; exit 2; }
venv=${PMPD_VENV:-$PWD/.venv}
[ -x "$venv/bin/pmpd" ] || { echo "error: no pmpd in $venv; set PMPD_VENV to the environment it is installed in" >&2; exit 2; }
export PATH="$venv/bin:$PATH"

# Ports of this job's own, so that two jobs on one node do not meet.
port=${PMPD_RAY_PORT:-$((20000 + SLURM_JOB_ID % 20000))}
nodes=($(scontrol show hostnames "$SLURM_JOB_NODELIST"))
head=${nodes[0]}
address=$(srun --nodes=1 --ntasks=1 --overlap -w "$head" hostname --ip-address | awk '{print $1}')

# Whoever can reach an open Ray can run anything on it: a token of this job's own, readable by its user alone.
umask 077
private=$(mktemp -d "${TMPDIR:-/tmp}/pmpd-$SLURM_JOB_ID-XXXX")
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')

steps=()
finish() {
  for step in "${steps[@]}"; do kill -TERM "$step" 2>/dev/null || true; done
  wait "${steps[@]}" 2>/dev/null || true
  rm -rf "$private"
}
trap finish EXIT

gpus=${SLURM_GPUS_ON_NODE:-0}
common=(--num-cpus="${SLURM_CPUS_PER_TASK:-1}" --num-gpus="$gpus" --disable-usage-stats --block)
srun --nodes=1 --ntasks=1 --overlap -w "$head" \
  ray start --head --node-ip-address="$address" --port="$port" --include-dashboard=false \
  --temp-dir="$private" "${common[@]}" &
steps+=($!)
for _ in $(seq 120); do
  (exec 3<>"/dev/tcp/$address/$port") 2>/dev/null && break
  kill -0 "${steps[0]}" 2>/dev/null || { echo "error: Ray's head did not start on $head" >&2; exit 1; }
  sleep 1
done
if [ "${#nodes[@]}" -gt 1 ]; then
  others=$(IFS=,; echo "${nodes[*]:1}")
  srun --nodes=$((${#nodes[@]} - 1)) --ntasks=$((${#nodes[@]} - 1)) --ntasks-per-node=1 --overlap -w "$others" \
    ray start --address="$address:$port" "${common[@]}" &
  steps+=($!)
fi

# In the background and waited for, so that Slurm's signal reaches it: it then releases its folder and keeps its rows.
RAY_ADDRESS="$address:$port" pmpd "$@" &
command=$!
trap 'kill -TERM "$command" 2>/dev/null || true' TERM INT
code=0
wait "$command" || code=$?
if kill -0 "$command" 2>/dev/null; then code=0; wait "$command" || code=$?; fi
exit "$code"
