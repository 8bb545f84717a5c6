#!/usr/bin/env bash
# What needs a CUDA device, in parts that each end within ten minutes: bench/device.sh PART..., or bench/device.sh --dry [PART...]
#
#   part      minutes  what
#   tests           4  the tests marked gpu, the sweep of all radius words among them; most of it compiles
#   kernels         4  bench/gpu.py: noise and convolutions against a copy, the vendor and torch.compile; the lines of kernels/triton/choices.py
#   host            1  suite host: what a launch and a layer take before the device does anything
#   noise           3  suite noise
#   train           6  suite train: steps launched one by one, compiled, and captured in a CUDA graph
#   ensemble        4  suite ensemble
#   attack          3  suite attack
#   certify         2  suite certify
#   paper           6  VGG16 for the paper's 200 epochs, plain and RSE, side by side on the images in DATA
#   checks          5  memory and race checks (needs compute-sanitizer)
#   counters        3  what the host does in a training step; hardware counters (needs ncu)
#
# Minutes are estimates for an H100; the first call takes one more to install. The first eight parts fit into 30 minutes, in four calls of at most ten:
#   tests kernels | host noise ensemble | train | attack certify
# A call ends by itself: its suites, run together, start no case later than SUITE_SECONDS (default 420), and what still runs LIMIT seconds
# after the start (default 540) is stopped.
#
# Results go to ${OUT:-bench/results/device}: NAME.log of each command, suites.json, to which further calls add, kernels.json and
# kernels.md, of "paper" configurations, logs and curves, and failed.txt. They and environment.log name device, driver, versions, commit and date;
# RSE_FAST_COMMIT is the commit of a copy without git. DATA is a folder or file of images that `rse-fast train` takes. Where only the checkout
# travels, put it into the folder carried/, which git ignores: DATA=carried/cifar10.npz. Nothing is downloaded: torch, triton, numpy and pytest
# have to be there, setuptools and ninja should.
#
# --dry: on any machine, with or without a device, parse every command, select every suite and collect every test, of all parts by default.
# Nothing is measured; only "paper" trains, for one epoch of a small network on the CPU. As without --dry, the exit status is 1 if a command
# fails, and 2 for bad arguments.
set -uo pipefail
cd "$(dirname "$0")/.."
names=(host noise train ensemble attack certify) # of suites
parts=(tests kernels "${names[@]}")
more=(paper checks counters)
dry=
if [ "${1:-}" = --dry ]; then
    dry=1
    export OMP_NUM_THREADS=1 # the parts run side by side
    shift
    [ -n "${OUT:-}" ] || { OUT=$(mktemp -d) && trap 'rm -rf "$OUT"' EXIT; }
    [ $# -gt 0 ] || set -- "${parts[@]}" "${more[@]}"
fi
[ $# -gt 0 ] || { echo "name parts, or --dry; there are: ${parts[*]} ${more[*]}" >&2; exit 2; }
for part in "$@"; do
    case " ${parts[*]} ${more[*]} " in *" $part "*) ;; *) echo "no part $part; there are: ${parts[*]} ${more[*]}" >&2; exit 2 ;; esac
    [ "$part" != paper ] || [ -n "$dry" ] || [ -e "${DATA:-}" ] || { echo "paper: DATA names no images, got '${DATA:-}'" >&2; exit 2; }
done
out=${OUT:-bench/results/device}
python=${PYTHON:-python3}
limit=${LIMIT:-540}
mkdir -p "$out"
out=$(cd "$out" && pwd)
export PYTHONUNBUFFERED=1
: >"$out/failed.txt"

step() { # step NAME COMMAND...: the command's output also goes to NAME.log; the names of those that failed to failed.txt
    local name=$1 left=$((limit - SECONDS))
    shift
    echo "== $name ($SECONDS s)"
    if [ "$left" -lt 5 ]; then
        echo "no time left"
        echo "$name" >>"$out/failed.txt"
        return
    fi
    timeout --kill-after=10 "$left" "$@" 2>&1 | tee "$out/$name.log" | tail -n 40
    [ "${PIPESTATUS[0]}" = 0 ] || echo "$name" >>"$out/failed.txt"
}

run_tests() { # run_tests NAME [PREFIX...] -- ARGUMENTS...: pytest behind a command; dry, without it, and tests are only collected
    local name=$1 prefix=()
    shift
    while [ "$1" != -- ]; do
        prefix+=("$1")
        shift
    done
    shift
    [ -z "$dry" ] || prefix=()
    step "$name" "${prefix[@]+"${prefix[@]}"}" "$python" -m pytest -q ${dry:+--collect-only} "$@"
}

