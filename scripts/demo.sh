#!/usr/bin/env bash
# The main job on bundled real data (40 hippocampus MRIs): check, plan, preprocess, train, predict, evaluate.
# About five minutes on two CPU cores. Run it again and it resumes; delete demo_output/ to start from the beginning.
set -euo pipefail
source "$(dirname "$0")/setup.sh"
data=$PWD/tests/data/Task04_Hippocampus
mkdir -p demo_output
cd demo_output
export NNLITE_WORKSPACE=$PWD/workspace

step() {
    echo
    echo "\$ $*"
    "$@"
}

nnlite doctor || true # its warnings may not matter here
SECONDS=0
step nnlite check "$data"
step nnlite plan "$data"
step nnlite preprocess 3d_fullres
begin=$SECONDS
step nnlite train 3d_fullres 0 --recipe cpu
training=$((SECONDS - begin))
step nnlite predict -i "$data/imagesTs" -o predictions
step nnlite evaluate predictions "$data/labelsTs" --output scores.json
echo
echo "predictions  $PWD/predictions   (8 cases that training never saw)"
echo "scores       $PWD/scores.json"
echo "progress     $NNLITE_WORKSPACE/Task04_Hippocampus/models/3d_fullres-cpu/fold_0/progress.png"
python - <<'PY'
import json
scores = json.load(open("scores.json"))
for value, name in scores["labels"].items():
    print(f"Dice {name:12} {scores['mean'][value]['Dice']:.4f}")
print(f"Dice {'mean':12} {scores['foreground_mean']['Dice']:.4f}")
PY
echo "time         $SECONDS s from check to score, of which training with validation $training s"
case ${SHELL:-} in *fish) activate=activate.fish ;; *csh) activate=activate.csh ;; *) activate=activate ;; esac
echo
echo "what comes next, to copy into this shell:"
printf '  source %q\n' "$(dirname "$(command -v nnlite)")/$activate"
printf '  nnlite info -w %q\n' "$NNLITE_WORKSPACE"
printf '  nnlite plan %q\n' "$data"
echo "and for your own images: nnlite plan FOLDER"
