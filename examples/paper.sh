#!/usr/bin/env bash
# Ask every question of "Supernodes and Halos" (arXiv 2604.23475) of a model of your own. docs/paper.md explains each step.
#
# Usage: examples/paper.sh MODEL CALIBRATION EVALUATION [DIR]
# The texts are sources as --calib takes them, of one kind: one part to measure, and another part to judge. Finished steps are not
# repeated: run the same command again after an interruption. Variables change what it costs:
#   DRY=1                 print the commands and run none
#   STEPS="1 5"           run these steps only; step 1 makes the atlas that the others read
#   SEQUENCES=64 SEQ_LEN=512 EVAL_TOKENS=8192 CHANNELS=21 DOSES=0,0.5,1
#   OTHER=pydoc           a text of another kind, for step 10
#   REVISIONS=a,b,c       checkpoints of MODEL on the Hub, for step 11
set -euo pipefail

if [ $# -lt 3 ]; then
  echo "usage: $0 MODEL CALIBRATION EVALUATION [DIR]" >&2
  exit 2
fi
model=$1
calibration=$2
evaluation=$3
work=${4:-.demo/paper}
sequences=${SEQUENCES:-64} seq_len=${SEQ_LEN:-512} eval_tokens=${EVAL_TOKENS:-8192}
channels=${CHANNELS:-21} doses=${DOSES:-0,0.5,1} other=${OTHER:-pydoc}
steps=" ${STEPS:-1 2 3 4 5 6 7 8 9 10 11} "
atlas=$work/atlas.h5
judged=(--model "$model" --data "$evaluation" --seq-len "$seq_len" --max-tokens "$eval_tokens")

show() {
  printf '\n$ %s\n' "$*"
  [ -n "${DRY:-}" ] || "$@"
}
step() {
  [[ $steps == *" $1 "* ]] || return 1
  printf '\n%s. %s\n' "$1" "$2"
}
build() { # FILE SOURCE SEQUENCES
  [ -f "$1" ] || show atlas build "$model" -o "$1" --calib "$2" --sequences "$3" --seq-len "$seq_len"
}
ablate() { # EXPERIMENT NAME OPTIONS
  show surgery ablate "$1" "$atlas" -o "$work/$2" "${judged[@]}" "${@:3}"
}

[ -n "${DRY:-}" ] || mkdir -p "$work"

if step 1 "Concentration, its factors, LP against cheaper metrics, the halo, the read halo: one atlas and its report"; then
  build "$atlas" "$calibration" "$sequences"
  show atlas report "$atlas" -o "$work/report" --overwrite
fi
if step 2 "What does one channel cost, and does LP predict it?"; then
  ablate channels channels --channels "$channels"
fi
if step 3 "What do the supernodes, the halo and their controls cost, one layer at a time and in all layers?"; then
  ablate remove one-layer --select supernodes --select halo --control random,lp-matched --one-layer-at-a-time
  ablate remove all-layers --select supernodes --select halo --control random,lp-matched
fi
if step 4 "Does the halo matter only next to supernodes?"; then
  ablate halo halo
fi
if step 5 "Can a mean take the place of the supernodes?"; then
  ablate mean-replace mean --select supernodes --control random
fi
if step 6 "Every score at half of the channels, and how many supernodes each removes"; then
  show surgery sweep "$atlas" -o "$work/scores" "${judged[@]}" --sparsity 0.5 \
    --methods scar-prot,scar-conn,scar-lp,activation,wanda,wanda-group,flap,taylor,magnitude,random
fi
if step 7 "From 10% to 70% of the channels, with and without a refit"; then
  show surgery sweep "$atlas" -o "$work/sparsity" "${judged[@]}" --sparsity 0.1:0.7:0.1 --methods scar-prot,wanda --recover none,lstsq
fi
if step 8 "Which protected set helps: supernodes, the top by activation, or none?"; then
  show surgery sweep "$atlas" -o "$work/protection" "${judged[@]}" --sparsity 0.5 --methods scar-lp,wanda,activation,magnitude \
    --protections none --protections supernodes --protections top:activation_power=1%
fi
if step 9 "At a fixed share of channels, more and more supernodes among the removed ones"; then
  ablate dose dose --sparsity 0.5 --doses "$doses"
fi
if step 10 "Another text, and less of the same text"; then
  build "$work/other.h5" "$other" "$sequences"
  build "$work/half.h5" "$calibration" "$((sequences / 2))"
  for metric in lp activation_power; do
    show atlas compare "$atlas" "$work/half.h5" "$work/other.h5" --metric "$metric"
  done
  for name in half other; do
    show surgery sweep "$work/$name.h5" -o "$work/from-$name" "${judged[@]}" --sparsity 0.5 --methods scar-conn,scar-lp
  done
fi
if step 11 "Importance over training"; then
  if [ -z "${REVISIONS:-}" ]; then
    echo "skipped: set REVISIONS to checkpoints of the model on the Hub"
  else
    show atlas build "$model" --revisions "$REVISIONS" -o "$work/checkpoints" --calib "$calibration" --sequences "$sequences" --seq-len "$seq_len"
    files=()
    for revision in ${REVISIONS//,/ }; do files+=("$work/checkpoints/$revision.h5"); done
    show atlas trajectory "${files[@]}" -o "$work/trajectory" --overwrite
  fi
fi
