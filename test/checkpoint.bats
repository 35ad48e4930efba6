#!/usr/bin/env bats
# checkpoint.bats: does a run go on as if it had never stopped, whatever stopped it, and is nothing lost or done twice?
#
# SOAK=1: 200 kills instead of 10.
# shellcheck disable=SC2086,SC2154 # $TINY is a list of words; stderr is bats's

load common

setup_file() {
    use_binary
    text_file "$BATS_FILE_TMPDIR/text.txt" 4000
}

setup() {
    cd "$BATS_TEST_TMPDIR" || return
    data=$BATS_FILE_TMPDIR
}

teardown() { # what a test that failed has left running
    local job
    for job in $(jobs -p); do kill "$job" 2> /dev/null || true; done
}

# train DIR FLAGS…: stdout in DIR.out, stderr in DIR.err
train() {
    local dir=$1
    shift
    "$TRAIN" --train-data "$data/text.txt" $TINY --output-dir "$dir" "$@" > "$dir.out" 2> "$dir.err"
}

train_on() { # RANKS DIR FLAGS…: the same on ranks
    local ranks=$1 dir=$2
    shift 2
    mpi "$ranks" "$TRAIN" --train-data "$data/text.txt" $TINY --output-dir "$dir" "$@" > "$dir.out" 2> "$dir.err" < /dev/null
}

# same_end A B STEP: the checkpoints hold the same bytes, and the logs tell the same of the same steps, each once
same_end() {
    local file
    for file in "$1/$3"/rank_*; do cmp "$file" "$2/$3/${file##*/}"; done
    cmp "$1/$3/loader.json" "$2/$3/loader.json"
    same_column loss "$1" "$2" 0
    same_column grad_norm "$1" "$2" 0
    [ "$(steps_of "$1")" = "$(steps_of "$2")" ]
}
steps_of() { grep '"loss"' "$1/log.jsonl" | sed 's/.*"step":\([0-9]*\),.*/\1/' | tr '\n' ' '; }

# ---- as if it had never stopped ----

@test "each recipe goes on bit for bit, with flags and data from the checkpoint" {
    local recipe flags
    for recipe in fp8 fp8-lm bf16 fp32 block; do
        flags="--recipe $recipe"
        [ $recipe = block ] && flags="--fp8-scaling block"
        train $recipe.a $flags --steps 24 --checkpoint-every 9 --global-batch 256 --skip-grad-z 20
        cp -r $recipe.a $recipe.b
        rm -r $recipe.b/step_00000024
        "$TRAIN" --resume --output-dir $recipe.b > $recipe.out
        grep -q "goes on from $recipe.b/step_00000018, step 18, read in .*; bit for bit as if it had never stopped" $recipe.out
        same_end $recipe.a $recipe.b step_00000024
        [ "$(cat $recipe.b/latest)" = step_00000024 ]
        valid_json $recipe.b/log.jsonl
    done
}

@test "scaling goes on with another, from tensors to blocks and back" {
    train a --steps 18 --checkpoint-every 18 --fp8-bwd e4m3 # past the window of delayed scales; dY as narrow in all of them
    "$TRAIN" --resume --output-dir a --steps 20 --fp8-scaling block > a.out
    grep -q 'goes on from a/step_00000018, .*; not bit for bit, as this has changed: .*fp8-scaling delayed -> block' a.out
    run ! grep -aq '"h0.qkvw.weight"' a/step_00000020/rank_00000.safetensors # made from the master
    cp -r a d
    "$TRAIN" --resume --output-dir a --steps 22 --fp8-scaling delayed > b.out
    "$TRAIN" --resume --output-dir d --steps 22 --fp8-scaling current > d.out
    [ "$(column grad_norm a | sed -n 21p)" = "$(column grad_norm d | sed -n 21p)" ] # scales just in time, as none are remembered
    grep -q 'fp8-scaling block -> delayed' b.out
    [ "$(steps_of a)" = "$(seq -s ' ' 1 22) " ]
    holds 'b < a + 0.1' a="$(column loss a | sed -n 18p)" b="$(last loss a)"
    "$TRAIN" --init a/step_00000020 --train-data "$data/text.txt" $TINY --steps 1 --output-dir c > c.out # its weights alone
    holds 'b < a + 0.2' a="$(column loss a | sed -n 20p)" b="$(last loss c)"
}

