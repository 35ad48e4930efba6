#!/usr/bin/env bats
# plan.bats: --plan: that it says what a run then takes, what the paper and arithmetic say of its presets, and that it needs and leaves nothing.
# shellcheck disable=SC2030,SC2031,SC2086,SC2154 # flags are lists of words; output, status and stderr are bats's

load common

setup_file() {
    use_binary
    text_file "$BATS_FILE_TMPDIR/text.txt" 400
    paper='--plan --json --seq-len 2048 --vocab 100352'
    m7b="$paper --init gpt3:7b --world 32 --micro-batch 2 --global-batch 4194304"
    m13b="$paper --init gpt3:13b --world 32 --tp 2 --micro-batch 2 --global-batch 4194304"
    m175b="$paper --init gpt3:175b --world 128 --tp 8 --pp 4 --micro-batch 1 --global-batch 1048576"
    narrow='--recompute 2 --master-dtype fp16 --m-dtype e4m3 --v-dtype e4m3'
    export m7b m13b m175b narrow
}

setup() { cd "$BATS_FILE_TMPDIR" || return; }

# field FILE a.b: what JSON objects of objects hold at a.b, from the file's first line
field() {
    perl -e '
        open(my $f, "<", $ARGV[0]) or die;
        my $text = <$f>;
        for my $key (split /\./, $ARGV[1]) {
            $text =~ /"\Q$key\E":((\{(?:[^{}]++|(?2))*\})|[^,}]+)/ or die "no $key in $text\n";
            $text = $1;
        }
        print "$text\n";
    ' "$1" "$2"
}

# plan FLAGS… [> FILE]: the plan, in time for a user who waits for it
plan() { timeout 20 "$TRAIN" "$@"; }

# near GOT WANT BOUND WHAT: relative
near() {
    awk -v got="$1" -v want="$2" -v bound="$3" 'BEGIN { d = got - want; if (d < 0) { d = -d } exit !(d <= bound * want) }' || {
        echo "$4: $1, should be $2 within a share of $3"
        return 1
    }
}

@test "--plan --json prints one valid object with all fields, and nothing else is needed or written" {
    mkdir "$BATS_TEST_TMPDIR/empty"
    cd "$BATS_TEST_TMPDIR/empty"
    run -0 --separate-stderr plan $m175b --recipe fp8-lm
    [ -z "$stderr" ]
    [ -z "$(ls -A)" ]
    echo "$output" > ../json
    [ "$(wc -l < ../json)" = 1 ]
    valid_json ../json
    for f in recipe=\"fp8-lm\" gpu=\"h100\" world=128 dp=4 tp=8 pp=4 baseline.recipe=\"bf16\"; do
        [ "$(field ../json "${f%=*}")" = "${f#*=}" ]
    done
    for side in '' baseline.; do
        for memory in memory memory_min; do
            sum=0
            for category in weights gradients optimizer activations workspace communication; do
                bytes=$(field ../json $side$memory.$category)
                [ "$bytes" -gt 0 ]
                sum=$((sum + bytes))
            done
            [ "$sum" = "$(field ../json $side$memory.total)" ]
        done
        for f in gradients tensor_parallel pipeline; do [ "$(field ../json ${side}traffic.$f)" -gt 0 ]; done
        field ../json ${side}traffic.weights
        [ "$(field ../json ${side}table7)" -gt 0 ]
        [ "$(field ../json ${side}memory.total)" -gt "$(field ../json ${side}memory_min.total)" ]
        field ../json ${side}largest_micro_batch
        holds 's > 0.001 && s < 1000' s="$(field ../json ${side}step_seconds)"
    done
    # 12·L·h² and 13·L·h of vectors, the embedding, the last norm
    [ "$(field ../json parameters)" = $((96 * 12 * 12288 * 12288 + 96 * 13 * 12288 + 100352 * 12288 + 2 * 12288)) ]
}

@test "the table has both columns and every category" {
    run -0 --separate-stderr plan ${m175b/--json/} --recipe fp8-lm
    [ -z "$stderr" ]
    [[ ${lines[0]} == *"gpt3:175b"*"175G parameters"*"128 × H100"*"dp 4, pp 4, tp 8"* ]]
    [[ ${lines[1]} == *fp8-lm*bf16* ]]
    for row in weights gradients optimizer activations workspace communication total "total of the emptiest rank" "largest micro-batch" \
        "tensor parallel" "sum dX" pipeline "micro-batch forward" "of it waiting in the pipeline" step; do
        grep -q "^ *$row .*" <<< "$output"
    done
    grep -q "at best" <<< "$output"
    run -0 --separate-stderr plan --plan --init d12 # one rank sends nothing
    [ -z "$stderr" ]
    ! grep -q "sent" <<< "$output"
}

