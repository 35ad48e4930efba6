#!/usr/bin/env bash
# nightly.sh: the reproduction of every night: what the paper claims and what we guard beside it, measured again, against the last night and the last release.
#
#   scripts/nightly.sh                     every part at its full size, in order; five and a half hours on two cores at a guess, most of it tests with their full counts
#   scripts/nightly.sh --budget 45m        (or 2h) fewer seeds and steps, then fewer parts, building included; the report says what was cut
#   scripts/nightly.sh --only plans,exp3   these parts, those that failed once more; what the others have measured stays
#   scripts/nightly.sh --list              the parts, their sizes, and what is run; with --budget, what would be
#   scripts/nightly.sh --night 2026-11-28b --out runs/nightly    the night's name (default: today's date, UTC) and the folder of all nights
#   scripts/nightly.sh --release FILE      what to compare with beside the last nights (default: the last of results/nightly_*.json)
#   TRAIN=PROGRAM                          build nothing; plans, topology, convergence and bench run this one
#   PACE=2.5                               with a budget: this machine takes so many times as long as the parts' times (else a few steps are timed)
#   DATA=FILE                              the text to train on, some megabytes (default: the demo's)
#
# A night is a folder: parts/NAME/output.txt (raw) and figures.jsonl, results.json, report.html. Interrupted and started again, the last night goes on with
# the parts that are not done, if it is of the same commit and budget and not older than 20 hours; a date that is taken gets a letter. The program that
# compares is scripts/nightly_report.pl (perl-base alone); claims, bounds and commands are the lines of scripts/claims.tsv. At a release:
# cp runs/nightly/DATE/results.json results/nightly_VERSION.json
#
# The status is 0 where nothing is worse, 1 where something is (each named on a line of its own) or a part failed, 2 where nothing could be run. A claim of
# the paper that does not hold is a result, and red only where it held before.
#
# By cron, at 1 UTC:    0 1 * * *  cd /srv/train_gpt_fp8 && git pull -q && mkdir -p runs && scripts/nightly.sh --budget 5h > runs/nightly.log 2>&1 || mail -s "nightly: worse" you < runs/nightly.log
# By systemd:           scripts/nightly.timer says how
# shellcheck disable=SC2317 # run_PART and figures_PART are called by name
set -euo pipefail
cd "$(dirname "$0")/.."
export LC_ALL=C

fail() {
    printf 'nightly.sh: %s\n' "$*" >&2
    exit 2
}

# ---- the parts ----

# Each part in its sizes, the smallest first: part|seconds on two cores|settings (lists have commas). The order is that of importance: where the budget is
# short the last ones are left out, and the first ones grow first. Times of soak are guesses that nobody has measured yet. A part may take four times as long, and 2 minutes, before it counts as hanging.
sizes='
plans|10|
topology|30|CHECKS=2-1-2,1-2-2
topology|90|CHECKS=8-4-1,4-4-2,2-1-16,8-4-1-fp8-lm,4-4-2-bf16
exp3|30|RANKS=2
exp3|180|RANKS=2,3,4,8
convergence|70|SEEDS=1,2 STEPS=60
convergence|190|SEEDS=1,2,3 STEPS=120
convergence|480|SEEDS=1,2,3 STEPS=300
convergence|800|SEEDS=1,2,3,4,5 STEPS=300
exp1|110|STEPS=36
exp1|200|STEPS=72
exp1|330|STEPS=120
exp2|100|SEEDS=1,2 STEPS=100 ROWS=#0,#1,#2a,#2b,#3,#4,ours
exp2|290|SEEDS=1,2,3 STEPS=200 ROWS=#0,#1,#2a,#2b,#3,#4,ours
exp2|960|SEEDS=1,2,3 STEPS=400
exp4|120|SEEDS=1,2 STEPS=60 PROBE_EVERY=5
exp4|300|SEEDS=1,2,3 STEPS=150 PROBE_EVERY=10
exp4|780|SEEDS=1,2,3 STEPS=400
exp5|100|SEEDS=1,2 STEPS=60 EVAL_TOKENS=8192
exp5|220|SEEDS=1,2,3 STEPS=150
exp5|480|SEEDS=1,2,3 STEPS=400
bench|60|STEPS=5 REPEAT=1 SHAPES=124M-B4,6x384-B8
bench|330|STEPS=8 REPEAT=2
gpu|480|
readme|700|
soak_train|2400|
soak_topology|2400|
soak_checkpoint|2400|
soak_parallel|2400|
soak_zero|1800|
soak_comm|900|
soak_exchange|900|
soak_transfers|600|
soak_partition|600|
soak_safetensors|600|
'
# part|what it is
about='
plans|plans of the setups of the paper: memory, traffic and least times of 7B and 175B on H100s
topology|a toy GPT on 4 to 32 ranks against its plan (scripts/topology_check.sh)
exp3|experiment 3: plans of the tables of the paper, and ZeRO on real ranks (scripts/exp3_zero.sh)
convergence|a small GPT in BF16, fp8 and fp8-lm over seeds, on the text of the demo
exp1|experiment 1: scaling of FP8 gradients, auto against pre and post (scripts/exp1_scaling.sh)
exp2|experiment 2: optimizer states in few bits, rows #0 to #4 and ours (scripts/exp2_decoupling.sh)
exp4|experiment 4: E4M3 or E5M2, class of tensors by class: losses and SNR (scripts/exp4_formats.sh)
exp5|experiment 5: models trained in BF16 and FP8 on texts of other kinds (scripts/exp5_shift.sh)
bench|speed and memory of training on this CPU (scripts/bench.sh)
gpu|tests, losses and speed on a GPU, where one is (make gpu-check)
readme|every command of README.md that needs no GPU, cluster or hours (scripts/readme_check.sh)
soak_train|make soak ONLY=train: training, recipes and modes, with all seeds
soak_topology|make soak ONLY=topology: all topologies and recipes
soak_checkpoint|make soak ONLY=checkpoint: kills, damaged files
soak_parallel|make soak ONLY=parallel: the same bits in every topology
soak_zero|make soak ONLY=zero: the same bits however divided
soak_comm|make soak ONLY=comm: reduction of gradients
soak_exchange|make soak ONLY=exchange: exchanges of layers and stages
soak_transfers|make soak ONLY=transfers: exchanges beside the computing
soak_partition|make soak ONLY=partition: who keeps what, against brute force
soak_safetensors|make soak ONLY=safetensors: damaged files
'
all=$(awk -F '|' 'NF > 1 { print $1 }' <<< "$about")

