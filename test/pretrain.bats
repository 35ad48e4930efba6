#!/usr/bin/env bats
# pretrain.bats: scripts/pretrain_*.sh: the paper's configurations are planned, run small, refused where they cannot run, and launched as they print.
# shellcheck disable=SC2016,SC2030,SC2031,SC2154 # some $ are sed's and other programs'; output, status and stderr are bats's

load common

models='125m 7b 13b 175b'

setup_file() {
    use_binary
    text_file "$BATS_FILE_TMPDIR/text.txt" 400
    printf '# 4 nodes\nnode1 slots=8\nnode2 slots=8\nnode3 slots = 8\n\nnode4 slots=8 max_slots=8\n' > "$BATS_FILE_TMPDIR/hosts"
    # Launchers that only say how they were called; this machine's GPUs are not asked
    mkdir "$BATS_FILE_TMPDIR/bin"
    printf '#!/bin/sh\n{ echo env; env | grep ^NCCL_ | sort; printf "%%s\n" "OMP_NUM_THREADS=$OMP_NUM_THREADS" "${0##*/}" "$@"; } > "$CALLED"\n' > "$BATS_FILE_TMPDIR/bin/mpirun"
    cp "$BATS_FILE_TMPDIR/bin/mpirun" "$BATS_FILE_TMPDIR/bin/srun"
    printf '#!/bin/sh\nexit 9\n' > "$BATS_FILE_TMPDIR/bin/nvidia-smi"
    chmod +x "$BATS_FILE_TMPDIR/bin/"*
}

setup() {
    cd "$BATS_TEST_DIRNAME/.." || return
    local variable
    for variable in DRY_RUN TOY DATA VAL_DATA OUT RECIPE GPU GPUS HOSTFILE PRICE RESTART MPIRUN "${!SLURM_@}" "${!NCCL_@}" OMP_NUM_THREADS LD_LIBRARY_PATH; do
        unset "$variable"
    done
    real_path=$PATH
    PATH=$BATS_FILE_TMPDIR/bin:$PATH
    CALLED=$BATS_TEST_TMPDIR/called
    export CALLED
}

# planned MODEL [NAME=VALUE…] [FLAG…]: a dry run; its command goes to $command
planned() {
    local model=$1 before=(DRY_RUN=1)
    shift
    while [[ ${1:-} == [A-Z]*=* ]]; do
        before+=("$1")
        shift
    done
    run -0 --separate-stderr env "${before[@]}" "scripts/pretrain_$model.sh" "$@"
    [ -z "$stderr" ]
    command=$(sed -n 's/^command: //p' <<< "$output")
    [ -n "$command" ]
}

# refused STATUS-2-MESSAGE NAME=VALUE… SCRIPT FLAG…
refused() {
    local message=$1
    shift
    run --separate-stderr -2 env "$@"
    [[ $stderr == *"$message"* ]] || {
        echo "not said: $message; but: $stderr"
        return 1
    }
    [ ! -e "$CALLED" ]
}

@test "dry runs plan the paper's table 1" {
    while read -r model ranks parameters layout shape; do
        planned "$model"
        grep -qE "^plan of .* $parameters parameters, on $ranks × H100: $layout; " <<< "$output"
        grep -qE "^planned, not measured; .*: $ranks × H100, [0-9.]+ of 78.6 GiB, [0-9]+k tok/s, .* GPU hours, " <<< "$output"
        [[ $command == *" -np $ranks "*" --recipe fp8 "*" --checkpoint-every 500 --resume "*"${shape//_/ } "* ]]
        for flag in '--seq-len 2048' '--position rope' '--warmup 1000' '--lr-schedule cosine' '--min-lr-frac 0.1' '--weight-decay 0.1' '--beta1 0.9' '--beta2 0.95'; do
            [[ $command == *" $flag "* ]]
        done
        # a recipe has a folder of its own
        for recipe in fp8-lm bf16; do
            planned "$model" RECIPE=$recipe
            [[ $command == *" --recipe $recipe --output-dir runs/$model-$recipe "* ]]
        done
    done <<'EOT'
125m 8 124M dp.8,.pp.1,.tp.1 --layers_12_--heads_12_--width_768
7b 32 6.65G dp.32,.pp.1,.tp.1 --layers_32_--heads_32_--width_4096
13b 32 12.8G dp.16,.pp.1,.tp.2 --layers_40_--heads_40_--width_5120
175b 128 175G dp.4,.pp.4,.tp.8 --layers_96_--heads_96_--width_12288
EOT
    # tokens in all: the batch times the steps
    for model in $models; do
        planned "$model"
        tokens=100
        [ "$model" != 175b ] || tokens=40
        grep -q " ${tokens}G tokens in " <<< "$output"
    done
}

