#!/usr/bin/env bash
# Measure a real model, halve its FFNs four ways, and compare the results. Usage: examples/demo.sh MODEL [TEXT]
#
# The models are compared on held-out Python documentation, or on TEXT, a .txt file such as WikiText-2's test part.
set -euo pipefail

model=$1
data=${2:-pydoc}
work=.demo/run
atlas=$work/smollm2.h5
rm -rf "$work"
mkdir -p "$work"

show() {
  printf '\n$ %s\n' "$*"
  "$@"
}

echo "1. Measure: one pass over 32 x 512 tokens of the language reference that ships with Python."
show atlas build "$model" -o "$atlas" --calib pydoc --sequences 32

echo
echo "2. Cut: remove half of every FFN's channels, chosen in four ways. One cut is also refitted. Each result is checked against the masked dense model."
show surgery prune "$atlas" --model "$model" --sparsity 0.5 --method scar-prot -o "$work/scar-prot"
show surgery prune "$atlas" --model "$model" --sparsity 0.5 --method scar-prot --recover lstsq -o "$work/scar-prot-lstsq"
show surgery prune "$atlas" --model "$model" --sparsity 0.5 --method magnitude -o "$work/magnitude"
show surgery prune "$atlas" --model "$model" --sparsity 0.5 --method magnitude --protect supernodes -o "$work/magnitude-protected"
show surgery prune "$atlas" --model "$model" --sparsity 0.5 --method random -o "$work/random"

echo
echo "3. Compare: perplexity on text that was not used in step 1."
show surgery eval "$model" "$work"/{scar-prot,scar-prot-lstsq,magnitude,magnitude-protected,random} --data "$data" --max-tokens 8192

cat <<END

How to read the table. All cuts remove the same number of channels, and no cut was trained afterwards.
- scar-prot ranks channels by their loss proxy and keeps all supernodes. Expect a model that is worse than the dense
  model, but still a language model.
- scar-prot-lstsq removes the same channels, and refits the write projections of the kept channels in closed form.
  Expect much of the damage to be undone.
- magnitude ranks channels by weight norms. Expect that over half of the supernodes are removed, and that the model is
  not usable.
- magnitude-protected differs from magnitude in about 1% of the channels, the supernodes. Compare the perplexities of
  the two to see what this 1% is worth. Then compare with scar-prot: the other channels matter too.
- random removes about half of the supernodes. It is the control that every score has to beat.

Browse the atlas:             $(dirname "$(command -v atlas)" | sed "s|$PWD/||")/atlas-tui $atlas
The models are in $work. Load a model with transformers:
  AutoModelForCausalLM.from_pretrained("$work/scar-prot")
END
