#!/usr/bin/env bash
# gpu_check.sh: is it right on this GPU, and how fast? `make gpu-check` builds and then calls it; where nothing can be built, it runs what a build
# folder brought here holds. Needs neither a network nor MPI nor Python; under 8 minutes.
#
#   tests      the kernels' test programs; two ranks on one GPU where MPI is there; compute-sanitizer on a tiny run where it is there
#   training   200 steps on this repository's own text, three seeds each of BF16 and FP8: FP8's mean loss must lie within BF16's spread
#   kernels    bandwidth of every kernel, TFLOP/s of attention, and FP8 against BF16 for each linear layer with the casts counted
#   speed      tokens a second, MFU and memory of 124M, 1.5B and a 7B shape, BF16 and FP8 at equal micro-batch, at least 131,072 tokens a step.
#              7B's 32 layers are extrapolated from two depths that fit, both stated.
#
#   ONLY='tests training kernels speed'   some of it
#   BUILD=build/cuda                      where the programs are
#   OUT=results                           the folder that gets gpu_check_GPU_DATE.jsonl and .txt; empty: none
#   DATE, COMMIT                          what the results are to be signed with, where this is no checkout
set -euo pipefail
cd "$(dirname "$0")/.."
export LC_ALL=C
# shellcheck source=scripts/random_tokens.sh
. scripts/random_tokens.sh

ONLY=${ONLY:-tests training kernels speed}
BUILD=${BUILD:-build/cuda}
OUT=${OUT-results}
train=$BUILD/train_gpt_fp8
# the others look into memory that is the device's here, or train widths that FP8 units refuse
programs='device float8 matmul matmul_choice attention fp8_kernels gradient adam_fp8'

fail() {
    printf 'gpu_check.sh: %s\n' "$*" >&2
    exit 2
}
for part in $ONLY; do
    case $part in tests | training | kernels | speed) ;; *) fail "ONLY: '$part' is not known; allowed: tests training kernels speed" ;; esac