@test "ranks go on bit for bit, and a checkpoint is readable by what others have" {
    have_mpi
    train_on 2 a --steps 12 --checkpoint-every 5 --zero 1 --recipe fp8-lm
    cp -r a b
    rm -r b/step_00000012
    mpi 2 "$TRAIN" --resume --output-dir b > b.out < /dev/null
    grep -q 'bit for bit as if it had never stopped' b.out
    same_end a b step_00000012
    [ "$(cd a/step_00000012 && echo *)" = "checksums.xxh128 config.json loader.json rank_00000.safetensors rank_00001.safetensors" ]
    if command -v xxh128sum > /dev/null; then (cd a/step_00000012 && xxh128sum --quiet -c checksums.xxh128); fi
    grep -q '"step":12' a/step_00000012/config.json
    # at other ranks the data goes on where it was, and it is said what is not the same
    "$TRAIN" --resume --output-dir a --steps 14 --micro-batch 8 > one.out
    grep -q 'step 12, read in .*; not bit for bit, as this has changed: micro-batch 4 -> 8, .*ranks 2 -> 1' one.out
    [ "$(steps_of a)" = "$(seq -s ' ' 1 14) " ]
    grep -q '"samples":112,' a/step_00000014/loader.json # 14 steps of 2 ranks of 4 sequences: none twice, none left out
}

@test "a checkpoint of ranks that share layers goes on on one" {
    have_mpi
    train_on 2 a --steps 2 --checkpoint-every 2 --tp 2
    run -2 "$TRAIN" --resume --output-dir a --steps 3
    [[ $output == *'--tp 2 × --pp 1 need a multiple of 2 ranks, and there is 1; start as many: mpirun -np 2 '*', or give other --tp and --pp than the checkpoint has' ]]
    "$TRAIN" --resume --output-dir a --steps 3 --tp 1 > a.out
    grep -q 'goes on from a/step_00000002, step 2, .* tp 2 -> 1, .*ranks 2 -> 1' a.out
}

@test "the headroom that --grad-scaling fixes is that of the ranks that go on" {
    have_mpi
    train_on 2 a --steps 2 --checkpoint-every 2 --recipe fp8-lm --grad-scaling pre --log-tensors --global-batch 512
    [ "$(grep '"step":2,' a/log.jsonl | grep -o '"mu":[0-9.]*' | sort -u)" = '"mu":0.5' ]
    mpi 4 "$TRAIN" --resume --output-dir a --steps 3 > a.out < /dev/null
    [ "$(grep '"step":3,' a/log.jsonl | grep -o '"mu":[0-9.]*' | sort -u)" = '"mu":0.25' ]
}

@test "four replicas' checkpoint is the same model on two, on one, and on ranks that share layers and stages" {
    have_mpi
    local recipe ranks flags n
    for recipe in fp8 fp8-lm bf16 fp32; do
        train_on 4 $recipe --recipe $recipe --layers 2 --heads 4 --width 256 --micro-batch 2 --steps 2 --checkpoint-every 2 --zero 1
        n=0
        while IFS='|' read -r ranks flags; do
            n=$((n + 1))
            cp -r $recipe $recipe.$n
            mpi "$ranks" "$TRAIN" --resume --output-dir $recipe.$n --micro-batch 2 $flags --export-hf $recipe.hf$n --export-dtype fp32 > out < /dev/null
            cmp $recipe.hf1/model.safetensors $recipe.hf$n/model.safetensors
            mpi "$ranks" "$TRAIN" --resume --output-dir $recipe.$n --micro-batch 2 $flags --steps 3 > out < /dev/null
            same_column loss $recipe.1 $recipe.$n "$([ $recipe = fp32 ] && echo 1e-5 || echo 4e-3)"
        done << END
4|
4|--tp 2 --pp 2
2|--zero 2
1|
END
    done
}

