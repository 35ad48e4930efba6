#!/usr/bin/env bash
# plot.sh: draws a curve of any number of runs into one picture, from their log.jsonl.
#
# Each run is a thin line with its running mean bold on top, centred, so that nothing lags. Lines that a killed run left torn, and null (a
# loss that was not finite), are passed over; where a run was resumed, the repeated steps count once, as they went the last time. Needs
# gnuplot and awk, no Python.
set -euo pipefail
export LC_ALL=C # decimal points

usage='usage: scripts/plot.sh [options] OUT.png|OUT.svg RUN…
  RUN          a run'\''s output folder or its log.jsonl; LABEL=PATH names it in the legend (else the folder'\''s name does)
  --y FIELD    loss (default), val_loss, grad_norm, or any other number that log.jsonl has a step: lr, ms, tok_s, mfu
  --x FIELD    step (default) or tokens
  --smooth N   running mean over N points, the near ones weighing more; 1: none (default: a fiftieth of the points)
  --title T    heading'

fail() {
    printf 'plot.sh: %s\n' "$*" >&2
    exit 2
}

# The points of one log as "x y mean" lines. Reads top-level numbers only, in any key order: objects, arrays and strings are skipped.
# shellcheck disable=SC2016
extract='
function skip(s, depth) {                  # what follows the object or array that s begins with
    do {
        if (!match(s, /["{}]|\[|\]/)) { return "" }
        c = substr(s, RSTART, 1)
        if (c == "\"") {
            s = substr(s, RSTART)
            if (!match(s, /^"([^"\\]|\\.)*"/)) { return "" }
            s = substr(s, RLENGTH + 1)
        } else {
            depth += (c == "{" || c == "[") ? 1 : -1
            s = substr(s, RSTART + 1)
        }
    } while (depth > 0)
    return s
}
function scan(s, key, c) {                 # value[key] of the line s
    split("", value)
    if (s !~ /^[ \t]*\{.*\}[ \t\r]*$/) { return }
    sub(/^[ \t]*\{/, "", s)
    while (match(s, /^[ \t,]*"([^"\\]|\\.)*"[ \t]*:[ \t]*/)) {
        key = substr(s, 1, RLENGTH)
        s = substr(s, RLENGTH + 1)
        sub(/^[ \t,]*"/, "", key)
        sub(/"[ \t]*:[ \t]*$/, "", key)
        c = substr(s, 1, 1)
        if (c == "{" || c == "[") {
            s = skip(s, 0)
        } else if (c == "\"") {
            if (!match(s, /^"([^"\\]|\\.)*"/)) { return }
            s = substr(s, RLENGTH + 1)
        } else {
            match(s, /^[^,} \t\r]*/)
            value[key] = substr(s, 1, RLENGTH)
            s = substr(s, RLENGTH + 1)
        }
    }
}
function number(key) { return key in value && value[key] ~ /^-?[0-9]+(\.[0-9]+)?([eE][-+]?[0-9]+)?$/ }
index($0, "\"" y "\"") || (x == "tokens" && index($0, "\"tokens\"")) {
    scan($0)
    if (!number("step")) { next }
    step = value["step"] + 0
    if (number("tokens")) { tokens[step] = value["tokens"] }
    if (!number(y)) { next }
    while (n > 0 && steps[n] >= step) { n-- }
    steps[++n] = step
    ys[n] = value[y] + 0
}
END {
    for (i = 1; i <= n; i++) {             # validation lines carry no tokens: those of the same step count
        if (x == "tokens" && !(steps[i] in tokens) && steps[i] != 0) { continue }
        xs[++m] = x == "tokens" ? tokens[steps[i]] + 0 : steps[i]
        ys[m] = means[m] = ys[i]
    }
    half = int((smooth > 0 ? smooth - 1 : m / 50) / 2)
    average(int((half + 1) / 2))           # twice half the window is a triangle of the whole: no steps around a spike
    average(int(half / 2))
    for (i = 1; i <= m; i++) { printf "%.10g %.10g %.10g\n", xs[i], ys[i], means[i] }
}
function average(half, left, right) {      # means[] by the means of up to half points on either side
    for (i = 1; i <= m; i++) { sum[i] = sum[i - 1] + means[i] }
    for (i = 1; half > 0 && i <= m; i++) {
        left = half < i - 1 ? half : i - 1
        right = half < m - i ? half : m - i
        if (right > left) { right = left } # the steep start would be pulled down
        means[i] = (sum[i + right] - sum[i - left - 1]) / (left + 1 + right)
    }
}'

x=step y=loss smooth=auto title='' out='' runs=()
while [ $# -gt 0 ]; do
    case $1 in
        --help)
            printf '%s\n' "$usage"
            exit 0
            ;;
        --x | --y | --title | --smooth)
            [ $# -ge 2 ] || fail "$1 needs a value (--help shows which)"
            set -- "$1=$2" "${@:3}"
            continue
            ;;
        --x=*) x=${1#*=} ;;
        --y=*) y=${1#*=} ;;
        --title=*) title=${1#*=} ;;
        --smooth=*) smooth=${1#*=} ;;
        -*) fail "unknown option '$1' (--help lists all)" ;;
        *) if [ -z "$out" ]; then out=$1; else runs+=("$1"); fi ;;
    esac
    shift
done
[ -n "$out" ] || fail "the picture to draw is missing; $(head -n 1 <<< "$usage")"
case $out in
    *.png | *.svg) ;;
    *) fail "'$out': the picture's name must end in .png or .svg" ;;
