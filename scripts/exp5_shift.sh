#!/usr/bin/env bash
# exp5_shift.sh: experiment 5: do models that were trained in FP8 lose more than BF16 ones on texts of another kind than they were trained on? The paper leaves
# it open: its models are scored on tasks near their data.
#
# Trains one small GPT in recipes bf16, fp8-lm and fp8 over seeds, everything else being the same, and takes the loss of each on the last hundredth of the
# text, which no model has seen, and on other texts. All are evaluated in BF16, so that what differs is how they were trained, and those of FP8 in their
# own recipe too. A difference to BF16 counts where it is larger than the two spreads over seeds together.
#
#   held       the end of the text that was trained on              numbers    lines of products: '83 times 54 is 4482.'
#   source     this repository's C++                                shuffled   the words of held in random order
#   legal      licences (/usr/share/common-licenses, if there)      random     printable characters, all equally likely
#
#   scripts/exp5_shift.sh [--quick]         20 minutes on two cores; --quick (or QUICK=1) seconds, to see that it works
#   DATA=FILE OUT=runs/exp5                 own text to train on; where to write: exp5.csv, exp5.png, table.txt, verdict.txt (a line a claim), texts, logs
#   EVAL="french=a.txt forum=b.txt"         own texts to evaluate, beside those above; paths from this repository, without spaces
#   SEEDS="1 2 3" STEPS=400 ROWS="bf16 fp8" seeds go round by round, so that every recipe has as many
#   EVAL_TOKENS=32768                       of each text, from its beginning
#   LAYERS HEADS WIDTH SEQ_LEN MICRO_BATCH LR WARMUP          of the model and its training
#   BUDGET=30                               minutes: what would not end within them is not started, and that is said
#
# The status is 0 where everything that was started ran, whatever the verdicts: a contradiction is a result.
set -euo pipefail
cd "$(dirname "$0")/.."
export LC_ALL=C

# shellcheck source=scripts/experiment.sh
. scripts/experiment.sh "$@"
small_gpt
MICRO_BATCH=${MICRO_BATCH:-8} # sequences
EVAL_TOKENS=${EVAL_TOKENS:-$([ -n "${QUICK:-}" ] && echo 1024 || echo 32768)}
OUT=${OUT-runs/exp5}

# name|what it is
rows="
bf16|BF16, FP32 states
fp8-lm|the paper's recipe
fp8|recipe fp8
"
above_zero STEPS LAYERS HEADS WIDTH SEQ_LEN MICRO_BATCH EVAL_TOKENS BUDGET
the_seeds
[ -n "$OUT" ] || fail "OUT is empty"
the_rows
# what of the text nobody trains on
held_back=0.01
batch=$((MICRO_BATCH * SEQ_LEN))
((EVAL_TOKENS >= batch)) || fail "EVAL_TOKENS: $EVAL_TOKENS are fewer than the $batch of a micro-batch"
texts=(held source numbers shuffled random)
licences=(/usr/share/common-licenses/GPL-3 /usr/share/common-licenses/MPL-1.1 /usr/share/common-licenses/Apache-2.0 /usr/share/common-licenses/GFDL-1.3)
[ ! -r "${licences[0]}" ] || texts=(held source legal numbers shuffled random)
declare -A files=()
for text in ${EVAL:-}; do
    [[ $text =~ ^([a-z][a-z0-9_-]*)=(.+)$ ]] || fail "EVAL: '$text' is not name=file, with a name of small letters, digits, _ and -"
    name=${BASH_REMATCH[1]} file=${BASH_REMATCH[2]}
    if [ ! -f "$file" ] || [ ! -r "$file" ]; then
        fail "EVAL: '$file' is not a file that can be read"
    fi
    [[ " ${texts[*]} " != *" $name "* ]] || fail "EVAL: there is a text '$name' already; name it otherwise than ${texts[*]}"
    texts+=("$name")
    files[$name]=$file
done

scripts/setup.sh --demo --check || scripts/setup.sh --demo
make -s --no-print-directory DEVICE=cpu binary
program=$(make -s DEVICE=cpu config | sed -n 's/^BUILD = //p')/train_gpt_fp8
mkdir -p "$OUT/texts"
data=demo/text.txt
[ -z "${DATA:-}" ] || data=$OUT/text.txt
scripts/text.sh "$data"
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}

# ---- the texts ----

