#!/usr/bin/env bats
# exp1.bats: scripts/exp1_scaling.sh runs from end to end, small, and says what it has measured.
# shellcheck disable=SC2030,SC2031,SC2154 # output, status and stderr are bats's

load common

setup_file() {
    cd "$BATS_TEST_DIRNAME/.." || return
    have_mpi
    export LC_ALL=C QUICK=1 OUT=$BATS_FILE_TMPDIR/out DATA=$BATS_FILE_TMPDIR/text.txt
    text_file "$DATA" 2000
    scripts/exp1_scaling.sh > "$BATS_FILE_TMPDIR/output" 2> "$BATS_FILE_TMPDIR/errors" || {
        cat "$BATS_FILE_TMPDIR/output" "$BATS_FILE_TMPDIR/errors"
        return 1
    }
}

setup() {
    cd "$BATS_TEST_DIRNAME/.." || return
    csv=$OUT/exp1.csv
}

# refuses [NAME=VALUE…] [ARGUMENT] PATTERN: one line on stderr that matches, status 2, nothing run
refuses() {
    run --separate-stderr env OUT="$BATS_TEST_TMPDIR/none" "${@:1:$#-1}"
    # shellcheck disable=SC2053 # a pattern
    if [ "$status" != 2 ] || [[ $stderr != "exp1_scaling.sh: "${*: -1} ]] || [ -e "$BATS_TEST_TMPDIR/none" ]; then
        printf 'status %s, stderr: %s\n' "$status" "$stderr"
        return 1
    fi
}

@test "a row for every kind, number of ranks, probe, block and mode" {
    [ "$(head -n 1 "$csv")" = kind,ranks,step,block,mode,underflow,overflow,snr_db,mu_min,mu_max,bytes,scale_bytes ]
    awk -F, '
        NR == 1 { next }
        NF != 12 || seen[$1, $2, $3, $4, $5]++ { print; bad = 1 }
        { n[$1 " " $2 " " $3 " " $5]++ }
        END {
            split("real.2 real.4 virtual.2 virtual.4 virtual.32", group, " "); split("0 4 8", step, " "); split("pre post sqrt auto direct", mode, " ")
            for (g in group) { for (s in step) { for (m in mode) {
                key = group[g]; sub(/\./, " ", key); key = key " " step[s] " " mode[m]
                if (n[key] != 2) { print key ": " n[key] + 0 " blocks"; bad = 1 }
            } } }
            exit bad || NR != 1 + 5 * 3 * 5 * 2 + 3 * 2  # and what auto settles to
        }' "$csv"
}

# Fails where headroom, bytes or saturation are not what the modes are defined by: a block of width 32 has 12·32² values
@test "headroom, bytes and shares are those of the modes" {
    awk -F, '
        function near(a, b) { return a - b < 1e-6 && b - a < 1e-6 }
        NR == 1 { next }
        {
            want = $5 == "pre" ? 1 / $2 : $5 == "sqrt" || ($5 == "auto" && $3 == 0) ? 1 / sqrt($2) : 1
            if ($5 != "settled" && ($5 != "auto" || $3 == 0)) { ok = near($9, want) && near($10, want) } else { ok = $9 >= 1 / $2 - 1e-6 && $10 <= 1 }
            elements = 12 * 32 * 32; multiple = 64 * $2
            elements = int((elements + multiple - 1) / multiple) * multiple
            ok = ok && $11 - $12 == 2 * elements * ($2 - 1) / $2
            ok = ok && $12 == int(2 * 4 * 4 * ($2 - 1) / $2) + ($5 == "direct" ? 16 * 4 * ($2 - 1) : 0)
            ok = ok && $6 >= 0 && $6 < 0.5 && $7 >= 0 && $7 < 0.5 && $8 > 0 && $8 < 60 && ($5 != "pre" || $7 < 1e-3)
            if (!ok) { print; bad = 1 }
        }
        END { exit bad }' "$csv"
}

@test "virtual ranks give what real ones give, and every claim has its verdict" {
    [ "$(grep -c . "$OUT/verdict.txt")" = 10 ]
    run ! grep -vE $'^(held|NOT held|not measured)\t[^\t]+\t' "$OUT/verdict.txt"
    grep -qE $'^held\tvirtual ranks equal real ones\t20 of 20 ' "$OUT/verdict.txt"
    grep -qE $'^not measured\tdirect is 14 dB' "$OUT/verdict.txt" # there are no 128 ranks here
    grep -q "^held: *virtual ranks equal real ones" "$BATS_FILE_TMPDIR/output"
    grep -q "^SNR, dB  *r2  *r4  *2  *4  *32$" "$BATS_FILE_TMPDIR/output"
    command -v gnuplot > /dev/null || skip "no gnuplot here"
    is_png "$OUT/exp1.png"
}

@test "virtual ranks that are not like real ones fail it" {
    # the virtual run alone starts from other weights
    cat > "$BATS_TEST_TMPDIR/mpirun" <<'END'
#!/usr/bin/env bash
if [[ " $* " == *" virtual "* ]]; then set -- "${@/#1234/1235}"; fi
exec mpirun "$@"
END
    chmod +x "$BATS_TEST_TMPDIR/mpirun"
    run env OUT="$BATS_TEST_TMPDIR/out" MPIRUN="$BATS_TEST_TMPDIR/mpirun" OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 SEED=1234 \
        RANKS_REAL=2 RANKS_VIRTUAL= scripts/exp1_scaling.sh
    [ "$status" = 1 ] || { echo "status $status: $output"; return 1; }
    grep -qE $'^NOT held\tvirtual ranks equal real ones\t0 of 10 ' "$BATS_TEST_TMPDIR/out/verdict.txt"
}

@test "what cannot be run is refused in one line" {
    refuses scripts/exp1_scaling.sh --fast "*'--fast'*"
    refuses STEPS=0 scripts/exp1_scaling.sh "*STEPS*'0'*"
    refuses STEPS=20 LATE=20 scripts/exp1_scaling.sh '*LATE*20*19*'
    refuses RANKS_REAL=3 scripts/exp1_scaling.sh "*RANKS_REAL*'3'*power of two*"
    refuses RANKS_VIRTUAL='16 x' scripts/exp1_scaling.sh "*RANKS_VIRTUAL*'x'*"
    refuses RANKS_REAL=' ' scripts/exp1_scaling.sh '*RANKS_REAL*'
    refuses OUT= scripts/exp1_scaling.sh '*OUT*'
    run --separate-stderr env OUT="$BATS_TEST_TMPDIR/none" WIDTH=33 scripts/exp1_scaling.sh # the trainer refuses
    [ "$status" = 2 ]
    [[ $stderr == *"--width: 33 is not divisible by --heads 2"* ]]
}