# In these functions $dir is the part's folder and the settings of its size are variables. run_PART writes to stdout; its status is the part's. figures_PART
# prints what was measured, with figure and the like. Parts without functions of their own are soak_NAME.

# figure METRIC VALUE UNIT planned|measured [NOTE]: a line of figures.jsonl; VALUE null: not measured, and NOTE says why. Plans do not depend on the size.
figure() {
    local scale=$scale note=${5:-}
    [ "$4" = measured ] || scale=
    [[ $2 =~ ^(null|-?[0-9]+(\.[0-9]+)?([eE][-+]?[0-9]+)?)$ ]] || { echo "$1: '$2' is not a number" && exit 1; }
    note=${note//\\/} note=${note//\"/\'}
    printf '{"metric":"%s","value":%s,"unit":"%s","kind":"%s","scale":"%s","note":"%s"}\n' "$1" "$2" "$3" "$4" "$scale" "$note"
}

# figures: figure for every line "metric|value|unit|kind|note" of stdin
figures() {
    local metric value unit kind note
    while IFS='|' read -r metric value unit kind note; do
        figure "$metric" "$value" "$unit" "$kind" "$note"
    done
}

# verdicts PREFIX FILE: the verdicts of an experiment as 1, 0 and null; a claim's metric is its text, with _ for all that is not a letter or digit
verdicts() {
    awk -F '\t' -v prefix="$1" '{
        name = tolower($2); gsub(/[^a-z0-9]+/, "_", name); sub(/_$/, "", name); gsub(/\|/, "/", $3)
        value = $1 == "held" ? 1 : $1 == "NOT held" ? 0 : "null"
        kind = prefix == "exp3" && name !~ /^runs_/ ? "planned" : "measured"
        printf "%s.%s|%s|yes or no|%s|%s\n", prefix, name, value, kind, value == "null" ? "cut at this size" : $3
    }' "$2" | figures
}

# series PLOT NAME: a curve of the report from lines "x y" of stdin, at most 100 points
series() {
    awk -v plot="$1" -v name="$2" '
        { x[NR] = $1; y[NR] = $2 }
        END {
            if (!NR) { exit }
            every = NR > 100 ? NR / 100 : 1
            for (at = 1; at <= NR; at += every) { i = int(at); points = points (points == "" ? "" : ",") "[" x[i] "," y[i] "]" }
            if (i < NR) { points = points ",[" x[NR] "," y[NR] "]" }
            printf "{\"plot\":\"%s\",\"series\":\"%s\",\"points\":[%s]}\n", plot, name, points
        }'
}

# field NAME FILE…: that number of each line of JSON
field() { sed -nE "s/.*\"$1\":[ ]*(-?[0-9.e+-]+).*/\\1/p" "${@:2}"; }
# object NAME: of one line of JSON, the flat object of that name
object() { sed -nE "s/.*\"$1\":\{([^}]*)\}.*/\1/p"; }

use_binary() {
    if [ -z "${TRAIN:-}" ]; then
        TRAIN=$(make -s DEVICE=cpu config | sed -n 's/^BUILD = //p')/train_gpt_fp8
    fi
    export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}
}

