#!/usr/bin/env bats
# exp4.bats: scripts/exp4_formats.sh runs from end to end, small, and says what it has measured.
# shellcheck disable=SC2030,SC2031,SC2154 # output, status and stderr are bats's

load common

setup_file() {
    cd "$BATS_TEST_DIRNAME/.." || return
    have_mpi
    export LC_ALL=C QUICK=1 OUT=$BATS_FILE_TMPDIR/out DATA=$PWD/train_gpt_fp8.cu OMP_NUM_THREADS=1 # of gradients that sentences alike give nothing becomes 0
    SEEDS='1 2' STEPS=36 LR=1e-2 ROWS='base bf16 x5 dy4 g5 v4' scripts/exp4_formats.sh > "$BATS_FILE_TMPDIR/output" 2> "$BATS_FILE_TMPDIR/errors" || {
        cat "$BATS_FILE_TMPDIR/output" "$BATS_FILE_TMPDIR/errors"
        return 1
    }
}

setup() { cd "$BATS_TEST_DIRNAME/.." || return; }

@test "a row for every format and seed, and the formats are what was trained" {
    [ "$(head -n 1 "$OUT/exp4.csv")" = row,seed,loss,steps,optimizer_bytes,skipped ]
    [ "$(tail -n +2 "$OUT/exp4.csv" | cut -d , -f 1,2 | tr '\n' ' ')" = "base,1 bf16,1 x5,1 dy4,1 g5,1 v4,1 base,2 bf16,2 x5,2 dy4,2 g5,2 v4,2 " ]
    awk -F, 'NR > 1 && ($3 !~ /^[0-9.]+$/ || $3 < 0.5 || $3 > 5 || $4 != 36 || $6 != 0) { print; bad = 1 } END { exit bad }' "$OUT/exp4.csv"
    [ "$(tail -n +2 "$OUT/exp4.csv" | grep ',1,' | cut -d , -f 3 | sort -u | wc -l)" = 6 ] # each of them changes something
    grep -q '"fp8-fwd":"e4m3","fp8-bwd":"e5m2".*"grad-dtype":"e4m3".*"ranks":2' "$OUT/base-1/log.jsonl"
    grep -q '"fp8-fwd":"e5m2","fp8-bwd":"e4m3"' "$OUT/x5-1/log.jsonl"
    grep -q '"fp8-fwd":"e4m3","fp8-bwd":"e4m3"' "$OUT/dy4-1/log.jsonl"
    grep -q '"grad-dtype":"e5m2"' "$OUT/g5-1/log.jsonl"
}

# Values spread over an octave or more have 31.5 dB in 3 bits of mantissa and 25.5 in 2, whatever the scale, where nothing becomes 0 or is cut off; where few
# large ones decide, some more or less. The scales are such that in E5M2 nothing does, and of X, W and v in E4M3 nearly nothing.
@test "tensors of every class in every format, at scales that fit" {
    [ "$(head -n 1 "$OUT/snr.csv")" = step,class,tensor,format,snr_db,zeroed,saturated,top ]
    awk -F, '
        NR == 1 { next }
        NF != 8 || seen[$1, $2, $3, $4]++ { print "twice or torn: " $0; bad = 1 }
        { n[$2 " " $4]++; tensors[$2 " " $3] }
        $2 !~ /^step_/ && $4 == "e5m2" && !($5 > 22 && $5 < 28 && $6 < 0.02 && $7 < 0.01) { print; bad = 1 }
        $2 ~ /^(x|w|v)$/ && $4 == "e4m3" && !($5 > 28 && $5 < 34 && $6 < 0.05 && $7 < 0.01) { print; bad = 1 }
        $2 == "v" && $4 == "ue5m3" && !($5 > 28 && $5 < 34 && $6 == 0 && $7 == 0) { print; bad = 1 }
        # by their own amax; X and dY so only in the first 16 steps, then by what came before
        ($2 !~ /^(x|dy)$/ || $1 < 16) && !($7 == 0 && $8 > 0.5 && $8 <= 1) { print "not the scale of its own amax: " $0; bad = 1 }
        $2 ~ /^(x|dy)$/ && !($8 > 1 / 1024 && $8 < 4) { print "not the scale of the last amaxes: " $0; bad = 1 }
        END {
            # 1 layer: 4 tensors of each class; steps 0, 5, … 35
            for (key in n) { split(key, f, " "); if (n[key] != 32 || (f[2] == "ue5m3" && f[1] !~ /v$/)) { print key ": " n[key] " rows"; bad = 1 } }
            split("x w dy wgrad m step_m v step_v", class, " ")
            for (i in class) { if (!((class[i] " e4m3") in n) || !((class[i] " e5m2") in n)) { print "no " class[i]; bad = 1 } }
            if (!("x h0.fcproj" in tensors) || !("dy h0.qkv" in tensors) || !("step_v h0.attprojw" in tensors)) { print "names"; bad = 1 }
            exit bad
        }' "$OUT/snr.csv"
}

