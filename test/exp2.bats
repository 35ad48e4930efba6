#!/usr/bin/env bats
# exp2.bats: scripts/exp2_decoupling.sh runs from end to end, small, and says what it has measured.
# shellcheck disable=SC2030,SC2031,SC2154 # output, status and stderr are bats's

load common

setup_file() {
    cd "$BATS_TEST_DIRNAME/.." || return
    export LC_ALL=C QUICK=1 OUT=$BATS_FILE_TMPDIR/out DATA=$BATS_FILE_TMPDIR/text.txt OMP_NUM_THREADS=1
    text_file "$DATA" 2000
    SEEDS='1 2' STEPS=60 LR=1e-2 ROWS='#0 #2a #3 128s ours' scripts/exp2_decoupling.sh > "$BATS_FILE_TMPDIR/output" 2> "$BATS_FILE_TMPDIR/errors" || {
        cat "$BATS_FILE_TMPDIR/output" "$BATS_FILE_TMPDIR/errors"
        return 1
    }
}

setup() { cd "$BATS_TEST_DIRNAME/.." || return; }

@test "a row for every format and seed, and the bytes that the formats take" {
    [ "$(head -n 1 "$OUT/exp2.csv")" = row,seed,loss,steps,optimizer_bytes,skipped ]
    [ "$(tail -n +2 "$OUT/exp2.csv" | cut -d , -f 1,2 | tr '\n' ' ')" = "#0,1 #2a,1 #3,1 128s,1 ours,1 #0,2 #2a,2 #3,2 128s,2 ours,2 " ]
    awk -F, 'NR > 1 && ($3 !~ /^[0-9.]+$/ || $3 < 0.5 || $3 > 5 || $4 != 60 || $6 != 0) { print; bad = 1 } END { exit bad }' "$OUT/exp2.csv"
    # 1 layer of width 32: 12,288 elements in matrices, 8,192 in the embedding: 12, 5, 4, 5 and 4 bytes each, and 12 for those of 1,280 in vectors
    awk -F, '
        NR > 1 { want["#0"] = 12; want["#2a"] = 5; want["#3"] = 4; want["128s"] = 5; want["ours"] = 4; left = $5 - want[$1] * 20480; if (left < 15360 || left > 23000) { print; bad = 1 } }
        END { exit bad }' "$OUT/exp2.csv"
}

@test "an FP8 master is seen to be worse, and every claim has its verdict" {
    [ "$(grep -c . "$OUT/verdict.txt")" = 11 ]
    run ! grep -vE $'^(held|NOT held|not measured)\t[^\t]+\t' "$OUT/verdict.txt"
    grep -qE $'^held\tan FP8 master is worse\t' "$OUT/verdict.txt"
    grep -qE $'^not measured\tFP8 v is worse\t' "$OUT/verdict.txt"
    grep -qE $'^held\tours ends where #2a does, at fewer bytes\t' "$OUT/verdict.txt"
    grep -qE '^#2a +FP16 master' "$BATS_FILE_TMPDIR/output"
    command -v gnuplot > /dev/null || skip "no gnuplot here"
    is_png "$OUT/exp2.png"
}

@test "what cannot be run is refused" {
    run --separate-stderr -2 env OUT="$BATS_TEST_TMPDIR/none" ROWS=5 scripts/exp2_decoupling.sh
    [[ $stderr == *"ROWS: '5' is not known; allowed: #0 #1 #2a"* ]]
    run --separate-stderr -2 env OUT="$BATS_TEST_TMPDIR/none" SEEDS=one scripts/exp2_decoupling.sh
    [[ $stderr == *"SEEDS: 'one'"* ]]
    run --separate-stderr -2 env OUT="$BATS_TEST_TMPDIR/none" BUDGET=0 scripts/exp2_decoupling.sh
    [[ $stderr == *"BUDGET: '0'"* ]]
    run --separate-stderr -2 env OUT="$BATS_TEST_TMPDIR/none" scripts/exp2_decoupling.sh --fast
    [ ! -e "$BATS_TEST_TMPDIR/none" ]
}
