#!/usr/bin/env bash
# bench.sh: how fast this machine trains: tokens a second, where a step's time goes, and llm.c's speed beside it. `make bench` calls it.
#
# One process with two threads trains GPTs of three shapes for a few steps on random tokens, in each recipe. Of a run's steps the first two
# warm up; the median of the others counts. Shares come from --profile and so are means over all steps but the first. With REPEAT runs the
# fastest counts. "own" is what a step cannot do without: its matmuls, bare and in BF16, and AdamW's traffic with memory, each timed by
# itself after the last step. Nothing is written but with OUT.
#
#   STEPS=8 REPEAT=2        steps of the largest shape (the small ones take more), and runs of each
#   SHAPES='124M-B4' RECIPES='bf16'   only these; also fp32
#   THREADS=2               as many as there are cores, at most two: what the figures to compare with were measured with
#   OUT=1 or OUT=FILE       adds a JSON line a result to results/bench_DEVICE_DATE.jsonl, or FILE
#   TRAIN=./train_gpt_fp8   the binary
#   OPTIMIZER=PROGRAM       of the last table, what AdamW's update moves and takes by formats (default: the build's; empty: none)
set -euo pipefail
cd "$(dirname "$0")/.."
export LC_ALL=C

# name        flags                                       steps  llm.c  with OpenBLAS  wanted of bf16
shapes='
124M-B8       -e,d12,-b,8,-t,256                          1      36.1   155            1150
124M-B4       -e,d12,-b,4,-t,64                           2      44.6   229            600
6x384-B8      -e,d6,-b,8,-t,256,--vocab,256               3      420    868            -
'
# llm.c: two cores with AVX-512, its own loops and with OpenBLAS's matmuls. Wanted: two cores with AMX.

STEPS=${STEPS:-8}
REPEAT=${REPEAT:-2}
RECIPES=${RECIPES:-bf16 fp8}
TRAIN=${TRAIN:-./train_gpt_fp8}

fail() {
    printf 'bench.sh: %s\n' "$*" >&2
    exit 2
}

known=$(awk 'NF { print $1 }' <<< "$shapes")
SHAPES=${SHAPES:-$known}
for name in $SHAPES; do
    grep -qx -- "$name" <<< "$known" || fail "SHAPES: '$name' is not known; allowed: ${known//$'\n'/ }"
done
for name in $RECIPES; do
    case $name in bf16 | fp8 | fp32) ;; *) fail "RECIPES: '$name' is not known; allowed: bf16 fp8 fp32" ;; esac
done
[[ $STEPS =~ ^([3-9]|[1-9][0-9]{1,5})$ ]] || fail "STEPS: '$STEPS' is not a whole number of 3 or more"
[[ $REPEAT =~ ^[1-9][0-9]{0,3}$ ]] || fail "REPEAT: '$REPEAT' is not a whole number above 0"
cores=$(nproc)
THREADS=${THREADS:-$((cores < 2 ? cores : 2))}
[[ $THREADS =~ ^[1-9][0-9]{0,3}$ ]] || fail "THREADS: '$THREADS' is not a whole number above 0"
[ -x "$TRAIN" ] || fail "there is no $TRAIN: run make first"
OPTIMIZER=${OPTIMIZER-$(make -s config | sed -n 's/^BUILD = //p')/scripts/bench_optimizer}
[ -z "$OPTIMIZER" ] || [ -x "$OPTIMIZER" ] || fail "there is no $OPTIMIZER: run make experiments first"
export OMP_NUM_THREADS=$THREADS

work=$(mktemp -d)
trap 'rm -rf -- "$work"' EXIT

# ---- the machine ----

cpu=$(sed -n 's/^model name[[:space:]]*: //p' /proc/cpuinfo 2> /dev/null | head -n 1)
cpu=${cpu:-$(uname -m)}
units=none
for unit in avx2 avx512f avx512_bf16 amx_bf16; do
    if grep -qw -m 1 "$unit" /proc/cpuinfo 2> /dev/null; then units=$unit; fi
