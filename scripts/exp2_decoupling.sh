#!/usr/bin/env bash
# exp2_decoupling.sh: experiment 2: how few bits AdamW's master weights and moments may have, each by itself (the paper's Table 6 and Fig. 8).
#
# Trains one small GPT with each row of formats and several seeds, everything else being the same: recipe fp8. Reports the mean loss of the last 20 steps
# and the spread over seeds, and says of each claim whether it held: a difference counts where it is larger than the two spreads together.
#
#   scripts/exp2_decoupling.sh [--quick]    10 to 16 minutes on two cores; --quick (or QUICK=1) seconds, to see that it works
#   DATA=FILE OUT=runs/exp2                 own text; where to write: exp2.csv, exp2.png, table.txt, verdict.txt (a line a claim), and each run's log
#   SEEDS="1 2 3" STEPS=400 ROWS="#0 #2a"   seeds go round by round, so that every row has as many
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
OUT=${OUT-runs/exp2}

# name|what it is|flags. As in the paper gradients are E4M3 from row #2a on; on one process that is what they are added up in.
wide='--master-dtype fp32 --m-dtype fp32 --v-dtype fp32'
narrow='--grad-accum-dtype e4m3 --master-dtype fp16 --m-dtype e4m3 --opt-block 0 --master-rounding nearest --moment-rounding nearest'
blocks="$narrow --opt-block 128 --master-rounding stochastic"
rows="
#0|FP32 gradients and states|$wide --grad-dtype fp32
#1|BF16 gradients, FP32 states|$wide --grad-dtype bf16
#2a|FP16 master, FP8 m, FP16 v: FP8-LM|$narrow --v-dtype fp16
#2b|BF16 master, FP8 m, FP16 v|$narrow --v-dtype fp16 --master-dtype bf16
#3|FP8 master, FP8 m, FP16 v|$narrow --v-dtype fp16 --master-dtype e4m3
#4|FP16 master, FP8 m, FP8 v|$narrow --v-dtype e4m3
128|#2a with a scale every 128|$narrow --v-dtype fp16 --opt-block 128
128s|the same, stochastic master|$blocks --v-dtype fp16
128v4|128s with v in E4M3|$blocks --v-dtype e4m3
128v5|128s with v in E5M2|$blocks --v-dtype e5m2
128r4|128v4 with stochastic moments|$blocks --v-dtype e4m3 --moment-rounding stochastic
ours|recipe fp8: v in UE5M3, all stochastic|--grad-accum-dtype e4m3
"
above_zero STEPS LAYERS HEADS WIDTH SEQ_LEN MICRO_BATCH BUDGET
the_seeds
[ -n "$OUT" ] || fail "OUT is empty"
the_rows

scripts/setup.sh --demo --check || scripts/setup.sh --demo
make -s --no-print-directory DEVICE=cpu binary
program=$(make -s DEVICE=cpu config | sed -n 's/^BUILD = //p')/train_gpt_fp8
mkdir -p "$OUT"
text=demo/text.txt
[ -z "${DATA:-}" ] || text=$OUT/text.txt
scripts/text.sh "$text"
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}

csv=$OUT/exp2.csv
echo row,seed,loss,steps,optimizer_bytes,skipped > "$csv"
start=$SECONDS longest=0 cut=()
for seed in $SEEDS; do
    for name in $ROWS; do
        if ((SECONDS - start + longest > 60 * BUDGET)); then
            cut+=("$name, seed $seed")
            continue
        fi
        read -ra flags <<< "$(flags_of "$name")"
        began=$SECONDS dir=$OUT/${name//\#/n}-$seed
        rm -rf "$dir"
        status=0
        "$program" --train-data "$text" --recipe fp8 --layers "$LAYERS" --heads "$HEADS" --width "$WIDTH" --seq-len "$SEQ_LEN" \
            --micro-batch "$MICRO_BATCH" --steps "$STEPS" --lr "$LR" --warmup "$WARMUP" --val-every 0 --seed "$seed" --output-dir "$dir" \
            "${flags[@]}" > "$dir.txt" 2>&1 || status=$?
        # 1: the model no longer trains, which is a result too
        ((status <= 1)) || { tail -n 1 "$dir.txt" >&2 && fail "row $name, seed $seed: status $status"; }
        echo "$name,$seed,$(losses "$dir/log.jsonl")" | tee -a "$csv"
        ((SECONDS - began <= longest)) || longest=$((SECONDS - began))
    done
done

awk -F '|' -v csv="$csv" -v tables="$OUT/table.txt" -v verdicts="$OUT/verdict.txt" "$judge"'
    NF { order[++rows] = $1; what[$1] = $2 }
    END {
        read_losses(csv)
        printf "%-7s %-42s %10s %9s %9s %10s\n", "row", "", "loss", "spread", "vs #0", "MiB" > tables
        for (i = 1; i <= rows; i++) {
            r = order[i]
            if (!n[r]) { continue }
            printf "%-7s %-42s %10s %9s %9s %10.2f%s\n", r, what[r], k[r] ? sprintf("%.4f", mean[r]) : "lost", sprintf("%.4f", spread[r]), \
                k[r] && k["#0"] ? sprintf("%+.2f %%", 100 * (mean[r] / mean["#0"] - 1)) : "-", bytes[r] / 1048576, \
                lost[r] ? sprintf("  lost %d of %d", lost[r], n[r]) : "" > tables
        }
        equal("#1", "#0", "BF16 gradients end where FP32 ones do"); equal("#2a", "#0", "FP16 master, FP8 m and FP16 v end where FP32 states do")
        worse("#2b", "#2a", "a BF16 master is worse than an FP16 one with a scale"); worse("#3", "#2a", "an FP8 master is worse"); worse("#4", "#2a", "FP8 v is worse")
        equal("128", "#2a", "scales every 128 end where scales by tensor do"); equal("128s", "#2a", "a stochastic master ends there too")
        equal("128v4", "#2a", "E4M3 v with scales every 128 ends there"); equal("128v5", "#2a", "E5M2 v with scales every 128 ends there")
        equal("128r4", "#2a", "E4M3 v ends there where moments are rounded stochastically")
        fewer("ours", "#2a", "ours ends where #2a does, at fewer bytes")
    }
    function fewer(a, b, claim) { if (measured(a, b, claim)) { say(no_higher(a, b) && bytes[a] < bytes[b], claim, a, b) } }
' <<< "$rows"

picture="none (gnuplot is not installed: package gnuplot-nox)"
if command -v gnuplot > /dev/null; then
    runs=() first=${SEEDS%% *}
    for name in $ROWS; do
        [ ! -s "$OUT/${name//\#/n}-$first/log.jsonl" ] || runs+=("$name=$OUT/${name//\#/n}-$first")
    done
    picture=$OUT/exp2.png
    scripts/plot.sh --title "Optimizer states, seed $first" "$picture" "${runs[@]}"
fi

printf '\nMean loss of the last 20 of %s steps, %s seeds; bytes of all optimizer states.\n\n' "$STEPS" "$(wc -w <<< "$SEEDS")"
cat "$OUT/table.txt"
echo
show_verdicts "$OUT/verdict.txt"
printf '\n  rows: %s\n  plot: %s\n  verdicts: %s\n' "$csv" "$picture" "$OUT/verdict.txt"
