#!/usr/bin/env bats
# topology.bats: training on ranks that share layers (tp), stages (pp) and the batch (dp), against training on one: losses, norms and tokens; what is
# sent; what is refused.
# shellcheck disable=SC2030,SC2031,SC2086,SC2154 # flags are lists of words; output, status and stderr are bats's

load common

setup_file() {
    use_binary
    export OMP_WAIT_POLICY=passive
    text_file "$BATS_FILE_TMPDIR/text.txt" 400
    shape='--layers 4 --heads 4 --width 64 --seq-len 32 --micro-batch 1 --global-batch 256 --lr 0.001 --warmup 4 --val-every 0'
    long=10 # steps of a trajectory
    [ -z "${SOAK:-}" ] || long=50
    export shape long
}

setup() {
    have_mpi
    cd "$BATS_FILE_TMPDIR" || return
}

# run_on TP PP DP DIR FLAGS…: a run of that topology. One that hangs is ended.
run_on() {
    local tp=$1 pp=$2 dp=$3 dir=$4 launch=()
    shift 4
    [ $((tp * pp * dp)) = 1 ] || launch=(mpirun "${mpi_flags[@]}" -np $((tp * pp * dp)))
    timeout 120 "${launch[@]}" "$TRAIN" --train-data text.txt $shape --tp "$tp" --pp "$pp" --output-dir "$dir" "$@" > output.txt 2>&1 < /dev/null || {
        echo "tp $tp, pp $pp, dp $dp, $*: status $?"
        tail -n 5 output.txt
        return 1
    }
}

