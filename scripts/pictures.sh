#!/usr/bin/env bash
# pictures.sh: draws the pictures of README.md from the files in results/: experiments 1 to 3, the newest file of each.
#
#   scripts/pictures.sh [DIR]     results/exp1.svg, exp2.svg, exp3.svg, or into DIR
#
# Needs gnuplot. The pictures are committed; run this after new results.
set -euo pipefail
cd "$(dirname "$0")/.."
export LC_ALL=C

fail() {
    printf 'pictures.sh: %s\n' "$*" >&2
    exit 2
}

out=${1:-results}
[ $# -le 1 ] || fail "usage: scripts/pictures.sh [DIR]"
[ -d "$out" ] || fail "there is no folder $out"
command -v gnuplot > /dev/null || fail "gnuplot is not installed: package gnuplot-nox"
data=$(mktemp -d)
trap 'rm -rf "$data"' EXIT

# newest NAME: its newest file of results
newest() {
    local files=(results/"$1"_*.txt)
    [ -r "${files[-1]}" ] || fail "there is no results/$1_*.txt"
    printf '%s\n' "${files[-1]}"
}

# picture NAME HEIGHT: gnuplot's commands from stdin
picture() {
    local style='set border 3 lc rgb "#888888"; set tics nomirror textcolor rgb "#222222"; set grid y lc rgb "#dddddd"; set key reverse Left'
    { printf 'set terminal svg size 800,%s dynamic background "white" font "Helvetica,14"\nset output "%s"\n%s\n' "$2" "$data/$1.svg" "$style" && cat; } | gnuplot
    [ -s "$data/$1.svg" ] || fail "gnuplot has drawn no $1.svg"
    mv "$data/$1.svg" "$out/$1.svg"
    echo "$out/$1.svg"
}

# Columns: ranks pre post sqrt auto direct
awk '
    /^SNR, dB/ { for (i = 3; i <= NF; i++) { ranks[i - 1] = $i }; on = 1; next }
    !NF { on = 0 }
    on && $1 != "settled," { names[++n] = $1; for (i = 2; i <= NF; i++) { value[n, i] = $i }; fields = NF }
    END {
        for (i = 2; i <= fields; i++) {
            if (ranks[i] !~ /^[0-9]+$/) { continue }  # those on real ranks say the same
            printf "%s", ranks[i]
            for (k = 1; k <= n; k++) { printf " %s", value[k, i] }
            print ""
        }
        if (n != 5) { exit 1 }
    }' "$(newest exp1)" > "$data/exp1" || fail "$(newest exp1) has not the five modes of the reduction"
picture exp1 420 << END
set title "SNR of the reduced E4M3 gradient against the exact sum"
set xlabel "ranks"; set ylabel "dB"; set logscale x 2; set xrange [1.9:280]; set yrange [0:35]; set key bottom left
set xtics (2,4,8,16,32,64,128,256)
plot "$data/exp1" u 1:6 w lp lw 3 pt 7 lc rgb "#1b7837" t "direct (recipe fp8)", "" u 1:5 w lp lw 2 pt 5 lc rgb "#2166ac" t "ring, auto (FP8-LM)", \\
    "" u 1:2 w lp lw 1 pt 4 dt 2 lc rgb "#888888" t "ring, pre", "" u 1:4 w lp lw 1 pt 6 dt 3 lc rgb "#555555" t "ring, sqrt", "" u 1:3 w lp lw 2 pt 9 lc rgb "#b2182b" t "ring, post"
END

# Lines: loss spread "name, MiB of states"
awk '
    /^row / { on = 1; next }
    on && !NF { exit }
    on { at = match($0, /  +[0-9.]+ +[0-9.]+ +[-+]/); split(substr($0, at), f, " "); name = substr($0, 1, at - 1); sub(/ +$/, "", name); gsub(/  +/, "  ", name)
         printf "%s %s \"%s, %.1f MiB\"\n", f[1], f[2], name, f[5]; n++ }
    END { exit !n }' "$(newest exp2)" > "$data/exp2" || fail "$(newest exp2) has no table"
rows=$(wc -l < "$data/exp2")
picture exp2 $((110 + 32 * rows)) << END
set title "Loss by what the optimizer keeps (three seeds)"
set xlabel "loss"; set yrange [$rows-0.4:-0.6]; unset key; unset grid; set grid x lc rgb "#dddddd"; set lmargin 52
plot "$data/exp2" u 1:0:2:yticlabels(3) w xerrorbars pt 7 ps 0.8 lw 2 lc rgb "#2166ac"
END

# Lines: "model" bf16 fp8-lm fp8 "fp8 e4m3 sums" paper-bf16 paper-fp8; GiB of the fullest rank, flat parts but for fp8-lm
awk '
    $1 !~ /^(7B|13B|175B)$/ { next }
    { recipe = $2; at = 3; if ($3 == "e4m3") { recipe = "sums"; at = 5 } }
    $at == (recipe == "fp8-lm" ? "tensor" : "flat") {
        gib[$1, recipe] = $(at + 2)
        if (match($0, /\([0-9. ]+\)/)) { split(substr($0, RSTART + 1, RLENGTH - 2), printed, " "); paper[$1, recipe] = printed[2] }
    }
    END {
        split("7B 13B 175B", model, " ")
        for (i = 1; i <= 3; i++) {
            m = model[i]
            print m, paper[m, "bf16"], paper[m, "fp8-lm"], gib[m, "bf16"], gib[m, "fp8-lm"], gib[m, "fp8"], gib[m, "sums"]
            bad += gib[m, "sums"] == "" || paper[m, "fp8-lm"] == ""
        }
        exit bad
    }' "$(newest exp3)" > "$data/exp3" || fail "$(newest exp3) has not the plans of 7B, 13B and 175B"
picture exp3 480 << END
set title "Memory of the fullest rank in the paper's setups"
set ylabel "GiB (the paper: GB)"; set style data histograms; set style histogram clustered gap 1.2; set style fill solid 0.85 border -1; set boxwidth 0.95
set yrange [0:80]; set key outside bottom center horizontal width -2
plot "$data/exp3" u 2:xtic(1) t "BF16, as the paper measured" lc rgb "#cccccc", "" u 3 t "FP8-LM, as the paper measured" lc rgb "#92c5de", "" u 4 t "bf16, planned" lc rgb "#777777", \\
    "" u 5 t "fp8-lm, planned" lc rgb "#4393c3", "" u 6 t "fp8, planned" lc rgb "#1b7837", "" u 7 t "fp8, E4M3 accumulators, planned" lc rgb "#7fbf7b"
END