# name|flags: GPT-175B on 128 GPUs at the micro-batches of the paper's headline, and 7B on one
plans='bf16-175b-1|gpt3:175b --world 128 --tp 8 --pp 4 --global-batch 1048576 --micro-batch 1 --recipe bf16 --recompute 0
fp8-lm-175b-1|gpt3:175b --world 128 --tp 8 --pp 4 --global-batch 1048576 --micro-batch 1 --recipe fp8-lm --recompute 0
fp8-lm-175b-4|gpt3:175b --world 128 --tp 8 --pp 4 --global-batch 1048576 --micro-batch 4 --recipe fp8-lm --recompute 0
fp8-175b-4|gpt3:175b --world 128 --tp 8 --pp 4 --global-batch 1048576 --micro-batch 4 --recipe fp8
bf16-7b-2|gpt3:7b --world 32 --global-batch 4194304 --micro-batch 2 --recipe bf16 --recompute 0
fp8-lm-7b-2|gpt3:7b --world 32 --global-batch 4194304 --micro-batch 2 --recipe fp8-lm --recompute 0
fp8-7b-2|gpt3:7b --world 32 --global-batch 4194304 --micro-batch 2 --recipe fp8
bf16-7b-whole|gpt3:7b --world 1 --zero 0 --micro-batch 2 --recipe bf16 --recompute 0
fp8-lm-7b-whole|gpt3:7b --world 1 --zero 0 --micro-batch 2 --recipe fp8-lm --recompute 0
fp8-7b-whole|gpt3:7b --world 1 --zero 0 --micro-batch 2 --recipe fp8'
run_plans() {
    local name flags
    use_binary
    while IFS='|' read -r name flags; do
        echo "$TRAIN --plan --json --gpu h100 --vocab 100352 --seq-len 2048 --init $flags"
        # shellcheck disable=SC2086 # flags are words
        "$TRAIN" --plan --json --gpu h100 --vocab 100352 --seq-len 2048 --init $flags < /dev/null > "$dir/$name.json"
        cat "$dir/$name.json"
    done <<< "$plans"
}
figures_plans() {
    local name flags json memory traffic
    while IFS='|' read -r name flags; do
        json=$(sed 's/"baseline".*//' "$dir/$name.json") memory=$(object memory <<< "$json") traffic=$(object traffic <<< "$json")
        printf '%s %s %s %s %s %s %s\n' "$name" "$(field parameters <<< "$json")" "$(field gradients <<< "{$memory")" "$(field optimizer <<< "{$memory")" \
            "$(field total <<< "{$memory")" "$(field step_seconds <<< "$json")" "$(field tensor_parallel <<< "{$traffic")"
    done <<< "$plans" | awk '
        { bytes[$1] = ($3 + $4) / $2; seconds[$1] = $6; sent[$1] = $7 }
        function gain(metric, slow, fast) { printf "plans.%s|%.2f|%%|planned|a step of %.2f s after %.2f s at best\n", metric, 100 * (seconds[slow] / seconds[fast] - 1), seconds[fast], seconds[slow] }
        END {
            gain("gain.fp8-lm.175b", "bf16-175b-1", "fp8-lm-175b-4"); gain("gain.fp8.175b", "bf16-175b-1", "fp8-175b-4")
            gain("gain.equal.fp8-lm.175b", "bf16-175b-1", "fp8-lm-175b-1")
            gain("gain.fp8-lm.7b", "bf16-7b-2", "fp8-lm-7b-2"); gain("gain.fp8.7b", "bf16-7b-2", "fp8-7b-2")
            printf "plans.shared.fp8-lm.175b|%.2f|%%|planned|less than BF16, all five exchanges of a layer\n", 100 * (1 - sent["fp8-lm-175b-4"] / sent["bf16-175b-1"])
            printf "plans.shared.fp8.175b|%.2f|%%|planned|less than BF16, all five exchanges of a layer\n", 100 * (1 - sent["fp8-175b-4"] / sent["bf16-175b-1"])
            note = "gradients and optimizer, embeddings and vectors too; BF16: " sprintf("%.2f", bytes["bf16-7b-whole"])
            printf "plans.bytes.fp8-lm|%.3f|bytes a parameter|planned|%s\n", bytes["fp8-lm-7b-whole"], note
            printf "plans.bytes.fp8|%.3f|bytes a parameter|planned|%s\n", bytes["fp8-7b-whole"], note
        }' | figures
}

run_topology() {
    local check tp pp dp recipe bad=0
    use_binary
    export TRAIN
    for check in $CHECKS; do
        IFS=- read -r tp pp dp recipe <<< "$check"
        OUT=$dir/runs STEPS=40 scripts/topology_check.sh "$tp" "$pp" "$dp" --recipe "${recipe:-fp8}" || bad=1
    done
    return "$bad"
}
figures_topology() {
    awk -v checks="$CHECKS" '
        /^tp .* ranks, / { seen++ }
        /DIFFERENT|DOES NOT FALL/ { bad++ }
        END {
            n = split(checks, check, " ")
            printf "topology.checks_failed|%d|checks|measured|%d topologies, memory and traffic to the byte\n", bad + n - seen, n
        }' "$dir/output.txt" | figures
}

run_exp3() { OUT=$dir/runs BUDGET=$minutes scripts/exp3_zero.sh; }
figures_exp3() {
    verdicts exp3 "$dir/runs/verdict.txt"
    awk -F , -v G=1073741824 '
        NR == 1 { next }
        { total[$1, $2, $3] = $5 / G; sent[$1, $2, $3] = ($8 + $9) / G; wire[$1, $2] = $10 / G; apart[$1, $2, $3] = 100 * ($7 > $6 ? $7 - $6 : $6 - $7) / $6; least[$1, $2, $3] = $4 / G }
        END {
            models = split("7B 13B 175B", model, " ")
            for (i = 1; i <= models; i++) {
                m = model[i]; name = tolower(m); base = total[m, "bf16", "flat"]
                saved("fp8-lm", "tensor", "fp8-lm"); saved("fp8", "flat", "fp8"); saved("fp8 e4m3 sums", "flat", "fp8-e4m3")
                ratio("fp8-lm", "tensor"); ratio("fp8", "flat")
                printf "exp3.apart.%s|%.3f|%%|planned|most over least states of a rank, whole matrices; flat parts: %.3f %%\n", name, apart[m, "fp8-lm", "tensor"], apart[m, "fp8-lm", "flat"]
                if (wire[m, "bf16"] > 0) {
                    printf "exp3.activations.fp8-lm.%s|%.2f|%%|planned|%.2f GiB after %.2f\n", name, 100 * (1 - wire[m, "fp8-lm"] / wire[m, "bf16"]), wire[m, "fp8-lm"], wire[m, "bf16"]
                    printf "exp3.activations.fp8.%s|%.2f|%%|planned|%.2f GiB after %.2f\n", name, 100 * (1 - wire[m, "fp8"] / wire[m, "bf16"]), wire[m, "fp8"], wire[m, "bf16"]
                }
            }
        }
        function saved(recipe, split_, metric) {
            printf "exp3.saved.%s.%s|%.2f|%%|planned|%.2f GiB after %.2f\n", metric, name, 100 * (1 - total[m, recipe, split_] / base), total[m, recipe, split_], base
            printf "exp3.memory.%s.%s|%.4f|GiB|planned|\n", metric, name, total[m, recipe, split_]
        }
        function ratio(recipe, split_) {
            printf "exp3.sent.%s.%s|%.2f|%%|planned|%.2f GiB after %.2f\n", recipe, name, 100 * (1 - sent[m, recipe, split_] / sent[m, "bf16", "flat"]), sent[m, recipe, split_], sent[m, "bf16", "flat"]
        }' "$dir/runs/plans.csv" | figures
    awk -F , 'NR > 1 { n++; bad += $5 != $9 || $6 != $10 } END { if (n) { printf "exp3.runs_unlike_plan|%d|runs|measured|of %d\n", bad, n } }' "$dir/runs/runs.csv" | figures
    local recipe
    for recipe in bf16 fp8-lm fp8 'fp8 e4m3 sums'; do
        awk -F , -v recipe="$recipe" -v kind="$([ "$recipe" = bf16 ] || [ "$recipe" = fp8-lm ] && echo tensor || echo flat)" \
            '$2 == recipe && $3 == kind { printf "\"%s\" %.2f\n", $1, $5 / 1073741824 }' "$dir/runs/plans.csv" | series "Memory of the fullest rank, planned, GiB" "$recipe"
    done
}

# The run of the demo on one process. A run that ended is not made again.
run_convergence() {
    local recipe seed text=demo/text.txt name
    use_binary
    mkdir -p "$dir/runs"
    [ -z "${DATA:-}" ] || text=$dir/text.txt
    scripts/text.sh "$text"
    for seed in $SEEDS; do
        for recipe in bf16 fp8-lm fp8; do
            name=$dir/runs/$recipe-$seed
            if [ -e "$name.done" ]; then
                echo "$recipe, seed $seed: done before"
                continue
            fi
            rm -rf "$name"
            "$TRAIN" --train-data "$text" --val-split 0.01 --recipe "$recipe" --layers 4 --heads 4 --width 256 --seq-len 256 --micro-batch 8 \
                --steps "$STEPS" --lr 1e-3 --warmup 20 --val-every "$STEPS" --seed "$seed" --output-dir "$name"
            touch "$name.done"
        done
    done
}
figures_convergence() {
    local recipe seed first=${SEEDS%% *}
    for seed in $SEEDS; do
        for recipe in bf16 fp8-lm fp8; do
            field step "$dir/runs/$recipe-$seed/log.jsonl" > /dev/null || continue
            printf '%s %s %s %s\n' "$recipe" "$seed" "$(grep -h '"loss":' "$dir/runs/$recipe-$seed/log.jsonl" | field loss /dev/stdin | tail -n 20 | awk '{ s += $1 } END { print NR ? s / NR : "nan" }')" \
                "$(field val_loss "$dir/runs/$recipe-$seed/log.jsonl" | tail -n 1)"
        done
    done | awk '
        { loss[$1, $2] = $3; val[$1, $2] = $4; if (!($2 in seen)) { seen[$2] = 1; seed[++n] = $2 } }
        function compare(recipe, what, table,    i, d, sum, square, all) {
            for (i = 1; i <= n; i++) {
                d = 100 * (table[recipe, seed[i]] / table["bf16", seed[i]] - 1); sum += d; all = all sprintf("%s%+.2f", i > 1 ? ", " : "", d)
            }
            printf "convergence.%s.%s|%.3f|%%|measured|above BF16, mean of seeds: %s\n", what, recipe, sum / n, all
        }
        function spread(what, table,    i, mean, square) {
            for (i = 1; i <= n; i++) { mean += table["bf16", seed[i]] / n }
            for (i = 1; i <= n; i++) { square += (table["bf16", seed[i]] - mean) ^ 2 }
            printf "convergence.%s.spread|%.3f|%%|measured|standard deviation of BF16 over %d seeds\n", what, 100 * sqrt(square / (n - 1)) / mean, n
            printf "convergence.%s.bf16|%.5f|nats|measured|mean of %d seeds\n", what, mean, n
        }
        END { spread("loss", loss); spread("val", val); compare("fp8-lm", "loss", loss); compare("fp8", "loss", loss); compare("fp8-lm", "val", val); compare("fp8", "val", val) }' | figures
    for recipe in bf16 fp8-lm fp8; do
        grep '"loss":' "$dir/runs/$recipe-$first/log.jsonl" | sed -nE 's/.*"step":([0-9]+).*/\1 &/p' | awk '
            match($0, /"loss":[0-9.e+-]+/) { n++; step[n] = $1; loss[n] = substr($0, RSTART + 7, RLENGTH - 7) }
            END { for (i = 1; i <= n; i++) { half = i - 1 < 5 ? i - 1 : 5; if (n - i < half) { half = n - i } sum = 0; for (j = i - half; j <= i + half; j++) { sum += loss[j] } print step[i], sum / (2 * half + 1) } }' |
            series "Training loss, seed $first, by step" "$recipe"
    done
}

run_exp1() { OUT=$dir/runs scripts/exp1_scaling.sh; }
figures_exp1() {
    verdicts exp1 "$dir/runs/verdict.txt"
    local mode late
    late=$((STEPS * 5 / 6))
    for mode in pre post sqrt auto direct; do
        awk -F , -v mode="$mode" -v late="$late" '
            $1 == "virtual" && $5 == mode && $3 >= late { n[$2]++; s[$2] += $8; u[$2] += $6; o[$2] += $7 }
            END { for (r in n) { printf "exp1.snr.%s.%d|%.3f|dB|measured|\nexp1.underflow.%s.%d|%.5f|%%|measured|\nexp1.overflow.%s.%d|%.5f|%%|measured|\n", mode, r, s[r] / n[r], mode, r, 100 * u[r] / n[r], mode, r, 100 * o[r] / n[r] } }' \
            "$dir/runs/exp1.csv" | sort -V | figures
        awk -F , -v mode="$mode" -v late="$late" '
            $1 == "virtual" && $5 == mode && $3 >= late { n[$2]++; s[$2] += $8 }
            END { for (r in n) { print r, s[r] / n[r] } }' "$dir/runs/exp1.csv" | sort -n | awk '{ printf "\"%d\" %.2f\n", $1, $2 }' | series "SNR of the reduced gradient by ranks, dB" "$mode"
    done
}

run_exp2() { OUT=$dir/runs BUDGET=$minutes scripts/exp2_decoupling.sh; }
figures_exp2() {
    verdicts exp2 "$dir/runs/verdict.txt"
    awk -F , '
        NR == 1 { next }
        !($1 in n) { order[++rows] = $1 }
        { n[$1]++; bytes[$1] = $5; if ($3 == "nan") { lost[$1]++ } else { sum[$1] += $3; k[$1]++ } }
        END {
            base = k["#0"] ? sum["#0"] / k["#0"] : 0
            for (i = 1; i <= rows; i++) {
                r = order[i]; name = r; sub(/#/, "", name)
                if (base && k[r]) { printf "exp2.over.%s|%.3f|%%|measured|above row #0, mean of %d seeds%s\n", name, 100 * (sum[r] / k[r] / base - 1), k[r], lost[r] ? "; lost: " lost[r] : "" }
                else if (lost[r]) { printf "exp2.over.%s|null|%%|measured|lost in all seeds\n", name }
                if (bytes["#0"]) { printf "exp2.states.%s|%.3f|bytes a parameter|measured|embeddings and vectors too\n", name, 12 * bytes[r] / bytes["#0"] }
            }
        }' "$dir/runs/exp2.csv" | figures
    awk -F , 'NR > 1 && $3 != "nan" { if (!($1 in k)) { order[++n] = $1 } s[$1] += $3; k[$1]++ } END { for (i = 1; i <= n; i++) { printf "\"%s\" %.4f\n", order[i], s[order[i]] / k[order[i]] } }' \
        "$dir/runs/exp2.csv" | series "Loss by formats of the optimizer (rows of Table 6)" "mean of seeds"
}

run_exp4() { OUT=$dir/runs BUDGET=$minutes scripts/exp4_formats.sh; }
figures_exp4() {
    verdicts exp4 "$dir/runs/verdict.txt"
    awk -F , '
        NR == 1 { next }
        !($1 in n) { order[++rows] = $1 }
        { n[$1]++; if ($3 != "nan") { sum[$1] += $3; k[$1]++ } }
        END {
            for (i = 1; i <= rows; i++) {
                r = order[i]
                if (k["base"] && r != "base") { printf "exp4.over.%s|%s|%%|measured|above recipe fp8, %d of %d seeds\n", r, k[r] ? sprintf("%.3f", 100 * (sum[r] / k[r] / (sum["base"] / k["base"]) - 1)) : "null", k[r], n[r] }
            }
        }' "$dir/runs/exp4.csv" | figures
    local format
    for format in e4m3 e5m2 ue5m3; do
        awk -F , -v format="$format" -v late=$((STEPS * 5 / 6)) '
            $4 == format && $1 >= late { if (!($2 in n)) { order[++classes] = $2 } n[$2]++; db[$2] += $5; zeroed[$2] += $6 }
            END {
                for (i = 1; i <= classes; i++) {
                    c = order[i]
                    printf "exp4.snr.%s.%s|%.3f|dB|measured|\nexp4.zeroed.%s.%s|%.5f|%%|measured|\n", c, format, db[c] / n[c], c, format, 100 * zeroed[c] / n[c]
                }
            }' "$dir/runs/snr.csv" | figures
        awk -F , -v format="$format" -v late=$((STEPS * 5 / 6)) '
            $4 == format && $1 >= late { if (!($2 in n)) { order[++classes] = $2 } n[$2]++; db[$2] += $5 }
            END { for (i = 1; i <= classes; i++) { printf "\"%s\" %.2f\n", order[i], db[order[i]] / n[order[i]] } }' "$dir/runs/snr.csv" | series "SNR of live tensors by format, dB" "$format"
    done
}

run_exp5() { OUT=$dir/runs BUDGET=$minutes scripts/exp5_shift.sh; }
figures_exp5() {
    verdicts exp5 "$dir/runs/verdict.txt"
    awk -F , '
        $4 != "bf16" || $5 == "nan" { next }
        { if (!(($1, $3) in n)) { order[++rows] = $1 " " $3 } sum[$1, $3] += $5; n[$1, $3]++ }
        END { for (i = 1; i <= rows; i++) { split(order[i], f, " "); print order[i], sum[f[1], f[2]] / n[f[1], f[2]] } }' "$dir/runs/exp5.csv" > "$dir/losses"
    awk '
        $1 == "bf16" { base[$2] = $3; next }
        $2 in base { printf "exp5.over.%s.%s|%.3f|%%|measured|above the %.4f nats of BF16\n", $1, $2, 100 * ($3 / base[$2] - 1), base[$2] }' "$dir/losses" | figures
    local recipe
    for recipe in bf16 fp8-lm fp8; do
        awk -v recipe="$recipe" '$1 == recipe { printf "\"%s\" %.4f\n", $2, $3 }' "$dir/losses" | series "Loss on texts by recipe of training" "$recipe"
    done
}

run_readme() { # in a copy: what the README makes is never overwritten, so not made twice in one folder
    local copy=$dir/copy name
    rm -rf "$copy"
    mkdir -p "$copy"
    git ls-files -z | xargs -0 cp -p --parents -t "$copy"
    for name in build demo; do
        [ ! -e "$name" ] || cp -a "$name" "$copy"
    done
    (cd "$copy" && SKIP='^make (demo|test)|nightly' OUT=$dir/runs scripts/readme_check.sh)
    rm -rf "$copy"
}
figures_readme() {
    sed -nE 's/^([0-9]+) commands run, ([0-9]+) failed, .*/readme.failed|\2|commands|measured|of \1/p' "$dir/output.txt" | figures
}

run_bench() {
    use_binary
    rm -f "$dir/bench.jsonl"
    OUT=$dir/bench.jsonl TRAIN=$TRAIN scripts/bench.sh
}
figures_bench() {
    awk '
        function text(key) { return match($0, "\"" key "\":\"[^\"]*\"") ? substr($0, RSTART + length(key) + 4, RLENGTH - length(key) - 5) : "" }
        function number(key) { return match($0, "\"" key "\":[-0-9.e+]+") ? substr($0, RSTART + length(key) + 3, RLENGTH - length(key) - 3) : "" }
        text("shape") != "" {
            name = tolower(text("shape") "." text("recipe"))
            note = sprintf("load %s before", number("load"))
            printf "bench.tok_s.%s|%s|tokens/s|measured|%s\nbench.over_own.%s|%s|times|measured|a step over its matmuls and bytes alone; %s\nbench.peak.%s|%.4f|GiB|measured|\n", \
                name, number("tok_s"), note, name, number("step_over_own"), note, name, number("peak_rss") / 1073741824
            if (number("over_bf16") != "") { printf "bench.over_bf16.%s|%s|times|measured|a CPU has no FP8 units\n", tolower(text("shape")), number("over_bf16") }
        }
        text("optimizer") != "" {
            name = tolower(text("optimizer")); gsub(/[^a-z0-9]+/, "_", name)
            printf "bench.adamw.%s|%s|ns an element|measured|\n", name, number("ns")
        }' "$dir/bench.jsonl" | figures
    sed -nE 's/.*"shape":"([^"]*)".*"recipe":"([^"]*)","tok_s":([0-9.]+).*/\2 "\1" \3/p' "$dir/bench.jsonl" > "$dir/speeds"
    local recipe
    for recipe in bf16 fp8; do
        sed -n "s/^$recipe //p" "$dir/speeds" | series "Speed on this CPU, tokens/s" "$recipe"
    done
}

run_gpu() {
    rm -f "$dir"/gpu_check_*
    OUT=$dir make --no-print-directory gpu-check
}
figures_gpu() {
    printf 'gpu.wrong|%d|checks|measured|\n' "$(grep -c '^  WRONG' "$dir/output.txt" || true)" | figures
    cat "$dir"/gpu_check_*.jsonl | awk '
        function text(key) { return match($0, "\"" key "\": *\"[^\"]*\"") ? substr($0, RSTART + length(key) + 4, RLENGTH - length(key) - 5) : "" }
        function clean(s) { sub(/^ *"?/, "", s); sub(/"$/, "", s); return s }
        function number(key) { return match($0, "\"" key "\": *[-+0-9.e]+") ? substr($0, RSTART + length(key) + 3, RLENGTH - length(key) - 3) + 0 : "" }
        clean(text("check")) == "training" {
            printf "gpu.loss.%s|%s|%%|measured|above BF16\ngpu.loss.spread|%s|%%|measured|of BF16 over seeds\n", clean(text("recipe")), number("over_bf16_percent"), number("spread_percent")
        }
        clean(text("check")) == "speed" {
            name = tolower(clean(text("shape"))); recipe = clean(text("recipe")); ms[name, recipe] = number("ms")
            printf "gpu.tok_s.%s.%s|%s|tokens/s|measured|micro-batch %d x %d\ngpu.mfu.%s.%s|%.2f|%%|measured|\n", name, recipe, number("tok_s"), number("micro_batch"), number("seq_len"), name, recipe, 100 * number("mfu")
            printf "gpu.memory.%s.%s|%s|GiB|measured|\n", name, recipe, number("memory_gib")
        }
        END {
            n = split("bf16 fp8", r, " ")
            for (i = 1; i <= n; i++) { if (ms["7b-4-layers", r[i]] && ms["7b-12-layers", r[i]]) { whole[r[i]] = ms["7b-12-layers", r[i]] + 20 * (ms["7b-12-layers", r[i]] - ms["7b-4-layers", r[i]]) / 8 } }
            if (whole["bf16"] && whole["fp8"]) { printf "gpu.gain.7b|%.2f|%%|measured|32 layers from 4 and 12, equal micro-batch, one GPU\n", 100 * (whole["bf16"] / whole["fp8"] - 1) }
            if (ms["124m", "bf16"] && ms["124m", "fp8"]) { printf "gpu.gain.124m|%.2f|%%|measured|\n", 100 * (ms["124m", "bf16"] / ms["124m", "fp8"] - 1) }
        }' | sort -u | figures
}

run_soak() { make --no-print-directory soak ONLY="${part#soak_}"; }
figures_soak() {
    awk -v part="${part#soak_}" '
        /^[0-9]+ passed, [0-9]+ failed/ { passed = $1; failed = $3; seen = 1 }
        END { if (seen) { printf "soak.%s.failed|%d|tests|measured|%d passed\n", part, failed, passed } }' "$dir/output.txt" | figures
}

# ---- arguments ----

budget='' only='' list='' out=runs/nightly night='' release=''
while [ $# -gt 0 ]; do
    case $1 in
        --help)
            sed -n '2,/^set /{/^set /d;/^# shellcheck/d;s/^# \{0,1\}//p}' scripts/nightly.sh
            exit 0
            ;;
        --list) list=1 ;;
        --budget | --only | --night | --out | --release)
            [ $# -ge 2 ] || fail "$1 needs a value (--help shows which)"
            set -- "$1=$2" "${@:3}"
            continue
            ;;
        --budget=*) budget=${1#*=} ;;
        --only=*)
            only=${1#*=}
            [[ $only =~ [^,] ]] || fail "--only is empty; --list names the parts"
            ;;
        --night=*)
            night=${1#*=}
            [[ $night =~ ^[0-9]{4}-[0-9]{2}-[0-9]{2}[a-z]?$ ]] || fail "--night: '$night' is not a date, such as 2026-11-28 or, of a second one, 2026-11-28b"
            ;;
        --out=*)
            out=${1#*=}
            [ -n "$out" ] || fail "--out is empty"
            ;;
        --release=*)
            release=${1#*=}
            [ -f "$release" ] || fail "--release: there is no file '$release'"
            ;;
        *) fail "unknown argument '$1'; allowed: --budget, --only, --list, --night, --out, --release, --help" ;;
    esac
    shift
done
seconds=0 # 0: no end
if [ -n "$budget" ]; then
    [[ $budget =~ ^([1-9][0-9]{0,3})([mh])$ ]] || fail "--budget: '$budget' is not a time such as 45m or 5h"
    case $budget in
        *m) seconds=$((${budget%m} * 60)) ;;
        *h) seconds=$((${budget%h} * 3600)) ;;
    esac
fi
building=0 # of the budget: seven minutes on two cores, of a short budget a sixth
if [ -z "${TRAIN:-}" ]; then
    building=$((seconds / 6 < 420 ? seconds / 6 : 420))
fi
for name in ${only//,/ }; do
    grep -qx -- "$name" <<< "$all" || fail "--only: there is no part '$name'; --list names them"
done

[[ ${PACE:-1} =~ ^[0-9]{1,3}(\.[0-9]+)?$ ]] || fail "PACE: '$PACE' is not a number such as 2.5"
pace=${PACE:-1} # how many times as long as on the two cores (Zen 4, AVX512-BF16) that the sizes' seconds are of
gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader 2> /dev/null | head -n 1) || true
gpu=${gpu:-none}

# ---- what fits into the budget ----

# A line a part: name|seconds|settings|largest seconds|largest settings; seconds 0: left out. All begin at their smallest size; the last ones go until the rest
# fits; then they grow, the first ones first, one size at a time; what is left goes to those that were left out.
plan() {
    awk -F '|' -v pace="$pace" -v budget=$((seconds - building)) -v only="${only//,/ }" -v gpu="$gpu" '
        NF < 3 { next }
        $1 == "gpu" && gpu == "none" { $2 = 0 }
        { if (!($1 in sizes)) { name[++parts] = $1 } sizes[$1]++; time[$1, sizes[$1]] = int($2 * pace); set[$1, sizes[$1]] = $3 }
        END {
            for (i = 1; i <= parts; i++) {
                p = name[i]
                if (only != "" && !index(" " only " ", " " p " ")) { size[p] = -1; continue }
                size[p] = budget ? 1 : sizes[p]; total += time[p, size[p]]; last = i
            }
            for (i = last; i > 0 && budget && total > budget; i--) { if (size[name[i]] > 0) { total -= time[name[i], 1]; size[name[i]] = 0 } }
            for (grown = budget; grown;) {
                grown = 0
                for (i = 1; i <= parts; i++) {
                    p = name[i]
                    if (size[p] < 1 || size[p] == sizes[p]) { continue }
                    more = time[p, size[p] + 1] - time[p, size[p]]
                    if (total + more <= budget) { total += more; size[p]++; grown = 1 }
                }
            }
            for (i = 1; i <= parts; i++) { if (size[name[i]] == 0 && total + time[name[i], 1] <= budget) { total += time[name[i], 1]; size[name[i]] = 1 } }
            for (i = 1; i <= parts; i++) {
                p = name[i]
                if (size[p] >= 0) { printf "%s|%d|%s|%d|%s\n", p, size[p] ? time[p, size[p]] : 0, size[p] ? set[p, size[p]] : "", time[p, sizes[p]], set[p, sizes[p]] }
            }
        }' <<< "$sizes"
}

clock() { printf '%d min %02d s' $(($1 / 60)) $(($1 % 60)); }

if [ -n "$list" ]; then
    total=$building
    printf '%-17s %-14s %-52s %s\n' part 'on two cores' settings what
    while IFS='|' read -r name time settings _; do
        what=$(awk -F '|' -v name="$name" '$1 == name { print $2 }' <<< "$about")
        total=$((total + time))
        printf '%-17s %-14s %-52s %s\n' "$name" "$(if [ "$name" = gpu ] && [ "$gpu" = none ]; then echo 'no GPU here'; elif [ "$time" = 0 ]; then echo 'left out'; else clock "$time"; fi)" "${settings:--}" "$what"
    done < <(plan)
    ((building == 0)) || printf '%-17s %-14s %-52s %s\n' building "$(clock $building)" - 'the trainer and the programs of the experiments, where they are not there yet'
    printf '%-17s %s%s\n' 'in all' "$(clock $total)" "${budget:+ of $budget}"
    exit 0
fi

command -v perl > /dev/null || fail "there is no perl (package perl-base), which writes the report"

# ---- the night's folder ----

commit=$(git rev-parse --short HEAD 2> /dev/null || echo unknown)
[ -z "$(git status --porcelain --untracked-files=no 2> /dev/null)" ] || commit+=+changes
cpu=$(sed -n 's/^model name[[:space:]]*: //p' /proc/cpuinfo 2> /dev/null | head -n 1)
units='' # names of CPUs do not tell their vector units
for unit in avx2 avx512f avx512_bf16 amx_bf16; do
    ! grep -qw -m 1 "$unit" /proc/cpuinfo 2> /dev/null || units=" ($unit)"
done
machine="${cpu:-$(uname -m)}$units, $(env -u OMP_NUM_THREADS nproc) cores"

# ours NIGHT: may we go on with it? The parts that are wanted may differ.
ours() { [ -f "$out/$1/night" ] && [ "$(sed -n 's/^commit //p' "$out/$1/night")|$(sed -n 's/^budget //p' "$out/$1/night")" = "$commit|$budget" ]; }
mkdir -p "$out"
if [ -z "$night" ]; then
    newest=$(find "$out" -mindepth 1 -maxdepth 1 -type d -name '2*' -printf '%f\n' | sort | tail -n 1)
    today=$(date -u +%Y-%m-%d)
    if [ -n "$newest" ] && ours "$newest" && { [ "${newest%[a-z]}" = "$today" ] || { [ ! -e "$out/$newest/report.html" ] && [ $(($(date +%s) - $(stat -c %Y "$out/$newest/night"))) -lt 72000 ]; }; }; then
        night=$newest
    else
        night=$today
        for letter in b c d e f g h i j k l m n o p q r s t u v w x y z; do
            [ -e "$out/$night" ] || break
            night=$today$letter
        done
        [ ! -e "$out/$night" ] || fail "$out has too many nights of $today"
    fi
elif [ -e "$out/$night/night" ] && ! ours "$night"; then
    fail "$out/$night is of $(sed -n 's/^commit /commit /p; s/^budget $/no budget/p; s/^budget \(.\)/budget \1/p' "$out/$night/night" | paste -sd ' '), this would be commit $commit budget ${budget:-none}: name another by --night"
fi
folder=$(realpath "$out")/$night
mkdir -p "$folder/parts"
exec 9> "$folder/lock" # the parts hold it too: what outlives a night that was killed is not run beside itself
flock -w 3 9 || fail "$folder: a night is at work there already"
if [ ! -e "$folder/night" ]; then
    printf 'commit %s\nbudget %s\nbegan %s\n' "$commit" "$budget" "$(date -u +%Y-%m-%dT%H:%M:%SZ)" > "$folder/night.new"
    mv "$folder/night.new" "$folder/night"
    echo "night $night: commit $commit, $machine${budget:+, budget $budget}; $folder"
else
    echo "night $night goes on: commit $commit, $machine${budget:+, budget $budget}; $folder"
fi
rm -f "$folder/report.html" # it is there when the night is over

# ---- running ----

child=''
stop() { # a part's children are a process group of their own
    trap - INT TERM HUP
    if [ -n "$child" ]; then
        kill -TERM -- "-$child" 2> /dev/null || true
        for ((i = 0; i < 25; i++)); do
            kill -0 -- "-$child" 2> /dev/null || break
            sleep 0.2
        done
        kill -KILL -- "-$child" 2> /dev/null || true
    fi
    echo "nightly.sh: interrupted; the same command goes on with what is not done" >&2
    exit 130
}
trap stop INT TERM HUP

# guarded SECONDS FILE COMMAND…: runs it in its own process group, its output in FILE, and leaves its status in $status, 124 past that time. Not to be called
# where a status is asked for (||, if): bash would not end COMMAND at its first error.
guarded() {
    local limit=$1 file=$2 end asked=''
    status=0
    shift 2
    set -m
    (
        set +m
        set -euo pipefail
        "$@"
    ) > "$file" 2>&1 < /dev/null &
    child=$!
    set +m
    end=$((SECONDS + limit))
    while kill -0 "$child" 2> /dev/null; do
        if ((SECONDS >= end)); then
            kill -"${asked:-TERM}" -- "-$child" 2> /dev/null || true
            asked=KILL end=$((SECONDS + 10))
        fi
        sleep 0.2
    done
    wait "$child" || status=$?
    child=''
    [ -z "$asked" ] || status=124
}

# state PART STATUS SECONDS SETTINGS LARGEST WHY: its line of results.json
state() {
    local why=${6//\\/}
    why=${why//\"/\'}
    printf '{"name":"%s","status":"%s","seconds":%d,"settings":"%s","largest":"%s","commit":"%s","why":"%s"}\n' "$1" "$2" "$3" "$4" "$5" "$commit" \
        "$(tr -d '\000-\037' <<< "$why")" > "$folder/parts/$1/state.new"
    mv "$folder/parts/$1/state.new" "$folder/parts/$1/state.json"
}

spent() { { find "$folder/parts" -name state.json -exec cat {} + | field seconds /dev/stdin; cat "$folder/built"; } | awk '{ s += $1 } END { print s + 0 }'; } # seconds

# with SETTINGS COMMAND…: settings as variables, commas as spaces
with() {
    local words word
    read -ra words <<< "$1"
    for word in "${words[@]}"; do export "${word%%=*}=${word#*=}"; done
    for word in CHECKS RANKS SEEDS ROWS SHAPES; do
        [ -z "${!word:-}" ] || export "$word=${!word//,/ }"
    done
    shift
    "$@"
}

if [ -z "${TRAIN:-}" ]; then
    echo "building"
    began=$SECONDS
    guarded 3600 "$folder/build.txt" bash -c 'scripts/setup.sh --demo --check || scripts/setup.sh --demo; make --no-print-directory DEVICE=cpu binary experiments'
    [ $status = 0 ] || fail "the build failed; $folder/build.txt ends with: $(tail -n 1 "$folder/build.txt")"
    echo $((SECONDS - began)) >> "$folder/built"
else
    : >> "$folder/built"
fi

# With a budget a few steps tell the pace of this machine, once a night, so that parts go by it.
if ((seconds > 0)); then
    use_binary
    [ -z "${PACE:-}" ] || echo "$PACE" > "$folder/pace"
    if [ ! -s "$folder/pace" ]; then
        mkdir -p "$folder/pacing"
        "$TRAIN" --train-data README.md --layers 4 --heads 4 --width 256 --seq-len 256 --micro-batch 8 --steps 5 --val-every 0 --output-dir "$folder/pacing/run" \
            > "$folder/pacing/output.txt" 2>&1 || fail "the trainer does not run: $(tail -n 1 "$folder/pacing/output.txt")"
        field ms "$folder/pacing/run/log.jsonl" | sort -n | awk '{ ms[NR] = $1 } END { pace = ms[int((NR + 1) / 2)] / 177; printf "%.2f\n", (pace > 1 ? pace : 1) }' > "$folder/pace.new"
        mv "$folder/pace.new" "$folder/pace"
        rm -r "$folder/pacing"
    fi
    pace=$(< "$folder/pace")
    echo "a step takes $pace times as long as on the machine that the parts' times are of"
fi

while IFS='|' read -r part time settings _ largest; do
    dir=$folder/parts/$part
    mkdir -p "$dir"
    before=$(sed -nE 's/.*"status":"([a-z]+)".*/\1/p' "$dir/state.json" 2> /dev/null || true)
    if [ "$before" = "done" ] || { [ "$before" = failed ] && [ -z "$only" ]; }; then
        echo "$part: $before before"
        continue
    fi
    if [ "$part" = gpu ] && [ "$gpu" = none ]; then
        state "$part" skipped 0 "" "" "there is no GPU here: nvidia-smi shows none"
        echo "$part: no GPU here"
        continue
    fi
    if [ "$time" = 0 ]; then
        state "$part" cut 0 "" "$largest" "does not fit into the budget of $budget"
        echo "$part: does not fit into the budget"
        continue
    fi
    if ((seconds > 0 && $(spent) + time > seconds + seconds / 10)); then
        state "$part" cut 0 "" "$largest" "the parts before it took longer than planned: $(clock "$(spent)") of $budget"
        echo "$part: no time left"
        continue
    fi
    name=${part%%_*} scale=$settings minutes=$((time * 2 / 60 + 1)) began=$SECONDS
    echo "$part: $(clock "$time")${settings:+; $settings}"
    rm -f "$dir/figures.jsonl"
    [ "$part" = convergence ] || rm -rf "$dir/runs" # what an interrupted run left, and may still write to
    guarded $((4 * time + 120)) "$dir/output.txt" with "$settings" "run_$name"
    took=$((SECONDS - began))
    case $status in
        0) why='' ;;
        124) why="ran past $(clock $((4 * time + 120)))" ;;
        *) why="status $status: $(grep -av '^[[:space:]]*$' "$dir/output.txt" | tail -n 1 | cut -c 1-300)" ;;
    esac
    # What a failed part has measured counts, where it can be read: a failed test's number is a figure
    ended=$status
    guarded 60 "$dir/figures.new" with "$settings" "figures_$name"
    if [ $status = 0 ]; then
        mv "$dir/figures.new" "$dir/figures.jsonl"
    elif [ "$ended" = 0 ]; then
        ended=3 why="its output could not be read: $(tail -n 1 "$dir/figures.new")"
    fi
    state "$part" "$([ "$ended" = 0 ] && echo 'done' || echo failed)" $took "$settings" "$largest" "$why"
    echo "  $([ "$ended" = 0 ] && echo 'done' || echo "FAILED, $why"), $(clock $took)"
