#!/usr/bin/env bash
# The folders that bench/label_noise.py compares: the same records labelled again with bfloat16 instead of
# float32, with a space before the text, cut at another length, with twice the new tokens.
#   bash bench/label_noise.sh RECORDS.jsonl QUANTIZED UNQUANTIZED OUT [PROMPTS] [RULES]
# A folder that is finished is not done again. PMPD runs a command (default: python -m pmpd).
set -euo pipefail
records=$1 quantized=$2 unquantized=$3 out=$4 size=${5:-64} rules=${6:-"kl agreement"}
pmpd=${PMPD:-python -m pmpd}
mkdir -p "$out/space"
python - "$records" "$out/space/$(basename "$records")" <<'P'
import json, sys
with open(sys.argv[1]) as lines, open(sys.argv[2], "w") as out:
    for line in lines:
        record = json.loads(line)
        out.write(json.dumps({**record, "text": " " + record["text"]}) + "\n")
P
for rule in $rules; do
  for variant in base bfloat16 space cut tokens; do
    dataset=$records more=(--max-new-tokens 64)
    case $variant in
      bfloat16) more+=(--dtype bfloat16) ;;
      space) dataset=$out/space/$(basename "$records") ;;
      cut) more+=(--seed 1) ;;
      tokens) more=(--max-new-tokens 128) ;;
    esac
    folder=$out/$rule/$variant
    [ -e "$folder/done" ] && continue
    $pmpd label --rule "$rule" --dataset "$dataset" --size "$size" --max-prompt-tokens 128 "${more[@]}" \
      --model-path "$quantized" --reference-model-path "$unquantized" --output-dir "$folder" --num-workers 0
    touch "$folder/done"
  done
done
