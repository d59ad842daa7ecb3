#!/bin/sh
# Runs the smaller GPU tests of the bits kernel and of a step's attention under compute-sanitizer: memcheck, then racecheck (shared memory). Needs
# a CUDA device, compute-sanitizer (CUDA toolkit, or `pip install nvidia-cuda-sanitizer-api`), and the test requirements.
# `sh tests/sanitize_cuda.sh memcheck` runs one.
set -eu
cd "$(dirname "$0")/.."
command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer is not on the PATH: it comes with the CUDA toolkit" >&2; exit 2; }
export PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 PYTORCH_NO_CUDA_MEMORY_CACHING=1  # each tensor an allocation: no neighbour hides a wrong access
bits="oracle or two_precisions or (norm and 1-dtype0)"
halves="small_clusters"
teams="small_teams and 3-dtype0"
attention="one_launch and dtype0"
# Compiled before, so that the sanitizer sees kernels only; and skipped tests would pass too.
python3 -m pytest -q -m gpu tests/test_gpu_bits.py tests/test_gpu.py -k "$bits or $halves or ($teams) or ($attention)"
# Errors of API calls are not looked at: cuda-bindings asks for functions that an older driver lacks. A kernel that the tool does not look
# at never runs under it: racecheck ends a process that launches clusters unwatched.
check() { # tool, kernel, tests
    echo "== $1, $2"
    compute-sanitizer --tool "$1" --error-exitcode 9 --report-api-errors no --kernel-name kernel_substring="$2" \
        python3 -m pytest -q -x -m gpu tests/test_gpu_bits.py tests/test_gpu.py -k "$3"
}
for tool in ${*:-memcheck racecheck}; do
    check "$tool" bits_product "$bits"
    check "$tool" rotary_attention "$attention"
    check "$tool" halves_product "$halves"
    check "$tool" teams_product "$teams"
done