@test "the files say what the plans say" {
    for model in $models; do
        for recipe in fp8 fp8-lm bf16; do
            planned "$model" RECIPE=$recipe GPU=h100
            read -r memory hours dollars < <(sed -nE 's/^planned.* ([0-9.]+) of .* ([0-9]+) GPU hours, \$([0-9]+) .*/\1 \2 \3/p' <<< "$output")
            sed -nE "s/^#   RECIPE=$recipe //p" "scripts/pretrain_$model.sh" | tr -d , > "$BATS_TEST_TMPDIR/said"
            cat "$BATS_TEST_TMPDIR/said"
            awk -v memory="$memory" -v hours="$hours" -v dollars="$dollars" '
                function near(a, b) { return a > 0.99 * b - 0.06 && a < 1.01 * b + 0.06 }
                { match($0, /\$[0-9]+/); ok = near($1, memory) && near(substr($0, RSTART + 1), dollars); match($0, /[0-9]+ GPU/); ok = ok && near(substr($0, RSTART) + 0, hours) }
                END { exit !(NR == 1 && ok) }' "$BATS_TEST_TMPDIR/said" || {
                echo "$model $recipe: planned $memory GiB, $hours hours, $dollars dollars"
                return 1
            }
        done
    done
}

@test "flags after the name win, and the plan is of them" {
    planned 7b GPU=h200 --tp 4 --micro-batch 16 --vocab 100352
    grep -q 'vocabulary 100352, .* on 32 × H200: dp 8, pp 1, tp 4; in a step 16 micro-batches of 16 ' <<< "$output"
    [[ $command == *' --tp 4 --micro-batch 16 --vocab 100352' ]]
    planned 175b GPUS=64
    grep -q ' on 64 × H100: dp 2, pp 4, tp 8; ' <<< "$output"
    planned 7b RESTART=1 PRICE=1 VAL_DATA='val/a b*.bin' OUT=/tmp/a DATA=c.bin
    [[ $command == "scripts/restart.sh env "*" --train-data c.bin --val-data 'val/a b*.bin' "*" --output-dir /tmp/a "* ]]
    grep -q '\$.* at \$1.00 each' <<< "$output"
}

# same_call NAME=VALUE… SCRIPT FLAG…: what a dry run prints is what the launcher gets
same_call() {
    run -0 --separate-stderr env DRY_RUN=1 "$@"
    [ ! -e "$CALLED" ]
    eval "words=($(sed -n 's/^command: //p' <<< "$output"))"
    printf '%s\n' "${words[@]}" > "$BATS_TEST_TMPDIR/printed"
    env "$@"
    diff "$BATS_TEST_TMPDIR/printed" "$CALLED"
    rm "$CALLED"
}

@test "mpirun and srun get the command that a dry run prints" {
    local data="DATA=$BATS_FILE_TMPDIR/t*xt.txt"
    same_call HOSTFILE="$BATS_FILE_TMPDIR/hosts" "$data" NCCL_IB_HCA=mlx5 GPU=h100 scripts/pretrain_13b.sh --seed 2
    grep -qx -e -np "$BATS_TEST_TMPDIR/printed"
    [ "$(grep -A 1 -x -e '-x' "$BATS_TEST_TMPDIR/printed" | grep -c -e NCCL_DEBUG -e NCCL_IB_HCA -e OMP_NUM_THREADS)" = 3 ]
    [ "$(tail -n 2 "$BATS_TEST_TMPDIR/printed" | paste -sd ' ')" = '--seed 2' ]
    same_call HOSTFILE="$BATS_FILE_TMPDIR/hosts" GPUS=16 "$data" GPU=h100 scripts/pretrain_7b.sh --prompt 'it'\''s; $HOME "$(x)" *'

    # this machine's GPUs: all of them, and what they are
    mkdir "$BATS_TEST_TMPDIR/bin"
    printf '#!/bin/sh\nfor i in 0 1 2 3 4 5 6 7; do [ "$1" = -L ] && echo "GPU $i: NVIDIA H200 (UUID: x)" || echo "NVIDIA H200"; done\n' > "$BATS_TEST_TMPDIR/bin/nvidia-smi"
    chmod +x "$BATS_TEST_TMPDIR/bin/nvidia-smi"
    PATH=$BATS_TEST_TMPDIR/bin:$PATH same_call GPUS=8 "$data" scripts/pretrain_13b.sh
    PATH=$BATS_TEST_TMPDIR/bin:$PATH run -0 env DRY_RUN=1 GPUS=8 scripts/pretrain_13b.sh
    [[ $output == *'on 8 × H200: dp 4, pp 1, tp 2;'* ]]
    PATH=$BATS_TEST_TMPDIR/bin:$PATH env "$data" scripts/pretrain_7b.sh
    grep -A 1 -x -e -np "$CALLED" | grep -qx 8
    rm "$CALLED"

    # Slurm runs a copy of the file elsewhere
    cp scripts/pretrain_175b.sh "$BATS_TEST_TMPDIR/slurm_script"
    cd /
    same_call SLURM_JOB_ID=7 SLURM_NTASKS=128 SLURM_CPUS_PER_TASK=12 SLURM_SUBMIT_DIR="$(realpath "$BATS_TEST_DIRNAME/..")" GPU=h100 "$data" "$BATS_TEST_TMPDIR/slurm_script"
    [ "$(sed -n '3,5p' "$BATS_TEST_TMPDIR/printed" | paste -sd ' ')" = 'OMP_NUM_THREADS=12 srun --ntasks=128' ]
    grep -qx -e --cpus-per-task=12 "$BATS_TEST_TMPDIR/printed"
}

