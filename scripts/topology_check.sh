#!/usr/bin/env bash
# topology_check.sh TP PP DP [FLAG…]: trains a toy GPT on this machine as TP × PP × DP ranks, and holds it against its plan.
#
# TP ranks share each layer, PP stages the layers, DP replicas the batch: the code is that of 13B (2 1 16) and 175B (8 4 4), only the model is small. It checks
# that the run ends, that its loss falls, that the fullest and the emptiest rank take to the byte what `--plan` says, and that the first rank sends what
# it says, or less where another rank sends most. FLAGs go to the trainer: --recipe fp8-lm, --zero 2, …
#
#   scripts/topology_check.sh 8 4 1
#   STEPS=40                  steps; the loss must fall by a tenth in them
#   OUT=runs/topology         where to write: plan.json and the run's log, in a folder of the topology's name
#
# Needs no GPU: on this machine's cores the ranks take turns.
set -euo pipefail
cd "$(dirname "$0")/.."
export LC_ALL=C

fail() {
    echo "topology_check.sh: $*" >&2
    exit "${status:-1}"
}

status=2
if [ $# -lt 3 ]; then
    fail "three numbers are needed: the ranks that share a layer, the stages, and the replicas; for example scripts/topology_check.sh 2 2 2"
fi
for n in "$1" "$2" "$3"; do
    [[ $n =~ ^[1-9][0-9]{0,2}$ ]] || fail "'$n' is not a whole number from 1 to 999"
done
STEPS=${STEPS:-40}
OUT=${OUT-runs/topology}
[[ $STEPS =~ ^[1-9][0-9]{0,5}$ ]] || fail "STEPS: '$STEPS' is not a whole number above 0"
[ -n "$OUT" ] || fail "OUT is empty"
tp=$1 pp=$2 dp=$3
shift 3
ranks=$((tp * pp * dp))
status=1

if [ -z "${TRAIN:-}" ]; then
    scripts/setup.sh --check || scripts/setup.sh
    make -s --no-print-directory DEVICE=cpu binary
    TRAIN=$(make -s DEVICE=cpu config | sed -n 's/^BUILD = //p')/train_gpt_fp8
fi
command -v mpirun > /dev/null || [ $ranks = 1 ] || fail "there is no mpirun; scripts/setup.sh installs it"
out=$OUT/tp$tp-pp$pp-dp$dp
mkdir -p "$out"

# Text that a small model learns in a few steps
awk 'BEGIN { x = 42; split("cat dog river king engine child word stone", w); for (i = 0; i < 2000; i++) { x = x * 16807 % 2147483647; print "the", w[1 + x % 8], "sees the", w[1 + int(x / 8) % 8] "." } }' > "$out/text.txt"

heads=$((tp > 2 ? tp : 2)) layers=$((pp > 2 ? pp : 2)) micro_batches=$((2 * pp))
seq_len=$(((32 + tp - 1) / tp * tp))
shape=(--layers "$layers" --heads "$heads" --width $((16 * heads)) --seq-len "$seq_len" --micro-batch 1 --global-batch $((seq_len * micro_batches * dp))
    --tp "$tp" --pp "$pp" --lr 0.01 --warmup 4 --steps "$STEPS" "$@")
"$TRAIN" --plan --json --gpu none --vocab 256 --world "$ranks" "${shape[@]}" > "$out/plan.json" < /dev/null
launch=()
if [ $ranks -gt 1 ]; then
    launch=(mpirun --oversubscribe --bind-to none -np "$ranks")
    [ "$(id -u)" != 0 ] || launch+=(--allow-run-as-root)
fi
start=$SECONDS
OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive "${launch[@]}" "$TRAIN" --train-data "$out/text.txt" --val-every 0 --output-dir "$out" "${shape[@]}" > "$out/output.txt" 2>&1 < /dev/null ||
    fail "the run failed: $(tail -n 3 "$out/output.txt")"
seconds=$((SECONDS - start))

# The figures of the log beside those of the plan
unlike=0 # whole matrices go to owners: what ranks send differs
[[ "$*" != *tensor* && "$*" != *fp8-lm* ]] || unlike=1
awk -v unlike=$unlike -v layout="tp $tp × pp $pp × dp $dp" -v ranks=$ranks -v stages="$pp" -v micro_batches=$micro_batches -v seconds=$seconds '
    function object(text, key) { sub(".*\"" key "\":\\{", "", text); sub(/\}.*/, "", text); return text }
    function number(text, key) { if (!index(text, "\"" key "\":")) { return 0 } sub(".*\"" key "\":", "", text); return text + 0 }
    function sum(text, n, i, parts, total) { n = split(text, parts, ","); for (i = 1; i <= n; i++) { sub(/.*:/, "", parts[i]); total += parts[i] } return total }
    # `most`: the plan is of the rank that has most, which may be another; then it must not be less
    function check(what, got, want, most, ok) {
        ok = got == want || (most && got < want)
        printf "  %-34s %14.0f %14.0f  %s\n", what, got, want, !ok ? "DIFFERENT" : got == want ? "ok" : "another rank has most"
        if (!ok) { bad = 1 }
    }
    FNR == NR { plan = $0; sub(/"baseline".*/, "", plan); next }
    /"config":/ { least = object($0, "mem_min"); next }
    { if (!steps++) { first = number($0, "loss") } last = number($0, "loss"); most = object($0, "mem"); comm = object($0, "comm") }
    END {
        printf "%s: %d ranks, %d steps of %d micro-batches, %d s\n", layout, ranks, steps, micro_batches, seconds
        printf "  %-34s %14.4f %14.4f  %s\n", "loss of the first and the last step", first, last, last < 0.9 * first ? "falls" : "DOES NOT FALL"
        if (!(last < 0.9 * first)) { bad = 1 }
        printf "  %-34s %14s %14s\n", "bytes", "taken", "planned"
        check("memory of the fullest rank", sum(most), number(object(plan, "memory"), "total"))
        check("memory of the emptiest rank", sum(least), number(object(plan, "memory_min"), "total"))
        reduced = 0
        n = split("scales vectors reduce_scatter all_to_all regroup all_gather weights", names, " ")
        for (i = 1; i <= n; i++) { reduced += number(comm, names[i]) }
        shared = 0
        n = split("tp_x tp_x_again tp_y tp_dy tp_dx tp_scales tp_other", names, " ")
        for (i = 1; i <= n; i++) { shared += number(comm, names[i]) }
        traffic = object(plan, "traffic")
        check("sent by the first rank: to replicas", reduced, number(traffic, "gradients") + number(traffic, "weights"), stages > 1 || unlike)
        check("to ranks of its layer", shared, number(traffic, "tensor_parallel"), stages > 1)
        check("to other stages", number(comm, "pipeline"), number(traffic, "pipeline"), stages > 2)
        printf "  of a step a stage waits for others for %.1f %% at least\n", 100 * (stages - 1) / (micro_batches + stages - 1)
        exit bad
    }' "$out/plan.json" "$out/log.jsonl" || fail "the run is not what its plan says, or does not learn"
