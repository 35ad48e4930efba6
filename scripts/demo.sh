#!/usr/bin/env bash
# demo.sh: trains the same small GPT twice on real text, in BF16 and in FP8, and sets the two side by side.
#
# Builds what is missing, makes the text (scripts/text.sh; DATA=FILE for your own), trains on two ranks where MPI and the device allow it,
# draws demo/loss.png and ends with a table. Everything it writes lies under demo/. The figures below may be given as environment variables:
# STEPS=1000 WIDTH=384 make demo
set -euo pipefail
cd "$(dirname "$0")/.."
export LC_ALL=C

STEPS=${STEPS:-200} # both runs together shall stay under four minutes on two cores
LAYERS=${LAYERS:-4}
HEADS=${HEADS:-4}
WIDTH=${WIDTH:-256}
SEQ_LEN=${SEQ_LEN:-256}
MICRO_BATCH=${MICRO_BATCH:-8}      # sequences
GLOBAL_BATCH=${GLOBAL_BATCH:-4096} # tokens
LR=${LR:-1e-3}
WARMUP=${WARMUP:-20}
SEED=${SEED:-1}
VAL_EVERY=${VAL_EVERY:-100}
SAMPLE_LEN=${SAMPLE_LEN:-200}
SHOW_EVERY=${SHOW_EVERY:-10} # steps; log.jsonl holds them all
MPIRUN=${MPIRUN:-mpirun}     # of the MPI that the binary was built with

scripts/setup.sh --demo --check || scripts/setup.sh --demo
config=$(make -s config)
value() { sed -n "s/^$1 = //p" <<< "$config"; }
echo "demo: DEVICE=$(value DEVICE) ($(value WHY)); MPI $(value MPI)"
make --no-print-directory all

text=demo/text.txt
[ -z "${DATA:-}" ] || text=demo/own-text.txt
scripts/text.sh "$text"

# Two ranks; on GPUs no more than there are; one where the binary or the machine has no MPI.
ranks=${RANKS:-2}
device=$(value DEVICE)
if [ "$device" = cuda ]; then
    gpus=$(nvidia-smi -L 2> /dev/null | grep -c '^GPU ' || true)
    ranks=$((gpus < ranks ? (gpus > 0 ? gpus : 1) : ranks))
fi
launch=()
case $(value MPI) in
    yes*)
        if command -v "$MPIRUN" > /dev/null; then
            launch=("$MPIRUN" -np "$ranks")
            if "$MPIRUN" --version 2> /dev/null | grep -q 'Open MPI'; then
                launch+=(--bind-to none --oversubscribe) # bound to one core, a rank's threads would share it
                [ "$(id -u)" != 0 ] || launch+=(--allow-run-as-root)
            fi
        else
            echo "demo: the binary has MPI but there is no $MPIRUN here (package openmpi-bin): one process"
            ranks=1
        fi
        ;;
    *)
        echo "demo: the binary was built without MPI: one process"
        ranks=1
        ;;
esac
threads=$(($(nproc) / ranks))
threads=$((threads > 8 ? 8 : (threads < 1 ? 1 : threads))) # so small a model has no work for more
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$threads}
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive} # threads that wait by spinning take the cores from those that work

# losses FILE: "step loss" a line, from a log.jsonl
losses() {
    awk '
        { gsub(/[ \t]/, "") }
        match($0, /"step":[0-9]+/) {
            step = substr($0, RSTART + 7, RLENGTH - 7)
            if (match($0, /"loss":-?[0-9][-+.0-9eE]*/)) { print step, substr($0, RSTART + 7, RLENGTH - 7) }
        }
    ' "$1"
}

# show LABEL: passes on what the trainer prints, but of its step lines only some, and sets the BF16 loss of the same step beside each.
# The loop is the shell's and not awk's because Debian's awk holds its input back.
show() {
    local line step beside
    while IFS= read -r line; do
        if [[ $line =~ ^step\ +([0-9]+)(/[0-9]+)?\ *\|\ *loss ]]; then
            step=${BASH_REMATCH[1]}
            if ((step == 1 || step % SHOW_EVERY == 0)); then
                beside=${bf16_loss[$step]:-}
                printf '%-5s%s%s\n' "$1" "$line" "${beside:+ | bf16 loss $beside}"
            fi
        else
            printf '%s\n' "$line"
        fi
    done
}