# make_text NAME: to stdout
make_text() {
    case $1 in
        held) tail -c $(($(stat -Lc %s "$data") / 101)) "$data" ;; # a little less than is held back
        source) cat train_gpt_fp8.cu ./*.cuh core/*.h core/*.cuh ;;
        legal) cat "${licences[@]}" 2> /dev/null || true ;;
        numbers) awk -v bytes="$EVAL_TOKENS" 'BEGIN { for (i = 0; n <= bytes; i++) { line = i % 97 " times " i % 89 " is " i % 97 * (i % 89) "."; print line; n += length(line) + 1 } }' ;;
        shuffled)
            tr -s '[:space:]' '\n' < "$OUT/texts/held" | awk '
                { word[NR] = $0 }
                END {
                    x = 42
                    for (i = NR; i > 1; i--) { x = x * 16807 % 2147483647; j = 1 + x % i; t = word[i]; word[i] = word[j]; word[j] = t }
                    for (i = 1; i <= NR; i++) { printf "%s%s", word[i], i % 12 && i < NR ? " " : "\n" }
                }'
            ;;
        random) awk -v bytes="$EVAL_TOKENS" 'BEGIN { x = 42; for (i = 0; i <= bytes; i++) { x = x * 16807 % 2147483647; printf "%c", 32 + int(x / 2147483647 * 95) } }' ;;
        *) cat -- "${files[$1]}" ;;
    esac
}
for text in "${texts[@]}"; do
    # a pipe that closes early is no failure
    (set +o pipefail && make_text "$text" 2> /dev/null | head -c $((EVAL_TOKENS + 1)) > "$OUT/texts/$text")
    size=$(stat -c %s "$OUT/texts/$text")
    ((size > batch)) || fail "the text $text has $size bytes, and a micro-batch takes $((batch + 1)): give a longer one, or a smaller MICRO_BATCH or SEQ_LEN"
done

# ---- training and evaluation ----

# val_loss ROW SEED TEXT PRECISION: a line of the csv
val_loss() {
    local dir=$OUT/$1-$2 status=0 loss
    loss=nan
    if [ -e "$dir/latest" ]; then
        "$program" --init "$(find "$dir" -maxdepth 1 -name 'step_*' | sort | tail -n 1)" --val-data "$OUT/texts/$3" --steps 0 --recipe "$4" --seq-len "$SEQ_LEN" \
            --micro-batch "$MICRO_BATCH" --val-batches $((EVAL_TOKENS / batch)) --val-every 1 --output-dir "$dir/eval-$3-$4" > "$dir/eval-$3-$4.txt" 2>&1 || status=$?
        ((status == 0)) || { tail -n 1 "$dir/eval-$3-$4.txt" >&2 && fail "row $1, seed $2 on $3: status $status"; }
        loss=$(sed -nE 's/.*"val_loss":([0-9.e+-]+).*/\1/p' "$dir/eval-$3-$4/log.jsonl")
    fi
    printf '%s,%s,%s,%s,%s\n' "$1" "$2" "$3" "$4" "${loss:-nan}"
}

csv=$OUT/exp5.csv
echo row,seed,text,precision,loss > "$csv"
start=$SECONDS longest=0 cut=()
for seed in $SEEDS; do
    for name in $ROWS; do
        if ((SECONDS - start + longest > 60 * BUDGET)); then
            cut+=("$name, seed $seed")
            continue
        fi
        began=$SECONDS dir=$OUT/$name-$seed
        rm -rf "$dir"
        status=0
        "$program" --train-data "$data" --val-split "$held_back" --recipe "$name" --layers "$LAYERS" --heads "$HEADS" --width "$WIDTH" --seq-len "$SEQ_LEN" \
            --micro-batch "$MICRO_BATCH" --steps "$STEPS" --lr "$LR" --warmup "$WARMUP" --val-every 0 --seed "$seed" --checkpoint-every "$STEPS" \
            --output-dir "$dir" > "$dir.txt" 2>&1 || status=$?
        # 1: the model no longer trains, which is a result too
        ((status <= 1)) || { tail -n 1 "$dir.txt" >&2 && fail "row $name, seed $seed: status $status"; }
        for text in "${texts[@]}"; do
            val_loss "$name" "$seed" "$text" bf16
            [ "$name" = bf16 ] || val_loss "$name" "$seed" "$text" "$name"
        done | tee -a "$csv"
        ((SECONDS - began <= longest)) || longest=$((SECONDS - began))
    done
done

# ---- tables and verdicts ----

