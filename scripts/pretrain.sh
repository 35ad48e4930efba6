# pretrain.sh: what scripts/pretrain_{125m,7b,13b,175b}.sh share: they source it and call `pretrain FLAG… -- FLAG…`: the paper's flags, then the user's,
# which win. Paths count from the project's folder.
#
# What runs is one command, the same flags on every rank, one rank a GPU; in the order of what is there:
#   a Slurm job               srun, on what sbatch was given. A job saves and ends two minutes before its time is over, and when it is preempted; put back into
#                             the queue (by Slurm, or as the next of --array 1-20%1) it goes on. Where pmix is not srun's default (`srun --mpi=list`), Open MPI
#                             needs SLURM_MPI_TYPE=pmix
#   HOSTFILE=hosts            mpirun, on the lines "NODE slots=8" of that file. The folder must be there on all nodes, and the environment below
#   neither                   mpirun on this machine's GPUs; one GPU needs no mpirun
# A checkpoint is written every 500 steps, and a run always goes on from the newest: the same command starts it and continues it. RESTART=1 does so by itself
# after a crash (scripts/restart.sh; not under Slurm, which has --requeue).
#
#   DRY_RUN=1                 print the plan, what it would cost, and the very command; run nothing. Exit code 2 where it does not fit, with what would
#   TOY=1                     a small model for 20 steps on this machine's cores, in the same layout, tp × pp, with one or two replicas; needs no data and no GPU
#   DATA='data/*.bin'         token shards, as --train-data takes them. uint16 is read as GPT-2's tokens (--vocab 50257). Of another tokenizer: give its size,
#                             as --vocab 100352 after the script's name (above 65,536 shards are uint32; scripts/tokenize.py writes either)
#   VAL_DATA=…                shards for validation
#   OUT=runs/7b-fp8           where log and checkpoints go; all nodes must see it
#   RECIPE=fp8                or fp8-lm (the paper's formats and sums) or bf16, to compare; bf16 takes the micro-batch that the paper gave it
#   GPUS=32                   ranks; default: the job's, the hostfile's, this machine's; of a dry run the paper's
#   GPU=h100                  what the plan is for: h100, h200, b200, a100, l40s; none: train on CPUs. Default: the GPU that is here, else h100
#   PRICE=2.50                dollars a GPU and hour
#   TRAIN, MPIRUN             the trainer (./train_gpt_fp8) and Open MPI's mpirun, where others are meant
#
# Environment, set here unless it is set already. To other nodes mpirun hands on these two, every NCCL_* and LD_LIBRARY_PATH, srun everything:
#   NCCL_DEBUG=WARN           NCCL says what is wrong with the network; INFO: which way it takes, to be looked at once on a new cluster
#   OMP_NUM_THREADS=8         threads of a rank on the host, for reading data and writing checkpoints
# Set these where NCCL chooses badly or does not start; they are the cluster's matter, so nothing is set here:
#   NCCL_SOCKET_IFNAME        the interface over which ranks find each other, such as eth0, or ^docker0,lo for any but these
#   NCCL_IB_HCA               the InfiniBand or RoCE adapters for the data, such as mlx5; without them it goes over sockets, which is much slower
#   NCCL_IB_GID_INDEX         for RoCE: the row of `show_gids` that is RoCE v2
# shellcheck shell=bash disable=SC2154 # name and paper_gpus are the caller's
set -euo pipefail
export LC_ALL=C
RECIPE=${RECIPE:-fp8}

fail() {
    echo "pretrain_$name.sh: $*" >&2
    exit 2
}

# setting LONG SHORT: the value that the flags give last, as the trainer reads them
setting() {
    local word before='' value=''
    for word in "${flags[@]}"; do
        case $before in "$1" | "$2") value=$word ;; esac
        case $word in "$1="*) value=${word#*=} ;; esac
        before=$word
    done
    printf '%s\n' "$value"
}

# whole NAME VALUE: is it a number of ranks or tokens?
whole() { [[ $2 =~ ^[1-9][0-9]{0,11}$ ]] || fail "$1: '$2' is not a whole number above 0"; }

# figures FLAG…: of the plan of these flags more: "bytes bytes-of-the-GPU largest-micro-batch seconds"
figures() {
    "$TRAIN" --plan --json --gpu "$gpu" --world "$ranks" "${flags[@]}" --no-resume "$@" < /dev/null | awk '
        function number(key) { return match(text, "\"" key "\":[0-9.e+-]+") ? substr(text, RSTART + length(key) + 3, RLENGTH - length(key) - 3) : 0 }
        { text = $0; sub(/,"baseline":.*/, "", text); print number("total"), number("memory_limit"), number("largest_micro_batch"), number("step_seconds") }'
}

