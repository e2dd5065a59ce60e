#!/bin/bash
# Trains with gatewise under Slurm. At preemption and before the time limit the ranks save, and the
# job goes back into the queue; it goes on in the same folder.
#
#   sbatch slurm.sh experiment=quickstart parallel.expert=2
#
# `gatewise submit submit.launcher=slurm` writes the lines between the two marks; in a copy of this
# file they are yours to edit. Nothing below them differs.
# --- settings
#SBATCH --job-name=gatewise
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=2
#SBATCH --time=1:00:00
#SBATCH --signal=B:USR2@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=gatewise-%j.log
RUN_DIR=$PWD/runs/$SLURM_JOB_ID # the same after a requeue
RANKS_PER_NODE=2
RESTARTS=0       # starts of all ranks after a crash, by torchrun, without leaving the queue
MAX_REQUEUES=100 # 0: save and end with 85 instead
SIGNAL=USR2      # as in --signal above
HEAD=            # address of the first node; empty: its name
PYTHON=python
CODE=            # folder to import gatewise from; empty: the installed one
SRUN_OPTIONS=()  # as (--container-image=image.sqsh --container-mounts=/data:/data)
PREFIX=()        # as (apptainer exec --nv --bind /data image.sif)
ARGUMENTS=("$@")
# --- end of settings

restart=${SLURM_RESTART_COUNT:-0}
say() { echo "[$(date '+%F %T')] job $SLURM_JOB_ID, start $restart: $*"; }
job_says() { scontrol show job "$SLURM_JOB_ID" | grep -Eq "$1"; }

mkdir -p "$RUN_DIR" || exit 2
# The ranks leave here what the script has to do; see the cases at the end.
export GATEWISE_OUTCOME=$RUN_DIR/.outcome-$SLURM_JOB_ID.$restart
rm -f "$GATEWISE_OUTCOME"

# The ranks meet at the first node, never at "localhost": each node would be a world of its own.
# A restart takes another port and another name, so that nothing of the last one is met.
head=${HEAD:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
if [ -z "$head" ]; then
  say "the nodes of the job are not known; set HEAD"
  exit 2
fi
port=$((10000 + (SLURM_JOB_ID * 7 + restart) % 20000))

export SLURM_EXPORT_ENV=ALL # srun passes on what this script sets
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
if [ -z "$OMP_NUM_THREADS" ]; then
  threads=$((SRUN_CPUS_PER_TASK / RANKS_PER_NODE))
  export OMP_NUM_THREADS=$((threads > 0 ? threads : 1))
fi
export PYTHONSAFEPATH=1
[ -z "$CODE" ] || export PYTHONPATH=$CODE${PYTHONPATH:+:$PYTHONPATH}
# Without it restarted ranks read what the last start left in the agents' store (pytorch#135712).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600 # seconds that torchrun leaves the ranks to save

say "$SLURM_NNODES nodes, $RANKS_PER_NODE ranks each, meeting at $head:$port -> $RUN_DIR"
# A signal to a step reaches all its processes. torchrun would die of it, so it starts deaf; the
# ranks listen for themselves.
srun --kill-on-bad-exit=0 --wait=600 "${SRUN_OPTIONS[@]}" \
  bash -c 'trap "" "$0"; exec "$@"' "$SIGNAL" "${PREFIX[@]}" \
  "$PYTHON" -m torch.distributed.run --nnodes="$SLURM_NNODES" \
  --nproc-per-node="$RANKS_PER_NODE" --max-restarts="$RESTARTS" --rdzv-backend=c10d \
  --rdzv-endpoint="$head:$port" --rdzv-id="$SLURM_JOB_ID.$restart" \
  -m gatewise.launch.train "${ARGUMENTS[@]}" "run.dir=$RUN_DIR" &
step=$!

# Slurm signals this shell alone. A rank that is still importing does not listen yet: ask again.
ask() {
  say "SIG$SIGNAL: asking the ranks to save"
  while kill -0 "$step" 2>/dev/null; do
    scancel --signal="$SIGNAL" "$SLURM_JOB_ID.0" 2>/dev/null
    sleep 5
  done &
}
trap ask "$SIGNAL"
trap 'say "SIGTERM: waiting for the ranks to save"' TERM
status=0
while true; do # a signal interrupts wait
  wait "$step"
  status=$?
  kill -0 "$step" 2>/dev/null || break
done

code=$(cat "$GATEWISE_OUTCOME" 2>/dev/null || echo none)
rm -f "$GATEWISE_OUTCOME"
say "the step ended with $status, the ranks with $code"
if [ "$code" = none ] && job_says 'PreemptTime=[0-9]'; then
  say "preempted before the ranks could save; the last checkpoint counts"
  code=85
fi
case $code in
  0 | 2) exit "$code" ;; # done, or a mistake that another start would repeat
  85) ;;
  *) exit "$status" ;;
esac
if job_says 'JobState=CANCELLED'; then
  say "saved; not requeued, because the job was cancelled"
elif [ "$restart" -ge "$MAX_REQUEUES" ]; then
  say "saved; not requeued after $restart requeues"
elif scontrol requeue "$SLURM_JOB_ID"; then
  say "saved; requeued"
  trap 'exit 85' TERM
  sleep 300 # Slurm ends this script
else
  say "saved; Slurm does not requeue the job, submit it again to go on"
fi
exit 85
