#!/bin/sh
# Runs the smaller GPU tests of four kernels under compute-sanitizer: memcheck, then racecheck (shared memory). Needs a CUDA device,
# compute-sanitizer (CUDA toolkit, or `pip install nvidia-cuda-sanitizer-api`), and the test requirements. On an H200 three of the kernels took
# memcheck some two minutes. Every check runs, also after one that found something; the last line and the exit status say which did.
# `sh tests/sanitize_cuda.sh racecheck halves_product teams_product` runs one tool on two kernels.
set -u
cd "$(dirname "$0")/.."
tools='' kernels=''
for word; do
    case $word in
        *check) tools="$tools $word" ;;
        *) kernels="$kernels $word" ;;
    esac
done
command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer is not on the PATH: it comes with the CUDA toolkit" >&2; exit 2; }
export PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 PYTORCH_NO_CUDA_MEMORY_CACHING=1  # each tensor an allocation: no neighbour hides a wrong access
tests_of() { # kernel
    case $1 in
        bits_product) echo "oracle or two_precisions or (norm and 1-dtype0)" ;;
        rotary_attention) echo "one_launch and dtype0" ;;
        halves_product) echo "small_clusters" ;;
        teams_product) echo "small_teams and 3-dtype0" ;;
        *) echo "$1: neither a kernel with tests of its own nor a tool" >&2; exit 2 ;;
    esac
}
kernels=${kernels:-bits_product rotary_attention halves_product teams_product}
every=''
for kernel in $kernels; do
    tests=$(tests_of "$kernel") || exit 2
    every="${every:+$every or }($tests)"
done
# Compiled before, so that the sanitizer sees kernels only; and skipped tests would pass too.
python3 -m pytest -q -m gpu tests/test_gpu_bits.py tests/test_gpu.py -k "$every" || exit 1
failed=''
for tool in ${tools:-memcheck racecheck}; do
    for kernel in $kernels; do
        echo "== $tool, $kernel"
        begin=$(date +%s)
        # Errors of API calls are not looked at: cuda-bindings asks for functions that an older driver lacks. A kernel that the tool does
        # not look at never runs under it: racecheck ends a process that launches clusters unwatched.
        compute-sanitizer --tool "$tool" --error-exitcode 9 --report-api-errors no --kernel-name kernel_substring="$kernel" \
            python3 -m pytest -q -m gpu tests/test_gpu_bits.py tests/test_gpu.py -k "$(tests_of "$kernel")" || failed="$failed, $tool of $kernel"
        echo "== $(($(date +%s) - begin)) s"
    done
done
[ -z "$failed" ] || { echo "FAILED: ${failed#, }" >&2; exit 1; }
echo "nothing found"
