#!/usr/bin/env bash
# exp4_formats.sh: experiment 4: E4M3 or E5M2, class of tensors by class: X, dY, the gradients of weights, m and v. The paper takes E4M3
# for all but dY (E5M2) and v (FP16), and gives no comparison.
#
# Trains one small GPT over seeds under recipe fp8 and with one class at a time in another format, all else being the same, on two MPI ranks: on one no
# gradient is sent, and none would be in FP8. X and dY cannot both be E5M2, so X in E5M2 is compared with X in E4M3 at dY in E4M3. Then quantises the live
# tensors of a training run in all formats (exp4_formats.cu says how): SNR, what share becomes 0, what share is beyond the range. Reports means over tensors
# and the probes of the last sixth of the steps, the mean loss of the last 20 steps and its spread over seeds, and says of each claim whether it held: a
# difference of losses counts where it is larger than the two spreads together.
#
#   scripts/exp4_formats.sh [--quick]       half an hour on two cores at a guess; --quick (or QUICK=1) seconds, to see that it works
#   DATA=FILE OUT=runs/exp4                 own text; where to write: exp4.csv (losses), snr.csv, exp4.png, table.txt, verdict.txt (a line a claim), logs
#   SEEDS="1 2 3" STEPS=400 ROWS="base m5"  seeds go round by round, so that every row has as many
#   PROBE_EVERY=20                          steps between looks at the tensors
#   LAYERS HEADS WIDTH SEQ_LEN MICRO_BATCH LR WARMUP          of the model and its training; MICRO_BATCH is a rank's
#   BUDGET=30                               minutes: what would not end within them is not started, and that is said
#
# The status is 0 where everything that was started ran, whatever the verdicts: a contradiction is a result.
set -euo pipefail
cd "$(dirname "$0")/.."
export LC_ALL=C

# shellcheck source=scripts/experiment.sh
. scripts/experiment.sh "$@"
small_gpt
MICRO_BATCH=${MICRO_BATCH:-4} # sequences
PROBE_EVERY=${PROBE_EVERY:-$([ -n "${QUICK:-}" ] && echo 5 || echo 20)}
OUT=${OUT-runs/exp4}
ranks=2

# name|what it is|flags beside recipe fp8
rows='
base|recipe fp8: dY E5M2, v UE5M3, others E4M3|
bf16|all in BF16, states in FP32|--recipe bf16
x5|X in E5M2, dY in E4M3|--fp8-fwd e5m2 --fp8-bwd e4m3
dy4|dY in E4M3|--fp8-bwd e4m3
g5|weight gradients in E5M2|--grad-dtype e5m2
m5|m in E5M2|--m-dtype e5m2
v4|v in E4M3|--v-dtype e4m3
v5|v in E5M2|--v-dtype e5m2
'
above_zero STEPS PROBE_EVERY LAYERS HEADS WIDTH SEQ_LEN MICRO_BATCH BUDGET
the_seeds
[ -n "$OUT" ] || fail "OUT is empty"
the_rows

scripts/setup.sh --demo --check || scripts/setup.sh --demo
config=$(make -s DEVICE=cpu config)
value() { sed -n "s/^$1 = //p" <<< "$config"; }
[[ $(value MPI) == yes* ]] || fail "the build has no MPI (MPI = $(value MPI)): no gradient would be sent in FP8"
mpi
program=$(value BUILD)/train_gpt_fp8 tensors=$(value BUILD)/scripts/exp4_formats
make -s --no-print-directory DEVICE=cpu "$program" "$tensors"
mkdir -p "$OUT"
text=demo/text.txt
[ -z "${DATA:-}" ] || text=$OUT/text.txt
scripts/text.sh "$text"
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}

# ---- losses ----

