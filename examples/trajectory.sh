#!/usr/bin/env bash
# Train a small model, measure its checkpoints, and draw how its supernodes emerge. Usage: examples/trajectory.sh [DIR]
set -euo pipefail

work=${1:-.demo/trajectory}
steps=$(for power in $(seq 0 10); do printf 'checkpoint-%d,' $((1 << power)); done)

show() {
  printf '\n$ %s\n' "$*"
  "$@"
}

mkdir -p "$work"
[ -d "$work/model/checkpoint-1024" ] || show python "$(dirname "$0")/train.py" "$work/model"
show atlas build "$work/model" --revisions "${steps%,}" -o "$work/atlases" --calib pydoc --sequences 64 --seq-len 256 --quiet
show atlas trajectory $(for power in $(seq 0 10); do echo "$work/atlases/checkpoint-$((1 << power)).h5"; done) \
  -o "$work/report" --overwrite
