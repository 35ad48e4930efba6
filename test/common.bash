# common.bash: what the end-to-end tests of the binary share: how it is started, the data it is fed, and how its log is read.
#
# The binary is $TRAIN (default that of the CPU build: GPUs refuse some of the widths here). Data is made by small generators with their own
# random numbers, so it is the same with every awk and perl. Needs bash, awk, perl-base and coreutils.
# shellcheck shell=bash

bats_require_minimum_version 1.5.0

# use_binary: for setup_file: TRAIN as an absolute path, one thread (so small a model has no work for two).
use_binary() {
    cd "$BATS_TEST_DIRNAME/.." || return
    TRAIN=$(realpath -m -- "${TRAIN:-build/cpu/train_gpt_fp8}")
    [ -x "$TRAIN" ] || {
        echo "there is no $TRAIN: run make DEVICE=cpu binary first, or give another by TRAIN=PATH"
        return 1
    }
    export TRAIN LC_ALL=C OMP_NUM_THREADS=1
    TINY='--layers 2 --heads 2 --width 64 --seq-len 32 --micro-batch 4 --val-every 0'
    export TINY
}

# mpi RANKS COMMAND…: COMMAND on that many ranks. have_mpi goes before it.
mpi() {
    local ranks=$1
    shift
    mpirun "${mpi_flags[@]}" -np "$ranks" "$@"
}

# have_mpi: skips the test where there is no mpirun; sets mpi_flags.
have_mpi() {
    command -v mpirun > /dev/null || skip "no mpirun here"
    mpi_flags=(--oversubscribe --bind-to none)
    [ "$(id -u)" != 0 ] || mpi_flags+=(--allow-run-as-root)
}

# processes TEXT: the numbers of the trainer's processes whose command line has it. (procps is not everywhere.)
processes() {
    local process words
    for process in /proc/[0-9]*; do
        { mapfile -d '' -t words < "$process/cmdline"; } 2> /dev/null || continue # it has ended
        if [[ "${words[*]} " == "$TRAIN "*"$1"* ]]; then echo "${process#/proc/}"; fi
    done
}

# is_png FILE: it begins as a PNG does
is_png() { [ "$(head -c 8 "$1" | od -An -tx1 | tr -d ' \n')" = 89504e470d0a1a0a ]; }

# ---- data ----

# text_file FILE LINES: sentences that a small model learns within a few dozen steps, 25 bytes each or so
text_file() {
    awk -v lines="$2" '
        function pick(n) { x = x * 16807 % 2147483647; return 1 + int(x / 2147483647 * n) }
        BEGIN {
            x = 42
            split("cat dog river king engine child word stone", noun)
            split("sees finds breaks carries follows loves counts leaves", verb)
            split("the a one small large red old quiet", article)
            for (i = 0; i < lines; i++) { print "the", noun[pick(8)], verb[pick(8)], article[pick(8)], noun[pick(8)] "." }
        }' > "$1"
}

# shard FILE uint16|uint32 TOKENS FIRST LAST: a shard of llm.c whose tokens lie in FIRST..LAST, each most often a function of the one before
shard() {
    perl -e '
        my ($kind, $n, $first, $last) = @ARGV;
        my ($magic, $version, $format) = $kind eq "uint16" ? (20240520, 1, "v*") : (20240801, 7, "V*");
        my ($x, $t, @tokens) = (7, 0);
        for (1 .. $n) {
            $x = $x * 16807 % 2147483647;
            $t = ($x % 8 == 0 ? $x >> 8 : 3 * $t + 1) % ($last - $first + 1);
            push @tokens, $first + $t;
        }
        binmode STDOUT;
        print pack("l<3 x1012", $magic, $version, $n), pack($format, @tokens);
    ' "$2" "$3" "$4" "$5" > "$1"
}

# answers FILE 7|8|all RECORDS [SEED]: a shard of records of 16 tokens: 12 of a prompt, each one of 64 at random, and 4 of a response that follows from the
# prompt's last. Version 8 masks what is not a response, `all` of it everything; 8 with the fifth word `none` nothing.
answers() {
    perl -e '
        my ($kind, $n, $x, $masks) = @ARGV;
        my @tokens;
        for (1 .. $n) {
            my $t;
            for (1 .. 12) {
                $x = $x * 16807 % 2147483647;
                $t = ($x >> 8) % 64;
                push @tokens, $t | ($kind ne "7" && $masks ne "none" ? 1 << 31 : 0);
            }
            for my $place (1 .. 4) {
                my $answer = 64 + 16 * $place + ($t * (2 * $place + 1)) % 16;
                push @tokens, $answer | ($kind eq "all" ? 1 << 31 : 0);
            }
        }
        binmode STDOUT;
        print pack("l<3 x1012", 20240801, $kind eq "7" ? 7 : 8, scalar @tokens), pack("V*", @tokens);
    ' "$2" "$3" "${4:-7}" "${5:-prompts}" > "$1"
}