@test "keep N keeps the newest, and an earlier run's are not written over" {
    train a --steps 12 --checkpoint-every 2 --keep 2
    [ "$(echo a/step_*)" = "a/step_00000010 a/step_00000012" ]
    train b --steps 6 --checkpoint-every 2 --keep 0
    [ "$(echo b/step_*)" = "b/step_00000002 b/step_00000004 b/step_00000006" ]
    cp a/log.jsonl log.before
    run -2 train a --steps 3
    grep -q "^train_gpt_fp8: --output-dir: 'a' holds checkpoints of an earlier run, the newest of step 12; give --resume to go on from it, or another folder$" a.err
    cmp a/log.jsonl log.before
    # nothing is left to do: nothing is done
    train a --steps 12 --resume
    cmp <(grep '"loss"' a/log.jsonl) <(grep '"loss"' log.before)
    run -2 train a --steps 9 --resume
    grep -q "^train_gpt_fp8: --steps: 9 are fewer than the 12 that a/step_00000012 has behind it$" a.err
}

@test "without a checkpoint --resume begins, and says so" {
    train a --steps 2 --resume
    grep -q '^train_gpt_fp8: --resume: a holds no checkpoint, so the run starts from the beginning$' a.err
    [ "$(steps_of a)" = "1 2 " ]
    ln -s b b # a folder that cannot be read is none without checkpoints
    run -1 train b --steps 2 --resume
    grep -q "^train_gpt_fp8: --resume: 'b' cannot be searched for checkpoints: Too many levels of symbolic links$" b.err
}

@test "a damaged checkpoint is named and passed over" {
    local file
    train a --steps 9 --checkpoint-every 3
    printf 'x' | dd of=a/step_00000009/rank_00000.safetensors bs=1 seek=5000 conv=notrunc status=none
    rm a/step_00000006/loader.json
    cp -r a b
    "$TRAIN" --resume --output-dir a > a.out 2> a.err
    grep -q '^train_gpt_fp8: --resume: a/step_00000009 is passed over: rank_00000.safetensors is damaged: its checksum is [0-9a-f]*, and was [0-9a-f]*$' a.err
    grep -q '^train_gpt_fp8: --resume: a/step_00000006 is passed over: loader.json: No such file or directory$' a.err
    grep -q 'goes on from a/step_00000003' a.out
    [ "$(steps_of a)" = "$(seq -s ' ' 1 9) " ]
    truncate -s 100 b/step_00000003/config.json
    "$TRAIN" --resume --output-dir b --train-data "$data/text.txt" $TINY --steps 3 > b.out 2> b.err
    grep -q '^train_gpt_fp8: --resume: b holds no whole checkpoint, so the run starts from the beginning$' b.err
}