@test "Slurm is asked for the paper's GPUs, to signal in time, and to put jobs back" {
    for model in $models; do
        asked=$(sed -n 's/^#SBATCH //p' "scripts/pretrain_$model.sh" | paste -sd ' ')
        nodes=$(sed -E 's/.*--nodes=([0-9]+).*/\1/' <<< "$asked")
        planned "$model"
        [[ $command == *" -np $((8 * nodes)) "* ]]
        [[ $asked == *"--ntasks-per-node=8 "*"--signal=USR1@120 --requeue "* ]]
        # options must come before the first command
        [ "$(grep -nvE '^(#|$)' "scripts/pretrain_$model.sh" | head -n 1 | cut -d : -f 1)" -gt "$(grep -n '^#SBATCH' "scripts/pretrain_$model.sh" | tail -n 1 | cut -d : -f 1)" ]
    done
}

@test "a plan that does not fit is refused, with what would fit" {
    refused 'does not fit: the fullest of 32 ranks would take 387.4 GiB' DRY_RUN=1 scripts/pretrain_7b.sh --micro-batch 64
    fits=$(sed -nE 's/^  --micro-batch ([0-9]+) .*/\1/p' <<< "$stderr")
    planned 7b --micro-batch "$fits"
    run ! grep -q '^command' <<< "$stderr"
    # that of the paper's BF16; every way that is named does fit
    refused 'does not fit' DRY_RUN=1 RECIPE=bf16 scripts/pretrain_175b.sh --micro-batch 8
    grep -qE '^  --recipe fp8 ' <<< "$stderr"
    ways=$(sed -nE 's/^  ((-|GPU)[^.]*[^ ]) +[0-9]+[.][0-9] GiB of .*/\1/p' <<< "$stderr")
    [ "$(wc -l <<< "$ways")" -ge 3 ]
    while read -r way; do
        case $way in
            GPU=*) planned 175b RECIPE=bf16 "$way" --micro-batch 8 ;;
            *)
                # shellcheck disable=SC2086 # words of a flag
                planned 175b RECIPE=bf16 --micro-batch 8 $way
                ;;
        esac
    done <<< "$ways"
    # a run is refused too, and nothing launched
    refused 'does not fit' HOSTFILE="$BATS_FILE_TMPDIR/hosts" DATA="$BATS_FILE_TMPDIR/text.txt" GPU=h100 scripts/pretrain_7b.sh --micro-batch 64
    # where no flag alone is enough
    refused '  GPUS=32 --tp 8 --pp 4 ' DRY_RUN=1 GPUS=1 scripts/pretrain_175b.sh --tp 1 --pp 1
    planned 175b GPUS=32 --tp 8 --pp 4
}

