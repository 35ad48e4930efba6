#!/usr/bin/env bash
# test.sh [NAME…]: builds everything, runs every test and counts. The last line is `N passed, N failed` (and `, N skipped`).
#
# A test program is test/NAME.cpp (cmocka) or test/NAME.bats; both speak TAP. Each gets a line, and its whole output where something failed
# (V=1: always). A program that crashes, hangs, does not build, or runs fewer tests than it planned counts as failed and is named. With
# NAMEs only those run. SOAK=1 is passed on to the tests, which then run their full counts.
#
# Some programs are built a second time as simt_NAME, with the kernels' form for GPUs, emulated on the CPU (test/simt.h).
#
# Two programs run at a time, as most have work for one core only (JOBS=1: one); a line comes when its program has ended.
#
# The tests are those of the CPU build on every machine: they look into memory that on a GPU is the device's, and train widths that its FP8
# units refuse. Where nvcc is present the CUDA build is compiled and linked too, and is a test of its own (cuda-build). ./train_gpt_fp8 is
# left as it is: the end-to-end tests run the binary of the build folder.
set -euo pipefail
cd "$(dirname "$0")/.."

passed=0 failed=0 skipped=0
seconds_each=600
skip_line='^(not )?ok [0-9]+ .*# (skip|SKIP)'
if [ -n "${SOAK:-}" ]; then
    seconds_each=21600
fi
# The jobs of the make that called us are not ours to hand out; its variables are.
if [ -n "${MAKEFLAGS:-}" ]; then
    MAKEFLAGS=$(sed -E 's/(^| )-j[0-9]*//g; s/(^| )--jobserver-[a-z]+=[^ ]*//g' <<< "$MAKEFLAGS")
    export MAKEFLAGS
fi
cores=$(nproc)
export OMP_NUM_THREADS=$((cores < 2 ? cores : 2))
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive} # threads that wait by spinning keep each other from working where cores are shared
export LC_ALL=C

scripts/setup.sh --check || scripts/setup.sh
logs=$(mktemp -d)
log=$logs/make
jobs=${JOBS:-$((cores < 2 ? 1 : 2))}
trap 'rm -rf "$logs"' EXIT