csv=$OUT/exp4.csv
echo row,seed,loss,steps,optimizer_bytes,skipped > "$csv"
training=(--train-data "$text" --recipe fp8 --layers "$LAYERS" --heads "$HEADS" --width "$WIDTH" --seq-len "$SEQ_LEN" --steps "$STEPS" --lr "$LR" --warmup "$WARMUP" --val-every 0)
start=$SECONDS longest=0 cut=()
for seed in $SEEDS; do
    for name in $ROWS; do
        if ((SECONDS - start + longest > 60 * BUDGET)); then
            cut+=("$name, seed $seed")
            continue
        fi
        read -ra flags <<< "$(flags_of "$name")"
        began=$SECONDS dir=$OUT/$name-$seed
        rm -rf "$dir"
        status=0
        OMP_NUM_THREADS=1 "${launch[@]}" -np "$ranks" "$program" "${training[@]}" --micro-batch "$MICRO_BATCH" --seed "$seed" --output-dir "$dir" "${flags[@]}" \
            > "$dir.txt" 2>&1 < /dev/null || status=$?
        # 1: the model no longer trains, which is a result too
        ((status <= 1)) || { grep -v '^[- ]*$' "$dir.txt" | tail -n 1 >&2 && fail "row $name, seed $seed: status $status"; }
        echo "$name,$seed,$(losses "$dir/log.jsonl")" | tee -a "$csv"
        ((SECONDS - began <= longest)) || longest=$((SECONDS - began))
    done
done

# ---- tensors ----

snr=$OUT/snr.csv
rm -rf "$OUT/tensors"
mkdir -p "$OUT/tensors"
echo "tensors: $STEPS steps, looked at every $PROBE_EVERY"
"$tensors" "$snr" "$PROBE_EVERY" "${training[@]}" --grad-dtype fp32 --grad-accum-dtype fp32 --master-dtype fp32 --m-dtype fp32 --v-dtype fp32 \
    --micro-batch $((ranks * MICRO_BATCH)) --seed "${SEEDS%% *}" --output-dir "$OUT/tensors" > "$OUT/tensors.txt" 2>&1 < /dev/null \
    || { tail -n 1 "$OUT/tensors.txt" >&2 && fail "the tensors could not be measured: $OUT/tensors.txt"; }

# ---- tables and verdicts ----