esac
[ ${#runs[@]} -gt 0 ] || fail "no run was named; $(head -n 1 <<< "$usage")"
[ "$x" = step ] || [ "$x" = tokens ] || fail "--x: '$x' is not known; allowed: step, tokens"
[[ $y =~ ^[A-Za-z_][A-Za-z0-9_]*$ ]] || fail "--y: '$y' is not the name of a field"
[ "$smooth" = auto ] || [[ $smooth =~ ^[1-9][0-9]{0,8}$ ]] || fail "--smooth: '$smooth' is not a whole number above 0"
[ -d "$(dirname -- "$out")" ] || fail "'$out': there is no folder $(dirname -- "$out")"
command -v gnuplot > /dev/null ||
    fail "gnuplot is missing: apt-get install gnuplot-nox (Debian, Ubuntu), dnf install gnuplot-minimal (Fedora)"

work=$(mktemp -d)
trap 'rm -rf -- "$work"' EXIT

# A string for gnuplot: within single quotes nothing has a meaning but the quote itself.
quoted() {
    local text=${1//$'\n'/ }
    printf "'%s'" "${text//\'/\'\'}"
}

count=0 labels=()
for run in "${runs[@]}"; do
    label='' path=$run
    if [ ! -e "$run" ] && [[ $run == *=* ]]; then
        label=${run%%=*} path=${run#*=}
    fi
    [ ! -d "$path" ] || path=${path%/}/log.jsonl
    [ -f "$path" ] || fail "no such log: $path"
    [ -r "$path" ] || fail "cannot read $path"
    if [ -z "$label" ]; then
        label=$(basename -- "$path")
        [ "$label" != log.jsonl ] || label=$(basename -- "$(cd -- "$(dirname -- "$path")" && pwd)")
        label=${label%.jsonl}
    fi
    count=$((count + 1))
    awk -v x="$x" -v y="$y" -v smooth="${smooth/auto/0}" "$extract" < "$path" > "$work/$count"
    if [ ! -s "$work/$count" ]; then
        [ "$x" = step ] || fail "$path has no line with numbers under \"$y\" and \"tokens\""
        fail "$path has no line with a number under \"$y\""
    fi
    labels+=("$label, ends at $(awk 'END { printf "%#.4g", $3 }' "$work/$count")")
done

# Ranges: of x all, from 0 unless that is far, with a unit for tokens; of y that of the means, lest one spike flatten everything.
read -r unit unit_name first last low high < <(awk -v x="$x" '
    NR == 1 || $1 < first { first = $1 }
    NR == 1 || $1 > last { last = $1 }
    NR == 1 || $3 < low { low = $3 }
    NR == 1 || $3 > high { high = $3 }
    END {
        if (first > 0 && first < last / 4) { first = 0 }
        if (first == last) { first--; last++ }
        margin = (high - low) * 0.06
        if (margin == 0) { margin = low == 0 ? 1 : (low < 0 ? -low : low) * 0.05 }
        unit = x == "step" ? "1 -" : last >= 2e9 ? "1e9 billions" : last >= 2e6 ? "1e6 millions" : last >= 2e4 ? "1e3 thousands" : "1 -"
        printf "%s %.10g %.10g %.10g %.10g\n", unit, first, last, low - margin, high + margin
    }' "$work"/[1-9]*)
x_label=$x
[ "$unit_name" = - ] || x_label="tokens ($unit_name)"

# Okabe and Ito's colours, which colour-blind people can tell apart, and which keep apart in grey; then again, dashed.
colours=(0072B2 D55E00 009E73 CC79A7 E69F00 56B4E9 000000) dashes=(1 '(3,1.5)' '(1,1.5)')
{
    if [ "${out##*.}" = png ]; then
        echo "set terminal pngcairo size 1600,1000 font 'Sans,21' noenhanced background '#ffffff'"
        thin=1.5 bold=4.5
    else
        echo "set terminal svg size 960,600 dynamic font 'sans-serif,14' noenhanced background '#ffffff'"
        thin=0.8 bold=2.5
    fi
    echo "set output 'picture'"
    echo "set encoding utf8"
    echo "set border 3 linecolor rgb '#606060'"
    echo "set tics nomirror out scale 0.6 textcolor rgb '#303030'"
    echo "set grid linetype 1 linewidth 1 linecolor rgb '#e0e0e0'"
    echo "set key top right Left reverse spacing 1.3 samplen 2.5 opaque nobox"
    echo "set xlabel $(quoted "$x_label")"
    echo "set ylabel $(quoted "${y//_/ }")"
    [ -z "$title" ] || echo "set title $(quoted "$title") textcolor rgb '#000000' font ',25'"
    echo "set xrange [$first/$unit:$last/$unit]"
    echo "set yrange [$low:$high]"
    plot=plot
    for pass in raw mean; do
        for ((i = 1; i <= count; i++)); do
            colour=${colours[(i - 1) % ${#colours[@]}]}
            dash=${dashes[(i - 1) / ${#colours[@]} % ${#dashes[@]}]}
            points=$(awk 'END { print NR }' "$work/$i")
            if [ $pass = raw ]; then
                if awk '$2 != $3 { exit 1 }' "$work/$i"; then continue; fi # nothing was averaged
                printf "%s '%d' using (\$1/%s):2 with lines linewidth %s linecolor rgb '#b0%s' notitle" \
                    "$plot" "$i" "$unit" "$thin" "$colour"
            else
                with=lines
                [ "$points" -gt 60 ] || with="linespoints pointtype 7 pointsize $([ "${out##*.}" = png ] && echo 1.2 || echo 0.5)"
                printf "%s '%d' using (\$1/%s):3 with %s linewidth %s dashtype %s linecolor rgb '#%s' title %s" \
                    "$plot" "$i" "$unit" "$with" "$bold" "$dash" "$colour" "$(quoted "${labels[i - 1]}")"
            fi
            plot=', '
        done
    done
    echo
} > "$work/script"

(cd "$work" && LC_ALL=C.UTF-8 gnuplot script 2> errors) || fail "gnuplot failed: $(head -n 3 "$work/errors" | tr '\n' ' ')"
[ -s "$work/picture" ] || fail "gnuplot drew nothing: $(head -n 3 "$work/errors" | tr '\n' ' ')"
cp -- "$work/picture" "$out" || fail "cannot write $out"
