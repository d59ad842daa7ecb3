#!/bin/sh
# Runs the smaller GPU tests of the CUDA kernels under compute-sanitizer: memcheck, then racecheck (shared memory). Needs
# a CUDA device, compute-sanitizer (CUDA toolkit, or `pip install nvidia-cuda-sanitizer-api`), and the test requirements.
# `sh tests/sanitize_cuda.sh memcheck` runs one.
set -eu
cd "$(dirname "$0")/.."
command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer is not on the PATH: it comes with the CUDA toolkit" >&2; exit 2; }
export PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 PYTORCH_NO_CUDA_MEMORY_CACHING=1  # each tensor an allocation: no neighbour hides a wrong access
# Compiled before, so that the sanitizer sees kernels only; and skipped tests would pass too.
python -m pytest -q -m gpu tests/test_gpu_bits.py -k "oracle or two_precisions or (norm and 1-dtype0)"
for tool in ${*:-memcheck racecheck}; do
    echo "== $tool"
    compute-sanitizer --tool "$tool" --error-exitcode 9 --kernel-name kernel_substring=bits_product \
        python -m pytest -q -x -m gpu tests/test_gpu_bits.py -k "oracle or two_precisions or (norm and 1-dtype0)"
done
