#!/usr/bin/env bash
# Everything that needs a CUDA device, in one call: the tests marked gpu (the sweep of all radius words among them), memory and race
# checks, benchmarks against a copy and torch.compile, hardware counters. Results go to ${OUT:-bench/results/device}: kernels.json and
# kernels.md, a log of each step, failed.txt. Nothing is downloaded: torch, triton, numpy and pytest have to be there, setuptools and
# ninja should.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-bench/results/device}
python=${PYTHON:-python3}
mkdir -p "$out"
out=$(cd "$out" && pwd)
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
if ! "$python" -c 'import rse_fast.kernels'; then
    # No pip, or a setuptools too old: the package's two folders under one path do as well, without the CPU library.
    mkdir -p "$out/path/rse_fast"
    ln -sfn "$PWD"/rse_fast/* "$PWD/kernels" "$out/path/rse_fast/"
    export PYTHONSAFEPATH=1 PYTHONPATH="$out/path:$PWD${PYTHONPATH:+:$PYTHONPATH}"
fi
# Named one by one: the other files import what only a full installation has.
mapfile -t marked < <(grep -l 'mark\.gpu' tests/test_*.py)
step tests "$python" -m pytest -q -m gpu "${marked[@]}"
step kernels "$python" -m bench.gpu --out "$out"
if "$python" -c 'import rich'; then
    step suites timeout 240 "$python" -m bench --suite noise ensemble train certify --out "$out/suites.json"
else
    echo "rich is not here: only the kernels are measured" >&2
fi

if command -v compute-sanitizer >/dev/null; then
    # Small shapes: each launch is slowed down many times over.
    for tool in memcheck racecheck; do
        step "$tool" compute-sanitizer --tool "$tool" --error-exitcode 9 --target-processes all \
            "$python" -m pytest -q -x tests/triton/kernel_add_noise.py tests/triton/kernel_sigma_grad.py tests/triton/kernel_conv.py \
            -k "combination or pieces or padding_has or dither or one_pass or pool_takes"
    done
else
    echo "compute-sanitizer is not here: no memory and race checks"
fi

if command -v ncu >/dev/null; then
    for walk in flat planar; do
        step "ncu_$walk" ncu --clock-control none --launch-count 1 --launch-skip 1 --kernel-name "regex:_add_noise_${walk}_kernel" \
            --section SpeedOfLight --section MemoryWorkloadAnalysis --section ComputeWorkloadAnalysis --section InstructionStats \
            --section SchedulerStats --section WarpStateStats --section Occupancy --section LaunchStats \
            "$python" -m bench.gpu --once "$walk"
    done
else
    echo "ncu is not here: no hardware counters"
fi

printf '%s\n' "${failed[@]+"${failed[@]}"}" >"$out/failed.txt"
[ "${#failed[@]}" = 0 ] || { echo "failed: ${failed[*]}" >&2; exit 1; }
