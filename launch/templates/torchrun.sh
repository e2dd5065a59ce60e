#!/bin/bash
# Trains with gatewise under torchrun, on this machine or on several: start the same script with the
# same settings on each, and NODES and HEAD set.
#
#   bash torchrun.sh experiment=quickstart parallel.expert=2
#
# `gatewise submit submit.launcher=torchrun` writes the lines between the two marks; in a copy of
# this file they are yours to edit. Nothing below them differs.
# --- settings
RUN_DIR=$PWD/runs/torchrun
NODES=1
RANKS_PER_NODE=2
RESTARTS=0      # starts of all ranks after a crash
HEAD=           # with several nodes: address of one of them
PORT=29400      # with several nodes: a free port there
PYTHON=python
CODE=           # folder to import gatewise from; empty: the installed one
PREFIX=()       # as (apptainer exec --nv --bind /data image.sif)
ARGUMENTS=("$@")
# --- end of settings

mkdir -p "$RUN_DIR" || exit 2
# The ranks leave here what the script ends with; torchrun itself knows 0 and 1 only.
export GATEWISE_OUTCOME=$RUN_DIR/.outcome
rm -f "$GATEWISE_OUTCOME"

if [ -z "$OMP_NUM_THREADS" ]; then
  threads=$(($(nproc) / RANKS_PER_NODE))
  export OMP_NUM_THREADS=$((threads > 0 ? threads : 1))
fi
export PYTHONSAFEPATH=1
[ -z "$CODE" ] || export PYTHONPATH=$CODE${PYTHONPATH:+:$PYTHONPATH}
# Without it restarted ranks read what the last start left in the agents' store (pytorch#135712).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600 # seconds that torchrun leaves the ranks to save

meeting=(--standalone)
if [ "$NODES" -gt 1 ]; then
  if [ -z "$HEAD" ]; then
    echo "NODES is $NODES but HEAD is empty; set it to the address of one of the nodes" >&2
    exit 2
  fi
  meeting=(--rdzv-backend=c10d "--rdzv-endpoint=$HEAD:$PORT" "--rdzv-id=${RUN_DIR//[^[:alnum:]]/_}")
fi
"${PREFIX[@]}" "$PYTHON" -m torch.distributed.run --nnodes="$NODES" \
  --nproc-per-node="$RANKS_PER_NODE" --max-restarts="$RESTARTS" "${meeting[@]}" \
  -m gatewise.launch.train "${ARGUMENTS[@]}" "run.dir=$RUN_DIR" &
agent=$!

trap 'kill -TERM "$agent" 2>/dev/null' TERM INT USR1 USR2 # the ranks save and end
status=0
while true; do # a signal interrupts wait
  wait "$agent"
  status=$?
  kill -0 "$agent" 2>/dev/null || break
done

code=$(cat "$GATEWISE_OUTCOME" 2>/dev/null || echo none)
[ "$NODES" -gt 1 ] || rm -f "$GATEWISE_OUTCOME" # the other nodes read it too
case $code in
  0 | 2 | 85) exit "$code" ;; # done, a mistake, or saved: start again to go on
  *) exit "$status" ;;
esac