done
busy=$(cut -d ' ' -f 1 /proc/loadavg 2> /dev/null || echo 0)
date=$(date -u +%Y-%m-%d)
commit=$(git rev-parse --short HEAD 2> /dev/null || echo unknown)
[ -z "$(git status --porcelain --untracked-files=no 2> /dev/null)" ] || commit+=+changes
printf '%s, %s cores (%s), %s thread(s); %s, commit %s\n' "$cpu" "$cores" "$units" "$THREADS" "$date" "$commit"
if awk -v load="$busy" 'BEGIN { exit !(load > 0.5) }'; then
    echo "note: the machine is busy (load $busy): figures will be too low"
fi

# ---- runs ----

# shellcheck source=scripts/random_tokens.sh
. scripts/random_tokens.sh
random_tokens "$work/50257.bin" 50257 100000
random_tokens "$work/256.bin" 256 100000

# measure DIR: a run's figures by the labels that the binary prints:
# "tok/s ms mean-ms peak-MiB matmul-ms library-ms library-GFLOP/s matmuls-alone-ms adamw-ms adamw-alone-ms adamw-alone-GB/s", ms a step each
measure() {
    awk '
        FILENAME ~ /log.jsonl$/ {
            if (!match($0, /"ms":[0-9.e+-]+/)) { next }
            ms = substr($0, RSTART + 5, RLENGTH - 5)
            match($0, /"tokens":[0-9]+/)
            tokens = substr($0, RSTART + 9, RLENGTH - 9)
            n++
            if (n == 1) { batch = tokens }
            if (n >= 2) { sum += ms }
            if (n >= 3) {
                for (i = ++count; i > 1 && sorted[i - 1] > ms + 0; i--) { sorted[i] = sorted[i - 1] }
                sorted[i] = ms + 0
            }
            next
        }
        /^peak memory of the host: / { peak = $(NF - 1); next }
        /^operation / { in_operations = 1; for (i = 1; i <= NF; i++) { if ($i == "ms/step") { from_end = NF - i } } next }
        /^m, n, k / { # a row below has as many words as this heading
            in_operations = 0; in_matmuls = 1
            for (i = 1; i <= NF; i++) { at[$i] = i }
            if (!("library" in at) || !("GFLOP/s" in at)) { exit }
            next
        }
        sub(/^matmuls: /, "") { matmul = $1; library = $5; in_matmuls = 0 }
        sub(/^matmuls alone: /, "") { alone = $1 }
        sub(/^adamw\x27s bytes alone: /, "") { bytes = $1; rate = substr($5, 2) }
        in_operations { if (/^adamw /) { adamw = $(NF - from_end); seen_adamw = 1 } next }
        in_matmuls && $at["library"] > 0 { timed += $at["library"]; flops += $at["library"] * $at["GFLOP/s"] }
        END {
            if (!count || !seen_adamw || !(peak > 0 && matmul > 0 && library > 0 && timed > 0)) { exit 1 }
            if (!(alone > 0 && bytes > 0 && rate > 0)) { exit 1 }
            median = count % 2 ? sorted[(count + 1) / 2] : (sorted[count / 2] + sorted[count / 2 + 1]) / 2
            printf "%.6g %.6g %.6g %.6g %.6g %.6g %.6g %.6g %.6g %.6g %.6g\n", batch / median * 1000, median, sum / (n - 1), peak, matmul,
                library, flops / timed, alone, adamw, bytes, rate
        }
    ' "$1/log.jsonl" "$1/out"
}

