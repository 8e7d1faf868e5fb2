#!/usr/bin/env bash
# One node's part of a training under torchrun; start it on every node with the same NNODES and MASTER_ADDR.
#
#   NNODES=8 MASTER_ADDR=node0 examples/launch/torchrun.sh               stage 4 of the 5B model
#   examples/launch/torchrun.sh CONFIG section.key=value ...             another stage, here on one node
#   ... CONFIG data.samples_per_step=null data.packs_per_step=P          as many packs as divide over the replicas
#   VERB=train-vae examples/launch/torchrun.sh CONFIG ...                a VAE
#
# MASTER_ADDR is one of the nodes; MASTER_PORT and the port after it have to be free there. GPUS_PER_NODE is 8 unless it
# is set, RUN_ID has to differ between runs that share MASTER_ADDR.
#
# By itself: stage 4 of the 5B model (fine-tuning, 700k tokens a pack) on 8 nodes of 8 H100-80. Its 100 samples
# are 12 packs, so there is work for 4 or so replicas, not for more. A pack's activations need 16 GPUs: tensor 2 x
# context 8. Tensor ranks halve weights and gradients, context ranks only activations, and both together stay under
# 80 GB; keep_attention, since the quadratic part of 86k-token clips is 71% of the time and not worth repeating.
# README.md beside this file has the numbers of all stages.
#
# `megacogvx doctor` looks at the machines first. SIGTERM and SIGUSR1 end every rank after its step, with a checkpoint;
# then this script's exit status is 75: start it again to go on. One that comes while the doctor looks ends the script
# before the training begins. Other failures restart the ranks RESTARTS times from the newest checkpoint.
set -euo pipefail

nodes=${NNODES:-1}
run=${RUN_ID:-megacogvx}
gpus=${GPUS_PER_NODE:-8}
address=${MASTER_ADDR:-127.0.0.1}
port=${MASTER_PORT:-29500}
restarts=${RESTARTS:-3}
python=${PYTHON:-python}
verb=${VERB:-train}
stopped=75

config=${1:-examples/configs/cogvideox_5b_stage4.yaml}
(($# > 0)) && shift
overrides=("$@")
[[ $config != *cogvideox_5b_stage4.yaml || $* == *_per_step=* ]] ||
    overrides=(data.samples_per_step=null data.packs_per_step=12 "$@")

ranks() {  # ranks PORT RESTARTS VERB...: run VERB on every GPU of all nodes
    exec "$python" -m torch.distributed.run --nnodes "$nodes" --nproc-per-node "$gpus" --rdzv-backend c10d \
        --rdzv-endpoint "$address:$1" --rdzv-id "$run" ${LOCAL_ADDR:+--local-addr "$LOCAL_ADDR"} \
        --max-restarts "$2" -m megacogvx "${@:3}"
}

agent=
stopping=
# shellcheck disable=SC2329  # the trap calls it
stop() {  # the agent itself would give its ranks 30 seconds; they get as long as a step and a checkpoint take
    stopping=1
    local children
    children=$(pgrep -P "$agent" || true)
    # shellcheck disable=SC2086  # one word for each process
    [[ -z $children ]] || kill -USR1 $children 2>/dev/null || true
    for child in $children; do
        while kill -0 "$child" 2>/dev/null; do sleep 0.2; done
    done
    kill -TERM "$agent" 2>/dev/null || true
}

trap 'exit "$stopped"' TERM USR1  # once the doctor is done: there is nothing to save yet
(ranks "$((port + 1))" 0 doctor --folder "${DOCTOR_FOLDER:-runs}")

(ranks "$port" "$restarts" "$verb" --config "$config" "${overrides[@]}") &
agent=$!
trap stop TERM USR1
status=0
wait "$agent" || status=$?
while kill -0 "$agent" 2>/dev/null; do  # a trap ends wait early
    wait "$agent" || status=$?
done
[[ -z $stopping ]] || exit "$stopped"
exit "$status"
