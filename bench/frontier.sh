#!/usr/bin/env bash
# The whole scheduler study on the devices of one machine: prompts, cost of each rule, label sets, decode times,
# classifiers, one small folder of all of it, tables.
#   bash bench/frontier.sh TEXTS QUESTIONS QUANTIZED UNQUANTIZED OUT NAME
# Every GPU that is visible takes its share: four processes of labels each (PARTS in all), and one rule's cost at a time.
#   DEVICE=cuda bash bench/frontier.sh texts.jsonl question.jsonl anyprec unquantized study frontier_smollm2
# On a CPU: SIZE=320 NOISE=64 NEW=64 LONGEST=128 SLOTS=32 KERNELS=auto bash bench/frontier.sh …
# STEPS names some of the steps only; a step does its work again, and one that fails is told and the others go on. LIMIT: seconds for
# all of it, of which KEEP are for what comes behind the labels; a step that runs into it ends with what it has written. BACK: a
# folder that gets the results as files of few MB each, after every step that has some.
# UNQUANTIZED is a folder (of a GGUF file: `python -m bench.frontier unpack`). TEXTS is what `python -m bench.frontier texts` wrote,
# or a folder of prompts as the first step writes it.
set -uo pipefail
texts=$1 questions=$2 quantized=$3 unquantized=$4 out=$5 name=$6
size=${SIZE:-4400} noise=${NOISE:-512} device=${DEVICE:-cpu} python=${PYTHON:-python}
limit=${LIMIT:-1000000} keep=${KEEP:-150}
models=(--model-path "$quantized" --reference-model-path "$unquantized" --device "$device")
sets=(main bfloat16 space cut tokens)
mkdir -p "$out/pack"
[ -e "$out/reference_dtype" ] || echo "${REFERENCE:-float32}" >"$out/reference_dtype"

# ---- Devices and time

gpus=("${CUDA_VISIBLE_DEVICES:-}")
if [ -n "${gpus[0]}" ]; then
  IFS=, read -ra gpus <<<"${gpus[0]}"
elif [ "$device" = cuda ]; then
  mapfile -t gpus < <(nvidia-smi --query-gpu=index --format=csv,noheader)
fi
parts=${PARTS:-$([ "$device" = cuda ] && echo $((4 * ${#gpus[@]})) || echo 1)}
on() { # NUMBER COMMAND…: on one of the GPUs, in turn
  CUDA_VISIBLE_DEVICES=${gpus[$1 % ${#gpus[@]}]} "${@:2}"
}
within() { # SECONDS COMMAND…: so many seconds less than what is left of LIMIT
  local left=$((limit - SECONDS - $1))
  timeout -k 5 "$((left > 1 ? left : 1))" "${@:2}"
}
step() { echo "== $1, $(date +%T), $SECONDS s"; }
failed() { echo "$1: ended with an error; what comes next goes on"; }
together() { # process ids: waits for all
  local id
  for id in "$@"; do wait "$id" || failed "one of $each"; done
  true
}

# ---- Steps

label() { # SECONDS to leave, options
  within "$1" "$python" -m bench.frontier_labels --texts "$out/texts" "${models[@]}" --output "$out" --size "$size" \
    --noise-size "$noise" --max-new-tokens "${NEW:-256}" --max-prompt-tokens "${LONGEST:-256}" --slots "${SLOTS:-256}" \
    --dtype "${DTYPE:-auto}" --reference-dtype "$(cat "$out/reference_dtype")" --other-dtype "${OTHER:-bfloat16}" "${@:2}"
}
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
back() { # files of few MB
  [ -n "${BACK:-}" ] || return 0
  mkdir -p "$BACK"
  (
    cd "$out" || exit
    for file in pack/curves-*.npz; do [ -e "$file" ] && cp "$file" "$BACK/"; done
    find . \( -path './pack/*' ! -name 'curves-*' -o -name 'costs-*.json' -o -name manifest.json -o -name reference_dtype \) -type f |
      tar czf "$BACK/small.tar.gz" -T -
  ) || failed "copying to $BACK"
}

for each in ${STEPS:-prompts cost steps labels finish pack judge study}; do
  step "$each"
  case $each in
    prompts)
      if [ -e "$texts/continuations.jsonl" ]; then
        mkdir -p "$out/texts" && cp "$texts"/*.jsonl "$out/texts/" || failed "$each"
      else
        "$python" -m bench.frontier prompts --whole --texts "$texts" --questions "$questions" --output "$out/texts" \
          --continuations $((size / 2)) --tasks $((size / 2)) || failed "$each"
      fi
      ;;
    cost) # each rule alone on its device, the second time without what is done once
      ids=()
      for k in ${KERNELS:-auto dense}; do
        # shellcheck disable=SC2046 # words on purpose
        on ${#ids[@]} label "$keep" --sets cost cost --noise-size "${COST:-256}" --name "cost_$k" $(of_kernel "$k") &
        ids+=($!)
        [ ${#ids[@]} -lt ${#gpus[@]} ] || { together "${ids[@]}" && ids=(); }
      done
      together "${ids[@]}"
      ls "$out"/costs-cost_* >/dev/null || echo float16 >"$out/reference_dtype" # the device has no float32 forward
      ;;
    steps)
      on 0 within "$keep" "$python" -m bench.frontier steps --model-path "$quantized" --device "$device" \
        --output "$out/pack/steps.json" || failed "$each"
      ;;
    labels)
      chosen=${KERNEL:-$(kernel)}
      echo "kernel: $chosen, $parts parts on ${#gpus[@]} device(s)"
      ids=()
      for ((part = 0; part < parts; part++)); do
        # shellcheck disable=SC2046
        on "$part" label "$keep" --sets "${sets[@]}" --part "$part/$parts" $(of_kernel "$chosen") &
        ids+=($!)
      done
      together "${ids[@]}"
      ;;
    finish) label 0 --sets "${sets[@]}" --finish || failed "$each" ;;
    pack)
      within 0 "$python" -m bench.frontier pack --study "$out" --output "$out/pack" --device "$device" || failed "$each"
      back
      ;;
    judge) # what needs a model and what needs a device, beside each other
      # shellcheck disable=SC2207
      chosen=($(of_kernel "${KERNEL:-$(kernel)}"))
      common=(--pack "$out/pack" --study "$out" --folds "${FOLDS:-5}")
      ids=()
      judge() {
        on ${#ids[@]} within 8 "$python" -m bench.frontier "$@" &
        ids+=($!)
      }
      judge online "${common[@]}" "${models[@]}" --reference-dtype "$(cat "$out/reference_dtype")" --prompts "${ONLINE:-640}" \
        "${chosen[@]}" --output "$out/pack/online.json"
      for rule in rouge_l agreement kl loss; do
        judge fit "${common[@]}" --rule "$rule" --epochs "${EPOCHS:-30}" --device "$device"
      done
      together "${ids[@]}"
      back
      ;;
    study)
      more=()
      for what in steps online; do [ -e "$out/pack/$what.json" ] && more+=("--$what" "$out/pack/$what.json"); done
      "$python" -m bench.frontier study --pack "$out/pack" --folds "${FOLDS:-5}" "${more[@]}" --targets 2.5 2.75 3 3.25 3.5 \
        --resamples "${RESAMPLES:-10000}" --name "$name" || failed "$each"
      ;;
  esac
done
step end