# run SHAPE FLAGS STEPS RECIPE: one run; adds "SHAPE RECIPE measure…" to $work/results
run() {
    local dir=$work/$1-$4 vocab=50257 flags figures
    [[ $2 != *--vocab,256* ]] || vocab=256
    IFS=, read -ra flags <<< "$2"
    rm -rf "$dir.new"
    mkdir "$dir.new"
    if ! "$TRAIN" --train-data "$work/$vocab.bin" "${flags[@]}" --recipe "$4" --steps "$3" --val-every 0 --profile \
        --output-dir "$dir.new" > "$dir.new/out" 2> "$dir.new/errors"; then
        fail "$1 $4: the run failed: $(tail -n 1 "$dir.new/errors")"
    fi
    figures=$(measure "$dir.new") ||
        fail "$1 $4: the run's log or its profile lacks what is to be measured; it ends with: $(tail -n 1 "$dir.new/out")"
    echo "$1 $4 $figures" >> "$work/results"
    # the tables of the fastest run are shown
    if [ ! -e "$dir" ] || awk -v a="$(measure "$dir")" -v b="$figures" 'BEGIN { exit !(b + 0 > a + 0) }'; then
        rm -rf "$dir"
        mv "$dir.new" "$dir"
    fi
}

: > "$work/results"
for ((i = 1; i <= REPEAT; i++)); do # all, and then all again: what slows the machine for a while slows no recipe alone
    while read -r shape flags factor _; do
        if [ -z "$shape" ] || ! grep -qw -- "$shape" <<< "$SHAPES"; then continue; fi
        for recipe in $RECIPES; do
            printf '%-9s %-5s %s steps, run %s of %s\n' "$shape" "$recipe" $((STEPS * factor)) "$i" "$REPEAT"
            run "$shape" "$flags" $((STEPS * factor)) "$recipe"
        done
    done <<< "$shapes"
done

# ---- tables ----

for shape in $SHAPES; do
    for recipe in $RECIPES; do
        printf '\n%s %s, by operation\n' "$shape" "$recipe"
        sed -n '/^operation /,/^m, n, k /{/^m, n, k /!p}' "$work/$shape-$recipe/out"
        echo "matmuls"
        sed -n '/^m, n, k /,$p' "$work/$shape-$recipe/out"
    done
done