@test "what cannot be run is refused before anything is launched" {
    data="DATA=$BATS_FILE_TMPDIR/text.txt" hosts="HOSTFILE=$BATS_FILE_TMPDIR/hosts"
    refused "DATA: no file is called 'nothing/*.bin'" "$hosts" DATA='nothing/*.bin' scripts/pretrain_7b.sh
    refused "DATA: no file is called 'data/*.bin'" GPU=none scripts/pretrain_125m.sh
    refused 'GPUS: 8 are too few: tp 8 × pp 4 needs 32' DRY_RUN=1 GPUS=8 scripts/pretrain_175b.sh
    refused 'GPUS: 36 are no multiple of tp 8 × pp 4 = 32; 32 or 64 would be' DRY_RUN=1 GPUS=36 scripts/pretrain_175b.sh
    refused 'GPUS: 33 are no multiple of tp 2 × pp 1 = 2' DRY_RUN=1 GPUS=33 scripts/pretrain_13b.sh
    refused 'GPUS: 31 are no multiple' SLURM_JOB_ID=1 SLURM_NTASKS=31 "$data" scripts/pretrain_13b.sh
    refused 'GPUS: 64 are more than the 32 slots of' "$hosts" GPUS=64 "$data" scripts/pretrain_7b.sh
    refused 'GPUS: 8 are more than the 0 of this machine' GPUS=8 "$data" scripts/pretrain_7b.sh
    refused 'this machine has no GPU' "$data" scripts/pretrain_125m.sh
    refused "GPUS: 'many' is not a whole number" DRY_RUN=1 GPUS=many scripts/pretrain_7b.sh
    refused "cannot read '/nowhere'" HOSTFILE=/nowhere "$data" scripts/pretrain_7b.sh
    refused 'names no node' HOSTFILE=/dev/null "$data" scripts/pretrain_7b.sh
    refused 'there is no /nowhere' TRAIN=/nowhere DRY_RUN=1 scripts/pretrain_7b.sh
    refused 'no multiple of micro-batch 4' DRY_RUN=1 GPUS=24 scripts/pretrain_7b.sh
    refused "--recipe: 'fp4'" DRY_RUN=1 RECIPE=fp4 scripts/pretrain_7b.sh
    refused "--gpu: 'v100'" DRY_RUN=1 GPU=v100 scripts/pretrain_7b.sh
    refused '--layres' DRY_RUN=1 scripts/pretrain_7b.sh --layres 2
    refused "PRICE: 'cheap'" DRY_RUN=1 PRICE=cheap scripts/pretrain_7b.sh
}

@test "each runs as a toy in its own layout, learns, and is saved" {
    have_mpi
    PATH=$real_path
    while read -r model tp pp ranks; do
        out=$BATS_TEST_TMPDIR/$model
        run -0 env TOY=1 OUT="$out" "scripts/pretrain_$model.sh"
        echo "${lines[-1]}"
        [[ ${lines[-1]} == "toy of $model: tp $tp × pp $pp × dp $((ranks / tp / pp)), $ranks ranks, 20 steps in "* ]]
        holds 'b < 0.8 * a' a="$(first loss "$out")" b="$(last loss "$out")"
        [ "$(cat "$out/latest")" = step_00000020 ]
        rm -r "$out"
    done <<'EOT'
125m 1 1 2
7b 1 1 2
13b 2 1 4
175b 8 4 32
EOT
}

@test "a toy's dry run prints its command, and a toy may be run again or gone on with" {
    have_mpi
    PATH=$real_path
    out=$BATS_TEST_TMPDIR/toy
    planned 7b TOY=1 OUT="$out" --recipe fp8-lm
    run -0 env TOY=1 OUT="$out" scripts/pretrain_7b.sh --recipe fp8-lm
    grep -qxF "command: $command" <<< "$output"
    run -0 env TOY=1 OUT="$out" scripts/pretrain_7b.sh --steps 10
    [[ ${lines[-1]} == *', 10 steps in '* ]]
    run -0 env TOY=1 OUT="$out" scripts/pretrain_7b.sh --steps 14 --resume
    [ "$(last step "$out")" = 14 ]
    [ "$(column loss "$out" | wc -l)" = 14 ]
}

@test "the same command starts a run and goes on with it" {
    PATH=$real_path
    out=$BATS_TEST_TMPDIR/run
    run=(env GPU=none OMP_NUM_THREADS=1 DATA="$BATS_FILE_TMPDIR/text.txt" OUT="$out" scripts/pretrain_125m.sh --layers 2 --heads 2 --width 64 --seq-len 32 --micro-batch 2
        --global-batch 128 --vocab 256 --warmup 2 --val-every 0)
    run -0 "${run[@]}" --steps 6
    [ "$(last step "$out")" = 6 ]
    run -0 "${run[@]}" --steps 9
    [ "$(last step "$out")" = 9 ]
    [ "$(column loss "$out" | wc -l)" = 9 ]
}
