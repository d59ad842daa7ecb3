#!/usr/bin/env bash
# The whole scheduler study on one device: prompts, cost of each rule, label sets, exactness, decode times, classifiers, one
# small folder of all of it, tables.
#   bash bench/frontier.sh TEXTS QUESTIONS QUANTIZED UNQUANTIZED OUT NAME
# On one GPU, 4,400 prompts, some 6 minutes of an H200 (PARTS processes share it):
#   DEVICE=cuda PARTS=4 bash bench/frontier.sh texts.jsonl question.jsonl anyprec unquantized study frontier_smollm2
# On a CPU: SIZE=320 NOISE=64 NEW=64 LONGEST=128 SLOTS=32 REFERENCE=float32 bash bench/frontier.sh …
# STEPS names some of the steps only; a step does its work again. UNQUANTIZED is a folder (of a GGUF file:
# `python -m bench.frontier unpack`). TEXTS is what `python -m bench.frontier texts` wrote.
set -euo pipefail
texts=$1 questions=$2 quantized=$3 unquantized=$4 out=$5 name=$6
size=${SIZE:-4400} noise=${NOISE:-512} parts=${PARTS:-1} device=${DEVICE:-cpu} python=${PYTHON:-python}
seconds=${SECONDS_EACH:-100000} # a step may take at most
mkdir -p "$out/pack"
label() {
  timeout -k 5 "$seconds" "$python" -m bench.frontier_labels --texts "$out/texts" --model-path "$quantized" \
    --reference-model-path "$unquantized" --output "$out" --size "$size" --max-new-tokens "${NEW:-256}" \
    --max-prompt-tokens "${LONGEST:-256}" --slots "${SLOTS:-256}" --device "$device" --dtype "${DTYPE:-auto}" \
    --reference-dtype "$(cat "$out/reference_dtype")" --other-dtype "${OTHER:-bfloat16}" "$@"
}
[ -e "$out/reference_dtype" ] || echo "${REFERENCE:-float32}" >"$out/reference_dtype"
sets=(main bfloat16 space cut tokens)

step() { echo "== $1, $(date +%T)"; }
kernel() { # the faster one of those that `cost` has measured
  "$python" - "$out" <<'P'
import json, pathlib, sys
best = {}
for path in pathlib.Path(sys.argv[1]).glob("costs-cost_*.json"):
    last = {(c["kind"], c["step"]): c["seconds"] for c in json.loads(path.read_text())}
    if any(step == "agreement" for _, step in last):
        best[path.stem.split("_")[1].rsplit("-", 1)[0]] = sum(last.values())
print(min(best, key=best.get, default="auto"))
P
}
of_kernel() { [ "$1" = auto ] || echo "--kernel $1"; }

for each in ${STEPS:-prompts cost steps labels finish pack judge study}; do
  step "$each"
  case $each in
    prompts)
      "$python" -m bench.frontier prompts --whole --texts "$texts" --questions "$questions" --output "$out/texts" \
        --continuations $((size / 2)) --tasks $((size / 2))
      ;;
    cost) # each rule alone on the device, the second time without what is done once
      for k in ${KERNELS:-auto dense}; do
        # shellcheck disable=SC2046 # words on purpose
        label --sets cost cost --noise-size "${COST:-256}" --name "cost_$k" $(of_kernel "$k") || true
      done
      ls "$out"/costs-cost_* >/dev/null || echo float16 >"$out/reference_dtype" # the device has no float32 forward
      ;;
    steps)
      timeout -k 5 "$seconds" "$python" -m bench.frontier steps --model-path "$quantized" --device "$device" \
        --output "$out/pack/steps.json" || true
      ;;
    labels)
      chosen=${KERNEL:-$(kernel)}
      echo "kernel: $chosen"
      ids=()
      for ((part = 0; part < parts; part++)); do
        # shellcheck disable=SC2046
        label --sets "${sets[@]}" --noise-size "$noise" --part "$part/$parts" $(of_kernel "$chosen") &
        ids+=($!)
      done
      for id in "${ids[@]}"; do wait "$id" || echo "a part ended with an error"; done
      ;;
    finish) label --sets "${sets[@]}" --noise-size "$noise" --finish ;;
    pack) "$python" -m bench.frontier pack --study "$out" --output "$out/pack" ;;
    judge) # what needs a model and what needs a device, beside each other
      # shellcheck disable=SC2207
      chosen=($(of_kernel "${KERNEL:-$(kernel)}"))
      models=(--model-path "$quantized" --reference-model-path "$unquantized" --device "$device")
      ids=()
      timeout -k 5 "$seconds" "$python" -m bench.frontier exact --labels "$out"/main/kl/{continuations,instructions} \
        "${models[@]}" --prompts "${EXACT:-24}" --output "$out/pack/exact.json" &
      ids+=($!)
      timeout -k 5 "$seconds" "$python" -m bench.frontier online --pack "$out/pack" --study "$out" "${models[@]}" \
        --reference-dtype "$(cat "$out/reference_dtype")" --folds "${FOLDS:-5}" --prompts "${ONLINE:-640}" \
        "${chosen[@]}" --output "$out/pack/online.json" &
      ids+=($!)
      for rule in rouge_l agreement kl loss; do
        timeout -k 5 "$seconds" "$python" -m bench.frontier fit --study "$out" --pack "$out/pack" --rule "$rule" \
          --folds "${FOLDS:-5}" --epochs "${EPOCHS:-30}" --device "$device" &
        ids+=($!)
      done
      for id in "${ids[@]}"; do wait "$id" || echo "one of them ended with an error"; done
      ;;
    study)
      more=()
      for what in steps exact online; do [ -e "$out/pack/$what.json" ] && more+=("--$what" "$out/pack/$what.json"); done
      "$python" -m bench.frontier study --pack "$out/pack" --folds "${FOLDS:-5}" "${more[@]}" --targets 2.5 2.75 3 3.25 3.5 --device "$device" \
        --resamples "${RESAMPLES:-10000}" --name "$name"
      ;;
  esac
done
step end
