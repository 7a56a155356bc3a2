#!/usr/bin/env bash
# Builds, tests and measures moemm on a machine with a CUDA device, in one call and under ten minutes:
#
#     benchmarks/gpu/run.sh
#
# Needs python3 with torch (a CUDA build), pybind11, ninja, setuptools, numpy, rich and pytest, and nvcc; no package index.
# What is missing may lie as wheels in $MOEMM_WHEELS (default: .whl in this checkout): they are installed into a scratch
# folder, and nothing else is changed. Steps have time limits and logs of their own in build/gpu-logs; a step that fails
# does not keep later ones from running, and makes the exit status 1. With $OUT set, results and the ends of logs go
# there too. PYTHON names another interpreter.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 2

PYTHON=${PYTHON:-python3}
WHEELS=${MOEMM_WHEELS:-.whl}
LOGS=build/gpu-logs
SITE=$(mktemp -d)
trap 'rm -rf "$SITE"' EXIT
rm -rf "$LOGS"
mkdir -p "$LOGS"

declare -a TABLE=()
FAILED=0

# step NAME SECONDS COMMAND...: runs a command with a time limit and a log; remembers how it ended.
step() {
    local name=$1 limit=$2 status began=$SECONDS verdict
    shift 2
    echo "== $name (at most $limit s): $*"
    timeout --kill-after=10 "$limit" "$@" >"$LOGS/$name.log" 2>&1
    status=$?
    case $status in
        0) verdict=ok ;;
        124 | 137) verdict="FAILED: took longer than $limit s" ;;
        *) verdict="FAILED: exit status $status" ;;
    esac
    if [ "$status" -ne 0 ]; then
        FAILED=1
        tail -n 25 "$LOGS/$name.log"
    fi
    TABLE+=("$(printf '%-12s %4d s  %-34s %s' "$name" $((SECONDS - began)) "$verdict" "$(summary "$name")")")
    return "$status"
}

# The line of a log that says most: pytest's count, the sanitizer's, else the last one.
summary() {
    local line
    line=$(grep -E '^(=+ )?[0-9]+ (passed|failed)|ERROR SUMMARY|RACECHECK SUMMARY' "$LOGS/$1.log" | tail -n 1)
    echo "${line:-$(tail -n 1 "$LOGS/$1.log")}" | tr -d '=' | cut -c1-90
}

if compgen -G "$WHEELS/*.whl" >/dev/null; then
    step wheels 20 "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --upgrade --target "$SITE" "$WHEELS"/*.whl
    export PYTHONPATH="$SITE${PYTHONPATH:+:$PYTHONPATH}"
fi

# One architecture builds in half the time of all; the library is for this machine alone.
ARCHITECTURE=$("$PYTHON" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())' 2>"$LOGS/device.log")
if [ -z "$ARCHITECTURE" ]; then
    tail -n 3 "$LOGS/device.log"
    echo "run.sh: $PYTHON has no torch that sees a CUDA device: nothing can be checked here" >&2
    exit 1
fi
export TORCH_CUDA_ARCH_LIST=$ARCHITECTURE MOEMM_BUILD=cuda MAX_JOBS=${MAX_JOBS:-$(nproc)}

step build 130 "$PYTHON" setup.py build_ext --inplace
step device 20 "$PYTHON" -c '
import torch
from moemm.ops import backend_info
info = backend_info()
assert info["cuda"], info
print(torch.cuda.get_device_name(), "torch", torch.__version__, "for", info["build"]["cuda_archs"])'

# Not -n: kernels of two processes take turns on one device, and the large cases need its memory.
step tests 150 "$PYTHON" -m pytest -q -p no:cacheprovider -m gpu tests/ops

# A few cases of each op, odd widths and dropped slots among them. Without torch's cache of memory, so that an access
# beyond a tensor is one beyond its allocation.
SANITIZER=$(command -v compute-sanitizer || echo "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer")
for tool in memcheck racecheck; do
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 step "$tool" 60 \
        "$SANITIZER" --tool "$tool" --error-exitcode 9 \
        "$PYTHON" -m benchmarks.gpu.few_cases
done

step kernels 40 "$PYTHON" -m benchmarks.gpu.kernels
step moe_layer 110 "$PYTHON" -m benchmarks.gpu.moe_layer --rounds 8

if [ -n "${OUT:-}" ]; then
    tail -n 200 "$LOGS"/*.log >"$OUT/logs.txt"
fi
for name in kernels moe_layer; do
    [ -f "$LOGS/$name.log" ] && cat "$LOGS/$name.log"
done
echo
echo "step          time  how it ended                       last word"
printf '%s\n' "${TABLE[@]}"
echo "logs: $LOGS; $SECONDS s in all"
exit "$FAILED"