awk -F '|' -v csv="$csv" -v tables="$OUT/table.txt" -v verdicts="$OUT/verdict.txt" -v plot="$OUT/plot.txt" -v texts="${texts[*]}" '
    NF { order[++rows] = $1; what[$1] = $2 }
    END {
        count = split(texts, text, " ")
        FS = ","
        while ((getline line < csv) > 0) {
            split(line, f, ",")
            if (f[1] == "row") { continue }
            key = f[1] SUBSEP f[3] SUBSEP f[4]
            n[key]++
            if (f[5] == "nan") { lost[key]++; continue }
            x[key, ++k[key]] = f[5]; sum[key] += f[5]
        }
        for (key in k) {
            mean[key] = sum[key] / k[key]
            for (j = 1; j <= k[key]; j++) { d = x[key, j] - mean[key]; square[key] += d * d }
            spread[key] = k[key] > 1 ? sqrt(square[key] / (k[key] - 1)) : 0
        }
        printf "%-10s %-8s %10s %9s %9s %12s\n", "text", "trained", "loss", "spread", "vs bf16", "own recipe" > tables
        for (t = 1; t <= count; t++) {
            base = key_of("bf16", text[t], "bf16"); changes = ""
            for (i = 1; i <= rows; i++) {
                r = order[i]; key = key_of(r, text[t], "bf16"); own = key_of(r, text[t], r)
                if (!n[key]) { continue }
                printf "%-10s %-8s %10s %9.4f %9s %12s%s\n", text[t], r, k[key] ? sprintf("%.4f", mean[key]) : "lost", spread[key], change(key, base), r == "bf16" ? "" : change(own, key), \
                    lost[key] ? sprintf("  lost %d of %d", lost[key], n[key]) : "" > tables
                if (r == "bf16") { continue }
                if (t == 1) { titles = titles " " r " spread" }
                changes = changes (k[key] && k[base] ? sprintf(" %.4f %.4f", 100 * (mean[key] / mean[base] - 1), 100 * (spread[key] + spread[base]) / mean[base]) : " nan nan")
            }
            if (t == 1) { print "text" titles > plot }
            print text[t] changes > plot
            for (i = 2; i <= rows; i++) {
                r = order[i]; key = key_of(r, text[t], "bf16")
                claim = "models trained in " r " lose no more than BF16 ones on " text[t]
                if (!n[key] || !n[base]) { printf "not measured\t%s\t\n", claim > verdicts; continue }
                printf "%s\t%s\t%s, BF16 %s, spreads together %.4f\n", !lost[key] && !lost[base] && mean[key] - mean[base] <= spread[key] + spread[base] ? "held" : "NOT held", claim, \
                    figure(key), figure(base), spread[key] + spread[base] > verdicts
            }
        }
        for (i = 2; i <= rows; i++) {
            r = order[i]; most = ""; apart = 0; all = 1
            for (t = 1; t <= count; t++) {
                key = key_of(r, text[t], "bf16"); own = key_of(r, text[t], r)
                if (!k[key] || !k[own]) { all = 0; continue }
                d = 100 * (mean[own] / mean[key] - 1)
                if (most == "" || d > most) { most = d; at = text[t] }
                apart += mean[own] - mean[key] > spread[own] + spread[key]
            }
            printf "%s\tmodels trained in %s lose no more in that recipe than in BF16\t%s\n", most == "" ? "not measured" : all && !apart ? "held" : "NOT held", r, \
                most == "" ? "" : sprintf("most: %+.2f %%, on %s", most, at) > verdicts
        }
    }
    function key_of(row, text_, precision) { return row SUBSEP text_ SUBSEP precision }
    function change(a, b) { return k[a] && k[b] ? sprintf("%+.2f %%", 100 * (mean[a] / mean[b] - 1)) : "-" }
    function figure(key) { return lost[key] ? "lost " lost[key] " of " n[key] : sprintf("%.4f", mean[key]) }
' <<< "$rows"

picture="none (gnuplot is not installed: package gnuplot-nox)"
if command -v gnuplot > /dev/null; then
    columns=$(awk 'NR == 1 { print NF }' "$OUT/plot.txt")
    picture="none (only bf16 was trained)"
    if ((columns > 1)); then
        picture=$OUT/exp5.png
        gnuplot << PLOT || fail "gnuplot did not draw $picture"
set terminal pngcairo size 1000,560
set output "$picture"
set title "Loss of models trained in FP8 above that of BF16 ones; bars: the spreads over seeds together"
set ylabel "%"
set style data histogram
set style histogram errorbars gap 2 lw 1
set style fill solid 0.8 border -1
set datafile missing "nan"
set key above
set grid ytics
set xzeroaxis
plot for [i=2:$columns:2] "$OUT/plot.txt" using i:i+1:xtic(1) title columnheader(i)
PLOT
    fi
fi

printf '\nLoss of models of %s steps, mean of %s seeds, on %s tokens of each text, in BF16; own recipe: against that.\n\n' "$STEPS" "$(wc -w <<< "$SEEDS")" \
    $((EVAL_TOKENS / batch * batch))
cat "$OUT/table.txt"
echo
show_verdicts "$OUT/verdict.txt"
printf '\n  rows: %s\n  plot: %s\n  verdicts: %s\n' "$csv" "$picture" "$OUT/verdict.txt"
