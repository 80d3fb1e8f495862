#!/bin/sh
# Starts a recipe with torchrun, on one node or on several; arguments are those of python -m train.
#
#     sh launch/torchrun.sh -cn tiny                                            # all GPUs of this node, or one rank on CPUs
#     NODES=4 FIRST=node0:29500 sh launch/torchrun.sh -cn nemotron3_nano        # the same line on each of four nodes
#
# NODES     nodes, or a range such as 2:4: the run goes on with fewer when some are lost
# RANKS     ranks of a node; default one per GPU
# FIRST     host:port of one of the nodes, where all meet; needed with more than one
# JOB       a name that the nodes of one run share and no other run at FIRST has
# RESTARTS  how often ranks are started again after one of them died: each time they go on from the newest checkpoint
set -eu
nodes=${NODES:-1} ranks=${RANKS:-}
python=${PYTHON:-python}
if [ -z "$ranks" ]; then
    ranks=$("$python" -c 'import torch; print(max(1, torch.cuda.device_count()))')
fi
if [ "$nodes" = 1 ]; then
    meeting=--standalone
elif [ -n "${FIRST:-}" ]; then
    meeting="--rdzv-backend=c10d --rdzv-endpoint=$FIRST --rdzv-id=${JOB:-nibble}"
else
    echo "error: NODES=$nodes needs FIRST=host:port, the node where all meet" >&2
    exit 2
fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# shellcheck disable=SC2086  # two or three options
exec "$python" -m torch.distributed.run --nnodes "$nodes" --nproc-per-node "$ranks" --max-restarts "${RESTARTS:-3}" \
    --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 $meeting -m train "$@"
