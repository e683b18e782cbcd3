#!/usr/bin/env bash
# The whole pipeline on this machine: drawings -> pretrained backbone -> detector -> COCO mAP. Called by `make demo`.
# Run again, it resumes where it stopped; a finished stage says so and does nothing.
set -euo pipefail
runs=${1:-runs/demo}
times=()
# OpenMP threads that wait give up their core. If they spun instead, a busy machine would need several times as long.
export OMP_WAIT_POLICY=PASSIVE

stage() { # stage NAME COMMAND...: print the command, run it, and record the seconds that it takes
    local name=$1 start=$SECONDS
    shift
    printf '\n== %s\n%s\n' "$name" "$*"
    "$@"
    times+=("$(printf '%-10s %4d s' "$name" $((SECONDS - start)))")
}

# In float32, though bf16 is faster where a CPU has it: the figures are then the same on every machine.
stage draw python -m schematics.synthetic --out "$runs/data" --sheets 80 --seed 0
stage pretrain python -m simclr.pretrain --data-dir "$runs/data/unlabeled" --exp-dir "$runs/pretrain" \
    --arch resnet18 --projector 512 128 --batch-size 32 --lr-scaling sqrt --steps 50 --image-size 64 --window 128 \
    --precision fp32
stage finetune python -m detection.finetune --data-dir "$runs/data" --exp-dir "$runs/finetune" \
    --backbone "$runs/pretrain/backbone.safetensors" --steps 320 --validate-every 100 --batch-size 4 --lr 0.02 \
    --scheduler cosine --warmup-steps 30 --window 256 --fpn-channels 128 --log-every 20 --precision fp32
stage evaluate python evaluate/evaluate.py --checkpoint "$runs/finetune/model.pt" --data-dir "$runs/data" \
    --split test --out "$runs/evaluate" --pictures 3

printf '\nTime of each stage\n'
printf '  %s\n' "${times[@]}"
printf 'Detections on three sheets: %s\n' "$(realpath "$runs/evaluate/pictures")"
printf 'Report:                     %s\n' "$(realpath "$runs/evaluate/report.html")"
