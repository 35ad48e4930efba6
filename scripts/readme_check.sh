#!/usr/bin/env bash
# readme_check.sh: follows a document to the letter: runs every command in it, in order, in this folder.
#
#   scripts/readme_check.sh [FILE.md…]      README.md, unless others are given
#   SKIP='^make (demo|test)'                commands that match this pattern are named and not run
#   OUT=runs/readme                         what each one has printed
#
# What is run stands in fenced blocks that begin with ```sh; a command may go on over lines that end with \. In blocks that begin with ```console commands
# stand after "$ ", and what they print must be the lines below. Blocks of ```sh NEEDS (a GPU, a cluster) are named and not run; all others are no commands.
# The status is 1 where a command failed or printed something else.
set -euo pipefail
cd "$(dirname "$0")/.."
export LC_ALL=C
# As root, and with more ranks than cores, Open MPI wants to be asked by flags that a document need not repeat.
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_rmaps_base_oversubscribe=1

fail() {
    printf 'readme_check.sh: %s\n' "$*" >&2
    exit 2
}

OUT=${OUT:-runs/readme}
SKIP=${SKIP:-^$}
[ $# -gt 0 ] || set -- README.md
[ -n "$OUT" ] || fail "OUT is empty"
for file; do [ -r "$file" ] || fail "cannot read $file"; done
mkdir -p "$OUT"

# run COMMAND [EXPECTED]: the command as its own shell, and where EXPECTED is given what it has to print
number=0 bad=0 left=0
run() {
    local status=0 began=$SECONDS said
    if [[ $1 =~ $SKIP ]]; then
        left=$((left + 1))
        printf 'not run  %s\n' "${1//$'\n'/ }"
        return
    fi
    number=$((number + 1))
    env -u OUT -u SKIP bash -euo pipefail -c "$1" > "$OUT/$number.txt" 2>&1 < /dev/null || status=$?
    if ((status != 0)); then
        said="FAILED, status $status: $(tail -n 1 "$OUT/$number.txt")"
    elif [ $# = 2 ] && ! diff <(printf '%s' "$2") "$OUT/$number.txt" > "$OUT/$number.diff"; then
        said="PRINTS OTHER LINES: see $OUT/$number.diff" status=1
    else
        said=ok
    fi
    ((status == 0)) || bad=$((bad + 1))
    printf '%4d s   %s\n         %s\n' $((SECONDS - began)) "${1//$'\n'/ }" "$said"
}

for file; do
    kind='' needs='' command='' expected=''
    while IFS= read -r line || [ -n "$line" ]; do
        case $kind:$line in
            :'```'*)
                read -r kind needs <<< "${line#'```'}" || true
                kind=${kind:-text}
                ;;
            *:'```'*)
                [ "$kind" != console ] || [ -z "$command" ] || run "$command" "$expected"
                [ "$kind" != sh ] || [ -z "$command" ] || fail "$file: '$command' goes on, and its block ends"
                kind='' command='' expected=''
                ;;
            sh:'#'* | sh:) ;;
            sh:*)
                command+=$line
                if [ "${line%\\}" != "$line" ]; then
                    command+=$'\n'
                elif [ -n "$needs" ]; then
                    left=$((left + 1))
                    printf 'needs %s: %s\n' "$needs" "${command//$'\n'/ }"
                    command=''
                else
                    run "$command"
                    command=''
                fi
                ;;
            console:'$ '*)
                [ -z "$command" ] || run "$command" "$expected"
                command=${line#'$ '} expected=''
                ;;
            console:*) expected+=$line$'\n' ;;
        esac
    done < "$file"
    [ -z "$kind" ] || fail "$file: a block is not closed"
done
printf '%d commands run, %d failed, %d not run\n' "$number" "$bad" "$left"
((bad == 0 && number > 0))
