#!/usr/bin/env bats
# eval.bats: multiple-choice files are scored, alike on any number of ranks.
# shellcheck disable=SC2086,SC2154 # $TINY is a list of words; output is bats's

load common

# sounds LINES: who says what, a sentence a line
sounds() {
    awk -v lines="$1" 'BEGIN {
        x = 7
        n = split("cat dog cow duck horse sheep mouse owl", who)
        split("meow woof moo quack neigh baa squeak hoot", what)
        for (i = 0; i < lines; i++) { x = x * 16807 % 2147483647; k = 1 + x % n; print "the " who[k] " says " what[k] "." }
    }'
}

# questions: for choices: each animal with the sounds of four, its own at another place each time
questions() {
    awk 'BEGIN {
        n = split("cat dog cow duck horse sheep mouse owl", who)
        split("meow woof moo quack neigh baa squeak hoot", what)
        for (k = 1; k <= n; k++) {
            label = k % 4
            line = label "|\\nthe " who[k] " says"
            for (i = 0; i < 4; i++) { line = line "| " what[(k + (i - label) * 3 + 2 * n - 1) % n + 1] "." }
            print line
        }
    }'
}

setup_file() {
    use_binary
    sounds 4000 > "$BATS_FILE_TMPDIR/text.txt"
    questions | choices "$BATS_FILE_TMPDIR/sounds.bin" 1
    questions | choices "$BATS_FILE_TMPDIR/wide.bin" 2
    questions | head -n 3 | sed 's/|.nthe/|a context that is far longer than the sequence \\nthe/' | choices "$BATS_FILE_TMPDIR/long.bin" 1
}

setup() {
    cd "$BATS_TEST_TMPDIR" || return
    data=$BATS_FILE_TMPDIR
}

train() { # RANKS DIR FLAGS…
    local ranks=$1 dir=$2
    shift 2
    mpi "$ranks" "$TRAIN" --train-data "$data/text.txt" $TINY --output-dir "$dir" "$@" > "$dir.out" < /dev/null
}

@test "a model that has learnt the right completions scores near 1, before that near chance" {
    have_mpi
    train 1 run --recipe fp32 --micro-batch 8 --steps 300 --lr 1e-2 --eval-data "$data/sounds.bin,$data/wide.bin" --val-every 150
    [ "$(grep -c '"eval":"sounds"' run/log.jsonl)" = 3 ] # at 0, 150, 300, without validation data
    [ "$(column step run | tail -n 2 | tr '\n' ' ')" = "300 300 " ]
    [ "$(grep '"eval":"wide"' run/log.jsonl | sed s/wide/sounds/)" = "$(grep '"eval":"sounds"' run/log.jsonl)" ]
    holds 'a <= 0.75 && b > 0.85 && c > 0.85' a="$(first acc run)" b="$(last acc run)" c="$(last acc_norm run)"
    [ "$(column examples run | sort -u)" = 8 ]
    grep -q '^step 300/300 | eval sounds | acc [01].[0-9]* | acc_norm [01].[0-9]* | 8 examples$' run.out
    valid_json run/log.jsonl
}

@test "every topology scores the same" {
    have_mpi
    local flags="--recipe fp32 --steps 24 --lr 5e-3 --micro-batch 2 --global-batch 256 --val-every 8 --eval-data $data/sounds.bin,$data/long.bin"
    train 1 one $flags
    train 2 two $flags
    train 3 three $flags --global-batch 384
    train 2 pipeline $flags --pp 2
    train 2 shared $flags --tp 2
    train 4 both $flags --tp 2 --pp 2
    train 4 all $flags --pp 2
    [ "$(column acc one | wc -l)" = 8 ]
    local other
    for other in two pipeline shared both all; do
        same_column acc one $other 0
        same_column acc_norm one $other 0
    done
    [ "$(column acc three | head -n 2)" = "$(column acc one | head -n 2)" ] # before the first step, divided in three
    grep -q '^note: of the 3 examples of .*long.bin 3 are longer than --seq-len 32 ' one.out
}

@test "--steps 0 scores without training, and --val-every 0 at the end only" {
    have_mpi
    train 1 none --recipe fp32 --steps 0 --eval-data "$data/sounds.bin" --val-every 5
    [ "$(column acc none | wc -l)" = 1 ]
    train 1 end --recipe fp8 --steps 3 --eval-data "$data/sounds.bin" --val-every 0
    [ "$(grep '"acc"' end/log.jsonl | sed 's/,.*//')" = '{"step":3' ]
}

# Scores do not depend on the batch: a completion alone in its pass has the losses that it has among others
@test "scores do not depend on how completions are batched" {
    have_mpi
    local batch
    for batch in 1 3 4 7; do train 1 b$batch --recipe fp32 --steps 0 --micro-batch $batch --eval-data "$data/sounds.bin"; done
    for batch in 3 4 7; do
        same_column acc b1 b$batch 0
        same_column acc_norm b1 b$batch 0
    done
}