gib() { awk -v bytes="$1" 'BEGIN { printf "%.1f GiB", bytes / 2^30 }'; }

# fits WORD FLAG…: names WORD, where the plan with these flags more fits
fits() {
    local word=$1 bytes room
    shift
    read -r bytes room _ < <(figures "$@" 2> /dev/null) || return 1
    ((bytes <= room)) && printf '  %-28s %s of %s\n' "$word" "$(gib "$bytes")" "$(gib "$room")" >&2
}

# too_large BYTES ROOM LARGEST: refuses the plan, and names what fits
too_large() {
    local n flag kind wanted=$gpu had=$ranks any='' most
    echo "pretrain_$name.sh: does not fit: the fullest of $ranks ranks would take $(gib "$1"), where ${gpu^^} has room for $(gib "$2"). What would fit:" >&2
    for ((n = $3; n > 0; n--)); do # the largest of which the batch is a multiple
        if fits "--micro-batch $n" --micro-batch "$n"; then
            any=1
            break
        fi
    done
    for flag in '--recompute 2' '--zero 2' '--recipe fp8' "--tp $((2 * tp))" "--pp $((2 * pp))" '--recompute 2 --micro-batch 1'; do
        if [ "$flag" = '--tp 16' ]; then continue; fi # a layer would be shared across nodes
        if [[ $flag == *micro-batch* && -n $any ]]; then continue; fi
        # shellcheck disable=SC2086 # words of a flag
        if fits "$flag" $flag; then any=1; fi
    done
    # More GPUs: more replicas, else more stages, else layers shared by up to 8 too
    for ((n = 2; n <= 128 && n * had <= 4096; n *= 2)); do
        [ -z "$any" ] || break
        ranks=$((n * had)) most=$((tp * n < 8 ? tp * n : 8))
        if fits "GPUS=$ranks" || fits "GPUS=$ranks --pp $((n * pp))" --pp $((n * pp)) ||
            fits "GPUS=$ranks --tp $most --pp $((n * tp * pp / most))" --tp $most --pp $((n * tp * pp / most)); then any=1; fi
    done
    ranks=$had
    for kind in h200 b200; do
        gpu=$kind
        if [ $kind != "$wanted" ] && fits "GPU=$kind"; then any=1; fi
    done
    [ -n "$any" ] || echo '  nothing that was tried: a smaller micro-batch, --recompute 2, --zero 2, larger GPUs, up to 128 times as many' >&2
    exit 2
}

# quoted WORD…: as the shell would read it
quoted() {
    local word line=''
    for word; do
        [[ $word =~ ^[A-Za-z0-9_./=:,+-]+$ ]] || word=${word@Q}
        line+=" $word"
    done
    printf '%s\n' "${line# }"
}

# small: flags that make a toy of the model, in the layout that it has
small() {
    local heads=$((tp > 2 ? tp : 2)) layers=$((pp > 2 ? pp : 2)) seq_len=$(((32 + tp - 1) / tp * tp))
    flags=("${paper[@]}" --layers "$layers" --heads "$heads" --width $((16 * heads)) --seq-len "$seq_len" --vocab 256
        --micro-batch 1 --global-batch $((layers * seq_len * ranks / (tp * pp))) --steps 20 --lr 0.01 --warmup 4 --val-every 0 --no-resume "${own[@]}")
}

# cost SECONDS BYTES ROOM: one line on the whole run
cost() {
    awk -v seconds="$1" -v bytes="$2" -v room="$3" -v ranks="$ranks" -v gpu="${gpu^^}" -v batch="$(setting --global-batch -d)" -v steps="$(setting --steps -x)" -v price="$PRICE" 'BEGIN {
        printf "planned, not measured; times are at best: %d × %s, %.1f of %.1f GiB", ranks, gpu, bytes / 2^30, room / 2^30
        if (seconds > 0) { printf ", %.0fk tok/s", batch / seconds / 1000 }
        if (seconds > 0 && steps > 0) {
            hours = steps * seconds / 3600
            printf ", %.0fG tokens in %.1f days, %.0f GPU hours, $%.0f at $%.2f each", steps * batch / 1e9, hours / 24, hours * ranks, hours * ranks * price, price
        }
        print ""
    }'
}

