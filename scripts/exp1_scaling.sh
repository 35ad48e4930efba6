#!/usr/bin/env bash
# exp1_scaling.sh: experiment 1: pre, post, sqrt and auto scaling of an FP8 ring, and the direct exchange, on the gradients of a real training run.
#
# Measures per transformer block, as the paper's Fig. 7: underflow (share of non-zero local values whose code is 0), overflow (share of codes at the
# maximum: of the reduced ones in a ring, of the sent ones in direct) and SNR against the float64 sum of the ranks' FP32 gradients. On real ranks over
# MPI, and on virtual ranks: the micro-batches of one large batch through the same kernels (exp1_scaling.cu says how). Every run trains its own small
# GPT from the same weights, with gradients in FP32, so that all modes see the same ones. Then says of each claim of the paper whether it held.
#
#   scripts/exp1_scaling.sh [--quick]     about 6 minutes on two idle cores; --quick (or QUICK=1) seconds, to see that it works
#   DATA=FILE OUT=runs/exp1               own text; where to write: exp1.csv, exp1.png, table.txt, verdict.txt (a line a claim), and each run's log
#   STEPS=120 LATE=100 PROBE_EVERY=10     training steps; tables and verdicts are means over blocks and the probes from step LATE on (5/6 of STEPS)
#   LAYERS HEADS WIDTH SEQ_LEN MICRO_BATCH LR WARMUP SEED     of the model and its training
#   RANKS_REAL="2 4 8" RANKS_VIRTUAL="16 32 64 128 256"       powers of two; the virtual run measures the real ones' numbers too
#
# The status is 0 where everything ran, whatever the verdicts: a contradiction is a result. It is 1 where virtual ranks do not equal real ones.
set -euo pipefail
cd "$(dirname "$0")/.."
export LC_ALL=C

# shellcheck source=scripts/experiment.sh
. scripts/experiment.sh "$@"
if [ -n "${QUICK:-}" ]; then
    : "${STEPS:=9}" "${LATE:=4}" "${PROBE_EVERY:=4}" "${LAYERS:=2}" "${HEADS:=2}" "${WIDTH:=32}" "${SEQ_LEN:=32}" "${WARMUP:=2}"
    : "${RANKS_REAL=2 4}" "${RANKS_VIRTUAL=32}"
fi
STEPS=${STEPS:-120}
PROBE_EVERY=${PROBE_EVERY:-10}
LAYERS=${LAYERS:-4}
HEADS=${HEADS:-4}
WIDTH=${WIDTH:-128}
SEQ_LEN=${SEQ_LEN:-128}
MICRO_BATCH=${MICRO_BATCH:-1} # sequences
LR=${LR:-2e-3}
WARMUP=${WARMUP:-20}
SEED=${SEED:-1}
RANKS_REAL=${RANKS_REAL-2 4 8}
RANKS_VIRTUAL=${RANKS_VIRTUAL-16 32 64 128 256}
OUT=${OUT-runs/exp1}
real_batch=32            # micro-batches of a step of the real runs, or as many as there are ranks
show_every=20            # steps; the logs hold them all

for name in STEPS PROBE_EVERY LAYERS HEADS WIDTH SEQ_LEN MICRO_BATCH; do
    [[ ${!name} =~ ^[1-9][0-9]{0,6}$ ]] || fail "$name: '${!name}' is not a whole number above 0"
done
LATE=${LATE:-$((STEPS * 5 / 6))}
for name in LATE WARMUP SEED; do
    [[ ${!name} =~ ^[0-9]{1,9}$ ]] || fail "$name: '${!name}' is not a whole number"
done
((LATE < STEPS)) || fail "LATE: step $LATE is beyond the last of $STEPS steps, number $((STEPS - 1))"
for name in RANKS_REAL RANKS_VIRTUAL; do
    most=$([ $name = RANKS_REAL ] && echo 64 || echo 1024)
    for ranks in ${!name}; do
        if ! [[ $ranks =~ ^[1-9][0-9]{0,3}$ ]] || ((ranks < 2 || ranks > most || (ranks & (ranks - 1)) != 0)); then
            fail "$name: '$ranks' is not a power of two from 2 to $most"
        fi
    done
