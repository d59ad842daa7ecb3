#!/bin/sh
# Runs the tests of the CPU kernels with AddressSanitizer and UndefinedBehaviorSanitizer. Needs g++ and the test requirements.
# The library is built into a copy of the package, so the working tree and an installed library stay as they are.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cp -r "$root/pmpd" "$root/tests" "$root/pyproject.toml" "$work/"
cd "$work"
sources=$(python -c "import runpy; print(runpy.run_path('pmpd/kernels/_sources.py')['fingerprint']())")
${CXX:-g++} -std=c++17 -O1 -g -fPIC -shared -fno-exceptions -fno-rtti -fno-omit-frame-pointer -w \
    -fsanitize=address,undefined -fno-sanitize-recover=all \
    "-DPMPD_SOURCES=\"$sources\"" pmpd/kernels/csrc/*.cpp -o pmpd/kernels/_native.so
sanitized() {  # Python itself keeps memory to the end, so leaks are not looked for.
    LD_PRELOAD="$(${CXX:-g++} -print-file-name=libasan.so) $(${CXX:-g++} -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 python "$@"
}
# A library that can't be loaded would have all tests skipped, which passes.
sanitized -c "import sys, torch; from pmpd.kernels import cpu; sys.exit(cpu.unavailable(torch.device('cpu'), torch.float32))"
sanitized -m pytest tests/test_kernels_cpu.py tests/test_llama_cpu.py -p no:cacheprovider "$@"