@test "another model, recipe or data is refused with the difference" {
    local flags message before
    train a --steps 4 --checkpoint-every 2 --val-split 0.1
    text_file other.txt 3000
    tr a-y b-z < "$data/text.txt" > as_long.txt
    before=$(md5sum < a/log.jsonl)
    while IFS='|' read -r flags message; do
        run -2 train a --resume --val-split 0.1 --steps 4 $flags
        grep -q -e "$message" a.err || { cat a.err; return 1; }
    done << END
--width 128|another run (there -> here): width 64 -> 128;
--recipe bf16|another run (there -> here): recipe fp8 -> bf16, master-dtype fp16 -> fp32
--seed 2|another run (there -> here): seed 1337 -> 2;
--seq-len 16 --micro-batch 8|another run (there -> here): seq-len 32 -> 16;
--train-data other.txt|source 1 of 'other.txt' has [0-9]* windows, in the checkpoint [0-9]*; allowed: the same data and --seq-len
--train-data as_long.txt|'as_long.txt' is as long as the data of a/step_00000004, and holds other tokens (fingerprint [0-9a-f]* -> [0-9a-f]*)
--steps 3|--steps: 3 are fewer than the 4 that a/step_00000004 has behind it
--v-dtype fp16|another run (there -> here): v-dtype ue5m3 -> fp16;
END
    run -2 "$TRAIN" --resume --output-dir a --init gpt2:d6
    [[ $output == *'another run (there -> here): layers 2 -> 6, heads 2 -> 6, width 64 -> 384, position rope -> learned'* ]]
    [ "$before" = "$(md5sum < a/log.jsonl)" ]
    run -2 "$TRAIN" --plan --resume
    [[ $output == *'--resume goes on with a run, and --plan runs nothing; leave one of them out' ]]
}

@test "a new run can begin with a checkpoint's weights, under another recipe too" {
    train a --recipe fp32 --steps 6 --checkpoint-every 3 --val-split 0.1 --val-every 3
    train b --recipe fp32 --init a/step_00000006 --steps 0 --val-split 0.1 --val-every 3
    [ "$(last val_loss a)" = "$(last val_loss b)" ]
    train c --recipe fp8 --init a/step_00000006 --steps 2 --val-split 0.1 --val-every 3 --checkpoint-every 2
    holds 'a - b < 0.02 && b - a < 0.02' a="$(last val_loss a)" b="$(first val_loss c)"
    train d --recipe bf16 --init c/step_00000002 --steps 0 --val-split 0.1 --val-every 3 # FP16 and exponents by block
    holds 'a - b < 0.02 && b - a < 0.02' a="$(last val_loss c)" b="$(last val_loss d)"
    run -2 train e --init a/step_00000006 --width 128 --steps 0
    grep -q "^train_gpt_fp8: --width: 128 was asked for, and 'a/step_00000006' has 64; leave the flag out$" e.err
    printf 'x' | dd of=a/step_00000006/rank_00000.safetensors bs=1 seek=5000 conv=notrunc status=none
    run -2 train e --init a/step_00000006 --steps 0
    grep -q "^train_gpt_fp8: --init: 'a/step_00000006' is no whole checkpoint: rank_00000.safetensors is damaged: " e.err
}

@test "what changes nothing is not told as a change, and what the steps come to is" {
    train a --steps 4 --checkpoint-every 2
    "$TRAIN" --resume --output-dir a --export-hf model --keep 3 > a.out
    grep -q 'step 4, read in .*; bit for bit as if it had never stopped$' a.out
    "$TRAIN" --resume --output-dir a --steps 20 > a.out
    grep -q 'step 4, read in .*; not bit for bit, as this has changed: steps of the learning rate 4 -> 20, steps of warm-up 0 -> 2$' a.out
    train b --steps 4 --checkpoint-every 2 --lr-schedule constant --warmup 1
    "$TRAIN" --resume --output-dir b --steps 20 > b.out
    grep -q 'step 4, read in .*; bit for bit as if it had never stopped$' b.out
}

# ---- what stops a run ----

# wait_for PATTERN FILE: up to 20 s
wait_for() {
    local i
    for ((i = 0; i < 400; i++)); do
        if grep -q "$1" "$2" 2> /dev/null; then return 0; fi
        sleep 0.05
    done
    echo "no '$1' in $2:"
    tail "$2"
    return 1
}