device=$(sed -n '1s/.*"device":"\([a-z]*\)".*/\1/p' "$work/${SHAPES%%[[:space:]]*}-${RECIPES%% *}/log.jsonl")
echo
awk -v shapes="$shapes" -v units="$units" -v threads="$THREADS" -v device="$device" -v cpu="$cpu" -v date="$date" -v commit="$commit" \
    -v load="$busy" -v json="$work/json" '
    BEGIN {
        lines = split(shapes, line, "\n")
        for (i = 1; i <= lines; i++) {
            if (split(line[i], word, " ") < 6) { continue }
            flags[word[1]] = word[2]; plain[word[1]] = word[4]; blas[word[1]] = word[5]; wanted[word[1]] = word[6]
        }
    }
    {
        key = $1 " " $2
        if (!(key in best)) { order[++keys] = key }
        if (!(key in best) || $3 > speed[key]) { best[key] = $0; speed[key] = $3 }
    }
    END {
        library_name = device == "cpu" ? "oneDNN" : "cuBLASLt"
        printf "%-9s %-6s %8s %9s %9s  %8s %8s %9s %9s  %9s %9s %9s %8s  %14s %7s\n", "shape", "recipe", "tok/s", "ms/step", "peak RSS",
            "inside", "TFLOP/s", "/alone", "copies", "own: mm", "+ AdamW", "step/own", "fp8/bf16", "llm.c (BLAS)", "faster"
        for (i = 1; i <= keys; i++) {
            split(best[order[i]], v, " ")
            shape = v[1]; recipe = v[2]; tok_s = v[3]; ms = v[4]; mean = v[5]; peak = v[6]; matmul = v[7]; library = v[8]; gflops = v[9]
            alone = v[10]; adamw = v[11]; bytes = v[12]; rate = v[13]
            # what was slower alone than in the step was disturbed (or is FP8 on a GPU that multiplies it): no excuse for the step
            own_matmul = alone < library ? alone : library; own_adamw = bytes < adamw ? bytes : adamw
            own = ms / (own_matmul + own_adamw)
            if (device == "cpu" && (alone > 1.05 * library || bytes > 1.05 * adamw)) { disturbed = disturbed " " shape "-" recipe }
            ratio = recipe == "fp8" && (shape " bf16") in speed ? speed[shape " fp8"] / speed[shape " bf16"] : 0
            printf "%-9s %-6s %8.0f %9.1f %5.2f GiB  %7.0f%% %8.3f %9.2f %9.0f  %9.1f %9.1f %9.2f %8s  %14s %6.1fx\n", shape, recipe, tok_s,
                ms, peak / 1024, 100 * library / mean, gflops / 1000, alone / library, matmul - library, own_matmul, own_adamw, own,
                ratio ? sprintf("%.2f", ratio) : "", plain[shape] " (" blas[shape] ")", tok_s / blas[shape]
            if (wanted[shape] != "-" && recipe == "bf16") {
                judge(shape " bf16: at least " wanted[shape] " tok/s", tok_s >= wanted[shape], sprintf("%.0f", tok_s))
            }
            if (recipe != "fp32") {
                judge(shape " " recipe ": a step at most 1.45 x its own", own <= 1.45, sprintf("%.2f", own))
            }
            if (ratio) { judge(shape ": fp8 at least 0.85 x bf16", ratio >= 0.85, sprintf("%.2f", ratio)) }
            if (shape == "124M-B4" && recipe != "fp32") {
                judge(shape " " recipe ": peak memory at most 2.4 GiB, as llm.c", peak <= 2.4 * 1024, sprintf("%.2f GiB", peak / 1024))
            }
            flag = flags[shape]; gsub(/,/, " ", flag)
            text = string("date", date) string("commit", commit) string("device", device) string("cpu", cpu) string("units", units)
            text = text number("threads", "%d", threads) number("load", "%s", load) string("shape", shape) string("flags", flag)
            text = text string("recipe", recipe) number("tok_s", "%.1f", tok_s) number("ms", "%.6g", ms)
            text = text number("peak_rss", "%.0f", peak * 1048576) number("mean_ms", "%.6g", mean) number("matmul_ms", "%.6g", matmul)
            text = text number("library_ms", "%.6g", library) number("library_share", "%.4f", library / mean)
            text = text number("library_gflops", "%.1f", gflops) number("over_alone", "%.3f", alone / library)
            text = text number("matmul_alone_ms", "%.6g", alone) number("adamw_ms", "%.6g", adamw)
            text = text number("adamw_alone_ms", "%.6g", bytes) number("adamw_alone_gb_s", "%.1f", rate)
            text = text number("step_over_own", "%.3f", own) (ratio ? number("over_bf16", "%.3f", ratio) : "")
            print "{" substr(text, 2) "}" > json
        }
        printf "\ninside: share of a step inside %s, its speed there, and that over its speed alone on BF16 (fp32: FP32) operands\n" \
            "copies: ms a step of our conversions around it\n" \
            "own: ms a step of the matmuls alone and of AdamW\x27s bytes alone, or in the step if less; step/own: a step over both\n" \
            "faster: than llm.c with OpenBLAS\n", library_name
        if (disturbed) { printf "note: slower alone than in the step, so other work disturbed the measurement:%s\n", disturbed }
        printf "\nwanted, on two cores with AMX%s:\n%s", units == "amx_bf16" && threads == 2 ? "" : " (which these are not)",
            judged
    }
    function string(name, value) { return ",\"" name "\":\"" value "\"" }
    function number(name, format, value) { return ",\"" name "\":" sprintf(format, value) }
    function judge(what, met, value) { judged = judged sprintf("  %-6s %s: %s\n", met ? "met" : "missed", what, value) }
' "$work/results"

if [ -n "$OPTIMIZER" ]; then
    echo
    "$OPTIMIZER" 16777216 "$work/optimizer"
    echo "alone: the same bytes read and written and nothing else; wanted: at most 1.3 times that"
    sed "s/^{/{\"date\":\"$date\",\"commit\":\"$commit\",\"device\":\"$device\",\"threads\":$THREADS,/" "$work/optimizer" >> "$work/json"
fi

if [ -n "${OUT:-}" ]; then
    [ "$OUT" != 1 ] || OUT=results/bench_${device}_$date.jsonl
    mkdir -p "$(dirname "$OUT")"
    cat "$work/json" >> "$OUT"
    echo "written to $OUT"
fi
