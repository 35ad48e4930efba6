#!/usr/bin/env bats
# exp5.bats: scripts/exp5_shift.sh runs from end to end, small, and says what it has measured.
# shellcheck disable=SC2030,SC2031,SC2154 # output, status and stderr are bats's

load common

setup_file() {
    cd "$BATS_TEST_DIRNAME/.." || return
    export LC_ALL=C QUICK=1 OUT=$BATS_FILE_TMPDIR/out DATA=$BATS_FILE_TMPDIR/text.txt OMP_NUM_THREADS=1
    text_file "$DATA" 8000
    seq 1 2000 > "$BATS_FILE_TMPDIR/counted.txt"
    SEEDS='1 2' STEPS=60 LR=1e-2 EVAL="counted=$BATS_FILE_TMPDIR/counted.txt" scripts/exp5_shift.sh > "$BATS_FILE_TMPDIR/output" 2> "$BATS_FILE_TMPDIR/errors" || {
        cat "$BATS_FILE_TMPDIR/output" "$BATS_FILE_TMPDIR/errors"
        return 1
    }
}

setup() {
    cd "$BATS_TEST_DIRNAME/.." || return
    texts=(held source numbers shuffled random counted)
    [ ! -r /usr/share/common-licenses/GPL-3 ] || texts=(held source legal numbers shuffled random counted)
}

@test "a row for every recipe, seed, text and precision" {
    [ "$(head -n 1 "$OUT/exp5.csv")" = row,seed,text,precision,loss ]
    for seed in 1 2; do
        for row in bf16 fp8-lm fp8; do
            for text in "${texts[@]}"; do
                echo "$row,$seed,$text,bf16"
                [ "$row" = bf16 ] || echo "$row,$seed,$text,$row"
            done
        done
    done > "$BATS_TEST_TMPDIR/wanted"
    cmp "$BATS_TEST_TMPDIR/wanted" <(tail -n +2 "$OUT/exp5.csv" | cut -d , -f 1-4)
    awk -F, 'NR > 1 && ($5 !~ /^[0-9.]+$/ || $5 < 0.3 || $5 > 30) { print; bad = 1 } END { exit bad }' "$OUT/exp5.csv"
}

# Fails where a text is not what it is said to be, was trained on, or is not the one that is evaluated
@test "the texts are what they are said to be, and each is evaluated" {
    for text in "${texts[@]}"; do [ "$(stat -c %s "$OUT/texts/$text")" = 1025 ]; done
    held=$(($(stat -c %s "$DATA") / 101))
    cmp <(tail -c "$held" "$DATA" | head -c 1025) "$OUT/texts/held"
    [ "$(stat -c %s "$DATA")" -gt 150000 ] && [ "$held" -ge 1025 ]
    cmp <(head -c 1025 "$BATS_FILE_TMPDIR/counted.txt") "$OUT/texts/counted"
    cmp <(tr -s '[:space:]' '\n' < "$OUT/texts/shuffled" | sort) <(tr -s '[:space:]' '\n' < "$OUT/texts/held" | sort)
    run ! cmp "$OUT/texts/shuffled" "$OUT/texts/held"
    [ "$(tr -d ' -~' < "$OUT/texts/random" | wc -c)" = 0 ]
    sed '$d' "$OUT/texts/numbers" | awk '!/^[0-9]+ times [0-9]+ is [0-9]+\.$/ || $1 * $3 != $5 + 0 { print; exit 1 }' # the last line is cut
    # a model of these sentences knows their end best, then their words; a character at random it knows least of all
    awk -F, '
        $1 == "fp8" && $2 == 1 && $4 == "bf16" { loss[$3] = $5; if ($5 in seen) { print "the same twice: " $0; bad = 1 } seen[$5] }
        END {
            if (!(loss["held"] < 3 && loss["held"] < loss["shuffled"] - 0.1 && loss["shuffled"] < loss["source"] && loss["random"] > 5)) { for (t in loss) { print t, loss[t] } bad = 1 }
            exit bad
        }' "$OUT/exp5.csv"
    for text in "${texts[@]}"; do grep -q "\"val-data\":\"$OUT/texts/$text\".*\"recipe\":\"bf16\"" "$OUT/fp8-2/eval-$text-bf16/log.jsonl"; done
    grep -q '"recipe":"fp8-lm"' "$OUT/fp8-lm-1/eval-held-fp8-lm/log.jsonl"
}

@test "every claim has its verdict, and it is that of the rows" {
    [ "$(grep -c . "$OUT/verdict.txt")" = $((2 * ${#texts[@]} + 2)) ]
    run ! grep -vE $'^(held|NOT held)\t[^\t]+\t' "$OUT/verdict.txt"
    perl -e '
        my (%loss, %said);
        open my $rows, "<", $ARGV[0] or die;
        while (<$rows>) { chomp; my ($row, $seed, $text, $precision, $loss) = split /,/; push @{ $loss{$row}{$text} }, $loss if $precision eq "bf16" }
        open my $verdicts, "<", $ARGV[1] or die;
        while (<$verdicts>) { $said{"$2 $3"} = $1 if /^(held|NOT held)\tmodels trained in (\S+) lose no more than BF16 ones on (\S+)\t/ }
        my $bad = 0;
        for my $row ("fp8-lm", "fp8") {
            for my $text (@ARGV[2 .. $#ARGV]) {
                my ($a, $b) = @{ $loss{$row}{$text} };
                my ($c, $d) = @{ $loss{bf16}{$text} };
                my $room = (abs($a - $b) + abs($c - $d)) / sqrt 2;  # of two
                my $want = ($a + $b - $c - $d) / 2 <= $room ? "held" : "NOT held";
                next if ($said{"$row $text"} || "") eq $want;
                print "$row on $text: $want, not ", $said{"$row $text"} || "said", "\n";
                $bad = 1;
            }
        }
        exit $bad;' "$OUT/exp5.csv" "$OUT/verdict.txt" "${texts[@]}"
    grep -qE '^held +fp8-lm +[0-9.]+ ' "$BATS_FILE_TMPDIR/output"
    command -v gnuplot > /dev/null || skip "no gnuplot here"
    is_png "$OUT/exp5.png"
}

@test "what cannot be run is refused" {
    refuses() {
        run --separate-stderr -2 env OUT="$BATS_TEST_TMPDIR/none" "${@:1:$#-1}" scripts/exp5_shift.sh
        # shellcheck disable=SC2053 # a pattern
        [[ $stderr == "exp5_shift.sh: "${*: -1} ]] || { echo "$stderr"; return 1; }
        [ ! -e "$BATS_TEST_TMPDIR/none" ]
    }
    refuses ROWS=fp32 "ROWS: 'fp32' is not known; allowed: bf16 fp8-lm fp8"
    refuses SEEDS=' ' 'SEEDS is empty'
    refuses EVAL=some.txt "EVAL: 'some.txt' is not name=file*"
    refuses EVAL=own=none.txt "EVAL: 'none.txt' is not a file that can be read"
    refuses EVAL="held=$DATA" "EVAL: there is a text 'held' already*"
    refuses EVAL_TOKENS=31 'EVAL_TOKENS: 31 are fewer than the 256 of a micro-batch'
    echo short > "$BATS_TEST_TMPDIR/short.txt"
    run --separate-stderr -2 env OUT="$BATS_TEST_TMPDIR/out" EVAL="short=$BATS_TEST_TMPDIR/short.txt" scripts/exp5_shift.sh
    [[ $stderr == *"the text short has 6 bytes, and a micro-batch takes 257"* ]]
}