done
# shellcheck disable=SC2086 # lists of words
read -ra real <<< "$(printf '%s\n' $RANKS_REAL | sort -nu | paste -sd ' ')"
# shellcheck disable=SC2086
read -ra virtual <<< "$(printf '%s\n' $RANKS_REAL $RANKS_VIRTUAL | sort -nu | paste -sd ' ')"
((${#real[@]} > 0)) || fail "RANKS_REAL is empty: without real ranks nothing shows that virtual ones are like them"
[ -n "$OUT" ] || fail "OUT is empty"

scripts/setup.sh --demo --check || scripts/setup.sh --demo
config=$(make -s DEVICE=cpu config)
value() { sed -n "s/^$1 = //p" <<< "$config"; }
[[ $(value MPI) == yes* ]] || fail "the build has no MPI (MPI = $(value MPI)): there are no real ranks to measure"
mpi
program=$(value BUILD)/scripts/exp1_scaling
make -s --no-print-directory DEVICE=cpu "$program"

mkdir -p "$OUT"
text=demo/text.txt
[ -z "${DATA:-}" ] || text=$OUT/text.txt
scripts/text.sh "$text"

cores=$(nproc) # before OMP_NUM_THREADS, which it believes
# One thread a process: the bits of a gradient depend on their number, and so small a model has no work for two.
export OMP_NUM_THREADS=1
export OMP_WAIT_POLICY=passive

show() { # of the trainer's step lines only some
    local line
    while IFS= read -r line; do
        printf '%s\n' "$line" >> "$1"
        if [[ $line =~ ^step\ +([0-9]+)/ ]] && ((BASH_REMATCH[1] % show_every == 1 || BASH_REMATCH[1] == STEPS)); then
            printf '  %s\n' "$line"
        fi
    done
}

# run NAME KIND PROCESSES RANKS MICRO-BATCHES: one training run; leaves OUT/NAME.csv
run() {
    local start=$SECONDS
    printf '%s: %s steps of %s micro-batches of %s tokens, %s processes\n' "$1" "$STEPS" "$5" $((MICRO_BATCH * SEQ_LEN)) "$3"
    rm -rf "${OUT:?}/$1" "$OUT/$1.csv"
    mkdir -p "$OUT/$1"
    "${launch[@]}" -np "$3" "$program" "$2" "$OUT/$1.csv" "$PROBE_EVERY" "$4" --recipe fp8 --grad-dtype fp32 --grad-accum-dtype fp32 \
        --train-data "$text" --layers "$LAYERS" --heads "$HEADS" --width "$WIDTH" --seq-len "$SEQ_LEN" --micro-batch "$MICRO_BATCH" \
        --global-batch $(($5 * MICRO_BATCH * SEQ_LEN)) --steps "$STEPS" --lr "$LR" --warmup "$WARMUP" --val-every 0 --seed "$SEED" \
        --output-dir "$OUT/$1" | show "$OUT/$1/output.txt"
    printf '  %s s\n' $((SECONDS - start))
}

for ranks in "${real[@]}"; do
    run "real$ranks" real "$ranks" "$ranks" $((ranks > real_batch ? ranks : real_batch))
done
batch=${virtual[-1]} workers=1
while ((2 * workers <= cores && 2 * workers <= LAYERS && 2 * workers <= batch)); do workers=$((2 * workers)); done
run virtual virtual "$workers" "$(IFS=, && echo "${virtual[*]}")" "$batch"

csv=$OUT/exp1.csv
{
    echo kind,ranks,step,block,mode,underflow,overflow,snr_db,mu_min,mu_max,bytes,scale_bytes
    for ranks in "${real[@]}"; do cat "$OUT/real$ranks.csv"; done
    cat "$OUT/virtual.csv"
} > "$csv.new"
mv "$csv.new" "$csv"
for name in "${real[@]/#/real}" virtual; do rm "$OUT/$name.csv"; done

# ---- tables and verdicts ----

# Groups are a kind and a number of ranks; m[mode, group, figure] are means over blocks and late probes.
# shellcheck disable=SC2016
judge='
BEGIN { FS = ","; modes = split("pre post sqrt auto direct settled", mode, " "); figures = split("underflow overflow snr", figure, " ") }
NR == 1 { next }
{
    group = $1 " " $2
    if (!(group in seen)) { seen[group] = 1; groups++; name[groups] = group; kind[groups] = $1; ranks[groups] = $2 }
    if ($3 == 0 && $5 != "settled") {               # the first step: text against text
        key = $2 "," $4 "," $5
        first[$1, key] = $6 "," $7 "," $8 "," $9 "," $10 "," $11 "," $12
        if ($1 == "real") { real[++reals] = key }
    }
    payload = $11 - $12; place = group "," $4
    if (!(place in sent)) { sent[place] = payload } else if (sent[place] != payload) { unequal++ }
    share = 100 * $12 / payload
    if ($5 == "direct") { if (share > direct_scales) { direct_scales = share; direct_at = group } }
    else if (share > ring_scales) { ring_scales = share; ring_at = group }
    if ($3 == last_step) { count[$5 "@", group]++; sum[$5 "@", group, "snr"] += $8 }  # of the last step alone
    if ($3 < late) { next }
    count[$5, group]++
    sum[$5, group, "underflow"] += 100 * $6; sum[$5, group, "overflow"] += 100 * $7; sum[$5, group, "snr"] += $8
    if (low[$5, group] == "" || $9 + 0 < low[$5, group]) { low[$5, group] = $9 + 0 }
    if ($10 + 0 > high[$5, group]) { high[$5, group] = $10 + 0 }
}
function mean(which, g, f) { return sum[which, name[g], f] / count[which, name[g]] }
function percent(x) { return x == 0 ? "0" : x < 0.001 ? sprintf("%.1e", x) : x < 0.1 ? sprintf("%.4f", x) : sprintf("%.2f", x) }
function cell(which, g, f) { return !((which, name[g]) in count) ? "-" : f == "snr" ? sprintf("%.1f", mean(which, g, f)) : percent(mean(which, g, f)) }
function table(f, title,    i, g, line) {
    line = sprintf("%-22s", title)
    for (g = 1; g <= groups; g++) { line = line sprintf("%8s", (kind[g] == "real" ? "r" : "") ranks[g]) }
    print line > tables
    for (i = 1; i <= modes; i++) {
        line = sprintf("  %-20s", mode[i] == "settled" ? "settled, last step" : mode[i])
        for (g = 1; g <= groups; g++) { line = line sprintf("%8s", cell(mode[i], g, f)) }
        print line > tables
    }
    print "" > tables
}
function verdict(held, claim, how) { print (held == "" ? "not measured" : held ? "held" : "NOT held") "\t" claim "\t" how > verdicts }
# the mode other than `which` with the largest figure in group g; rings: of the ring only
function next_best(which, g, f, last,    i, best) {
    best = ""
    for (i = 1; i <= last; i++) { if (mode[i] != which && (best == "" || mean(mode[i], g, f) > mean(best, g, f))) { best = mode[i] } }
    return best
}
function most(which, f, among,    g, other, ratio, worst, at, all) {
    all = 1
    for (g = 1; g <= groups; g++) {
        other = next_best(which, g, f, among)
        if (mean(which, g, f) <= mean(other, g, f)) { all = 0 }
        ratio = mean(other, g, f) > 0 ? mean(which, g, f) / mean(other, g, f) : 1e9
        if (worst == "" || ratio < worst) { worst = ratio; at = g }
    }
    other = next_best(which, at, f, among)
    verdict(all, which " has the most " f, sprintf("closest at %s ranks: %s %%, then %s with %s %%; at %s: %s %%, then %s with %s %%", name[at], \
        percent(mean(which, at, f)), other, percent(mean(other, at, f)), name[shown], percent(mean(which, shown, f)), \
        next_best(which, shown, f, among), percent(mean(next_best(which, shown, f, among), shown, f))))
}
# SNR of `which` against the best of `against` (a list) in all groups
function compare(which, against, claim,    g, n, list, i, best, d, least, greatest, at, top, wins, measured) {
    n = split(against, list, " ")
    for (g = 1; g <= groups; g++) {
        if (!((which, name[g]) in count)) { continue }
        best = list[1]
        for (i = 2; i <= n; i++) { if (mean(list[i], g, "snr") > mean(best, g, "snr")) { best = list[i] } }
        d = mean(which, g, "snr") - mean(best, g, "snr")
        measured++; wins += d >= 0
        if (least == "" || d < least) { least = d; at = name[g] " ranks (" best ")" }
        if (greatest == "" || d > greatest) { greatest = d; top = name[g] " ranks (" best ")" }
    }
    if (!measured) { verdict("", claim, ""); return }
    gsub(/@/, "", at); gsub(/@/, "", top)
    verdict(wins == measured, claim, sprintf("so in %d of %d; from %+.2f dB at %s to %+.2f dB at %s", wins, measured, least, at, greatest, top))
}
function direct_gain(at, wanted,    g, ring, d) {
    for (g = 1; g <= groups; g++) {
        if (kind[g] != "virtual" || ranks[g] != at) { continue }
        ring = next_best("direct", g, "snr", 4)
        d = mean("direct", g, "snr") - mean(ring, g, "snr")
        verdict(d >= wanted, "direct is " wanted " dB or more above the best ring at " at " ranks", \
            sprintf("%+.1f dB: %.1f against %.1f (%s)", d, mean("direct", g, "snr"), mean(ring, g, "snr"), ring))
        return
    }
    verdict("", "direct is " wanted " dB or more above the best ring at " at " ranks", "")
}
END {
    for (g = 1; g <= groups; g++) { if (kind[g] == "virtual" && ranks[shown] != 32) { shown = g } }
    if (plot_ranks != "") { print ranks[shown] > plot_ranks }
    table("underflow", "underflow, %"); table("overflow", "overflow, %"); table("snr", "SNR, dB")
    line = sprintf("%-22s", "auto, least μ · ranks ")
    for (g = 1; g <= groups; g++) { line = line sprintf("%8s", sprintf("%.2f", low["auto", name[g]] * ranks[g])) }
    print line > tables
    line = sprintf("%-22s", "auto, most μ · ranks ")
    for (g = 1; g <= groups; g++) { line = line sprintf("%8s", sprintf("%.2f", high["auto", name[g]] * ranks[g])) }
    print line > tables

    most("pre", "underflow", 5); most("post", "overflow", 4)  # direct has no overflow of this kind: it counts what is sent
    low_on_both = 1
    for (g = 1; g <= groups; g++) {
        if (mean("auto", g, "underflow") >= mean("pre", g, "underflow") || mean("auto", g, "overflow") >= mean("post", g, "overflow")) { low_on_both = 0 }
    }
    g = shown
    verdict(low_on_both, "auto has less underflow than pre and less overflow than post", sprintf("at %s ranks: underflow %s %% (pre %s, post %s), overflow %s %% (pre %s, post %s)", \
        name[g], cell("auto", g, "underflow"), cell("pre", g, "underflow"), cell("post", g, "underflow"), cell("auto", g, "overflow"), \
        cell("pre", g, "overflow"), cell("post", g, "overflow")))
    compare("auto", "post", "SNR(auto) is at least SNR(post)")
    compare("auto", "pre post sqrt", "auto has the best SNR of the ring modes")
    compare("settled@", "pre@ post@ sqrt@", "auto, settled, has the best SNR of the ring modes at the last step")
    direct_gain(32, 8); direct_gain(128, 14)
    verdict(unequal == 0, "all modes send equally many bytes, scales apart", sprintf("scales add at most %.2f %% in a ring (%s ranks) and %.2f %% in direct (%s)", \
        ring_scales, ring_at, direct_scales, direct_at))
    for (i = 1; i <= reals; i++) { differ += first["real", real[i]] != first["virtual", real[i]] }
    verdict(reals > 0 && differ == 0, "virtual ranks equal real ones", sprintf("%d of %d blocks and modes of the first step are the same to the last digit", reals - differ, reals))
    exit reals == 0 || differ > 0
}'

status=0
awk -v late="$LATE" -v last_step=$((STEPS - 1)) -v tables="$OUT/table.txt" -v verdicts="$OUT/verdict.txt" -v plot_ranks="$OUT/plot_ranks" "$judge" "$csv" || status=1
plot_ranks=$(cat "$OUT/plot_ranks")
rm "$OUT/plot_ranks"

# ---- the picture ----

draw() {
    local work colours=(0072B2 D55E00 009E73 E69F00 000000) i column panel first plotted
    local points=(6 7 7 7 7) sizes=(2.4 1.3 1.3 1.3 1.3) # pre and auto often lie on each other: rings around dots
    local modes=(pre post sqrt auto direct)
    work=$(mktemp -d)
    # a file a mode: "block underflow overflow snr" at plot_ranks, and "ranks snr", of virtual ranks, means over the late probes
    awk -F, -v late="$LATE" -v at="$plot_ranks" -v work="$work" '
        $1 == "virtual" && $3 >= late && $5 != "settled" {
            n[$5, $2]++; all[$5, $2] += $8
            if ($2 == at) { c[$5, $4]++; u[$5, $4] += $6; o[$5, $4] += $7; s[$5, $4] += $8 }
        }
        END {
            for (key in c) {
                split(key, k, SUBSEP)
                print k[2], u[key] / c[key], o[key] / c[key], s[key] / c[key] > (work "/" k[1] ".block")
            }
            for (key in n) { split(key, k, SUBSEP); print k[2], all[key] / n[key] > (work "/" k[1] ".ranks") }
        }' "$csv"
    for i in "${modes[@]}"; do
        sort -n -o "$work/$i.block" "$work/$i.block"
        sort -n -o "$work/$i.ranks" "$work/$i.ranks"
    done
    {
        echo "set terminal pngcairo size 1600,1200 font 'Sans,18' noenhanced background '#ffffff'"
        echo "set output 'picture'"
        echo "set encoding utf8"
        echo "set border 3 linecolor rgb '#606060'"
        echo "set tics nomirror out scale 0.6 textcolor rgb '#303030'"
        echo "set grid linetype 1 linewidth 1 linecolor rgb '#e0e0e0'"
        echo "set multiplot layout 2,2 title 'FP8 gradients (E4M3), steps $LATE to $((STEPS - 1)) of $STEPS: $LAYERS blocks of width $WIDTH' font ',22'"
        for panel in "underflow:2:share of values, log" "overflow:3:share of codes, log (0 at the bottom)" "SNR:4:dB"; do
            IFS=: read -r first column axis <<< "$panel"
            echo "set title '$first by block, $plot_ranks virtual ranks'"
            echo "set xlabel 'transformer block'; set ylabel '$axis'; set xtics 1; set xrange [-0.3:$((LAYERS - 1)).3]"
            if [ "$column" = 4 ]; then
                echo "unset logscale; set format y '%g'; set yrange [0:*]; unset key"
            else
                echo "set logscale y; set format y '10^{%L}'; set termoption enhanced; set yrange [1e-7:1]; unset key"
            fi
            plotted=plot
            for i in 0 1 2 3 4; do
                printf "%s '%s' using 1:(\$%s > 1e-7 || %s == 4 ? \$%s : 1e-7) with linespoints pointtype %s pointsize %s linewidth 3 linecolor rgb '#%s' title '%s'" \
                    "$plotted" "${modes[i]}.block" "$column" "$column" "$column" "${points[i]}" "${sizes[i]}" "${colours[i]}" "${modes[i]}"
                plotted=', '
            done
            echo
        done
        echo "set title 'SNR by number of virtual ranks, mean over blocks'"
        echo "set xlabel 'ranks'; set ylabel 'dB'; set logscale x 2; set xtics (${virtual[*]/%/,} 1); set xrange [${virtual[0]}*0.9:${virtual[-1]}*1.1]"
        echo "unset logscale y; set format y '%g'; set yrange [0:*]; set key bottom left Left reverse spacing 1.2 samplen 2 opaque"
        plotted=plot
        for i in 0 1 2 3 4; do
            printf "%s '%s' using 1:2 with linespoints pointtype %s pointsize %s linewidth 3 linecolor rgb '#%s' title '%s'" \
                "$plotted" "${modes[i]}.ranks" "${points[i]}" "${sizes[i]}" "${colours[i]}" "${modes[i]}"
            plotted=', '
        done
        echo
        echo "unset multiplot"
    } > "$work/script"
    (cd "$work" && LC_ALL=C.UTF-8 gnuplot script 2> errors) || fail "gnuplot failed: $(head -n 3 "$work/errors" | tr '\n' ' ')"
    [ -s "$work/picture" ] || fail "gnuplot drew nothing: $(head -n 3 "$work/errors" | tr '\n' ' ')"
    cp -- "$work/picture" "$OUT/exp1.png"
    rm -rf -- "$work"
}
picture="none (gnuplot is not installed: package gnuplot-nox)"
rm -f "$OUT/exp1.png"
if command -v gnuplot > /dev/null; then
    draw
    picture=$OUT/exp1.png
fi

printf '\nMeans over %s blocks and the probes from step %s on; r: real ranks, else virtual ones.\n\n' "$LAYERS" "$LATE"
cat "$OUT/table.txt"
echo
awk -F '\t' '{ printf "%-13s %s%s\n", $1 ":", $2, $3 == "" ? "" : "; " $3 }' "$OUT/verdict.txt"
printf '\n  rows: %s\n  plot: %s\n  verdicts: %s\n' "$csv" "$picture" "$OUT/verdict.txt"
exit $status
