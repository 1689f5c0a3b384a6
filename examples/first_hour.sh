#!/usr/bin/env bash
# A person's first hour: install the wheel, shrink a model to 80%, look, plan, push, heal, convert, and ask a question.
#
# Usage, from a clone: examples/first_hour.sh MODEL. Everything goes to .demo/first-hour. Variables change what it does:
#   BIN=DIR               use the atlas, surgery and python of this directory, and install nothing
#   HF_ENDPOINT, HF_TOKEN a Hub to push to; without HF_ENDPOINT nothing is pushed
#   HEAL_MINUTES=2        how long to heal; TRAIN=lora|ffn|all says what is trained
#   CONVERTER=FILE        llama.cpp's convert_hf_to_gguf.py; without it the line is printed only
#   SEQUENCES, SEQ_LEN, EVAL_TOKENS: the settings of the measurement. The defaults are cheap; those of surgery shrink are better.
set -euo pipefail

model=$1
root=$(cd "$(dirname "$0")/.." && pwd)
work=${WORK:-.demo/first-hour}
train=${TRAIN:-ffn}
sequences=${SEQUENCES:-16} seq_len=${SEQ_LEN:-256} eval_tokens=${EVAL_TOKENS:-4096}
question="What is the capital of France?"
if [ -e "$work" ]; then
  echo "$work exists; remove it, or set WORK to another directory" >&2
  exit 1
fi
mkdir -p "$work"

step() { printf '\n%s\n' "$*"; }
show() {
  printf '\n$ %s\n' "$*"
  "$@"
}

if [ -n "${BIN:-}" ]; then
  step "1. Install: skipped; the commands are those in $BIN"
else
  step "1. Install the wheel into a fresh environment"
  bin=$work/venv/bin
  # The Makefile chooses the build of torch for this machine.
  make --no-print-directory -C "$root" VENV="$(realpath "$work")/venv" "$(realpath "$work")/venv/torch"
  show "$bin/python" -m pip --quiet wheel --no-deps --wheel-dir "$work/dist" "$root"
  show "$bin/python" -m pip --quiet install --constraint "$root/constraints.txt" "$(ls "$work"/dist/chanfmt-*.whl)[gguf,plot]"
  if [ "$train" = lora ]; then show "$bin/python" -m pip --quiet install peft; fi
  BIN=$bin
fi
PATH=$(cd "$BIN" && pwd):$PATH
export PATH

# A text of another kind than the language reference that the model is measured on: source code.
python - "$work/code.txt" <<'END'
import argparse, json.decoder, pathlib, sys, textwrap
modules = (argparse, textwrap, json.decoder)
pathlib.Path(sys.argv[1]).write_text("\n".join(pathlib.Path(module.__file__).read_text("utf-8") for module in modules), "utf-8")
END

step "2. Shrink: measure $sequences x $seq_len tokens of pydoc, cut to 80%, refit, and judge on held-out pydoc and on code"
show surgery shrink "$model" --to 80% -o "$work/small" --format safetensors --calib pydoc --other "$work/code.txt" --methods scar-lp \
  --recover lstsq --sequences "$sequences" --seq-len "$seq_len" --eval-tokens "$eval_tokens"

step "3. Look at what was measured"
show atlas info "$work/small.work/atlas.h5"
show atlas show "$work/small.work/atlas.h5" --layer 0
show atlas report "$work/small.work/atlas.h5" -o "$work/report"

step "4. Plan: what 70% would cost"
show surgery plan "$work/small.work/atlas.h5" --to 70%

step "5. Push"
if [ -n "${HF_ENDPOINT:-}" ]; then
  show surgery push "$work/small" first-hour
else
  echo "skipped: HF_ENDPOINT names no Hub. To publish: surgery push $work/small"
fi

step "6. Heal for ${HEAL_MINUTES:-2} minutes, by training towards the dense model"
show python "$root/examples/heal.py" "$model" "$work/small" -o "$work/healed" --train "$train" --text pydoc --other "$work/code.txt" \
  --minutes "${HEAL_MINUTES:-2}" --length "$seq_len" --batch 2 --eval-tokens "$eval_tokens"

step "7. Convert to GGUF"
answering=("$model" "$work/small" "$work/healed")
convert=(python "${CONVERTER:-convert_hf_to_gguf.py}" "$work/healed" --outtype q8_0 --outfile "$work/healed-q8_0.gguf")
if [ -n "${CONVERTER:-}" ]; then
  show "${convert[@]}"
  answering+=("$work/healed-q8_0.gguf")
else
  echo "skipped: CONVERTER names no convert_hf_to_gguf.py of llama.cpp. With it: ${convert[*]}"
fi

step "8. Ask"
show surgery eval "${answering[@]}" --data "$work/code.txt" --seq-len "$seq_len" --max-tokens "$eval_tokens" --prompt "$question"

echo
echo "The models, the atlas and the report are in $work."
