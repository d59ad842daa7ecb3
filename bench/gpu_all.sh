#!/usr/bin/env bash
# Everything that a GPU has to answer, in under 8 minutes: tests, kernels, decoding, labeling. Run from the repository root.
# Needs torch >= 2.11, triton, transformers >= 5.17, numpy, safetensors (pytest for the tests). JSON and logs go to ${OUT:-bench/results}.
set -uo pipefail
export PYTHONPATH=.:${PYTHONPATH:-} PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
out=${OUT:-bench/results}
mkdir -p "$out"
started=$SECONDS
part() {  # name, seconds at most, command...
  local name=$1 limit=$2 begin=$SECONDS
  shift 2
  echo "== $name"
  timeout "$limit" "$@" >"$out/$name.log" 2>&1
  local status=$?
  echo "$name: exit $status, $((SECONDS - begin)) s" | tee -a "$out/parts.txt"
  [ $status -eq 0 ] || tail -n 25 "$out/$name.log"
}
: >"$out/parts.txt"
part bits 45 python3 -m pytest -q -x -m gpu tests/test_gpu_bits.py -k "oracle or two_precisions or thousand and 4"
tail -n 3 "$out/bits.log"
part kernels 180 python3 bench/_cuda.py --out "$out" --write-settings ${QUICK:+--quick}
part decode 120 python3 bench/decode.py --device cuda --head-bits 8 --out "$out"
cp -f pmpd/kernels/autotune/*.json "$out" 2>/dev/null
export PYTEST_DISABLE_PLUGIN_AUTOLOAD=1  # a plugin that fails to load, needed by nobody here, would end the run
workers=$(python3 -c 'import xdist' 2>/dev/null && echo "-p xdist.plugin -n 8")
more=$(python3 -c 'import hypothesis' 2>/dev/null && echo "tests/test_gptq.py tests/test_quantize_kmeans.py")
part tests 95 python3 -m pytest -q -m gpu $workers tests/test_gpu.py tests/test_gpu_bits.py $more
if python3 -c 'import rouge_score, tyro' 2>/dev/null; then
  part label 40 python3 bench/label.py --device cuda --plain-prompts 2 --max-new-tokens 64 --slots 64 128 --output "$out"
else
  echo "label: skipped, it needs rouge_score and tyro" | tee -a "$out/parts.txt"
fi
tail -n 4 "$out/tests.log"
grep -hE "^(predicted|met|MISSED|at least as fast)|REFUSED" "$out/kernels.log" || true
grep -E "graph|switching|prefill|copy|met|MISSED" "$out/decode.log" || true
sed -n '/^shape /,$p' "$out/kernels.log"
echo "-- parts ($((SECONDS - started)) s in all)"
cat "$out/parts.txt"