@test "signals save and end with the command that goes on" {
    local signal
    train whole --steps 400 --checkpoint-every 400
    for signal in TERM USR1 INT; do
        "$TRAIN" --train-data "$data/text.txt" $TINY --output-dir $signal --steps 400 --checkpoint-every 400 > $signal.out 2> $signal.err &
        wait_for '^step *5/' $signal.out
        kill -$signal $!
        wait $! # exit code 0
        grep -q " | a signal asks for the end: the run ends here. To go on: $TRAIN --train-data .* --resume$" $signal.out
        eval "$(sed -n 's/.*To go on: //p' $signal.out)" > $signal.again
        grep -q 'bit for bit as if it had never stopped' $signal.again
        same_end whole $signal step_00000400
    done
    train late --steps 1000000 --max-minutes 0.01
    grep -q ' | --max-minutes are over: the run ends here. To go on: ' late.out
    [ -s late/latest ]
}

@test "mpirun passes SIGUSR1 on, and all ranks save the same step" {
    have_mpi
    mpirun "${mpi_flags[@]}" -np 2 "$TRAIN" --train-data "$data/text.txt" $TINY --output-dir a --steps 100000 > a.out 2> a.err < /dev/null &
    wait_for '^step *5/' a.out
    kill -USR1 $!
    wait $!
    grep -q ' | a signal asks for the end: the run ends here. To go on: mpirun -np 2 ' a.out
    [ "$(cd a/step_* && echo rank_*)" = "rank_00000.safetensors rank_00001.safetensors" ]
}

@test "a run that is killed at any moment, and restarted, ends as one that was not" {
    local kills=10 i=0 late=0 killed
    if [ -n "${SOAK:-}" ]; then kills=200; fi
    steps=$((kills * 30))
    train whole --micro-batch 32 --steps $steps --checkpoint-every 3 --keep 2
    while ((i < kills)); do
        "$TRAIN" --train-data "$data/text.txt" $TINY --output-dir a --micro-batch 32 --steps $steps --checkpoint-every 3 --keep 2 --resume > a.out 2> a.err &
        killed=$!
        sleep 0.$((RANDOM % 60 + 30))
        kill -9 $killed 2> /dev/null || true
        if wait $killed 2> /dev/null; then break; fi
        i=$((i + 1))
        if grep -q 'goes on from' a.out; then late=$((late + 1)); fi
        lacks 'passed over' a.err
    done
    echo "# $i kills, $late of them of runs that had gone on from a checkpoint, at last step $(tail -n 1 a/latest)" >&3
    holds 'late >= kills / 4' late=$late kills=$kills
    "$TRAIN" --resume --output-dir a > a.out 2> a.err
    [ ! -s a.err ]
    same_end whole a step_"$(printf %08d $steps)"
    [ "$(echo a/*.tmp a/*.old)" = 'a/*.tmp a/*.old' ]
}

@test "a full disk or one that cannot be written to does not stop training, and the last checkpoint stays" {
    (
        ulimit -f 200 # KiB a file: the log has room, a checkpoint has not
        "$TRAIN" --train-data "$data/text.txt" $TINY --output-dir a --steps 6 --checkpoint-every 2 > a.out 2> a.err || echo "code $?" >> a.err
    )
    # (said at the next look, which may be at the end)
    [ "$(grep -c '^train_gpt_fp8: the checkpoint of step [24] could not be saved: File too large (ulimit -f limits the size of a file: raise it); \(training goes on, and \)\?there is none yet$' a.err)" = 2 ]
    grep -q "^train_gpt_fp8: the checkpoint of step 6 could not be saved: File too large (ulimit -f limits the size of a file: raise it); there is none yet$" a.err
    grep -q '^code 1$' a.err # the last save failed
    [ "$(steps_of a)" = "1 2 3 4 5 6 " ]
    [ "$(echo a/*)" = a/log.jsonl ]
    if ! mkdir full || ! mount -t tmpfs -o size=1800k tmpfs full 2> /dev/null; then skip "no tmpfs can be mounted here"; fi
    train full/run --steps 9 --checkpoint-every 3 --keep 0 || echo "code $?" >> full/run.err
    cp full/run.err . && cp -r full/run run && umount full
    grep -q '^train_gpt_fp8: the checkpoint of step 9 could not be saved: No space left on device (df -h shows what is full: make room, or give a folder on another disk); step_00000006 is the newest good one$' run.err
    "$TRAIN" --resume --output-dir run --steps 9 > again.out
    grep -q 'goes on from run/step_00000006' again.out
}

