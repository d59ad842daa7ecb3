#!/usr/bin/env bash
# The whole scheduler study: prompts, references, labels by divergence, noise, exactness, decode times, tables.
#   bash bench/frontier.sh TEXTS QUESTIONS QUANTIZED UNQUANTIZED OUT NAME
# With Ray on a GPU (PER_KIND=2000 of each kind, 256 new tokens):
#   PER_KIND=2000 NEW=256 LONGEST=1024 BATCH=auto DEVICE=cuda NOISE=512 KV=1 bash bench/frontier.sh … frontier_cuda
# On a CPU without Ray: PER_KIND=320 NEW=64 LONGEST=128 BATCH=32 WORKERS=0. What is finished is not done again,
# so the same command goes on where it was stopped.
set -euo pipefail
texts=$1 questions=$2 quantized=$3 unquantized=$4 out=$5 name=$6
pmpd=${PMPD:-python -m pmpd} device=${DEVICE:-cpu} kinds="continuations instructions"
workers=${WORKERS:+--num-workers $WORKERS}
[ -e "$out/texts/done" ] || {
  python -m bench.frontier prompts --texts "$texts" --questions "$questions" --output "$out/texts" \
    --continuations "${PER_KIND:-320}" --tasks "${PER_KIND:-320}"
  touch "$out/texts/done"
}
for kind in $kinds; do
  form=cut
  [ $kind = instructions ] && form=chat
  # shellcheck disable=SC2086 # words on purpose
  $pmpd label --rule kl --dataset "$out/texts/$kind.jsonl" --prompt-form $form --size "${PER_KIND:-320}" \
    --max-prompt-tokens "${LONGEST:-128}" --max-new-tokens "${NEW:-64}" --batch-size "${BATCH:-32}" $workers \
    --model-path "$quantized" --reference-model-path "$unquantized" --output-dir "$out/$kind"
done
folders="$out/continuations $out/instructions"
# shellcheck disable=SC2086
[ -e "$out/exact.json" ] || python -m bench.frontier exact --labels $folders --model-path "$quantized" \
  --reference-model-path "$unquantized" --prompts "${EXACT:-40}" --device "$device" --output "$out/exact.json"
[ -e "$out/steps.json" ] || python -m bench.frontier steps --model-path "$quantized" --device "$device" \
  --output "$out/steps.json"
noise=
if [ -n "${NOISE:-}" ]; then # so many records, labelled again in four ways by each rule
  bash bench/label_noise.sh "$out/texts/continuations.jsonl" "$quantized" "$unquantized" "$out/noise" "$NOISE"
  python -m bench.label_noise --base "$out"/noise/{kl,agreement}/base --name "${name}_noise" \
    --others "$out"/noise/{kl,agreement}/{bfloat16,space,cut,tokens}
  noise="--noise bench/results/${name}_noise.json"
fi
# shellcheck disable=SC2086
python -m bench.frontier study --labels $folders --exact "$out/exact.json" --steps "$out/steps.json" \
  $noise ${KV:+--kv-classifiers} --device "$device" --name "$name"
