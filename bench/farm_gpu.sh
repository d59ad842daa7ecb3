#!/usr/bin/env bash
# The whole farm on the GPUs of one host, through Ray and the commands: quantize, label with 1, 2, ... workers, answer, train,
# kill workers and the driver, share a GPU, one node a GPU; one table and one JSON at the end. docs/guides/gpu-farm.md says more.
#
#   bash bench/farm_gpu.sh --workers 1 2 --checkpoint smollm2=ANYPREC:UNQUANTIZED --out bench/results
#   bash bench/farm_gpu.sh --cpu --workers 1 2 --size 16 --batch-size 4 --max-new-tokens 16     # on CPUs: do the steps work?
#
# Needs what `pip install '.[farm,train,eval]'` brings, in the Python that PYTHON names (python3 if not). Starts a Ray of its own, on
# loopback, with a token, and ends it by its process id. Every step is bounded in time; one that fails is told and the rest goes on.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD:${PYTHONPATH:-} PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
python=${PYTHON:-python3}
"$python" - <<'END'
import sys
from importlib.util import find_spec

needed = ("torch", "transformers", "pyarrow", "tyro", "rouge_score", "ray")
if lacking := [name for name in needed if find_spec(name) is None]:
    sys.exit(f"error: {sys.executable} has no {', '.join(lacking)}; activate the environment that has them (or name its "
             "Python: PYTHON=...), or install them: pip install '.[farm,train,eval]'")
END
exec "$python" -m bench.farm_gpu "$@"