# choices FILE 1|2: a multiple-choice file of that version (core/choices.h) for models of bytes, from lines "label|context|completion|completion…"; \n in
# them is a line's end
choices() {
    perl -ne '
        BEGIN { ($version, $longest) = (shift @ARGV, 0) }
        chomp;
        s/\\n/\n/g;
        my ($label, $context, @completions) = split /\|/;
        my ($bytes, $format) = $version == 1 ? (2, "v*") : (4, "V*");
        my @words = ($bytes == 2 ? 65535 : 4294967295, 0, $n++, $label, scalar @completions);
        push @words, length, unpack("C*", $_) for $context, @completions;
        $words[1] = $bytes * @words;
        $longest = $words[1] if $words[1] > $longest;
        $stream .= pack($format, @words);
        END {
            binmode STDOUT;
            print pack("l<4 x1008", 20240522, $version, $n, $longest), $stream;
        }
    ' "$2" > "$1"
}

# ---- reading what a run has written ----

# column FIELD DIR: a field of every line of DIR/log.jsonl but the first (the config) that has it. "loss" is not
# "val_loss": the quotes count.
column() {
    awk -v key="\"$1\":" '{
        at = index($0, key)
        if (at == 0 || /^\{"config":/) { next }
        value = substr($0, at + length(key))
        if (substr(value, 1, 1) == "{") { sub(/\}.*/, "}", value) } else { sub(/[,}].*/, "", value) }
        print value
    }' "$2/log.jsonl"
}

first() { column "$1" "$2" | head -n 1; }
last() { column "$1" "$2" | tail -n 1; }

# holds CONDITION [NAME=VALUE…]: an awk condition on numbers; says the numbers where it does not hold
holds() {
    local condition=$1 words=() word
    shift
    for word in "$@"; do words+=(-v "$word"); done
    awk "${words[@]}" "BEGIN { exit !($condition) }" || {
        echo "does not hold: $condition, with $*"
        return 1
    }
}

# lacks PATTERN FILE: no line has it. (bats does not see a failed `! grep`, unless it is a test's last command.)
lacks() {
    [ -r "$2" ] || {
        echo "there is no $2"
        return 1
    }
    if grep -e "$1" "$2"; then return 1; fi
}

# same_column FIELD DIR1 DIR2 BOUND: both logs have the field as often, at least once, and agree within BOUND (relative; 0: as text)
same_column() {
    column "$1" "$2" > "$BATS_TEST_TMPDIR/column1"
    column "$1" "$3" > "$BATS_TEST_TMPDIR/column2"
    paste "$BATS_TEST_TMPDIR/column1" "$BATS_TEST_TMPDIR/column2" | awk -F '\t' -v bound="$4" -v what="$1 of $2 and $3" '
        {
            rows++
            if ($1 == "" || $2 == "") { print what ": one has more lines than the other"; bad = 1; exit }
            if (bound == 0 && $1 "" != $2 "") { print what ": line " NR ": " $1 " and " $2; bad = 1; exit }
            if (bound == 0) { next }
            apart = $1 - $2; size = $1 < 0 ? -$1 : $1
            if (apart < 0) { apart = -apart }
            if (!(apart <= bound * size)) { print what ": line " NR ": " $1 " and " $2 " are more than " bound " apart"; bad = 1; exit }
            if (size > 0 && apart / size > worst) { worst = apart / size }
        }
        END {
            if (!bad && rows == 0) { print what ": no line has it"; bad = 1 }
            if (!bad && bound > 0) { printf "%s: at most %.2g apart\n", what, worst }
            exit bad
        }'
}

# different_column FIELD DIR1 DIR2: the field's values are not all the same in both logs
different_column() {
    if cmp -s <(column "$1" "$2") <(column "$1" "$3"); then
        echo "$1 is the same in $2 and $3"
        return 1
    fi
}

# valid_json FILE: every line is one JSON object. NaN and Infinity, which Python's reader would take, are not JSON.
valid_json() {
    [ -s "$1" ] || {
        echo "$1 is missing or empty"
        return 1
    }
    if python3 -c '' 2> /dev/null; then
        python3 -c '
import json, sys
def refuse(word): raise ValueError(word + " is not JSON")
for number, line in enumerate(open(sys.argv[1], encoding="utf-8"), 1):
    assert isinstance(json.loads(line, parse_constant=refuse), dict) and line.endswith("\n"), number
' "$1"
        return
    fi
    awk '{
        text = $0
        gsub(/"([^"\\]|\\.)*"/, "s", text)  # strings away: what is left is punctuation, numbers and three words
        rest = text
        gsub(/true|false|null|s|-?[0-9]+(\.[0-9]+)?([eE][-+]?[0-9]+)?/, "v", rest)
        while (gsub(/\{(v:v(,v:v)*)?\}/, "v", rest) + gsub(/\[(v(,v)*)?\]/, "v", rest)) { }
        if (rest != "v" || text !~ /^\{/) { print FILENAME ": line " NR " is not a JSON object: " $0; exit 1 }
    }' "$1"
}
