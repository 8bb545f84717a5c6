#!/usr/bin/env bash
# Everything that needs a CUDA device, in one call: the tests marked gpu, memory and race checks, benchmarks, hardware counters.
# Results go to ${OUT:-bench/results/device}. Nothing is downloaded: torch, triton, numpy, pytest, setuptools and ninja have to be there.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-bench/results/device}
python=${PYTHON:-python3}
mkdir -p "$out"
export PYTHONUNBUFFERED=1
failed=()

step() { # step NAME COMMAND...: the command's output also goes to NAME.log; a failure is kept for the end
    local name=$1
    shift
    echo "== $name"
    "$@" 2>&1 | tee "$out/$name.log" | tail -n 40
    [ "${PIPESTATUS[0]}" = 0 ] || failed+=("$name")
}

"$python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' || { echo "no CUDA device" >&2; exit 2; }
step install "$python" -m pip install --no-deps --no-build-isolation -e .
step tests "$python" -m pytest -q -m gpu tests
step kernels "$python" -m bench.gpu --out "$out"

if command -v compute-sanitizer >/dev/null; then
    # Small shapes: each launch is slowed down many times over.
    for tool in memcheck racecheck; do
        step "$tool" compute-sanitizer --tool "$tool" --error-exitcode 9 --target-processes all \
            "$python" -m pytest -q -x tests/triton/kernel_add_noise.py tests/triton/kernel_sigma_grad.py tests/triton/kernel_conv.py \
            -k "combination or pieces or padding_has or dither"
    done
else
    echo "compute-sanitizer is not here: no memory and race checks"
fi

if command -v ncu >/dev/null; then
    for walk in flat planar; do
        step "ncu_$walk" ncu --clock-control none --launch-count 1 --launch-skip 1 --kernel-name "regex:_add_noise_${walk}_kernel" \
            --section SpeedOfLight --section MemoryWorkloadAnalysis --section ComputeWorkloadAnalysis --section Occupancy --section LaunchStats \
            "$python" -m bench.gpu --once "$walk"
    done
else
    echo "ncu is not here: no hardware counters"
fi

printf '%s\n' "${failed[@]+"${failed[@]}"}" >"$out/failed.txt"
[ "${#failed[@]}" = 0 ] || { echo "failed: ${failed[*]}" >&2; exit 1; }
