#!/usr/bin/env bats
# plot.bats: scripts/plot.sh draws what the binary has logged.
# shellcheck disable=SC2030,SC2031,SC2086,SC2154 # $TINY is a list of words; output, status and stderr are bats's

load common

setup_file() {
    use_binary
    local recipe
    text_file "$BATS_FILE_TMPDIR/text.txt" 1000
    for recipe in bf16 fp8; do
        "$TRAIN" --train-data "$BATS_FILE_TMPDIR/text.txt" $TINY --steps 20 --lr 3e-3 --recipe $recipe --val-split 0.1 --val-every 5 \
            --val-batches 1 --output-dir "$BATS_FILE_TMPDIR/$recipe" > "$BATS_FILE_TMPDIR/$recipe.out"
    done
}

setup() {
    command -v gnuplot > /dev/null || skip "no gnuplot here"
    plot=$BATS_TEST_DIRNAME/../scripts/plot.sh
    runs=$BATS_FILE_TMPDIR
    cd "$BATS_TEST_TMPDIR" || return
}

# refuses ARGUMENTS… PATTERN: one line on stderr that matches, status 2, no picture
refuses() {
    run --separate-stderr "$plot" "${@:1:$#-1}"
    # shellcheck disable=SC2053 # a pattern
    if [ "$status" != 2 ] || [ "$(wc -l <<< "$stderr")" != 1 ] || [[ $stderr != "plot.sh: "${*: -1} ]] ||
        compgen -G '*.png' > /dev/null; then
        printf 'status %s, stderr: %s\n' "$status" "$stderr"
        return 1
    fi
}

@test "two runs become a PNG" {
    "$plot" loss.png "$runs/bf16" "$runs/fp8"
    is_png loss.png
    [ "$(tail -c 8 loss.png | head -c 4)" = IEND ] # not cut short
    [ "$(wc -c < loss.png)" -gt 8000 ]
    "$plot" one.png "$runs/bf16"
    run ! cmp -s loss.png one.png
}

@test "two runs become an SVG with both names and their last losses" {
    local end
    "$plot" loss.svg "BF16=$runs/bf16" "$runs/fp8/log.jsonl" --smooth 1 --title 'a <b> & c'
    grep -q '^<svg' loss.svg
    grep -q '</svg>' loss.svg # not cut short
    for end in bf16 fp8; do
        end=$(printf '%#.4g' "$(last loss "$runs/$end")")
        grep -q "ends at $end" loss.svg || { echo "no 'ends at $end'"; return 1; }
    done
    grep -q '>.*BF16, ends' loss.svg
    grep -q '>.*fp8, ends' loss.svg
    grep -qE 'a &lt;b(>|&gt;) &amp; c' loss.svg
    if python3 -c '' 2> /dev/null; then
        python3 -c 'import sys, xml.dom.minidom as m; m.parse(sys.argv[1])' loss.svg
    fi
}

@test "every field that a run logs can be drawn, over steps and tokens" {
    local field
    for field in loss grad_norm lr ms tok_s val_loss; do
        "$plot" $field.svg --y $field "$runs/bf16" "$runs/fp8"
        grep -q "${field//_/ }" $field.svg
    done
    # validations at 0, 5, 10, 15 and 20; what is drawn ends at the last of them
    grep -q "ends at $(printf '%#.4g' "$(last val_loss "$runs/fp8")")" val_loss.svg
    "$plot" tokens.svg --x tokens --y loss "$runs/fp8"
    grep -q '>tokens' tokens.svg
    grep -qE '> *2[05]00 *<' tokens.svg # a number at the axis: 20 steps of 128 are 2,560
}

@test "what cannot be drawn is refused in one line" {
    refuses loss.png "$runs/bf16" missing 'no such log: missing*'
    refuses loss.png "$runs" 'no such log: *log.jsonl'
    refuses loss.png '*no run*'
    refuses loss.gif "$runs/bf16" "*'loss.gif'*.png*.svg*"
    refuses nowhere/loss.png "$runs/bf16" '*nowhere*'
    sed 's/"grad_norm":[^,]*/"grad_norm":null/' "$runs/bf16/log.jsonl" > null.jsonl
    refuses loss.png null.jsonl --y grad_norm '*null.jsonl*"grad_norm"*'
    refuses loss.png "$runs/bf16" --smooth 0 "*--smooth*'0'*"
    refuses loss.png "$runs/bf16" --colour red "*'--colour'*"
    head -n 1 "$runs/fp8/log.jsonl" > config.jsonl
    refuses loss.png config.jsonl '*config.jsonl*"loss"*'
}

@test "a torn last line and steps without a loss are passed over" {
    head -n 15 "$runs/fp8/log.jsonl" > whole.jsonl
    { sed '8s/"loss":[^,]*/"loss":null/' whole.jsonl && printf '{"step":16,"loss":9'; } > torn.jsonl
    "$plot" torn.svg torn.jsonl
    "$plot" whole.svg whole.jsonl
    grep -q "ends at $(printf '%#.4g' "$(grep -o '"loss":[^,]*' whole.jsonl | tail -n 1 | cut -d: -f2)")" whole.svg
    grep -q ends torn.svg
    [ "$(grep -o 'ends at [0-9.]*' torn.svg)" = "$(grep -o 'ends at [0-9.]*' whole.svg)" ]
}
