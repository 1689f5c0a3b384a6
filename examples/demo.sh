#!/usr/bin/env bash
# Measure a real model, halve its FFNs four ways, compare. Usage: examples/demo.sh MODEL [TEXT]
#
# TEXT (a .txt file, such as WikiText-2's test part) replaces the held-out Python documentation
# that the models are compared on.
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
echo "2. Cut: half of every FFN's channels, chosen four ways. Each result is checked against the masked dense model."
show surgery prune "$atlas" --model "$model" --sparsity 0.5 --method scar-prot -o "$work/scar-prot"
show surgery prune "$atlas" --model "$model" --sparsity 0.5 --method scar-prot --recover lstsq -o "$work/scar-prot-lstsq"
show surgery prune "$atlas" --model "$model" --sparsity 0.5 --method magnitude -o "$work/magnitude"
show surgery prune "$atlas" --model "$model" --sparsity 0.5 --method magnitude --protect supernodes -o "$work/magnitude-protected"
show surgery prune "$atlas" --model "$model" --sparsity 0.5 --method random -o "$work/random"

echo
echo "3. Compare: perplexity on text that was not measured on."
show surgery eval "$model" "$work"/{scar-prot,scar-prot-lstsq,magnitude,magnitude-protected,random} --data "$data" --max-tokens 8192

cat <<END

How to read the table. All cuts remove the same number of channels; none was trained afterwards.
- scar-prot ranks channels by their loss proxy and keeps all supernodes. Expect a model that is
  worse than the dense one, and still a language model.
- scar-prot-lstsq removes the same channels, and refits in closed form what the others write. Expect
  much of the damage undone.
- magnitude ranks by weight norms. Expect over half of the supernodes gone, and nothing usable left.
- magnitude-protected differs from it in about 1% of the channels, the supernodes. Compare the two
  perplexities to see what that 1% is worth, and then with scar-prot: the others matter too.
- random takes about half of the supernodes; it is the control that every score has to beat.

Browse what was measured:   $(dirname "$(command -v atlas)" | sed "s|$PWD/||")/atlas-tui $atlas
The models are in $work; load one with transformers:
  AutoModelForCausalLM.from_pretrained("$work/scar-prot")
END
