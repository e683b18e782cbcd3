#!/usr/bin/env bash
# The whole pipeline on this machine: drawings -> pretrained backbone -> detector -> COCO mAP. Called by `make demo`.
# Run again, it goes on where it was stopped; finished stages say so.
set -euo pipefail
runs=${1:-runs/demo}
times=()

stage() { # name command...: show it, run it, keep its time
    local name=$1 start=$SECONDS
    shift
    printf '\n== %s\n%s\n' "$name" "$*"
    "$@"
    times+=("$(printf '%-10s %4d s' "$name" $((SECONDS - start)))")
}

[ -e "$runs/data" ] || stage draw python -m schematics.synthetic --out "$runs/data" --sheets 80 --seed 0
stage pretrain python -m vicreg.pretrain --data-dir "$runs/data/unlabeled" --exp-dir "$runs/pretrain" \
    --arch resnet18 --projector 512 512 512 --batch-size 64 --steps 60 --image-size 96 --window 192
stage finetune python -m detection.finetune --data-dir "$runs/data" --backbone "$runs/pretrain/backbone.safetensors" \
    --exp-dir "$runs/finetune" --epochs 10 --batch-size 4
stage evaluate python evaluate/evaluate.py --checkpoint "$runs/finetune/model.pt" --data-dir "$runs/data" \
    --split test --out "$runs/evaluate"

printf '\nTime of each stage\n'
printf '  %s\n' "${times[@]}"
printf 'Detections on three sheets: %s\n' "$(realpath "$runs/evaluate")"