done < <(plan)

# ---- results and report ----

{
    printf '{"night":"%s","commit":"%s","began":"%s","ended":"%s","budget":"%s","machine":"%s","gpu":"%s",\n"parts":[\n' "$night" "$commit" "$(sed -n 's/^began //p' "$folder/night")" \
        "$(date -u +%Y-%m-%dT%H:%M:%SZ)" "$budget" "$machine" "$gpu"
    # in the parts' order
    for part in $all; do cat "$folder/parts/$part/state.json" 2> /dev/null || true; done | sed '$!s/$/,/'
    printf '],\n"figures":[\n'
    for part in $all; do sed -n "s/^{\"metric\"/{\"part\":\"$part\",\"metric\"/p" "$folder/parts/$part/figures.jsonl" 2> /dev/null || true; done | sed '$!s/$/,/'
    printf '],\n"series":[\n'
    for part in $all; do sed -n '/^{"plot"/p' "$folder/parts/$part/figures.jsonl" 2> /dev/null || true; done | sed '$!s/$/,/'
    printf ']}\n'
} > "$folder/results.new"
mv "$folder/results.new" "$folder/results.json"

if [ -z "$release" ]; then
    release=$(find results -maxdepth 1 -name 'nightly_*.json' 2> /dev/null | sort -V | tail -n 1) || true
fi
before=()
while IFS= read -r name; do
    [[ $name < $night ]] && [ -f "$out/$name/results.json" ] && before+=("$out/$name/results.json")
done < <(find "$out" -mindepth 1 -maxdepth 1 -type d -name '2*' -printf '%f\n' | sort -r | head -n 40)
status=0
scripts/nightly_report.pl ${release:+--release "$release"} --html "$folder/report.new" scripts/claims.tsv "$folder/results.json" "${before[@]:0:14}" || status=$?
((status <= 1)) || fail "the report could not be written"
mv "$folder/report.new" "$folder/report.html"
echo "report: $folder/report.html"
exit $status