# What the paper's tables imply, in GiB, with optimizer states divided over replicas
@test "model states of the paper's models are what its tables imply" {
    bad=0
    while IFS='|' read -r model flags weights gradients optimizer; do
        plan ${!model} $flags > json || bad=1
        for f in weights=$weights gradients=$gradients optimizer=$optimizer; do
            near "$(($(field json memory.${f%=*}) / 1048576))" "$(awk -v x="${f#*=}" 'BEGIN { print 1024 * x }')" 0.005 "$model $flags ${f%=*}, MiB" || bad=1
        done
    done <<'EOT'
m7b|--recipe bf16|12.77|25.53|2.39
m7b|--recipe fp8-lm|6.77|7.53|1.08
m13b|--recipe bf16|12.21|24.42|4.58
m13b|--recipe fp8-lm|6.34|6.82|2.02
m175b|--recipe bf16|10.41|20.82|15.62
m175b|--recipe fp8-lm|5.35|5.64|6.76
EOT
    [ $bad = 0 ]
}

# Table 7: X, X again and the sum of dX of two linear layers a layer. BF16's activations: 32 bytes a token, channel and layer, divided by tp, for each
# micro-batch in flight
@test "activations and their traffic are what the paper's tables imply" {
    for row in m13b:4.69:3.12 m175b:5.91:3.94; do
        IFS=: read -r model bf16 fp8 <<< "$row"
        plan ${!model} --recipe fp8-lm > json
        near "$(field json baseline.table7)" "$(awk -v x="$bf16" 'BEGIN { print x * 2^30 }')" 0.002 "$model bf16"
        near "$(field json table7)" "$(awk -v x="$fp8" 'BEGIN { print x * 2^30 }')" 0.002 "$model fp8-lm"
        holds '3 * a == 2 * b' a="$(field json table7)" b="$(field json baseline.table7)"
    done
    near "$(field json baseline.memory.activations)" $((32 * 2048 * 12288 / 8 * 24 * 4)) 0.02 "175b activations, bf16"
    for row in 0:26 1:22 2:20; do # of which FP8 saves half of every X but attention's output, and what is computed again is not kept
        plan $m175b --recipe fp8-lm --recompute ${row%:*} > json
        near "$(field json memory.activations)" $((${row#*:} * 2048 * 12288 / 8 * 24 * 4)) 0.02 "175b activations, --recompute ${row%:*}"
    done
    # all five exchanges of a linear layer: 20, 16 and 12 bytes an element and layer; embedding, head, norms and scales are little beside them
    for row in bf16:20 fp8-lm:16 fp8:12; do
        plan $m175b --recipe ${row%:*} > json
        sum=0
        for operation in tp_x tp_x_again tp_y tp_dy tp_dx; do sum=$((sum + $(field json traffic_operations.$operation))); done
        [ $sum = $((128 * 24 * ${row#*:} * 2048 * 12288 / 8 * 7)) ]
        near "$(field json traffic.tensor_parallel)" $sum 0.016 "175b ${row%:*}"
    done
}

@test "bytes sent for gradients and weights are what the paper's table 5 prints" {
    for row in m7b:37.1:13.9 m13b:34.3:12.3 m175b:23.4:8.2; do
        IFS=: read -r model bf16 fp8 <<< "$row"
        plan ${!model} --recipe fp8-lm > json
        for side in "baseline.:$bf16" ":$fp8"; do
            sum=$(($(field json "${side%:*}traffic.gradients") + $(field json "${side%:*}traffic.weights")))
            near $((sum / 1048576)) "$(awk -v x="${side#*:}" 'BEGIN { print 1024 * x }')" 0.01 "$model ${side%:*}traffic, MiB"
        done
    done
}

@test "memory of 175B on H100s is less than half of BF16's" {
    while IFS='|' read -r least flags; do
        plan $m175b $flags > json
        holds '100 * (1 - a / b) >= least' a="$(field json memory.total)" b="$(field json baseline.memory.total)" least="$least"
    done <<'EOT'
52|--recipe fp8-lm
50|--recipe fp8
50|--recipe fp8 --recompute 2
55|--recipe fp8 --recompute 2 --grad-accum-dtype e4m3
EOT
}

# Fails where the largest micro-batch does not fit, or one more would
@test "the largest micro-batch fits and one more does not" {
    for flags in "--init gpt3:7b --world 8 --recipe fp8-lm" "--init gpt2:d24 --recipe fp8" "--init gpt3:13b --tp 4 --pp 4 --gpu h200" "--init d12 --seq-len 24 --gpu a100"; do
        plan --plan --json $flags --micro-batch 2 > json
        n=$(field json largest_micro_batch) limit=$(field json memory_limit)
        [ "$n" -gt 0 ]
        step=1 # FP8 units take tokens by 16
        [[ $flags != *"--seq-len 24"* ]] || step=2
        # as many micro-batches in a step, as many in flight
        batch=$(($(field json dp) * $(field json seq_len) * $(field json micro_batches)))
        plan --plan --json $flags --micro-batch "$n" --global-batch $((batch * n)) > fits
        plan --plan --json $flags --micro-batch $((n + step)) --global-batch $((batch * (n + step))) > more
        [ "$(field fits memory.total)" -le "$limit" ]
        [ "$(field more memory.total)" -gt "$limit" ]
    done
    plan --plan --json --init gpt3:175b --world 8 --tp 8 --gpu l40s > json
    [ "$(field json largest_micro_batch)" = 0 ]
}

# A lower bound: no GPU can do the matmuls faster than at its peak; what is faster in the table is not slower in the plan
@test "times are at best, and faster hardware makes them shorter" {
    before=0
    for gpu in b200 h200 h100 a100; do
        plan $m7b --recipe fp8 --gpu $gpu > json
        seconds=$(field json step_seconds)
        holds 's >= before' s="$seconds" before="$before"
        before=$seconds
    done
    plan $m7b --recipe bf16 > json
    holds 's > least' s="$(field json step_seconds)" least="$(awk 'BEGIN { print 6 * 6.44e9 * 4194304 / 32 / 989e12 }')"
    plan $m7b --recipe fp8 > json
    holds 's > least && s < b' s="$(field json step_seconds)" b="$(field json baseline.step_seconds)" \
        least="$(awk 'BEGIN { print 6 * 6.44e9 * 4194304 / 32 / 1979e12 }')"
    plan --plan --json --init d12 --recipe fp32 > json
    [ "$(field json step_seconds)" = null ]
}

# same_memory FLAGS…: a run of $RANKS ranks takes what --gpu none planned, to the byte, and sends what it planned
same_memory() {
    rm -rf out
    local launch=()
    [ "$RANKS" = 1 ] || launch=(mpi "$RANKS")
    "${launch[@]}" "$TRAIN" --train-data text.txt --steps 1 --val-every 0 --output-dir out "$@" > /dev/null
    plan --plan --json --gpu none --vocab 256 --world "$RANKS" "$@" > json
    local split=flat
    [[ "$*" != *tensor* && "$*" != *fp8-lm* ]] || split=tensor
    perl -e '
        sub object { my ($text, $key) = @_; $text =~ /"\Q$key\E":(\{[^{}]*\})/ or die "no $key in $text\n"; return { $1 =~ /"(\w+)":(\d+)/g } }
        my $alike = pop(@ARGV) eq "flat";
        my ($plan, $config, $step) = map { open(my $f, "<", $_) or die; my @lines = <$f>; @lines[@lines > 1 ? (0, -1) : 0] } @ARGV;
        for (["memory", object($step, "mem")], ["memory_min", object($config, "mem_min")]) {  # of the fullest rank, of the emptiest
            my ($which, $taken, $total) = (@$_, 0);
            my $planned = object($plan, $which);
            for my $category (sort keys %$taken) {
                $total += $taken->{$category};
                $planned->{$category} == $taken->{$category} or die "$which, $category: planned $planned->{$category}, taken $taken->{$category}\n";
            }
            $planned->{total} == $total && keys %$taken == 6 or die "$which: planned $planned->{total}, taken $total\n";
        }
        my ($traffic, $comm, $sent) = (object($plan, "traffic"), object($step, "comm"), 0);
        $sent += $comm->{$_} // 0 for qw(scales vectors reduce_scatter all_to_all regroup all_gather weights);
        my $planned = $traffic->{gradients} + $traffic->{weights};  # of the rank that sends most; whole tensors are not alike on all
        ($planned == $sent || (!$alike && $planned > $sent && $sent > 0.5 * $planned)) or die "sending $planned bytes was planned, $sent were sent\n";
        $plan =~ /"step_seconds":null/ or die "a time for a CPU\n";
    ' json out/log.jsonl "$split" || {
        echo "$RANKS ranks, $*"
        return 1
    }
}

@test "--gpu none plans to the byte what one process takes" {
    export RANKS=1
    recompute=0
    for flags in "--recipe bf16" "--recipe fp8" "--recipe fp8-lm --fp8-scaling current" "--recipe fp32" "--recipe fp8 --fp8-scaling block" \
        "--recipe fp8 --bf16-layers first:1 --opt-block 128 --master-dtype fp16" "--recipe fp8 --fp8-min-size 100"; do
        same_memory --layers 2 --heads 2 --width 64 --seq-len 32 --micro-batch 4 $flags --recompute $((recompute % 3))
        recompute=$((recompute + 1))
        same_memory --layers 3 --heads 3 --width 96 --seq-len 40 --micro-batch 3 --position learned --tie-embeddings no $flags --recompute $((recompute % 3))
    done
    # attention in several blocks
    same_memory --layers 1 --heads 1 --width 32 --seq-len 700 --micro-batch 1 --recompute 2
}

@test "--gpu none plans to the byte what several ranks take and send" {
    have_mpi
    while IFS='|' read -r RANKS flags; do
        export RANKS
        same_memory --layers 2 --heads 2 --width 64 --seq-len 32 --micro-batch 2 $flags < /dev/null
    done <<'EOT'
2|--recipe bf16
2|--recipe fp8 --zero 0
2|--recipe fp8 --fp8-min-size 65 --tp 2
2|--recipe fp8-lm --zero 2
3|--recipe fp8
3|--recipe fp8 --fp8-scaling block --zero 2
3|--recipe fp8-lm
3|--recipe fp8 --zero 2 --zero-split tensor --global-batch 384
4|--recipe fp8 --grad-reduce ring
4|--recipe bf16 --grad-dtype e5m2 --grad-accum-dtype bf16
4|--recipe bf16 --zero 2
8|--recipe fp8-lm --layers 1
8|--recipe fp8 --zero 1 --zero-split tensor
EOT
}

@test "under mpirun one rank prints, and --world is the ranks that were launched" {
    have_mpi
    run -0 --separate-stderr mpi 4 "$TRAIN" --plan --json --init d12
    [ "$(grep -c '"recipe"' <<< "$output")" = 1 ]
    [ "$(wc -l <<< "$output")" = 1 ]
    echo "$output" > json
    [ "$(field json world)" = 4 ]
    [ "$(field json dp)" = 4 ]
    run -0 --separate-stderr mpi 4 "$TRAIN" --plan --json --init d12 --tp 4 --pp 2
    echo "$output" > json
    [ "$(field json world)" = 8 ]
}

@test "a plan that cannot be written is an error" {
    [ -w /dev/full ] || skip "no /dev/full here"
    for json in '' --json; do
        run -1 --separate-stderr bash -c '"$TRAIN" --plan --init d12 '"$json"' > /dev/full'
        [[ $stderr == "train_gpt_fp8: --plan: cannot write: "* ]]
    done
}

@test "the vocabulary is padded to a multiple of 128 a rank of tp" {
    for vocab in 50257 50688 50689; do # 50688 = 99 · 128 · 4
        plan --plan --json --init gpt2:d24 --tp 4 --vocab $vocab > $vocab
    done
    [ "$(field 50257 memory)" = "$(field 50688 memory)" ]
    [ $(($(field 50689 memory.weights) - $(field 50688 memory.weights))) = $((128 * 1024 * 2)) ]
}

@test "linear layers that FP8 is expected to slow down are named, and --fp8-min-size leaves them in BF16" {
    local note='note: on H100 FP8 is expected to be slower than BF16 (0.[0-9]*x) in the linear layers '
    plan --plan --init d12 > d12
    [ "$(grep -c '^note' d12)" = 1 ]
    grep -q "^${note}attproj, 768 -> 768 at 4096 tokens; --fp8-min-size 769 leaves them in BF16$" d12
    plan --plan --init d12 --fp8-min-size 769 > without
    lacks '^note' without
    plan --plan --init d12 --fp8-min-size 768 | diff - d12
    plan --plan --init gpt2:d6 --micro-batch 1 > d6
    [ "$(grep -c "^$note" d6)" = 4 ]
    plan --plan --init gpt2:d6 --micro-batch 1 --fp8-min-size 769 > without # 384 × 4·384
    lacks '^note' without
    plan --plan --init d12 --tp 4 > tp
    grep -q "attproj, 192 -> 768 at 4096 tokens on a rank; --fp8-min-size 769 leaves" tp
    for flags in "--init gpt3:7b" "--init d12 --recipe bf16" "--init d12 --bf16-layers first:12"; do
        plan --plan $flags > none
        lacks '^note' none
    done
    plan --plan --json --init d12 > json
    [ "$(wc -l < json)" = 1 ]
    # less is in FP8, so weights take more
    for n in 769 1331 1537; do
        plan --plan --json --init d12 --fp8-min-size $n > json$n
    done
    holds 'a < b && b < c && c < d' a="$(field json memory.weights)" b="$(field json769 memory.weights)" c="$(field json1331 memory.weights)" \
        d="$(field json1537 memory.weights)"
    [ "$(field json1537 memory.weights)" = "$(field json1537 baseline.memory.weights)" ]
}

@test "the baseline is BF16 with nothing computed twice, whatever was asked for" {
    plan --plan --json --init d12 --world 4 --recipe bf16 --recompute 0 > json
    want=$(field json memory)
    [ "$want" = "$(field json baseline.memory)" ]
    plan --plan --json --init d12 --world 4 --recipe fp8-lm --fp8-scaling current --grad-scaling pre --bf16-layers first:2 --fp8-min-size 900 --opt-block 128 --recompute 2 \
        --grad-accum-dtype e4m3 --grad-accum-rounding stochastic --v-dtype fp32 > json
    [ "$want" = "$(field json baseline.memory)" ]
    [ "$want" != "$(field json memory)" ]
}

# kernel SIDE NAME FIELD: of the kernels in JSON
kernel() {
    perl -e '
        my ($side, $name, $field) = @ARGV;
        my $text = <STDIN>;
        my ($asked, $baseline) = split /"baseline":/, $text;
        ($side eq "bf16" ? $baseline : $asked) =~ /\{"name":"\Q$name\E",[^}]*"$field":([^,}]+)/ or die "no $name $field\n";
        print "$1\n";
    ' "$1" "$2" "$3" < kernels
}

@test "--kernels: every kernel of a micro-batch, with the operations and bytes that arithmetic gives" {
    plan --plan --json --kernels --init gpt3:7b --micro-batch 2 --seq-len 2048 --vocab 50257 --global-batch 131072 --gpu h200 > kernels
    # 32 layers, C = 4096, 4096 tokens: 2·12·C²·tokens a layer and product
    for name in Y dX dW; do
        near "$(kernel fp8 "$name, FP8" flops)" 52776558133248 1e-9 "$name"
        near "$(kernel bf16 "$name, BF16" flops)" 52776558133248 1e-9 "$name in BF16"
        near "$(kernel fp8 "$name, FP8" seconds)" 0.0266683 1e-4 "$name's time"
    done
    # FP8 dW: dYᵀ and X of 9 and 7 C·tokens, gradients of 12·C² read and written in BF16
    near "$(kernel fp8 'dW, FP8' bytes)" "$((32 * (16 * 4096 * 4096 + 4 * 12 * 4096 * 4096)))" 1e-9 "dW's bytes"
    # what is transposed apart: W, and X of both norms, read and written
    near "$(kernel fp8 'operands transposed or widened' bytes)" "$((32 * (2 * 12 + 2 * 2) * 4096 * 4096))" 1e-9 transposed
    # attention of 2048 tokens, causal: two products forward, seven backward
    near "$(kernel fp8 'attention, BF16' flops)" "$((32 * 2 * 2 * 2 * 2048 * 2048 * 4096 / 2))" 1e-9 attention
    near "$(kernel fp8 'attention backward, BF16' flops)" "$((32 * 7 * 2 * 2 * 2048 * 2048 * 4096 / 2))" 1e-9 'attention backward'
    [ "$(kernel fp8 'LayerNorm, residual added' calls)" = 65.0 ] || [ "$(kernel fp8 'LayerNorm, residual added' calls)" = 65 ]
    plan --plan --kernels --init gpt3:7b --micro-batch 2 --seq-len 2048 --vocab 50257 --global-batch 131072 --gpu h200 > table
    grep -q 'fp8 over bf16: 1.67 times the speed, at best' table
}
