# scripts/pictures.sh: the pictures of the README, from the results beside them
load common

setup() {
    cd "$BATS_TEST_DIRNAME/.."
    command -v gnuplot > /dev/null || skip "no gnuplot"
}

@test "the pictures that the README shows are drawn from the results, and show their rows" {
    run -0 scripts/pictures.sh "$BATS_TEST_TMPDIR"
    for name in exp1 exp2 exp3; do
        grep -qF "results/$name.svg" README.md
        [ -s "results/$name.svg" ]
        grep -qF '</svg>' "$BATS_TEST_TMPDIR/$name.svg"
    done
    for text in 'direct (recipe fp8)' 'ring, post' 256; do grep -qF "$text" "$BATS_TEST_TMPDIR/exp1.svg"; done
    for row in '#2a' '#4' ours; do grep -qF ">$row " "$BATS_TEST_TMPDIR/exp2.svg"; done
    for text in 7B 13B 175B 'fp8-lm, planned'; do grep -qF ">$text<" "$BATS_TEST_TMPDIR/exp3.svg"; done
}

@test "what cannot be drawn is refused" {
    run -2 scripts/pictures.sh "$BATS_TEST_TMPDIR/none"
    [[ $output = *"there is no folder"* ]]
    run -2 scripts/pictures.sh a b
    mkdir -p "$BATS_TEST_TMPDIR/repo/results" "$BATS_TEST_TMPDIR/repo/scripts"
    cp scripts/pictures.sh "$BATS_TEST_TMPDIR/repo/scripts"
    run -2 "$BATS_TEST_TMPDIR/repo/scripts/pictures.sh"
    [[ $output = *"there is no results/exp1_"* ]]
    sed 's/^  sqrt .*//' results/exp1_cpu_2026-11-24.txt > "$BATS_TEST_TMPDIR/repo/results/exp1_cpu_x.txt"
    run -2 "$BATS_TEST_TMPDIR/repo/scripts/pictures.sh"
    [[ $output = *"has not the five modes"* ]]
}