# find_trainer: sets TRAIN. Toys run on CPUs
find_trainer() {
    if [ -z "${TRAIN:-}" ] && [ -n "${TOY:-}" ]; then
        scripts/setup.sh --check || scripts/setup.sh
        make -s --no-print-directory DEVICE=cpu binary
        TRAIN=$(make -s DEVICE=cpu config | sed -n 's/^BUILD = //p')/train_gpt_fp8
    fi
    TRAIN=${TRAIN:-./train_gpt_fp8}
    [ -x "$TRAIN" ] || fail "there is no $TRAIN: 'make' builds it; TRAIN=PATH names another"
}

# find_gpus: sets gpu (which), here (how many this machine has), slots (of the hostfile) and ranks
find_gpus() {
    local layout=$((tp * pp)) least
    here=$({ nvidia-smi -L 2> /dev/null || true; } | grep -c '^GPU ' || true)
    gpu=$({ nvidia-smi --query-gpu=name --format=csv,noheader 2> /dev/null || true; } | sed -nE '1 s/.*\b(A100|L40S|H100|H200|B200)\b.*/\L\1/p')
    gpu=${GPU:-${gpu:-h100}}
    [ -z "${TOY:-}" ] || gpu=none
    if [ -n "${HOSTFILE:-}" ] && [ -z "${TOY:-}" ]; then
        [ -r "$HOSTFILE" ] || fail "HOSTFILE: cannot read '$HOSTFILE'"
        slots=$(awk '!/^[ \t]*(#|$)/ { sum += match($0, /slots *= *[0-9]+/) ? substr($0, RSTART + index(substr($0, RSTART), "=")) : 1 } END { print sum + 0 }' "$HOSTFILE")
        [ "$slots" != 0 ] || fail "HOSTFILE: '$HOSTFILE' names no node; a line is such as: node1 slots=8"
    fi
    if [ -n "${GPUS:-}" ]; then
        ranks=$GPUS
    elif [ -n "${TOY:-}" ]; then
        ranks=$((layout > 8 ? layout : 2 * layout))
    elif [ -n "${SLURM_JOB_ID:-}" ]; then
        ranks=${SLURM_NTASKS:-0}
    elif [ -n "$slots" ]; then
        ranks=$slots
    elif [ -n "${DRY_RUN:-}" ]; then
        ranks=$paper_gpus
    elif [ "$gpu" = none ]; then
        ranks=$layout
    else
        ranks=$here
        [ "$ranks" != 0 ] ||
            fail "this machine has no GPU: HOSTFILE=FILE names machines that have, sbatch asks Slurm for them; DRY_RUN=1 plans, TOY=1 runs a small model here"
    fi
    whole GPUS "$ranks"
    ((ranks >= layout)) || fail "GPUS: $ranks are too few: tp $tp × pp $pp needs $layout"
    least=$((ranks - ranks % layout))
    ((ranks == least)) || fail "GPUS: $ranks are no multiple of tp $tp × pp $pp = $layout; $least or $((least + layout)) would be"
    [ -z "$slots" ] || ((ranks <= slots)) || fail "GPUS: $ranks are more than the $slots slots of $HOSTFILE"
    if [ -z "${TOY:-}${DRY_RUN:-}${SLURM_JOB_ID:-}$slots" ] && [ "$gpu" != none ] && ((ranks > here)); then
        fail "GPUS: $ranks are more than the $here of this machine: HOSTFILE=FILE names others, sbatch asks Slurm for them"
    fi
}

# find_data: sets data
find_data() {
    if [ -n "${TOY:-}" ]; then
        data=(--train-data "$OUT/text.txt")
        return
    fi
    data=(--train-data "$DATA" ${VAL_DATA:+--val-data "$VAL_DATA"})
    if [ -z "${DRY_RUN:-}" ] && [ -z "$(setting --train-data -i)" ] && [[ $DATA != *[:,]* ]] && ! compgen -G "$DATA" > /dev/null; then
        fail "DATA: no file is called '$DATA'; token shards are needed, such as scripts/tokenize.py writes"
    fi
}

