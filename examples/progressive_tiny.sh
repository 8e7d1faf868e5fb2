#!/usr/bin/env bash
# The paper's four stages in miniature: larger clips, longer packs and a temporal patch, each stage started from the
# one before; image to video last. Two CPU cores, a few minutes, no network. What is done already is not done again.
#
#   examples/progressive_tiny.sh [FOLDER]        (default: progressive_run; PYTHON names the interpreter)
set -euo pipefail

project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
run=${1:-progressive_run}
python=${PYTHON:-python}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export PYTHONPATH="$project:$project/kernels${PYTHONPATH:+:$PYTHONPATH}"
megacogvx=("$python" -m megacogvx)

once() {  # once FILE COMMAND...: run COMMAND unless FILE is there
    local made=$1
    shift
    [[ -e $made ]] || "$@"
}

once "$run/videos/captions.jsonl" "$python" "$project/examples/moving_shapes.py" --output "$run/videos"
once "$run/text_encoder/text_encoder/config.json" \
    "$python" "$project/examples/tiny_text_encoder.py" --captions "$run/videos/captions.jsonl" \
    --output "$run/text_encoder"

sizes=("32 --frames 1 9" "48 --frames 1 9" "64 --frames 9 17")
for stage in 1 2 3; do
    read -ra size <<<"${sizes[stage - 1]}"
    once "$run/clips$stage/clips.jsonl" "${megacogvx[@]}" clips --captions "$run/videos/captions.jsonl" \
        --output "$run/clips$stage" --fps 16 --short-sides "${size[@]}"
done

"${megacogvx[@]}" train-vae --config "$project/examples/configs/vae_demo.yaml" \
    "clips.paths=[$run/clips1]" clips.height=32 clips.width=48 clips.clips_per_step=2 clips.held_out_fraction=0 \
    training.steps=10 training.save_every=10 "training.run_folder=$run/vae"

for stage in 1 2 3; do
    once "$run/stage$stage/manifest.json" "${megacogvx[@]}" encode --clips "$run/clips$stage" --vae "$run/vae" \
        --text-encoder "$run/text_encoder" --text-length 32 --measure-clips 4 --first-frame --output "$run/stage$stage"
done

# A clip's place in its video stands in for the score that a real dataset's curation gives.
once "$run/stage3/columns" "${megacogvx[@]}" data column "$run/stage3" --name quality \
    --from-metadata start --rank

for stage in 1 2 3 4; do
    start=()
    ((stage == 1)) || start=("training.start_from=$run/runs/stage$((stage - 1))")
    "${megacogvx[@]}" train --config "$project/examples/configs/progressive_tiny_stage$stage.yaml" \
        "data.paths=[$run/stage$((stage < 4 ? stage : 3))]" "training.run_folder=$run/runs/stage$stage" "${start[@]}"
done

"${megacogvx[@]}" train --config "$project/examples/configs/progressive_tiny_i2v.yaml" "data.paths=[$run/stage3]" \
    "image.vae=$run/vae" "training.run_folder=$run/runs/i2v" "training.start_from=$run/runs/stage4"