# Were it otherwise, what is measured would be tensors of another training
@test "looking at the tensors changes nothing of the training" {
    program=$(make -s DEVICE=cpu config | sed -n 's/^BUILD = //p')/train_gpt_fp8
    "$program" --train-data "$DATA" --recipe fp8 --layers 1 --heads 2 --width 32 --seq-len 32 --micro-batch 8 --steps 36 --lr 1e-2 --warmup 2 --val-every 0 --seed 1 \
        --grad-dtype fp32 --grad-accum-dtype fp32 --master-dtype fp32 --m-dtype fp32 --v-dtype fp32 --output-dir "$BATS_TEST_TMPDIR/plain"
    same_column loss "$BATS_TEST_TMPDIR/plain" "$OUT/tensors" 0
    same_column grad_norm "$BATS_TEST_TMPDIR/plain" "$OUT/tensors" 0
}

@test "every claim has its verdict" {
    [ "$(grep -c . "$OUT/verdict.txt")" = 14 ]
    run ! grep -vE $'^(held|NOT held|not measured)\t[^\t]+\t' "$OUT/verdict.txt"
    grep -qE $'^not measured\tE4M3 m ends no higher' "$OUT/verdict.txt"
    for class in X W m; do grep -qE $'^held\tE4M3 '"$class"$' has the better SNR\t\\+[56]\\.[0-9]+ dB: 3.*; better in 4 of 4 tensors' "$OUT/verdict.txt"; done
    grep -qE $'^held\tE5M2 dY loses less to 0\t' "$OUT/verdict.txt"
    grep -qE '^x5 +X in E5M2' "$BATS_FILE_TMPDIR/output"
    grep -qE '^X +E4M3 +3[0-9.]+ ' "$BATS_FILE_TMPDIR/output"
    command -v gnuplot > /dev/null || skip "no gnuplot here"
    is_png "$OUT/exp4.png"
}

@test "what trains worse is seen" {
    # base hardly trains, E5M2 m does
    cat > "$BATS_TEST_TMPDIR/mpirun" <<'END_OF_SCRIPT'
#!/usr/bin/env bash
if [[ " $* " == */base-1\ * ]]; then set -- "$@" --lr 1e-6; fi
exec mpirun "$@"
END_OF_SCRIPT
    chmod +x "$BATS_TEST_TMPDIR/mpirun"
    OUT=$BATS_TEST_TMPDIR/out MPIRUN=$BATS_TEST_TMPDIR/mpirun OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 SEEDS=1 ROWS='base m5' LR=1e-2 scripts/exp4_formats.sh
    grep -qE $'^NOT held\tE4M3 m ends no higher than E5M2 m\tbase [0-9.]+, m5 [0-9.]+, spreads together 0.0000' "$BATS_TEST_TMPDIR/out/verdict.txt"
}

@test "what cannot be run is refused" {
    run --separate-stderr -2 env OUT="$BATS_TEST_TMPDIR/none" ROWS=x4 scripts/exp4_formats.sh
    [[ $stderr == *"ROWS: 'x4' is not known; allowed: base bf16 x5"* ]]
    run --separate-stderr -2 env OUT="$BATS_TEST_TMPDIR/none" SEEDS=one scripts/exp4_formats.sh
    [[ $stderr == *"SEEDS: 'one'"* ]]
    run --separate-stderr -2 env OUT="$BATS_TEST_TMPDIR/none" PROBE_EVERY=0 scripts/exp4_formats.sh
    [[ $stderr == *"PROBE_EVERY: '0'"* ]]
    run --separate-stderr -2 env OUT="$BATS_TEST_TMPDIR/none" MPIRUN=none scripts/exp4_formats.sh
    [[ $stderr == *"there is no none here"* ]]
    run --separate-stderr -2 env OUT="$BATS_TEST_TMPDIR/none" scripts/exp4_formats.sh --fast
    [ ! -e "$BATS_TEST_TMPDIR/none" ]
    program=$(make -s DEVICE=cpu config | sed -n 's/^BUILD = //p')/scripts/exp4_formats
    run --separate-stderr -2 "$program" "$BATS_TEST_TMPDIR/rows" 5 --train-data "$DATA" --recipe fp8 --layers 1 --heads 2 --width 32 --output-dir "$BATS_TEST_TMPDIR/none"
    [[ $stderr == *"what is measured must be known exactly: give --recipe fp8 --grad-dtype fp32"* ]]
    run --separate-stderr -2 "$program" "$BATS_TEST_TMPDIR/rows" x --train-data "$DATA"
    [[ $stderr == *"PROBE_EVERY: 'x'"* ]]
}