# find_launch: sets launch: what stands before the trainer
find_launch() {
    local variable
    export NCCL_DEBUG=${NCCL_DEBUG:-WARN} OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-8}}
    launch=(env)
    for variable in "${!NCCL_@}" OMP_NUM_THREADS; do launch+=("$variable=${!variable}"); done
    [ -z "${TOY:-}" ] || launch=(env OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive) # ranks take turns on the cores
    if [ -n "${SLURM_JOB_ID:-}" ] && [ -z "${TOY:-}" ]; then
        # block: a node is filled before the next, so ranks of a layer share one. srun does not take over the job's CPUs a task by itself
        launch+=(srun --ntasks="$ranks" ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} --distribution=block --kill-on-bad-exit=1)
        return
    fi
    [ -z "${RESTART:-}" ] || launch=(scripts/restart.sh "${launch[@]}")
    if ((ranks > 1)) || [ -n "$slots" ]; then
        MPIRUN=${MPIRUN:-mpirun}
        [ -n "${DRY_RUN:-}" ] || command -v "$MPIRUN" > /dev/null || fail "there is no $MPIRUN; scripts/setup.sh installs it"
        launch+=("$MPIRUN" -np "$ranks" --bind-to none)
        [ "$(id -u)" != 0 ] || launch+=(--allow-run-as-root)
        [ "$gpu" != none ] || launch+=(--oversubscribe)
        if [ -n "$slots" ]; then
            launch+=(--hostfile "$HOSTFILE" --map-by slot) # as block above
            for variable in OMP_NUM_THREADS "${!NCCL_@}" ${LD_LIBRARY_PATH:+LD_LIBRARY_PATH}; do launch+=(-x "$variable"); done
        fi
    fi
}

# toy: runs it, on text that it learns in a few steps
toy() {
    local start=$SECONDS
    if [ -e "$OUT/text.txt" ] && [[ " ${own[*]} " != *' --resume '* ]]; then rm -rf "$OUT"/step_* "$OUT/latest"; fi # of an earlier toy
    mkdir -p "$OUT"
    awk 'BEGIN {
        x = 7
        split("cat dog river king engine child word stone", w)
        for (i = 0; i < 2000; i++) { x = x * 16807 % 2147483647; print "a", w[1 + x % 8], "finds the", w[1 + int(x / 8) % 8] "." }
    }' > "$OUT/text.txt"
    "$@" < /dev/null || fail "the toy's run failed"
    awk -v name="$name" -v ranks="$ranks" -v layout="tp $tp × pp $pp × dp $((ranks / tp / pp))" -v seconds=$((SECONDS - start)) '
        /"step":/ && match($0, /"loss":[0-9.e+-]+/) { last = substr($0, RSTART + 7, RLENGTH - 7) + 0; if (!steps++) { first = last } }
        END {
            printf "toy of %s: %s, %d ranks, %d steps in %d s, loss %.4f to %.4f\n", name, layout, ranks, steps, seconds, first, last
            exit !(last < first)
        }' "$(setting --output-dir -o)/log.jsonl" || fail "the toy's loss does not fall"
}

pretrain() {
    local paper=() own=() flags tp pp ranks here gpu slots='' data launch command bytes room largest seconds
    while [ "$1" != -- ]; do
        paper+=("$1")
        shift
    done
    shift
    own=("$@")
    PRICE=${PRICE:-2.50}
    [[ $PRICE =~ ^[0-9]{1,6}([.][0-9]+)?$ ]] || fail "PRICE: '$PRICE' is not a number of dollars"
    OUT=${OUT:-runs/$name-$RECIPE${TOY:+-toy}} # a recipe's own: runs go on with what they find there
    DATA=${DATA:-data/*.bin}
    paper=(--recipe "$RECIPE" --output-dir "$OUT" --checkpoint-every 500 --resume "${paper[@]}")
    flags=("${paper[@]}" "${own[@]}")
    tp=$(setting --tp --tp) pp=$(setting --pp --pp)
    whole --tp "$tp"
    whole --pp "$pp"
    find_trainer
    find_gpus
    [ -z "${TOY:-}" ] || small
    find_data
    find_launch
    command=("${launch[@]}" "$TRAIN" "${data[@]}" "${flags[@]}")

    # Does it fit? What the trainer would refuse on every rank it refuses here
    read -r bytes room largest seconds < <(figures) || exit 2
    if [ -n "${DRY_RUN:-}" ]; then "$TRAIN" --plan --gpu "$gpu" --world "$ranks" "${flags[@]}" --no-resume < /dev/null; fi
    if [ "$gpu" != none ]; then
        ((bytes <= room)) || too_large "$bytes" "$room" "$largest"
        cost "$seconds" "$bytes" "$room"
    fi
    echo "command: $(quoted "${command[@]}")"
    [ -z "${DRY_RUN:-}" ] || exit 0
    [ -n "${TOY:-}" ] || exec "${command[@]}"
    toy "${command[@]}"
}