declare -A bf16_loss=()
for recipe in bf16 fp8; do
    printf '\n=== %s: %s steps of %s tokens, %s rank(s) × %s thread(s) ===\n' "$recipe" "$STEPS" "$GLOBAL_BATCH" "$ranks" "$OMP_NUM_THREADS"
    rm -rf "demo/$recipe"
    "${launch[@]}" ./train_gpt_fp8 --train-data "$text" --val-split 0.01 --recipe "$recipe" --output-dir "demo/$recipe" --seed "$SEED" \
        --layers "$LAYERS" --heads "$HEADS" --width "$WIDTH" --seq-len "$SEQ_LEN" \
        --micro-batch "$MICRO_BATCH" --global-batch "$GLOBAL_BATCH" --steps "$STEPS" --lr "$LR" --warmup "$WARMUP" \
        --val-every "$VAL_EVERY" --sample-every "$STEPS" --sample-len "$SAMPLE_LEN" | show "$recipe"
    if [ "$recipe" = bf16 ]; then
        while read -r step loss; do
            bf16_loss[$step]=$(printf '%.4f' "$loss")
        done < <(losses demo/bf16/log.jsonl)
    fi
done

echo
plot=demo/loss.png
if command -v gnuplot > /dev/null; then
    rm -f "$plot"
    scripts/plot.sh "$plot" bf16=demo/bf16 fp8=demo/fp8
else
    plot="none (gnuplot is not installed: package gnuplot-nox)"
fi

# summary DIR: "final-loss validation-loss weights gradients optimizer activations all-memory sent tok/s", from its log.jsonl; - for what is not there.
# Final loss: mean of the last 10 steps. Memory, sent: bytes of the last step. tok/s: mean of the second half, when all is warm.
summary() {
    awk '
        function number(key) {
            return match($0, "\"" key "\":-?[0-9][-+.0-9eE]*") ? substr($0, RSTART + length(key) + 3, RLENGTH - length(key) - 3) : ""
        }
        function sum_of(object,    parts, part, i, pair, total) {
            if (!match($0, "\"" object "\":\\{[^}]*\\}")) { return "" }
            parts = split(substr($0, RSTART + length(object) + 4, RLENGTH - length(object) - 5), part, ",")
            for (i = 1; i <= parts; i++) { split(part[i], pair, ":"); total += pair[2] }
            return total
        }
        function mean(values, from, to,    i, sum, n) {
            for (i = from; i <= to; i++) { if (values[i] != "") { sum += values[i]; n++ } }
            return n ? sum / n : "-"
        }
        { gsub(/[ \t]/, "") }
        number("val_loss") != "" { val = number("val_loss") }
        number("step") != "" && /"loss":/ {
            n++; loss[n] = number("loss"); speed[n] = number("tok_s")
            if (sum_of("mem") != "") {
                mem = sum_of("mem")
                weights = number("weights"); gradients = number("gradients"); optimizer = number("optimizer"); activations = number("activations")
            }
            if (sum_of("comm") != "") { sent = sum_of("comm") }
        }
        function or_none(value) { return value == "" ? "-" : value }
        END {
            print mean(loss, n > 10 ? n - 9 : 1, n), or_none(val), or_none(weights), or_none(gradients), or_none(optimizer), or_none(activations), or_none(mem), \
                or_none(sent), mean(speed, int(n / 2) + 1, n)
        }
    ' "$1/log.jsonl"
}

{
    summary demo/bf16
    summary demo/fp8
} | awk '
    function change(a, b) { return a == "-" || b == "-" || a == 0 ? "-" : sprintf("%+.2f %%", (b / a - 1) * 100) }
    function show(value, format, scale) { return value == "-" ? "-" : sprintf(format, value / scale) }
    function row(what, format, i, scale) {
        printf "  %-36s %10s %10s %11s\n", what, show(v[1, i], format, scale), show(v[2, i], format, scale), change(v[1, i], v[2, i])
    }
    { for (i = 1; i <= NF; i++) { v[NR, i] = $i } }
    END {
        printf "  %-36s %10s %10s %11s\n", "", "bf16", "fp8", "difference"
        row("final loss (mean of last 10 steps)", "%.4f", 1, 1)
        row("validation loss", "%.4f", 2, 1)
        row("a rank\047s memory, MiB: weights", "%.1f", 3, 1048576)
        row("                      gradients", "%.1f", 4, 1048576)
        row("                      optimizer", "%.1f", 5, 1048576)
        row("                      activations", "%.1f", 6, 1048576)
        row("                      in all", "%.1f", 7, 1048576)
        row("a rank\047s sent bytes a step, MiB", "%.2f", 8, 1048576)
        row("tokens a second", "%.0f", 9, 1)
    }
'
printf '\n  plot: %s\n  runs: demo/bf16 and demo/fp8 (log.jsonl in each)\n' "$plot"
