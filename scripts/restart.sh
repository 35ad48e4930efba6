#!/usr/bin/env bash
# restart.sh COMMAND…: runs a training command until it has ended well; whenever it crashes, it goes on from the last checkpoint.
#
#   scripts/restart.sh mpirun -np 8 ./train_gpt_fp8 --train-data 'data/*.bin' --steps 20000 --checkpoint-every 500 --output-dir runs/a
#
# --resume is added to the command. Input that is refused (exit code 2) is no crash. A run that dies three times in a row without a new checkpoint is given
# up: something is wrong that trying again does not mend. TERM, INT and USR1 end this loop; the run gets USR1, which mpirun and srun pass on to their ranks: it
# saves and ends. (A terminal's Ctrl-C reaches the run by itself too; a second one stops it at once.)
#
#   PAUSE=10      seconds before a restart; doubled when there was no new checkpoint
#   TRIES=3       how often without one
set -uo pipefail
PAUSE=${PAUSE:-10} TRIES=${TRIES:-3}

fail() {
    echo "restart.sh: $*" >&2
    exit 2
}

[ $# -gt 0 ] || fail "a command is needed, such as: scripts/restart.sh ./train_gpt_fp8 --train-data text.txt --checkpoint-every 500"
for n in "$PAUSE" "$TRIES"; do
    [[ $n =~ ^[0-9]{1,5}$ ]] || fail "PAUSE and TRIES are whole numbers, not '$n'"
done
folder=log # the trainer's own default
before=''
for word; do
    case $before in
        --output-dir | -o) folder=$word ;;
    esac
    case $word in
        --output-dir=*) folder=${word#*=} ;;
    esac
    before=$word
done
case " $* " in
    *' --resume '*) ;;
    *) set -- "$@" --resume ;;
esac

run='' ends=''
trap 'ends=1; [ -z "$run" ] || kill -USR1 "$run" 2> /dev/null' TERM INT USR1
latest() { cat "$folder/latest" 2> /dev/null; }

tried=0 pause=$PAUSE
while :; do
    was=$(latest)
    "$@" < /dev/null &
    run=$!
    [ -z "$ends" ] || kill -USR1 $run # it came before there was a run
    wait $run
    status=$?
    while [ -n "$ends" ] && kill -0 $run 2> /dev/null; do # a signal has ended our waiting, not the run
        wait $run
        status=$?
    done
    if [ $status = 0 ]; then exit 0; fi
    if [ -n "$ends" ]; then exit $status; fi
    [ $status != 2 ] || exit 2
    if [ "$(latest)" = "$was" ]; then
        tried=$((tried + 1)) pause=$((pause * 2))
    else
        tried=0 pause=$PAUSE
    fi
    if [ $tried -ge "$TRIES" ]; then
        echo "restart.sh: exit code $status, $tried times in a row without a new checkpoint in $folder: given up" >&2
        exit $status
    fi
    at=$(latest) || at='the beginning'
    echo "restart.sh: exit code $status; goes on from $at in $pause s" >&2
    sleep "$pause" &
    run=$!
    wait $run
    run=''
    if [ -n "$ends" ]; then exit $status; fi
done
