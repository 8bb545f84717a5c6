#!/usr/bin/env bash
# What needs a CUDA device, in stages that fit a short loan of one: bench/device.sh [STAGE...], by default all but train.
#   tests     the tests marked gpu, the sweep of all radius words among them (about two minutes: most of it compiles)
#   kernels   noise and convolutions against a copy, the vendor and torch.compile
#   suites    rse-fast bench, starting no case later than SUITE_SECONDS (default 240)
#   train     VGG16 for the paper's 200 epochs, plain and RSE, side by side on the images in DATA (by an H100's steps about five minutes)
#   checks    memory and race checks
#   counters  hardware counters; what the host does in a training step
# Results go to ${OUT:-bench/results/device}: a log of each stage, kernels.json and kernels.md, suites.json, the configurations, logs and
# curves of training, failed.txt. Nothing is downloaded: torch, triton, numpy and pytest have to be there, setuptools and ninja should.
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
    echo "== $name (${SECONDS} s)"
    "$@" 2>&1 | tee "$out/$name.log" | tail -n 40
    [ "${PIPESTATUS[0]}" = 0 ] || failed+=("$name")
}

tests() {
    # Named one by one: the other files import what only a full installation has.
    mapfile -t marked < <(grep -l 'mark\.gpu' tests/test_*.py)
    step tests "$python" -m pytest -q -m gpu "${marked[@]}"
}

kernels() {
    step kernels "$python" -m bench.gpu --out "$out"
}

suites() {
    step suites "$python" -m bench --suite host train ensemble noise attack certify growth --seconds "${SUITE_SECONDS:-240}" \
        --out "$out/suites.json"
}

train() {
    local work defence
    work=$(mktemp -d)  # checkpoints of each epoch: a disk in memory is best
    for defence in plain rse; do
        step "train_$defence" "$python" -m rse_fast.cli train --data "$DATA" --model vgg16 \
            --defence "$defence" --epochs 200 --batch-size 512 --lr 0.1 --schedule step --val-fraction 0.04 --bf16 --cuda-graphs \
            --device cuda --out "$work/$defence" &
    done
    wait
    for defence in plain rse; do
        mkdir -p "$out/$defence"
        cp "$work/$defence"/{config.json,data.json,log.jsonl,curves.png} "$out/$defence/" || failed+=("train_$defence")
        tail -n 1 "$work/$defence/log.jsonl"
    done
    rm -rf "$work"
}

checks() {
    command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer is not here: no memory and race checks"; return; }
    # Small shapes: each launch is slowed down many times over.
    for tool in memcheck racecheck; do
        step "$tool" compute-sanitizer --tool "$tool" --error-exitcode 9 --target-processes all \
            "$python" -m pytest -q -x tests/triton/kernel_add_noise.py tests/triton/kernel_sigma_grad.py tests/triton/kernel_conv.py \
            -k "combination or pieces or padding_has or dither or one_pass or pool_takes"
    done
}

counters() {
    step host "$python" -m bench.gpu --host
    command -v ncu >/dev/null || { echo "ncu is not here: no hardware counters"; return; }
    for walk in flat planar; do
        step "ncu_$walk" ncu --clock-control none --launch-count 1 --launch-skip 1 --kernel-name "regex:_add_noise_${walk}_kernel" \
            --section SpeedOfLight --section MemoryWorkloadAnalysis --section ComputeWorkloadAnalysis --section InstructionStats \
            --section SchedulerStats --section WarpStateStats --section Occupancy --section LaunchStats \
            "$python" -m bench.gpu --once "$walk"
    done
}

[ $# -gt 0 ] || set -- tests kernels suites checks counters
for stage in "$@"; do
    case $stage in tests | kernels | suites | train | checks | counters) ;; *) echo "no stage $stage" >&2; exit 2 ;; esac
    [ "$stage" != train ] || [ -d "${DATA:-}" ] || { echo "train: DATA names no folder of images" >&2; exit 2; }
done
"$python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' || { echo "no CUDA device" >&2; exit 2; }
step install "$python" -m pip install --no-deps --no-build-isolation -e .
if ! "$python" -c 'import rse_fast.kernels'; then
    # No pip, or a setuptools too old: the package's two folders under one path do as well, without the CPU library.
    mkdir -p "$out/path/rse_fast"
    ln -sfn "$PWD"/rse_fast/* "$PWD/kernels" "$out/path/rse_fast/"
    ln -sfn "$PWD/bench" "$out/path/rse_fast/bench"
    export PYTHONSAFEPATH=1 PYTHONPATH="$out/path:$PWD${PYTHONPATH:+:$PYTHONPATH}"
fi
for stage in "$@"; do
    "$stage"
done
printf '%s\n' "${failed[@]+"${failed[@]}"}" >"$out/failed.txt"
[ "${#failed[@]}" = 0 ] || { echo "failed: ${failed[*]}" >&2; exit 1; }