done
[ -x "$train" ] || fail "there is no $train: run make gpu-check"
gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader 2> /dev/null | head -n 1) || true
[ -n "$gpu" ] || fail "nvidia-smi shows no GPU"
driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader | head -n 1)
date=${DATE:-$(date -u +%Y-%m-%d)}
commit=${COMMIT:-$(git rev-parse --short HEAD 2> /dev/null || echo unknown)}
work=$(mktemp -d)
trap 'rm -rf -- "$work"' EXIT
: > "$work/judged"
: > "$work/json"
began=$SECONDS
# where a toolkit is installed elsewhere than where the programs were linked
library=$(ldconfig -p 2> /dev/null | awk '/libcublasLt.so/ { print $NF; exit }')
for dir in ${library:+"$(dirname "$library")"} /usr/local/cuda/lib64 "$BUILD/lib"; do # the last: what a carried build brings along
    [ ! -d "$dir" ] || LD_LIBRARY_PATH=${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$dir
done
export LD_LIBRARY_PATH

wanted() { [[ " $ONLY " == *" $1 "* ]]; }
head_line() { printf '\n---- %s (%d s) ----\n' "$1" $((SECONDS - began)); }
# judge NUMBER TEST WHAT: met or missed; TEST as awk understands it, of x
judge() {
    awk -v x="$1" "BEGIN { exit !($2) }" && printf '  met     %s: %s\n' "$3" "$1" >> "$work/judged" || printf '  missed  %s: %s\n' "$3" "$1" >> "$work/judged"
}
# fault WHAT: not a matter of speed: the check fails
fault() {
    printf '  WRONG   %s\n' "$1" >> "$work/judged"
    touch "$work/wrong"
}
# field NAME FILE: that number of each line
field() { sed -nE "s/.*\"$1\":[ ]*(-?[0-9.e+-]+).*/\\1/p" "$2"; }
median() { sort -g | awk '{ v[NR] = $1 } END { if (NR) { print NR % 2 ? v[(NR + 1) / 2] : (v[NR / 2] + v[NR / 2 + 1]) / 2 } }'; }
mean_last() { tail -n "$1" | awk '{ s += $1 } END { printf "%.4f", s / NR }'; }

printf '%s, driver %s; %s, commit %s\n' "$gpu" "$driver" "$date" "$commit"

if wanted tests; then
    head_line tests
    for name in $programs; do
        program=$BUILD/test/$name status=0
        if [ ! -x "$program" ]; then
            fault "test $name: there is no $program"
            continue
        fi
        CMOCKA_MESSAGE_OUTPUT=TAP OMP_NUM_THREADS=8 timeout 120 "$program" > "$work/tap" 2>&1 || status=$?
        ok=$(grep -c '^ok ' "$work/tap" || true)
        bad=$(grep -E '^not ok ' "$work/tap" | grep -cv SKIP || true)
        printf '%-16s %3d passed, %d failed\n' "$name" "$ok" "$bad"
        if [ "$status" != 0 ] || [ "$bad" != 0 ] || [ "$ok" = 0 ]; then
            fault "test $name: $bad failed, status $status"
            grep -A4 '^not ok' "$work/tap" | grep -v SKIP | head -n 12 || true
            tail -n 2 "$work/tap"
        fi
    done
    tiny=(--layers 2 --heads 2 --width 64 -b 2 -t 64 --val-every 0 --vocab 256)
    if command -v mpirun > /dev/null && "$train" --help | grep -q -- --staged && ldd "$train" | grep -q libmpi; then
        for ranks in 1 2; do
            mpirun -np "$ranks" --oversubscribe --allow-run-as-root "$train" -i README.md "${tiny[@]}" -d 256 --steps 20 --staged --output-dir "$work/ranks$ranks" \
                > "$work/out" 2>&1 < /dev/null || fault "two ranks on one GPU: $(tail -n 1 "$work/out")"
        done
        judge "$(paste <(field loss "$work/ranks1/log.jsonl" | tail -n 1) <(field loss "$work/ranks2/log.jsonl" | tail -n 1) | awk '{ print $2 / $1 }')" \
            'x > 0.99 && x < 1.01' 'loss of two ranks on one GPU over that of one'
    else
        echo "two ranks on one GPU: skipped (no MPI)"
    fi
    if command -v compute-sanitizer > /dev/null; then
        if timeout 90 compute-sanitizer --tool memcheck --error-exitcode 9 "$train" -i README.md "${tiny[@]}" --steps 2 --output-dir "$work/sanitized" > "$work/out" 2>&1; then
            echo "compute-sanitizer: $(tail -n 1 "$work/out")"
        else
            fault "compute-sanitizer: $(tail -n 1 "$work/out")"
            grep -A12 -m1 'Invalid\|=========' "$work/out" | head -n 14
        fi
    else
        echo "compute-sanitizer: skipped (not here)"
    fi
fi

if wanted training; then
    head_line training
    cat README.md ./*.cu ./*.cuh core/* test/*.cpp > "$work/text"
    for recipe in bf16 fp8 fp8-lm; do
        for seed in 1 2 3; do
            dir=$work/$recipe-$seed
            "$train" -i "$work/text" --layers 6 --heads 6 --width 384 -b 16 -t 256 --lr 1e-3 --steps 200 --val-every 0 --recipe "$recipe" --seed "$seed" \
                --output-dir "$dir" > "$work/out" 2>&1 || fault "training $recipe: $(tail -n 1 "$work/out")"
            field loss "$dir/log.jsonl" | mean_last 20 >> "$work/$recipe"
            echo >> "$work/$recipe"
        done
        printf '%-7s mean loss of steps 181 to 200, seeds 1 to 3: %s\n' "$recipe" "$(paste -sd ' ' "$work/$recipe")"
    done
    for recipe in fp8 fp8-lm; do
        difference=$(paste "$work/bf16" "$work/$recipe" | awk '{ s += $2 / $1 - 1 } END { printf "%+.2f", 100 * s / NR }')
        spread=$(awk 'NR == 1 || $1 > high { high = $1 } NR == 1 || $1 < low { low = $1 } { s += $1 } END { printf "%.2f", 100 * (high - low) / (s / NR) }' "$work/bf16")
        judge "$difference" "x < $spread && x > -$spread" "loss of $recipe over bf16 in %, within bf16's spread over seeds ($spread)"
        printf '{"check": "training", "recipe": "%s", "over_bf16_percent": %s, "spread_percent": %s}\n' "$recipe" "$difference" "$spread" >> "$work/json"
    done
fi

if wanted kernels; then
    for bench in bench_kernels bench_attention bench_gemm; do
        head_line "$bench"
        "$BUILD/scripts/$bench" "$work/json" 2>&1 | tee "$work/out" || fault "$bench failed"
        ! grep -q FAIL "$work/out" || fault "$bench: $(grep -c FAIL "$work/out") results differ from the CPU's"
    done
fi

# steps DIR RECIPE FLAGS…: trains; the median step without the first two
steps() {
    local dir=$work/$1 recipe=$2
    shift 2
    "$train" -i "$work/tokens" --vocab 50257 --val-every 0 --recipe "$recipe" --output-dir "$dir" "$@" > "$work/out" 2>&1 || {
        fault "$recipe $*: $(tail -n 1 "$work/out")"
        return 1
    }
    field ms "$dir/log.jsonl" | tail -n +3 | median
}
memory_gib() { grep -m1 -o '"mem":{[^}]*}' "$work/$1/log.jsonl" | grep -o '[0-9]*' | awk '{ s += $1 } END { printf "%.1f", s / 1073741824 }'; }
flops() { grep -m1 -o '"parameters":[0-9]*' "$work/$1/log.jsonl" | cut -d: -f2; }

if wanted speed; then
    head_line speed
    random_tokens "$work/tokens" 50257 1200000
    printf '%-22s %-5s %10s %9s %8s %9s  %s\n' shape recipe ms/step tok/s 'MFU' memory 'FP8/BF16'
    # name       micro-batch length steps flags
    while read -r name b t n flags; do
        [ -n "$name" ] || continue
        before=
        for recipe in bf16 fp8; do
            # shellcheck disable=SC2086 # flags are words
            ms=$(steps "$name-$recipe" "$recipe" -b "$b" -t "$t" -d 131072 --steps "$n" $flags) || continue
            mfu=$(field mfu "$work/$name-$recipe/log.jsonl" | tail -n +3 | median)
            awk -v name="$name" -v recipe="$recipe" -v ms="$ms" -v mfu="$mfu" -v gib="$(memory_gib "$name-$recipe")" -v before="$before" -v b="$b" -v t="$t" \
                -v json="$work/json" 'BEGIN {
                    tok = 131072000 / ms
                    printf "%-22s %-5s %10.1f %9.0f %6.1f %% %5s GiB  %s\n", name " " b "x" t, recipe, ms, tok, 100 * mfu, gib, before ? sprintf("%.2f", before / ms) : ""
                    printf "{\"check\": \"speed\", \"shape\": \"%s\", \"micro_batch\": %d, \"seq_len\": %d, \"recipe\": \"%s\", \"ms\": %.3f, \"tok_s\": %.1f, \"mfu\": %.4f, \"memory_gib\": %s}\n",
                        name, b, t, recipe, ms, tok, mfu, gib >> json
                }'
            if [ "$recipe" = fp8 ] && [ -n "$before" ]; then
                gain=$(awk -v a="$before" -v b="$ms" 'BEGIN { printf "%.3f", a / b }')
                case $name in
                    124M) judge "$gain" 'x >= 1' '124M: FP8 over BF16' ;;
                    1.5B) judge "$(awk -v ms="$ms" 'BEGIN { printf "%.0f", 131072000 / ms }')" 'x >= 75000' '1.5B FP8: tok/s, at least 75,000' ;;
                esac
            fi
            before=$ms
            echo "$ms" > "$work/$name-$recipe.ms"
        done
    done << 'END'
124M         32 1024 8 -e d12
1.5B          8 1024 5 -e d48
7B-4-layers   2 2048 4 --layers 4 --width 4096 --heads 32
7B-12-layers  2 2048 4 --layers 12 --width 4096 --heads 32
END
    for recipe in bf16 fp8; do
        if [ ! -e "$work/7B-4-layers-$recipe.ms" ] || [ ! -e "$work/7B-12-layers-$recipe.ms" ]; then continue; fi
        paste "$work/7B-4-layers-$recipe.ms" "$work/7B-12-layers-$recipe.ms" | awk '{ printf "%.1f\n", $2 + 20 * ($2 - $1) / 8 }' > "$work/7B-$recipe.ms"
        printf '7B, 32 layers from 4 and 12: %-5s %.1f ms/step, %.0f tok/s\n' "$recipe" "$(cat "$work/7B-$recipe.ms")" "$(awk '{ print 131072000 / $1 }' "$work/7B-$recipe.ms")"
    done
    if [ -e "$work/7B-fp8.ms" ] && [ -e "$work/7B-bf16.ms" ]; then
        judge "$(awk '{ printf "%.0f", 131072000 / $1 }' "$work/7B-fp8.ms")" 'x >= 20000' '7B FP8: tok/s, at least 20,000'
        judge "$(paste "$work/7B-bf16.ms" "$work/7B-fp8.ms" | awk '{ printf "%.3f", $1 / $2 }')" 'x >= 1.5' '7B: FP8 over BF16, at least 1.5'
    fi
fi

head_line summary
cat "$work/judged"
if [ -n "$OUT" ]; then
    name=$OUT/gpu_check_$(sed -E 's/^NVIDIA //; s/[^A-Za-z0-9]+/-/g' <<< "$gpu")_$date
    mkdir -p "$OUT"
    sed "s/^{/{\"date\": \"$date\", \"commit\": \"$commit\", \"gpu\": \"$gpu\", \"driver\": \"$driver\", /" "$work/json" > "$name.jsonl"
    echo "written to $name.jsonl"
fi
if [ -e "$work/wrong" ]; then
    echo "gpu-check: not as it should be"
    exit 1
fi
echo "gpu-check: all right"
