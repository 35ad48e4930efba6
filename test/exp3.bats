#!/usr/bin/env bats
# exp3.bats: scripts/exp3_zero.sh runs from end to end, small, and says what it has planned and measured.
# shellcheck disable=SC2030,SC2031,SC2154 # output, status and stderr are bats's

load common

setup_file() {
    cd "$BATS_TEST_DIRNAME/.." || return
    have_mpi
    export LC_ALL=C QUICK=1 OUT=$BATS_FILE_TMPDIR/out
    RANKS=3 scripts/exp3_zero.sh > "$BATS_FILE_TMPDIR/output" 2> "$BATS_FILE_TMPDIR/errors" || {
        cat "$BATS_FILE_TMPDIR/output" "$BATS_FILE_TMPDIR/errors"
        return 1
    }
}

setup() { cd "$BATS_TEST_DIRNAME/.." || return; }

@test "a plan for every model, recipe and split, and a run for every way of dividing" {
    [ "$(tail -n +2 "$OUT/plans.csv" | cut -d , -f 1-3 | sort -u | wc -l)" = 24 ]
    awk -F, 'NR > 1 { for (i = 4; i <= 12; i++) { if ($i !~ /^[0-9.e-]+$/) { print; bad = 1 } } if ($4 > $5 || $6 > $5) { print; bad = 1 } } END { exit bad }' "$OUT/plans.csv"
    [ "$(tail -n +2 "$OUT/runs.csv" | cut -d , -f 1-4 | sort -u | wc -l)" = 10 ]
    # planned and taken; a third of the states at most half of them, with what is not divided
    awk -F, '
        NR > 1 && ($5 != $9 || $6 != $10) { print "not as planned: " $0; bad = 1 }
        NR > 1 && $3 == 0 { whole[$1] = $8 }
        NR > 1 && $3 > 0 && !($8 < whole[$1] / 2 && $8 >= whole[$1] / 3) { print "not divided: " $0; bad = 1 }
        END { exit bad }' "$OUT/runs.csv"
}

@test "the paper's traffic is planned, and every claim has its verdict" {
    [ "$(grep -c . "$OUT/verdict.txt")" = 16 ]
    run ! grep -vE $'^(held|NOT held)\t[^\t]+\t' "$OUT/verdict.txt"
    [ "$(grep -cE $'^held\t[^\t]*send what the paper prints' "$OUT/verdict.txt")" = 6 ]
    grep -qE $'^held\truns allocate what was planned' "$OUT/verdict.txt"
    grep -qE '^175B +bf16 +flat .*\(65.60 66.12\) .*\(23.4\) .*\(5.9\)' "$BATS_FILE_TMPDIR/output"
    command -v gnuplot > /dev/null || skip "no gnuplot here"
    is_png "$OUT/exp3.png"
}

@test "what cannot be run is refused" {
    run --separate-stderr -2 env OUT="$BATS_TEST_TMPDIR/none" RANKS=1 scripts/exp3_zero.sh
    [[ $stderr == *"RANKS: '1' is not a whole number from 2 to 64"* ]]
    run --separate-stderr -2 env OUT="$BATS_TEST_TMPDIR/none" BUDGET=0 scripts/exp3_zero.sh
    [[ $stderr == *"BUDGET: '0'"* ]]
    run --separate-stderr -2 env OUT="$BATS_TEST_TMPDIR/none" scripts/exp3_zero.sh --fast
    [ ! -e "$BATS_TEST_TMPDIR/none" ]
}
