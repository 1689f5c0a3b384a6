#!/usr/bin/env bash
# Measure a real model, halve its FFNs four ways, and compare the results. Usage: examples/demo.sh MODEL [TEXT]
#
# The models are compared on held-out Python documentation, or on TEXT, a .txt file such as WikiText-2's test part; and on a text
# of another kind, source code. The last thing printed is a table with sizes, perplexities and answers.
set -euo pipefail

model=$1
data=${2:-pydoc}
question="What is the capital of France?"
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
echo "3. Compare: perplexity on text that was not used in step 1, and on source code, which is text of another kind."
python - "$work/code.txt" <<'END'
import argparse, json.decoder, pathlib, sys, textwrap
modules = (argparse, textwrap, json.decoder)
pathlib.Path(sys.argv[1]).write_text("\n".join(pathlib.Path(module.__file__).read_text("utf-8") for module in modules), "utf-8")
END
models=("$model" "$work"/{scar-prot,scar-prot-lstsq,magnitude,magnitude-protected,random})
evaluate() {
  printf '\n$ surgery eval %s > %s\n' "${*:2}" "$1"
  surgery eval "${@:2}" > "$1"
}
evaluate "$work/held-out.json" "${models[@]}" --data "$data" --max-tokens 8192 --prompt "$question" --answer-tokens 24 --json
evaluate "$work/code.json" "${models[@]}" --data "$work/code.txt" --max-tokens 4096 --json

echo
python - "$work"/{held-out,code}.json <<'END'
import json, pathlib, sys
held_out, code = (json.loads(pathlib.Path(path).read_text("utf-8")) for path in sys.argv[1:])
headings = [f"perplexity, {name}" for name in (pathlib.Path(held_out["data"]).name, "source code")]


def name_of(model):
    return pathlib.Path(model["model"]).name if pathlib.Path(model["model"]).is_dir() else "dense (4 bits)"


def size_of(model):
    path = pathlib.Path(model["model"])
    files = [path] if path.is_file() else path.glob("model*.safetensors")
    return f"{sum(file.stat().st_size for file in files) / 1e6:.0f} MB"


def shown(model):
    return "beyond float64" if model["perplexity"] is None else f"{model['perplexity']:,.4g}"


print(f"{'model':<21}{'parameters':>10}{'size':>8}" + "".join(f"{heading:>25}" for heading in headings))
for one, two in zip(held_out["models"], code["models"]):
    print(f"{name_of(one):<21}{one['parameters'] / 1e6:>9.1f}M{size_of(one):>8}{shown(one):>25}{shown(two):>25}")
print(f"\nThe answers to: {held_out['models'][0]['answers'][0]['prompt']}")
for one in held_out["models"]:
    print(f"{name_of(one):<21}{' '.join(one['answers'][0]['answer'].split())[:100]!r}")
END

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
- No atlas was measured on source code. A cut whose scores and refit come from one kind of text costs more on another kind.

Browse the atlas:             $(dirname "$(command -v atlas)" | sed "s|$PWD/||")/atlas-tui $atlas
The models are in $work. Load a model with transformers:
  AutoModelForCausalLM.from_pretrained("$work/scar-prot")
END