@test "a rank that is killed or stopped ends all, and is named" {
    have_mpi
    local how pid start i
    for how in KILL STOP; do
        mpirun "${mpi_flags[@]}" -np 2 "$TRAIN" --train-data "$data/text.txt" $TINY --output-dir $how --steps 1000000 --timeout 3 > $how.out 2> $how.err < /dev/null &
        wait_for '^step *5/' $how.out
        pid=$(processes "--output-dir $how " | while read -r p; do tr '\0' '\n' < /proc/$p/environ | grep -q '^OMPI_COMM_WORLD_RANK=1$' && echo $p; done | head -n 1)
        start=$SECONDS
        kill -$how "$pid"
        if wait $!; then return 1; fi
        if [ $how = STOP ]; then
            grep -q "^train_gpt_fp8: rank 0: rank 1 (process $pid on .*) has given no sign of life for [0-9]* s, in step [0-9]*: it was stopped, or its machine is gone." $how.err
        else
            grep -qi "rank 1 .*signal 9\|signal 9.*rank 1" <(tr '\n' ' ' < $how.err)
        fi
        [ $((SECONDS - start)) -le 30 ]
        for ((i = 0; i < 100; i++)); do # the launcher may end before what it has killed
            processes "--output-dir $how " > left
            [ -s left ] || break
            sleep 0.1
        done
        [ ! -s left ]
    done
}

@test "too many skipped steps in a row end the run, and it says where to go on" {
    train a --steps 40 --checkpoint-every 4 --lr 1e-3
    run -1 train a --resume --steps 200 --lr 1000 --warmup 0 --clip 0 --max-skipped 6 --lr-schedule constant --beta2 0
    grep -q '^train_gpt_fp8: the last 6 steps, up to step [0-9]*, were skipped (--max-skipped); --resume goes on from step [0-9]*;' a.err || { cat a.err; tail -5 a.out; false; }
}

@test "restart.sh goes on after crashes, gives up where nothing helps, and passes signals on" {
    local restart=$BATS_TEST_DIRNAME/../scripts/restart.sh i
    train whole --steps 300 --checkpoint-every 10
    PAUSE=0 "$restart" "$TRAIN" --train-data "$data/text.txt" $TINY --output-dir a --steps 300 --checkpoint-every 10 > a.out 2> a.err &
    for i in 1 2; do
        wait_for "^step *${i}[0-4][0-9]/" a.out
        kill -9 "$(processes '--output-dir a --steps 300')"
        sleep 0.3
    done
    wait $!
    grep -q '^restart.sh: exit code 137; goes on from step_[0-9]* in 0 s$' a.err
    same_end whole a step_00000300
    run -3 env PAUSE=0 TRIES=2 "$restart" bash -c 'exit 3'
    [[ $output == *'restart.sh: exit code 3, 2 times in a row without a new checkpoint in log: given up'* ]]
    run -2 "$restart" "$TRAIN" --train-data nothing.txt --output-dir b # refused: no crash
    "$restart" "$TRAIN" --train-data "$data/text.txt" $TINY --output-dir c --steps 1000000 > c.out 2> c.err &
    wait_for '^step *5/' c.out
    kill -TERM $!
    wait $!
    grep -q 'a signal asks for the end' c.out
    # a signal between two tries ends the loop
    PAUSE=100 "$restart" bash -c 'exit 3' 2> d.err &
    wait_for 'goes on from' d.err
    kill -TERM $!
    i=0
    wait $! || i=$?
    [ $i = 3 ]
}

# ---- without room ----

@test "a save without room for a copy writes the same" {
    train a --steps 6 --checkpoint-every 2 --checkpoint-memory 0
    train b --steps 6 --checkpoint-every 2
    same_end a b step_00000006
}
