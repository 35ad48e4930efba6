#!/usr/bin/env bats
# nightly.bats: scripts/nightly.sh runs, is interrupted, goes on and reports; scripts/nightly_report.pl finds what has become worse.
# shellcheck disable=SC2030,SC2031,SC2154 # output, status and stderr are bats's

load common

setup_file() { use_binary; }

setup() {
    cd "$BATS_TEST_DIRNAME/.." || return
    nightly=scripts/nightly.sh
    nights=$BATS_TEST_TMPDIR/nights
}

# refuses ARGUMENTS… PATTERN: one line on stderr that matches, status 2, nothing run
refuses() {
    run --separate-stderr "$nightly" --out "$nights" "${@:1:$#-1}"
    # shellcheck disable=SC2053 # a pattern
    if [ "$status" != 2 ] || [ "$(wc -l <<< "$stderr")" != 1 ] || [[ $stderr != "nightly.sh: "${*: -1} ]] || [ -e "$nights" ]; then
        printf 'status %s, stderr: %s\n' "$status" "$stderr"
        return 1
    fi
}

# made FILE NIGHT [METRIC=VALUE…]: results of a night in which every claim that can be measured was, at figures that hold, but for those named
made() {
    perl -e '
        my ($claims, $night, %changed) = ($ARGV[0], $ARGV[1], map { split /=/, $_, 2 } @ARGV[2 .. $#ARGV]);
        my (@figures, %seen, %part);
        open my $file, "<", $claims or die;
        while (<$file>) {
            chomp;
            my ($id, $section, $claim, $paper, $metric, $held, $must) = split /\t/;
            next if /^#/ || $id eq "id" || $metric eq "-" || $seen{$metric}++;
            my ($bound) = (($must ne "-" ? $must : $held) =~ /(-?[\d.]+)$/);
            my $value = defined $bound ? $bound : 40;
            $value = $held =~ /^abs/ ? 0.4 : $value;
            my $unit = $metric =~ /_/ && $held eq "= 1" ? "yes or no" : "u";
            my $part = $metric =~ /^soak\.(\w+)/ ? "soak_$1" : $metric =~ /^(\w+)/ ? $1 : "";
            $part{$part} = 1;
            if (exists $changed{$metric}) { $value = $changed{$metric} }
            next if $value eq "gone";
            push @figures, "{\"part\":\"$part\",\"metric\":\"$metric\",\"value\":$value,\"unit\":\"$unit\",\"kind\":\"measured\",\"scale\":\"STEPS=9\",\"note\":\"\"}";
        }
        my $machine = $changed{machine} || "a machine";
        print "{\"night\":\"$night\",\"commit\":\"abc\",\"began\":\"\",\"ended\":\"\",\"budget\":\"\",\"machine\":\"$machine\",\"gpu\":\"a GPU\",\"parts\":[",
            join(",", map { my $failed = exists $changed{"part:$_"}; "{\"name\":\"$_\",\"status\":\"" . ($failed ? "failed" : "done") . "\",\"seconds\":9,\"settings\":\"STEPS=9\",\"largest\":\"STEPS=9\",\"commit\":\"abc\",\"why\":\"" . ($failed ? $changed{"part:$_"} : "") . "\"}" } sort keys %part),
            "],\"figures\":[", join(",\n", @figures), "],\"series\":[{\"plot\":\"A <plot>\",\"series\":\"one\",\"points\":[[1,2.5],[2,2.25],[30,2]]},{\"plot\":\"Bars\",\"series\":\"a\",\"points\":[[\"7B\",1],[\"13B\",3]]},{\"plot\":\"Bars\",\"series\":\"b\",\"points\":[[\"7B\",2],[\"13B\",1]]}]}\n";
    ' scripts/claims.tsv "${@:2}" > "$1"
}

# worse LINE-PATTERN CHANGE…: with the changes, and with nothing else, that line is red: in the output, in the report and by the status
worse() {
    made "$BATS_TEST_TMPDIR/now" 2026-11-02 "${@:2}"
    run -1 scripts/nightly_report.pl "${against[@]}" --html "$BATS_TEST_TMPDIR/report.html" scripts/claims.tsv "$BATS_TEST_TMPDIR/now" "${earlier[@]}"
    if [ "$(grep -c '^worse: ' <<< "$output")" != 1 ] || ! grep -qE "^worse: $1" <<< "$output" || [ "${lines[-1]}" != "1 line is worse" ]; then
        echo "$output"
        return 1
    fi
    grep -q 'class="banner bad"' "$BATS_TEST_TMPDIR/report.html"
}

@test "--list names the parts, and a budget is kept" {
    run -0 "$nightly" --list
    for part in plans topology exp1 exp2 exp3 convergence exp4 exp5 bench gpu readme soak_train; do grep -qE "^$part " <<< "$output"; done
    grep -qE '^exp2 .*SEEDS=1,2,3 STEPS=400 ' <<< "$output"
    whole=$(grep -c . <<< "$output")
    last=0
    for budget in 1m 3m 10m 45m 2h 9h; do
        run -0 "$nightly" --list --budget "$budget"
        [ "$(grep -c . <<< "$output")" = "$whole" ]
        used=$(awk '$1 == "in" { print 60 * $3 + $5 }' <<< "$output")
        limit=$((${budget%[mh]} * $([ "${budget: -1}" = h ] && echo 3600 || echo 60)))
        if ((used > limit || used < last)); then
            echo "$budget: $used s of $limit, less had $last"
            return 1
        fi
        last=$used
    done
    [[ $output != *'left out'* ]]
    run -0 env PACE=4 "$nightly" --list --budget 45m # on a slower machine less is done in the same time
    grep -qE '^in all +(3[0-9]|4[0-5]) min' <<< "$output"
    run -0 "$nightly" --list --budget 3m
    grep -qE '^soak_train +left out ' <<< "$output"
    grep -qE '^topology +0 min 30 s +CHECKS=2-1-2,1-2-2 ' <<< "$output" # smaller, before what matters less is left out
}

@test "interrupted and started again it goes on, and reports" {
    have_mpi
    export PACE=1 # a slow machine would leave out the topologies
    "$nightly" --only plans,topology --budget 1m --out "$nights" > "$BATS_TEST_TMPDIR/first" 2>&1 &
    night=$!
    for ((i = 0; i < 100; i++)); do # until the second part is at work
        ! compgen -G "$nights/*/parts/topology/runs" > /dev/null || break
        sleep 0.1
    done
    kill -TERM $night
    status=0
    wait $night || status=$?
    cat "$BATS_TEST_TMPDIR/first"
    [ "$status" = 130 ]
    folder=$(echo "$nights"/2*)
    [ ! -e "$folder/report.html" ]
    [ ! -e "$folder/parts/topology/state.json" ]
    grep -q '"status":"done"' "$folder/parts/plans/state.json"
    touch -d '2001-02-03' "$folder/parts/plans/output.txt"

    run "$nightly" --only plans,topology --budget 1m --out "$nights"
    echo "$output"
    [ "$status" = 0 ]
    [[ ${lines[0]} == "night $(basename "$folder") goes on: "* ]]
    grep -qx 'plans: done before' <<< "$output"
    [ "$(stat -c %y "$folder/parts/plans/output.txt" | cut -c 1-4)" = 2001 ]
    grep -q '"metric":"topology.checks_failed","value":0,' "$folder/results.json"
    grep -qE '"metric":"plans.gain.fp8.7b","value":[1-9][0-9.]*,' "$folder/results.json"
    { tr -d '\n' < "$folder/results.json" && echo; } > "$BATS_TEST_TMPDIR/one_line"
    valid_json "$BATS_TEST_TMPDIR/one_line"
    grep -q 'CHECKS=2-1-2,1-2-2 in place of CHECKS=8-4-1' "$folder/report.html" # what was cut
    grep -q 'part exp1 was not run' "$folder/report.html"

    run -0 "$nightly" --only plans,topology --budget 1m --out "$nights" # nothing is left to do
    [ "$(grep -c 'done before$' <<< "$output")" = 2 ]
    unset PACE
    run -0 "$nightly" --only plans --budget 2m --out "$nights/timed" # a few steps tell it
    grep -qE '^a step takes [1-9][0-9]*\.[0-9][0-9] times as long' <<< "$output"
    grep -q '"status":"done"' "$nights"/timed/2*/parts/plans/state.json
    run -0 "$nightly" --only plans --out "$nights" # another budget: another night
    [[ ${lines[0]} == "night $(basename "$folder")b: "* ]]
    grep -q 'the same' "$nights"/*b/report.html # as the night before
    run --separate-stderr -2 "$nightly" --only plans --night "$(basename "$folder")" --out "$nights"
    [[ $stderr == *"name another by --night" ]]
}

@test "a part that fails is red, and its name is said" {
    printf '#!/bin/sh\necho cannot plan\nexit 3\n' > "$BATS_TEST_TMPDIR/train"
    chmod +x "$BATS_TEST_TMPDIR/train"
    run -1 env TRAIN="$BATS_TEST_TMPDIR/train" "$nightly" --only plans --out "$nights"
    grep -q '^worse: part plans failed: status 3' <<< "$output"
    grep -q 'class="banner bad"' "$nights"/2*/report.html
}

@test "a trainer that has become worse is red the night after" {
    cat > "$BATS_TEST_TMPDIR/train" <<END
#!/usr/bin/env bash
exec "$TRAIN" "\${@/#fp8-lm/bf16}"
END
    chmod +x "$BATS_TEST_TMPDIR/train"
    run -0 "$nightly" --only plans --out "$nights" --night 2026-01-01
    run "$nightly" --only plans --out "$nights" --night 2026-01-02
    echo "$output"
    [ "$status" = 0 ]
    run -1 env TRAIN="$BATS_TEST_TMPDIR/train" "$nightly" --only plans --out "$nights" --night 2026-01-03
    grep -qE '^worse: speed-175b: .* after [0-9.]+ .*night 2026-01-02; allowed: 0.5 % worse' <<< "$output"
    grep -qE '^worse: optimizer-bytes: .* 16 bytes a parameter, must be <= 6.61' <<< "$output"
    run ! grep -qE '^worse: [a-z0-9-]*(fp8|plan|all):' <<< "$output" # the other recipe is as it was
    grep -q '<tr id="speed-175b" class="red">' "$nights/2026-01-03/report.html"
}

@test "what has become worse is red, and nothing else is" {
    made "$BATS_TEST_TMPDIR/last" 2026-11-01
    made "$BATS_TEST_TMPDIR/release" 2026-10-01
    against=() earlier=("$BATS_TEST_TMPDIR/last")
    made "$BATS_TEST_TMPDIR/now" 2026-11-02
    run -0 scripts/nightly_report.pl --html "$BATS_TEST_TMPDIR/report.html" scripts/claims.tsv "$BATS_TEST_TMPDIR/now" "${earlier[@]}"
    [ "${lines[-1]}" = "nothing is worse" ]
    run ! grep -q 'class="bad"\|banner bad\|tr class="red"' "$BATS_TEST_TMPDIR/report.html"

    worse 'scale-auto: .* 39.50 after 40, night 2026-11-01; allowed: 0.3 worse' exp1.snr.auto.32=39.5 # a worse rule of scales
    grep -q '<tr id="scale-auto" class="red">' "$BATS_TEST_TMPDIR/report.html"
    [ "$(grep -c 'class="red"' "$BATS_TEST_TMPDIR/report.html")" = 1 ]
    worse 'speed-124m-b8-fp8: .* 33 after 40 \(-17.5 %\)' bench.tok_s.124m-b8.fp8=33                   # a slower kernel
    worse 'memory-fp8: .* 40.10 after 40 ' exp3.memory.fp8.175b=40.1                                    # a larger buffer
    worse 'memory-175b: .* 39.05 u, must be >= 39.1$' exp3.saved.fp8-lm.175b=39.05
    worse 'auto-both: .* was yes' exp1.auto_has_less_underflow_than_pre_and_less_overflow_than_post=0   # what held
    worse 'soak-zero: .* must be = 0' soak.zero.failed=2
    worse 'loss-fp8: .* must be in size <= 3|loss-fp8: ' convergence.loss.fp8=-0.95
    worse 'auto-best: .* no longer measured' exp1.auto_has_the_best_snr_of_the_ring_modes=gone
    worse 'part bench failed: ran past 9 min' 'part:bench=ran past 9 min'

    # better, or within what is allowed
    made "$BATS_TEST_TMPDIR/now" 2026-11-02 exp1.snr.auto.32=39.8 bench.tok_s.124m-b8.fp8=90 exp3.memory.fp8.175b=39 convergence.loss.fp8=-0.1
    run -0 scripts/nightly_report.pl scripts/claims.tsv "$BATS_TEST_TMPDIR/now" "${earlier[@]}"
    # speeds of another machine are not compared, its memory is
    made "$BATS_TEST_TMPDIR/now" 2026-11-02 machine=another bench.tok_s.124m-b8.fp8=3
    run -0 scripts/nightly_report.pl scripts/claims.tsv "$BATS_TEST_TMPDIR/now" "${earlier[@]}"
    worse 'memory-fp8: ' machine=another exp3.memory.fp8.175b=41
    # nor are figures of another size
    sed 's/"scale":"STEPS=9"/"scale":"STEPS=8"/' "$BATS_TEST_TMPDIR/last" > "$BATS_TEST_TMPDIR/smaller"
    made "$BATS_TEST_TMPDIR/now" 2026-11-02 exp1.snr.auto.32=9
    run -0 scripts/nightly_report.pl scripts/claims.tsv "$BATS_TEST_TMPDIR/now" "$BATS_TEST_TMPDIR/smaller"
    # the newest night that can be compared counts
    earlier=("$BATS_TEST_TMPDIR/smaller" "$BATS_TEST_TMPDIR/last")
    worse 'scale-auto: .* night 2026-11-01' exp1.snr.auto.32=9
    # a slow slide, which no night shows, is seen against the release
    made "$BATS_TEST_TMPDIR/last" 2026-11-01 exp1.snr.auto.32=39.4
    against=(--release "$BATS_TEST_TMPDIR/release") earlier=("$BATS_TEST_TMPDIR/last")
    worse 'scale-auto: .* 39.20 after 40, the release \(2026-10-01\)' exp1.snr.auto.32=39.2
}

@test "the report has every claim, is whole in itself, and names what reproduces a figure" {
    made "$BATS_TEST_TMPDIR/now" 2026-11-02
    scripts/nightly_report.pl --html "$BATS_TEST_TMPDIR/report.html" scripts/claims.tsv "$BATS_TEST_TMPDIR/now" > /dev/null
    awk -F '\t' '!/^#/ && $1 != "id" && NF' scripts/claims.tsv > "$BATS_TEST_TMPDIR/claims"
    [ "$(wc -l < "$BATS_TEST_TMPDIR/claims")" -gt 60 ]
    while IFS=$'\t' read -r id _ _ _ metric _ _ _ command reason; do
        grep -q "<tr id=\"$id\"" "$BATS_TEST_TMPDIR/report.html" || { echo "no row of $id"; return 1; }
        if [ "$metric" = - ]; then
            [ "$reason" != - ] || { echo "$id: not measured, and no reason"; return 1; }
        else
            [ "$command" != - ] || { echo "$id: no command"; return 1; }
        fi
    done < "$BATS_TEST_TMPDIR/claims"
    run ! grep -qE '(src=|href="[^#]|@import|url\()|https?:|<script|<link' "$BATS_TEST_TMPDIR/report.html"
    grep -q 'A &lt;plot&gt;' "$BATS_TEST_TMPDIR/report.html"
    [ "$(grep -c '<svg ' "$BATS_TEST_TMPDIR/report.html")" = 2 ]
    [ "$(wc -c < "$BATS_TEST_TMPDIR/report.html")" -lt 200000 ]
    # what is opened is closed again
    perl -0777 -ne '
        s/<!DOCTYPE html>|<style>.*?<\/style>//gs;
        while (/<(\/?)([a-z0-9]+)[^>]*?(\/?)>/g) {
            next if $3 || $2 =~ /^(meta|br)$/;
            if (!$1) { push @open, $2 } elsif (pop(@open) ne $2) { print "at </$2>\n"; exit 1 }
        }
        exit(@open ? 1 : 0);' "$BATS_TEST_TMPDIR/report.html"
}

@test "what cannot be run is refused in one line" {
    refuses --fast "unknown argument '--fast'*"
    refuses --budget 45 "--budget: '45' is not a time such as 45m or 5h"
    refuses --budget 0m "--budget: '0m'*"
    refuses --budget "--budget needs a value*"
    PACE=x refuses --list "PACE: 'x' is not a number*"
    refuses --only plans,exp9 "--only: there is no part 'exp9'*"
    refuses --only '' "--only is empty*"
    refuses --night yesterday "--night: 'yesterday'*"
    refuses --release "$BATS_TEST_TMPDIR/none" "--release: there is no file*"
    printf '{"figures": [1,' > "$BATS_TEST_TMPDIR/torn"
    run --separate-stderr -2 scripts/nightly_report.pl scripts/claims.tsv "$BATS_TEST_TMPDIR/torn"
    [[ $stderr == "nightly_report.pl: $BATS_TEST_TMPDIR/torn is not JSON at byte "* ]]
    run --separate-stderr -2 scripts/nightly_report.pl scripts/claims.tsv "$BATS_TEST_TMPDIR/none"
    [[ $stderr == "nightly_report.pl: cannot read $BATS_TEST_TMPDIR/none"* ]]
    run --separate-stderr -2 scripts/nightly_report.pl --fast
    [[ $stderr == *"unknown option '--fast'"* ]]
    run -0 scripts/nightly_report.pl --help
    [[ ${lines[0]} == nightly_report.pl:* ]]
    run -0 "$nightly" --help
    [[ ${lines[0]} == nightly.sh:* ]]
}