awk -F '|' -v csv="$csv" -v snr="$snr" -v late=$((STEPS * 5 / 6)) -v last=$((STEPS - 1)) -v tables="$OUT/table.txt" -v verdicts="$OUT/verdict.txt" -v plot="$OUT/plot.txt" "$judge"'
    NF { order[++rows] = $1; what[$1] = $2 }
    END {
        read_losses(csv)
        printf "%-5s %-42s %10s %9s %9s %9s\n", "row", "", "loss", "spread", "vs base", "vs bf16" > tables
        for (i = 1; i <= rows; i++) {
            r = order[i]
            if (!n[r]) { continue }
            printf "%-5s %-42s %10s %9.4f %9s %9s%s\n", r, what[r], k[r] ? sprintf("%.4f", mean[r]) : "lost", spread[r], above(r, "base"), above(r, "bf16"), \
                lost[r] ? sprintf("  lost %d of %d", lost[r], n[r]) : "" > tables
        }
        while ((getline line < snr) > 0) {
            split(line, f, ",")
            if (f[1] == "step" || (f[1] < late && f[1] < last)) { continue }
            key = f[2] SUBSEP f[4]; tensor = key SUBSEP f[3]
            count[key]++; db[key] += f[5]; zeroed[key] += 100 * f[6]; beyond[key] += 100 * f[7]
            if (!(key in least) || f[5] + 0 < least[key]) { least[key] = f[5] + 0 }
            if (!((f[2], f[3]) in known)) { known[f[2], f[3]] = 1; seen[f[2], ++tensors[f[2]]] = f[3] }
            times[tensor]++; each[tensor] += f[5]
        }
        classes = split("x w dy wgrad m step_m v step_v", class, " "); formats = split("e4m3 e5m2 ue5m3", format, " ")
        title["x"] = "X"; title["w"] = "W"; title["dy"] = "dY"; title["wgrad"] = "weight gradients"; title["m"] = "m"; title["step_m"] = "the step of that m"
        title["v"] = "v"; title["step_v"] = "the step of that v"
        printf "\n%-20s %-7s %9s %9s %12s %14s\n", "tensors", "format", "SNR, dB", "least", "become 0, %", "out of range, %" > tables
        for (i = 1; i <= classes; i++) {
            line = "\"" title[class[i]] "\""
            for (j = 1; j <= formats; j++) {
                key = class[i] SUBSEP format[j]
                line = line " " (key in count ? db[key] / count[key] : "nan")
                if (!(key in count)) { continue }
                share = substr(class[i], 1, 5) != "step_"  # of a step it is that of its m or v
                printf "%-20s %-7s %9.2f %9.2f %12s %14s\n", title[class[i]], toupper(format[j]), db[key] / count[key], least[key], share ? percent(zeroed[key] / count[key]) : "", \
                    share ? percent(beyond[key] / count[key]) : "" > tables
            }
            print line > plot
        }
        equal("dy4", "x5", "E4M3 X ends no higher than E5M2 X, dY being E4M3"); equal("base", "dy4", "E5M2 dY ends no higher than E4M3 dY")
        equal("base", "g5", "E4M3 gradients end no higher than E5M2 ones"); equal("base", "m5", "E4M3 m ends no higher than E5M2 m")
        equal("base", "v4", "UE5M3 v ends no higher than E4M3 v"); equal("base", "v5", "UE5M3 v ends no higher than E5M2 v")
        better("x", "e4m3", "e5m2", "E4M3 X has the better SNR"); better("w", "e4m3", "e5m2", "E4M3 W has the better SNR")
        better("dy", "e5m2", "e4m3", "E5M2 dY has the better SNR")
        less_lost("dy", "e5m2", "e4m3", "E5M2 dY loses less to 0")
        better("wgrad", "e4m3", "e5m2", "E4M3 gradients have the better SNR"); better("m", "e4m3", "e5m2", "E4M3 m has the better SNR")
        better("step_v", "ue5m3", "e4m3", "UE5M3 v makes a step of better SNR than E4M3 v"); better("step_v", "ue5m3", "e5m2", "UE5M3 v makes a step of better SNR than E5M2 v")
    }
    function above(r, base) { return k[r] && k[base] ? sprintf("%+.2f %%", 100 * (mean[r] / mean[base] - 1)) : "-" }
    function percent(share) { return share == 0 ? "0" : share < 0.001 ? sprintf("%.1e", share) : sprintf("%.3f", share) }
    function better(c, a, b, claim,    ka, kb, j, t, d, wins) {
        ka = c SUBSEP a; kb = c SUBSEP b
        if (!count[ka] || !count[kb]) { printf "not measured\t%s\t\n", claim > verdicts; return }
        for (j = 1; j <= tensors[c]; j++) {
            t = seen[c, j]
            if (times[ka, t] && times[kb, t]) { wins += each[ka, t] / times[ka, t] > each[kb, t] / times[kb, t] }
        }
        d = db[ka] / count[ka] - db[kb] / count[kb]
        printf "%s\t%s\t%+.2f dB: %.2f against %.2f (%s); better in %d of %d tensors\n", (d >= 0.05 ? "held" : "NOT held"), claim, d, db[ka] / count[ka], db[kb] / count[kb], toupper(b), \
            wins, tensors[c] > verdicts
    }
    function less_lost(c, a, b, claim,    ka, kb) {
        ka = c SUBSEP a; kb = c SUBSEP b
        if (!count[ka] || !count[kb]) { printf "not measured\t%s\t\n", claim > verdicts; return }
        printf "%s\t%s\t%s %% against %s %% (%s)\n", (zeroed[ka] / count[ka] < zeroed[kb] / count[kb] ? "held" : "NOT held"), claim, percent(zeroed[ka] / count[ka]), \
            percent(zeroed[kb] / count[kb]), toupper(b) > verdicts
    }
' <<< "$rows"

picture="none (gnuplot is not installed: package gnuplot-nox)"
if command -v gnuplot > /dev/null; then
    picture=$OUT/exp4.png
    gnuplot << PLOT || fail "gnuplot did not draw $picture"
set terminal pngcairo size 1000,560
set output "$picture"
set title "SNR of live tensors as each format holds them, steps $((STEPS * 5 / 6)) to $((STEPS - 1))"
set ylabel "dB"
set style data histogram
set style histogram clustered gap 1
set style fill solid 0.8 border -1
set datafile missing "nan"
set key above
set yrange [0:*]
set xtics rotate by 30 right
set grid ytics
plot "$OUT/plot.txt" using 2:xtic(1) title "E4M3", "" using 3 title "E5M2", "" using 4 title "UE5M3"
PLOT
fi

printf '\nMean loss of the last 20 of %s steps, %s seeds, %s ranks; SNR: means over tensors and probes from step %s on.\n\n' "$STEPS" "$(wc -w <<< "$SEEDS")" "$ranks" $((STEPS * 5 / 6))
cat "$OUT/table.txt"
echo
show_verdicts "$OUT/verdict.txt"
printf '\n  rows: %s\n  tensors: %s\n  plot: %s\n  verdicts: %s\n' "$csv" "$snr" "$picture" "$OUT/verdict.txt"
