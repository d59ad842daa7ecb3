#!/usr/bin/env bash
# The whole farm on the GPUs of one host, through Ray and the commands: quantize, label with 1, 2, ... workers, answer, train,
# kill workers and the driver, share a GPU, one node a GPU; one table and one JSON at the end. docs/guides/gpu-farm.md says more.
#
#   bash bench/farm_gpu.sh --workers 1 2 --checkpoint smollm2=ANYPREC:UNQUANTIZED --out bench/results
#   bash bench/farm_gpu.sh --cpu --workers 1 2 --size 8 --max-new-tokens 16      # the same steps on CPUs: does the script work?
#
# Needs ray[default,train], pyarrow, tyro, rouge_score and fschat beside torch and transformers. Starts a Ray of its own, on
# loopback, with a token, and ends it by its process id. Every step is bounded in time; one that fails is told and the rest goes on.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD:${PYTHONPATH:-} PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
exec "${PYTHON:-python3}" -m bench.farm_gpu "$@"