tests() {
    # Named one by one: the other files import what only a full installation has.
    local marked
    mapfile -t marked < <(grep -l 'mark\.gpu' tests/*/test_*.py)
    run_tests tests -- -m gpu "${marked[@]}"
}

kernels() {
    step kernels "$python" -m bench.gpu --out "$out" ${dry:+--list}
}

suites() { # suites NAME...: in one run
    step suites "$python" -m bench --suite "$@" --seconds "${SUITE_SECONDS:-420}" --out "$out/suites.json" ${dry:+--list cuda}
}

paper() {
    local work defence file defences=(plain rse) small=() pids=()
    work=$(mktemp -d) # checkpoints of each epoch: a disk in memory is best
    if [ -n "$dry" ]; then
        defences=(rse)
        small=(--data digits --model small --epochs 1 --device cpu --no-cuda-graphs)
    fi
    for defence in "${defences[@]}"; do
        step "paper_$defence" "$python" -m rse_fast.cli train --data "${DATA:-}" --model vgg16 \
            --defence "$defence" --epochs 200 --batch-size 512 --lr 0.1 --schedule step --val-fraction 0.04 --bf16 --cuda-graphs \
            --device cuda --out "$work/$defence" "${small[@]+"${small[@]}"}" &
        pids+=($!)
    done
    wait "${pids[@]}"
    for defence in "${defences[@]}"; do
        mkdir -p "$out/$defence"
        for file in config.json data.json log.jsonl curves.png; do
            [ ! -e "$work/$defence/$file" ] || cp "$work/$defence/$file" "$out/$defence/"
        done
    done
    rm -rf "$work"
}

checks() {
    local tool tools=(memcheck racecheck)
    [ -z "$dry" ] || tools=(memcheck) # the same tests
    if [ -z "$dry" ] && ! command -v compute-sanitizer >/dev/null; then
        echo "compute-sanitizer is not here: no memory and race checks"
        return
    fi
    # Small shapes: each launch is slowed down many times over.
    for tool in "${tools[@]}"; do
        run_tests "$tool" compute-sanitizer --tool "$tool" --error-exitcode 9 --target-processes all -- \
            -x tests/kernels/triton/kernel_add_noise.py tests/kernels/triton/kernel_sigma_grad.py tests/kernels/triton/kernel_conv.py \
            -k "combination or pieces or padding_has or dither or one_pass or pool_takes"
    done
}

counters() {
    local walk watch
    step profile "$python" -m bench.gpu --host ${dry:+--list}
    if [ -z "$dry" ] && ! command -v ncu >/dev/null; then
        echo "ncu is not here: no hardware counters"
        return
    fi
    for walk in flat planar; do
        watch=(ncu --clock-control none --launch-count 1 --launch-skip 1 --kernel-name "regex:_add_noise_${walk}_kernel"
            --section SpeedOfLight --section MemoryWorkloadAnalysis --section ComputeWorkloadAnalysis --section InstructionStats
            --section SchedulerStats --section WarpStateStats --section Occupancy --section LaunchStats)
        [ -z "$dry" ] || watch=()
        step "ncu_$walk" "${watch[@]+"${watch[@]}"}" "$python" -m bench.gpu --once "$walk" ${dry:+--list}
    done
}

[ -n "$dry" ] || "$python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' || { echo "no CUDA device" >&2; exit 2; }
if ! "$python" -c 'import rse_fast.kernels'; then
    [ -n "$dry" ] || step install "$python" -m pip install --no-deps --no-build-isolation -e .
    if ! "$python" -c 'import rse_fast.kernels'; then
        # No pip, or a setuptools too old: the package's two folders under one path do as well, without the CPU library.
        mkdir -p "$out/path/rse_fast"
        ln -sfn "$PWD"/rse_fast/* "$PWD/kernels" "$out/path/rse_fast/"
        ln -sfn "$PWD/bench" "$out/path/rse_fast/bench"
        export PYTHONSAFEPATH=1 PYTHONPATH="$out/path:$PWD${PYTHONPATH:+:$PYTHONPATH}"
    fi
fi
step environment "$python" -c 'import json, bench.results; print(json.dumps(bench.results.environment(), indent=1))'
chosen=()
for part in "$@"; do
    case " ${names[*]} " in
        *" $part "*) chosen+=("$part") ;;
        *) if [ -n "$dry" ]; then "$part" & else "$part"; fi ;;
    esac
done
[ "${#chosen[@]}" = 0 ] || suites "${chosen[@]}"
wait
[ ! -s "$out/failed.txt" ] || { echo "failed: $(tr '\n' ' ' <"$out/failed.txt")" >&2; exit 1; }