wanted() {
    local name
    for name in "${names[@]}"; do
        if [ "$name" = "$1" ]; then
            return 0
        fi
    done
    [ ${#names[@]} = 0 ]
}

say() { printf '%-8s %-20s %s\n' "$@"; }

# fail NAME WHY: one failure that no TAP line tells of.
fail() {
    failed=$((failed + 1))
    say "not ok" "$1" "$2"
}

# begin PROGRAM COMMAND…: runs one test program in the background, once there is room for it. PROGRAM is NAME or NAME.bats: there may be both
begun=()
begin() {
    local program=$1
    shift
    while (($(jobs -rp | wc -l) >= jobs)); do
        wait -n || true
        tell
    done
    begun+=("$program")
    (
        status=0 start=$SECONDS
        { timeout -k 10 "$seconds_each" "$@" > "$logs/$program" 2>&1 < /dev/null; } 2> /dev/null || status=$? # bash itself has no word on crashes
        echo "$status $((SECONDS - start))" > "$logs/$program.end"
    ) &
}

# tell: of those that have ended meanwhile
tell() {
    local program running=()
    for program in "${begun[@]}"; do
        if [ -s "$logs/$program.end" ]; then count "$program"; else running+=("$program"); fi
    done
    begun=("${running[@]}")
}

# count PROGRAM: counts the TAP lines of a program that has ended, and tells of it
count() {
    local name=${1%.bats} status seconds planned ok not_ok skip ran why='' words log=$logs/$1
    read -r status seconds < "$log.end"
    if [ "$name" = cuda-build ]; then
        cuda_counted "$status" "$seconds"
        return
    fi
    planned=$(awk '/^1\.\.[0-9]+/ { n += substr($1, 4) } END { print n + 0 }' "$log")
    # bats marks a skipped test "ok 2 name # skip why", cmocka "not ok 2 # SKIP name"
    skip=$(grep -cE "$skip_line" "$log" || true)
    ok=$(grep -vE "$skip_line" "$log" | grep -cE '^ok ' || true)
    not_ok=$(grep -vE "$skip_line" "$log" | grep -cE '^not ok ' || true)
    ran=$((ok + not_ok + skip))
    if ((status == 124 || status == 137)); then
        why="ran past $seconds_each s"
    elif ((status > 128)); then
        why="crashed: signal $((status - 128)), $(kill -l $((status - 128)))"
    elif ((ran < planned)); then
        why="ended with status $status after $ran of $planned tests"
    elif ((ran == 0)); then
        why="ended with status $status and ran no test"
    elif ((status != 0 && not_ok == 0)); then
        why="ended with status $status though no test failed"
    fi
    passed=$((passed + ok)) failed=$((failed + not_ok)) skipped=$((skipped + skip))
    words="$ok passed"
    ((not_ok == 0)) || words+=", $not_ok failed"
    ((skip == 0)) || words+=", $skip skipped"
    words+=", $seconds s"
    if [ -n "$why" ]; then
        fail "$name" "$why ($words)"
    elif ((not_ok > 0)); then
        say "not ok" "$name" "$words"
    else
        say ok "$name" "$words"
    fi
    if [ -n "$why" ] || ((not_ok > 0)) || [ -n "${V:-}" ]; then
        sed 's/^/    /' "$log"
    elif ((skip > 0)); then
        grep -E "$skip_line" "$log" | sed 's/^/    /'
    fi
    [ -z "${SOAK:-}" ] || sed -n 's/^# /    /p' "$log" # what the long runs have measured
}

# Does the whole CUDA build compile and link? (Not to be asked where it is what we are testing anyway.)
cuda_begin() {
    if ! scripts/detect.sh nvcc > /dev/null 2>&1; then
        skipped=$((skipped + 1))
        say skip cuda-build "no nvcc here: the CUDA build is not compiled"
        return
    fi
    begin cuda-build make -s DEVICE=cuda BUILD=build/cuda SANITIZE= binary
}
cuda_counted() { # STATUS SECONDS
    local log=$logs/cuda-build
    if [ "$1" = 0 ]; then
        passed=$((passed + 1))
        say ok cuda-build "compiles and links, $2 s"
        sed 's/^/    /' "$log" # warnings
    elif grep -q 'does not know sm_' "$log"; then
        skipped=$((skipped + 1))
        say skip cuda-build "$(grep -m1 'does not know sm_' "$log")"
    else
        fail cuda-build "does not compile and link"
        sed 's/^/    /' "$log"
    fi
}

names=("$@")
for name in "${names[@]}"; do
    if [ ! -e "test/${name#simt_}.cpp" ] && [ ! -e "test/$name.bats" ] && [ "$name" != cuda-build ]; then
        echo "test.sh: there is no test/$name.cpp and no test/$name.bats" >&2
        exit 2
    fi
done

why="asked for"
if [ "${DEVICE:-auto}" = auto ]; then
    DEVICE=cpu why="the tests are those of the CPU build, GPU or not"
fi
config=$(make -s DEVICE="$DEVICE" config)
build=$(sed -n 's/^BUILD = //p' <<< "$config")
export TRAIN=$build/train_gpt_fp8
printf 'DEVICE: %s\nWHY: %s\n' "$DEVICE" "$why"
sed -n 's/^\(MPI\|NCCL\|ONEDNN\) = \(..*\)/\1: \2/p' <<< "$config"
programs=()
for source in test/*.cpp; do
    name=$(basename "$source" .cpp)
    if [ -e "$source" ] && [[ $name != simt* ]] && wanted "$name"; then
        programs+=("$build/test/$name")
    fi
done
for name in $([ "$DEVICE" != cpu ] || sed -n 's/^SIMT = //p' <<< "$config"); do
    if wanted "simt_$name"; then
        programs+=("$build/test/simt_$name")
    fi
done
start=$SECONDS
make -s -k -j"$cores" DEVICE="$DEVICE" binary experiments "${programs[@]}" > "$log" 2>&1 || true
sed 's/^/    /' "$log" # silent when all is well; warnings and errors are for everyone to see
[ -x "$TRAIN" ] || fail train_gpt_fp8 "does not build"
echo "built in $((SECONDS - start)) s"

export CMOCKA_MESSAGE_OUTPUT=TAP
if [ "$DEVICE" = cpu ] && wanted cuda-build; then
    cuda_begin # the longest of all
fi
for program in "${programs[@]}"; do
    name=$(basename "$program")
    if [ -x "$program" ]; then
        begin "$name" "$program"
    else
        fail "$name" "does not build"
    fi
done
for source in test/*.bats; do
    name=$(basename "$source" .bats)
    if [ -e "$source" ] && wanted "$name"; then
        begin "$name.bats" bats --tap "$source"
    fi
done
while (($(jobs -rp | wc -l) > 0)); do
    wait -n || true
    tell
done
wait
tell

((passed + failed > 0)) || echo "no test ran"
if ((skipped > 0)); then
    echo "$passed passed, $failed failed, $skipped skipped"
else
    echo "$passed passed, $failed failed"
fi
((failed == 0 && passed > 0))
