#!/usr/bin/env bats
# trouble.bats: what the binary says of the commonest failures, and that what it advises is so. Those of GPUs and NCCL are in trouble.cpp, bad input in bad_input.bats.
# shellcheck disable=SC2030,SC2031,SC2086,SC2154 # $TINY is a list of words; output and status are bats's

load common

setup_file() {
    use_binary
    text_file "$BATS_FILE_TMPDIR/text.txt" 1600
    cd "$BATS_FILE_TMPDIR" || return
    shard tokens.bin uint16 4000 0 38
}

setup() { cd "$BATS_FILE_TMPDIR" && rm -rf out; }

# has PATTERN: the output has it
has() {
    # shellcheck disable=SC2053 # a pattern
    [[ $output == *$1* ]] || {
        printf 'wanted: %s\nstatus %s, output: %s\n' "$1" "$status" "$output"
        return 1
    }
}

@test "a processor that lacks what the binary was built for" {
    command -v g++ > /dev/null || skip "no g++ here"
    grep -qw fma4 /proc/cpuinfo && skip "this processor has everything"
    [ "$(uname -m)" = x86_64 ] || skip "not an x86-64"
    printf '#include "core/trouble.h"\nint main() { puts("began"); return 0; }\n' > cpu.cpp
    g++ -std=c++17 -mfma4 -I "$BATS_TEST_DIRNAME/.." cpu.cpp -o cpu
    run -2 ./cpu
    [ "$output" = "train_gpt_fp8: this binary was built for a processor with fma4, which this one lacks; build it here (make clean, then make), or for both machines (make MARCH=x86-64-v3)" ]
    g++ -std=c++17 -I "$BATS_TEST_DIRNAME/.." cpu.cpp -o cpu
    run -0 ./cpu
    [ "$output" = began ]
}

@test "a binary without MPI is not started as several" { # each would train alone, into the same folder
    command -v g++ > /dev/null || skip "no g++ here"
    printf '#include "core/collectives.cuh"\nint main(int argc, char** argv) { World w = world_init(&argc, &argv); return w.size - 1; }\n' > alone.cpp
    g++ -std=c++17 -fopenmp -I "$BATS_TEST_DIRNAME/.." alone.cpp -o alone
    run -0 env -u SLURM_STEP_NUM_TASKS ./alone
    for launcher in OMPI_COMM_WORLD_SIZE=2 PMI_SIZE=2 SLURM_STEP_NUM_TASKS=2; do
        run -2 env "$launcher" ./alone
        has 'a launcher started 2 processes, but this binary was built without MPI*without the launcher*scripts/setup.sh'
    done
    run -2 env PMIX_RANK=0 ./alone
    has 'a launcher started this process, maybe with others'
}

@test "fewer ranks than tp and pp need: the command that starts them" {
    local good="$TRAIN --train-data text.txt $TINY --steps 1 --output-dir out"
    run -2 env -u SLURM_JOB_ID $good --tp 2 --pp 2
    has "and there is 1; start as many: mpirun -np 4 *$TRAIN …"
    [ "$(id -u)" != 0 ] || has ' --allow-run-as-root '
    run -2 env SLURM_JOB_ID=1 $good --tp 2
    has "start as many: srun -n 2 $TRAIN …"
    run -0 env SLURM_NTASKS=3 $good
    has "this job has 3 tasks (SLURM_NTASKS), and this is one process; to start them all: srun -n 3 "
    run -0 env SLURM_NTASKS=1 $good
    [[ $output != *SLURM_NTASKS* ]]
}

@test "ranks that never meet" {
    have_mpi
    local start=$SECONDS
    run timeout 40 mpirun "${mpi_flags[@]}" -np 1 "$TRAIN" --train-data text.txt $TINY --steps 1 --output-dir out --timeout 3 : -np 1 sleep 30
    [ "$status" != 0 ]
    has 'no progress for 3 s (--timeout)*this rank waits in the first exchange*Not all ranks have met*firewall'
    ((SECONDS - start < 20))
}

# ---- memory ----

BIG='--layers 6 --heads 4 --width 256 --seq-len 128 --vocab 256 --val-every 0'

# needs FLAGS…: bytes of a run of that model
needs() { "$TRAIN" --plan --json --gpu none $BIG "$@" | sed 's/"baseline".*//; s/.*"memory":{[^}]*"total":\([0-9]*\).*/\1/'; }