# same_course RECIPE LOSS NORM [SOME]: every topology of tp 1, 2, 4 × pp 1, 2, 4 × dp 1, 2 against one rank, within these relative bounds; where time is
# short SOME of them, "211 122"
same_course() {
    local recipe=$1 loss=$2 norm=$3 some=${4:-} tp pp dp column bad=
    run_on 1 1 1 "$recipe-1" --recipe "$recipe" --steps "$long"
    holds 'last < 0.9 * first' first="$(first loss "$recipe-1")" last="$(last loss "$recipe-1")"
    for tp in 1 2 4; do
        for pp in 1 2 4; do
            for dp in 1 2; do
                [ $((tp * pp * dp)) != 1 ] || continue
                [[ -z "$some" || -n "${SOAK:-}" || " $some " == *" $tp$pp$dp "* ]] || continue
                run_on $tp $pp $dp "$recipe" --recipe "$recipe" --steps "$long" || return
                for column in "loss $loss" "grad_norm $norm" "tokens 0"; do
                    same_column ${column% *} "$recipe-1" "$recipe" ${column#* } > difference || bad=1
                    sed "s/^/tp $tp, pp $pp, dp $dp: /" difference >> differences
                done
                rm -rf "$recipe"
            done
        done
    done
    if [ -n "${SOAK:-}" ]; then
        for column in loss grad_norm; do
            sed -n "s/\(.*\): $column of .* at most \(.*\) apart/\2 \1/p" differences | sort -g | sed -n "\$s/^\([^ ]*\) \(.*\)/# $recipe, $long steps: $column at most \1 apart (\2)/p" >&3
        done
    fi
    cat differences
    rm differences
    [ -z $bad ]
}

@test "in FP32 every topology follows one rank to 1e-5" { same_course fp32 1e-5 1e-5; }

# Ranks of a layer add up partial sums that were rounded to BF16's 8 bits (2^-9 of each), and AdamW's first steps make as much of a small gradient as of a
# large one.
@test "in BF16 every topology follows one rank to 0.1 %" { same_course bf16 1e-3 0.02; }

# As in BF16; and dY and dX travel in FP8 of 2 and 3 bits, gradients between replicas with scales of their own, and a replica's share of the batch draws
# other random bits
@test "in FP8 every topology follows one rank to 0.4 %" { same_course fp8 4e-3 0.12; }
@test "with the paper's recipe topologies follow one rank to 0.4 %" { same_course fp8-lm 4e-3 0.12 "211 141 122 442"; }

# Every two values of two of these occur together: tp pp dp zero recipe tied position micro-batches
covering() {
    cat <<'EOT'
1 4 3 0 fp8 no rope 8
2 1 2 2 fp8-lm no learned 4
4 2 1 2 fp32 yes rope 6
1 2 2 1 bf16 yes learned 8
2 1 3 1 fp8 yes rope 4
4 4 1 0 bf16 no learned 6
2 4 2 0 fp32 yes learned 4
4 2 3 1 fp8-lm no learned 6
1 1 1 0 fp8-lm yes rope 4
1 1 3 2 fp32 no rope 8
4 1 2 2 fp8 no learned 6
2 2 1 1 bf16 yes rope 4
2 4 1 2 fp8-lm no rope 8
1 2 2 0 fp8 no rope 6
2 1 3 2 bf16 yes learned 6
4 4 1 1 fp8 yes learned 8
4 2 2 1 fp32 yes learned 4
EOT
}

# Fails where the list above has lost a pair
@test "the list of combinations covers all pairs" {
    covering | awk '
        { for (i = 1; i <= NF; i++) { value[i, $i]; for (j = i + 1; j <= NF; j++) { pair[i, $i, j, $j] } } }
        END {
            for (a in value) { split(a, x, SUBSEP); for (b in value) { split(b, y, SUBSEP)
                if (x[1] < y[1] && !((x[1], x[2], y[1], y[2]) in pair)) { print "no row has " x[2] " with " y[2] " (columns " x[1] ", " y[1] ")"; bad = 1 }
            } }
            exit bad
        }'
}

@test "any combination of topology, ZeRO, recipe and model runs and agrees with one rank" {
    bad=0
    while read -r tp pp dp zero recipe tied position micro_batches; do
        flags="--recipe $recipe --tie-embeddings $tied --position $position --global-batch $((32 * micro_batches * dp)) --steps 5 --clip 0.5"
        run_on 1 1 1 one $flags
        run_on "$tp" "$pp" "$dp" many $flags --zero "$zero" || { bad=1; continue; }
        loss=4e-3 norm=0.12
        [ "$recipe" != fp32 ] || loss=1e-5 norm=1e-5
        for column in "loss $loss" "grad_norm $norm" "tokens 0"; do
            same_column ${column% *} one many ${column#* } > difference || { echo "tp $tp pp $pp dp $dp $flags --zero $zero: $(cat difference)"; bad=1; }
        done
        rm -rf one many
    done < <(covering)
    [ $bad = 0 ]
}

# sent FIELD DIR: bytes of one kind that rank 0 sent in the last step; 0 where it sent none
sent() {
    local comm
    comm=$(last comm "$2")
    [[ $comm == *"\"$1\":"* ]] || { echo 0; return; }
    comm=${comm#*\""$1"\":}
    echo "${comm%%[,\}]*}"
}

# X in FP8 takes half of BF16's bytes, exactly; of all five exchanges of a layer fp8-lm saves a fifth, fp8 two fifths. Scales are counted apart
@test "FP8 between the ranks of a layer: half the bytes of X, a fifth or two fifths of all" {
    for recipe in bf16 fp8 fp8-lm; do run_on 2 1 1 $recipe --recipe $recipe --steps 4; done
    for recipe in fp8 fp8-lm; do
        for field in tp_x tp_x_again; do [ $((2 * $(sent $field $recipe))) = "$(sent $field bf16)" ]; done
        [ "$(sent tp_x $recipe)" -gt 0 ]
    done
    all() {
        local sum=0 field
        for field in tp_x tp_x_again tp_y tp_dy tp_dx; do sum=$((sum + $(sent $field "$1"))); done
        echo $sum
    }
    [ $((10 * $(all fp8-lm))) = $((8 * $(all bf16))) ]
    [ $((10 * $(all fp8))) = $((6 * $(all bf16))) ]
    # 2 of X, 2 again, 2 Y, 2 dY, 2 dX: of 4 layers, 8 micro-batches of 32 tokens, 64 channels, to one other rank of two, each half the rows
    [ "$(all bf16)" = $((10 * 4 * 8 * 32 * 64 * 2 / 2)) ]
    # an amax for each scale made just in time: 4 of X, 4 of dY a layer and micro-batch, 4 bytes each; and what a row of dX in FP8 takes beyond its codes
    run_on 2 1 1 current --recipe fp8-lm --fp8-scaling current --steps 4
    [ "$(sent tp_scales current)" = $((6 * 4 * 8 * 4)) ]
}

@test "a pipeline sends each micro-batch on once in each direction, and the tied embedding's gradient once" {
    for tied in yes no; do run_on 1 2 1 $tied --recipe fp8 --tie-embeddings $tied --steps 4; done
    [ "$(sent pipeline no)" = $((8 * 32 * 64 * 2)) ]                              # BF16
    [ $(($(sent pipeline yes) - $(sent pipeline no))) = $((256 * 64 * 2)) ] # accumulators in BF16
}

# A non-finite gradient on one rank would part the ranks' ways if not all skipped. Samples and validation go through all stages.
@test "skipped steps, validation and samples agree between topologies" {
    wild="--recipe fp32 --lr 50 --warmup 0 --steps 12 --clip 0 --skip-grad-z 3 --val-split 0.1 --val-every 4 --val-batches 3 --sample-every 6 --sample-len 12"
    calm="--recipe fp32 --steps 8 --val-split 0.1 --val-every 4 --sample-every 4 --sample-len 40 --seq-len 16 --global-batch 128"
    run_on 1 1 1 one $calm --val-batches 6
    grep -A 1 'sample of' output.txt > sample1
    run_on 2 2 2 many $calm --val-batches 3
    grep -A 1 'sample of' output.txt > sample2
    same_column val_loss one many 1e-5
    cmp sample1 sample2
    run_on 1 1 1 one $wild || true
    run_on 2 2 1 many $wild || true
    same_column skipped one many 0
}

@test "32 ranks of tp 8 × pp 4 and of tp 4 × pp 4 × dp 2 train as planned" {
    cd "$BATS_TEST_DIRNAME/.." || return
    for topology in "8 4 1" "4 4 2"; do
        STEPS=12 OUT=$BATS_TEST_TMPDIR/check run -0 scripts/topology_check.sh $topology
        [[ $output == *"falls"* ]]
        [[ $output != *DIFFERENT* ]]
    done
}

# refused RANKS PATTERN FLAGS…: one line of that pattern, exit status 2, nothing made, and all ranks end
refused() {
    local ranks=$1 pattern=$2 lines
    shift 2
    rm -rf out
    run timeout 60 mpirun "${mpi_flags[@]}" -np "$ranks" "$TRAIN" --train-data text.txt $shape --steps 1 --output-dir out "$@" < /dev/null
    lines=$(grep '^train_gpt_fp8:' <<< "$output" || true)
    # shellcheck disable=SC2053 # a pattern
    if [ "$status" != 2 ] || [ "$(wc -l <<< "$lines")" != 1 ] || [[ $lines != "train_gpt_fp8: "$pattern ]] || [ -e out ]; then
        printf '%s ranks, %s\nwanted: %s\nstatus %s: %s\n' "$ranks" "$*" "$pattern" "$status" "$output"
        return 1
    fi
}

@test "topologies that a model, a batch or the ranks do not allow are refused" {
    bad=0
    while IFS='|' read -r ranks pattern flags; do
        refused "$ranks" "$pattern" $flags || bad=1
    done <<'EOT'
3|--tp: 3 ranks cannot share the 4 attention heads alike; allowed: divisors of them|--tp 3
3|--pp: 3 stages cannot share the 4 layers alike; allowed: divisors of them|--pp 3
4|--tp: 4 ranks cannot share the 30 tokens of --seq-len alike*|--tp 4 --seq-len 30 --global-batch 240
2|--width: 66 is not divisible by --heads 4|--tp 2 --width 66
4|--global-batch: 96 tokens are 3 micro-batches of each replica, and the 4 stages of --pp need as many at least; allowed: multiples of 32 from 128 on|--pp 4 --global-batch 96
3|--tp 2 × --pp 1 need a multiple of 2 ranks, and there are 3; start as many: mpirun -np 4 *|--tp 2
2|--tp 2 × --pp 2 need a multiple of 4 ranks, and there are 2; *|--tp 2 --pp 2
EOT
    refused 1 "rank 1 was started with tp=1, rank 0 with tp=2; all ranks need the same flags" --tp 2 : -np 1 "$TRAIN" --train-data text.txt $shape --steps 1 --output-dir out || bad=1
    [ $bad = 0 ]
}
