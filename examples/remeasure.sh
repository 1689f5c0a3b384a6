#!/usr/bin/env bash
# Ask three questions about the measurements of the paper, for a model of your own. docs/remeasured.md has the answers for
# SmolLM2.
# Usage: examples/remeasure.sh MODEL CALIBRATION.txt EVALUATION.txt [DIR]
set -euo pipefail

model=$1
calibration=$2
evaluation=$3
work=${4:-.demo/remeasure}
examples=$(dirname "$0")
mkdir -p "$work"

show() {
  printf '\n$ %s\n' "$*"
  "$@"
}

echo "1. Does keeping the supernodes matter?"
[ -f "$work/packed.h5" ] || show atlas build "$model" -o "$work/packed.h5" --calib "$calibration" --quiet
show surgery sweep "$work/packed.h5" --model "$model" -o "$work/protection" --data "$evaluation" --max-tokens 8192 \
  --methods scar-lp,wanda,magnitude --protections none --protections supernodes --sparsity 0.5

echo
echo "2. What does an absolute epsilon do to the redundancy?"
show python "$examples/redundancy_epsilon.py" "$model" "$calibration"

echo
echo "3. What does padding do to scores?"
# The same lines without padding are measured too, because they hold fewer and other tokens than the packed text.
grep --max-count 64 '[^[:space:]]' "$calibration" > "$work/lines.txt"
show python "$examples/padded_rows.py" "$model" "$calibration" 64 512 "$work/padded.npz"
[ -f "$work/lines.h5" ] || show atlas build "$model" -o "$work/lines.h5" --calib "$work/lines.txt" --quiet
[ -f "$work/padded.h5" ] || show atlas build "$model" -o "$work/padded.h5" --calib "$work/padded.npz" --quiet
for metric in lp activation_power; do
  show atlas compare "$work/packed.h5" "$work/lines.h5" "$work/padded.h5" --metric "$metric"
done
for name in packed lines padded; do
  show atlas report "$work/$name.h5" -o "$work/report-$name" --overwrite --json | grep -E '^\$|"(lp|activation_power)_top_share'
  show surgery sweep "$work/$name.h5" --model "$model" -o "$work/from-$name" --data "$evaluation" --max-tokens 8192 \
    --methods scar-lp,wanda,activation --sparsity 0.5
done