# within KIB FLAGS…: a run of it where the process may have no more
within() { bash -c 'ulimit -v "$0" && exec "$@"' "$1" "$TRAIN" --train-data text.txt $BIG --output-dir out "${@:2}"; }

@test "what does not fit is refused, with flags that would fit" {
    local flags gib need
    need=$(needs --micro-batch 64)
    run -2 within $((need * 9 / 10240)) --micro-batch 64 --steps 1
    has 'out of memory: this run needs *GiB are free on this device; what fits: --*GiB)'
    [ ! -e out ]
    flags=$(sed 's/.*what fits: //; s/ (.*//' <<< "$output")
    gib=${output##*(}
    [[ $flags == *--micro-batch* && $flags == *'--global-batch 8192'* && $flags != *--tp* ]]
    [ "$(awk "BEGIN { printf \"%.2f\", $(needs --micro-batch 64 $flags) / 2 ^ 30 }")" = "${gib% GiB)}" ]
    run -0 within $((need * 9 / 10240)) --micro-batch 64 $flags --steps 0
}

@test "the first flag that suffices is the only one" {
    local kib need
    need=$(needs --micro-batch 16)
    for ((kib = need / 1024 + 400000; kib > 50000; kib -= 5000)); do # down to where it no longer fits
        run within $kib --micro-batch 16 --steps 0
        rm -rf out
        [ "$status" = 0 ] || break
    done
    has 'what fits: --recompute 2 ('
}

@test "flags that would fit are those that are allowed together" {
    run -2 within 130000 --micro-batch 4 --fp8-scaling block --steps 0
    has 'out of memory: this run needs '
    [[ $output != *'with --tp'* ]]
}

@test "ranks that share a machine's memory: one line, and all of them end" {
    have_mpi
    run -2 bash -c "ulimit -v 600000 && exec mpirun ${mpi_flags[*]} -np 2 '$TRAIN' --train-data text.txt $BIG --micro-batch 64 --recipe bf16 --steps 1 --output-dir out"
    [ "$(grep -c '^train_gpt_fp8:' <<< "$output")" = 1 ]
    has 'for each of 2 processes on this device; what fits: --*GiB)'
    [ ! -e out ]
}

# ---- data and files ----

@test "data that is not there: what is like it, and how to make some" {
    mkdir -p data
    shard data/web_000.bin uint16 4000 0 99
    local path pattern bad=0
    while IFS='|' read -r path pattern; do
        run -2 "$TRAIN" --train-data "$path" $TINY --steps 1 --output-dir out
        has "$pattern" || bad=1
        has 'scripts/tokenize.py makes shards, make demo a text' || bad=1
    done <<'EOT'
data/web_00.bin|data/web_00.bin cannot be read: No such file or directory; of the 1 name in 'data' the nearest is 'web_000.bin'
data/wob*.bin|matches no file: of the 1 name in 'data' the nearest is 'web_000.bin'
date/*.bin|matches no file: there is no folder 'date', but this folder is there
EOT
    [ $bad = 0 ]
}

@test "a file or a folder that cannot be written any more" {
    local i
    run -1 bash -c "ulimit -f 8 && exec '$TRAIN' --train-data text.txt $TINY --steps 2 --checkpoint-every 1 --output-dir full"
    has 'could not be saved: File too large (ulimit -f limits the size of a file: raise it)'
    mkdir -p many
    for ((i = 0; i < 30; i++)); do shard many/$i.bin uint16 200 0 99; done
    run bash -c "ulimit -n 20 && exec '$TRAIN' --train-data 'many/*.bin' $TINY --vocab 100 --steps 1 --output-dir out"
    [ "$status" = 2 ]
    has 'Too many open files (ulimit -n limits how many files a process has open: raise it)'
}

# ---- what is not finite ----

# poison FROM TO TENSOR BITS FIRST COUNT: the model in folder FROM with COUNT elements of a tensor from FIRST on set to these 16 bits
poison() {
    rm -rf "$2"
    cp -r "$1" "$2"
    perl -e '
        my ($file, $tensor, $bits, $first, $count) = @ARGV;
        open(my $f, "+<:raw", $file) or die;
        read($f, my $length, 8);
        $length = unpack("Q<", $length);
        read($f, my $header, $length);
        $header =~ /"\Q$tensor\E":\{[^}]*"data_offsets":\[(\d+)/ or die "no $tensor";
        seek($f, 8 + $length + $1 + 2 * $first, 0);
        print $f pack("v", hex($bits)) x $count;
    ' "$2/model.safetensors" "${@:3}"
}

# blames PATTERN FLAGS…: a run of the model in `bad` says so in its output and its log, and fails where each step is skipped
blames() {
    rm -rf out
    run "${launch[@]}" "$TRAIN" --init bad --train-data tokens.bin --vocab 40 --seq-len 12 --micro-batch 4 --val-every 0 --recipe bf16 --output-dir out --steps 3 "${@:2}"
    has "step 1/3 | the first tensor that is not finite is $1; "
    grep -qF "{\"step\":1,\"not_finite\":\"$1\"}" out/log.jsonl || { cat out/log.jsonl; return 1; }
    [ "$(grep -c not_finite out/log.jsonl)" = 1 ] # of steps in a row the first is searched
    has "no longer trains*the first tensor that was not finite: $1, at step 1"
    [ "$status" = 1 ]
}

MODEL=$BATS_TEST_DIRNAME/golden/hf_gpt_neox
H1=gpt_neox.layers.1

@test "a loss that is not finite: the first tensor that is not" {
    launch=(env)
    poison "$MODEL" bad $H1.mlp.dense_h_to_4h.weight 7fc0 5 1
    blames 'the weight h1.fcw'
    has 'no later step mends a weight*is the model of --init whole?'
    poison "$MODEL" bad gpt_neox.layers.0.attention.dense.bias ff80 3 1
    blames 'the weight h0.attprojb'
    poison "$MODEL" bad $H1.mlp.dense_h_to_4h.weight 7e96 0 1024
    blames 'the output of fc of layer 1 (h1)'
    has 'the forward pass overflows: a lower --lr*there is no checkpoint to go back to'
    poison "$MODEL" bad gpt_neox.layers.0.attention.query_key_value.weight 7e96 0 768
    blames 'the output of qkv of layer 0 (h0)' --recompute 2
    poison "$MODEL" bad embed_out.weight 7e96 0 640
    blames 'the logits'
    local scaling
    for scaling in delayed current block; do
        poison "$MODEL" bad $H1.mlp.dense_h_to_4h.weight 7fc0 5 1
        blames 'the weight h1.fcw' --recipe fp8 --fp8-scaling $scaling
    done
}

@test "the same on several ranks" {
    have_mpi
    poison "$MODEL" bad $H1.mlp.dense_h_to_4h.weight 7e96 0 1024
    launch=(mpirun "${mpi_flags[@]}" -np 2)
    blames 'the output of fc of layer 1 (h1)' --pp 2
    blames 'the output of fc of layer 1 (h1)' --tp 2
    blames 'the output of fc of layer 1 (h1)'
    poison "$MODEL" bad $H1.mlp.dense_4h_to_h.weight 7fc0 1000 1
    blames 'the weight h1.fcprojw' --pp 2
    blames 'the weight h1.fcprojw' --tp 2
}

@test "one bad batch is found again, and the run goes on as if nobody had looked" {
    # token 39, whose embedding overflows in the LayerNorm, is once in the data: one step of the epoch meets it, in either of its micro-batches
    poison "$MODEL" bad gpt_neox.embed_in.weight 7f00 624 16
    local at step
    for at in 100 2000 3500; do
        perl -e 'open(my $f, "<:raw", "tokens.bin"); local $/; my $all = <$f>; substr($all, 1024 + 2 * $ARGV[0], 2) = pack("v", 39); print $all' $at > once.bin
        rm -rf out
        run -0 "$TRAIN" --init bad --train-data once.bin --vocab 40 --seq-len 12 --micro-batch 4 --global-batch 96 --val-every 0 --recipe bf16 --output-dir out --steps 41 --checkpoint-every 41
        has "the first tensor that is not finite is the first LayerNorm's output, X of qkv, of layer 0 (h0); the forward pass"
        step=$(sed -n 's/^{"step":\([0-9]*\),"not_finite".*/\1/p' out/log.jsonl)
        grep -q "^{\"step\":$step,\"loss\":null.*\"skipped\":\"non-finite loss\"" out/log.jsonl
        [ "$(grep -c '"skipped":"' out/log.jsonl)" = 1 ]
        grep -q '"samples": *328' out/step_00000041/loader.json || { cat out/step_00000041/loader.json; return 1; }
    done
}
