#!/usr/bin/env bats
# generate.bats: --generate: the same tokens on any number of ranks, from prompts of text and of numbers, and what the flags of sampling do to them.
# shellcheck disable=SC2086,SC2154 # $TINY is a list of words; output is bats's

load common

setup_file() {
    use_binary
    text_file "$BATS_FILE_TMPDIR/text.txt" 4000
    shard "$BATS_FILE_TMPDIR/a.bin" uint16 5000 0 90
    perl -e 'print pack("l<256", 20240328, 2, 100, 99, (0) x 252), map { my $t = "<$_>"; chr(length $t) . $t } 0 .. 99' > "$BATS_FILE_TMPDIR/tokens.bin"
}

setup() {
    cd "$BATS_TEST_TMPDIR" || return
    data=$BATS_FILE_TMPDIR
}

on() { # RANKS DIR FLAGS…
    local ranks=$1 dir=$2
    shift 2
    mpi "$ranks" "$TRAIN" --train-data "$data/text.txt" $TINY --output-dir "$dir" "$@" > "$dir.out" < /dev/null
}

# tokens DIR: those that were generated, a line a sample
tokens() { grep '"sample":' "$1/log.jsonl" | sed 's/.*"tokens":\[\([^]]*\)\].*/\1/'; }

# texts DIR: what --sample-every printed
texts() { awk '/^(step|sample) / { inside = / \| sample of/ } inside' "$1.out"; }

@test "a model that has learnt its text goes on with it, beyond its window too" {
    have_mpi
    on 1 run --micro-batch 8 --steps 150 --lr 5e-3 --recipe fp32 --generate 100 --prompt 'the cat ' --temperature 0
    [ "$(tokens run | tr ',' '\n' | wc -l)" = 100 ]
    grep -q '^sample 1/1 | 100 tokens after a prompt of 8 | .* tok/s$' run.out
    [[ $(tail -n 1 run/log.jsonl) == '{"sample":1,"prompt_tokens":8,"tokens":['*'"text":"the cat '* ]]
    # the text is what the tokens are, and the console shows it
    tail -n 1 run/log.jsonl | perl -ne '
        my ($n, $t) = /"tokens":\[([^]]*)\].*"text":"the cat (.*)"/;
        $t =~ s/\\n/\n/g;
        exit(join("", map { chr } split /,/, $n) ne $t)'
    grep -q '^the cat ' run.out
    # most words are words of the text
    tokens run | tr ',' '\n' | awk '{ printf "%c", $1 }' | tr -s ' .' '\n' | sed '1d;$d' > words
    tr -s ' .' '\n' < "$data/text.txt" | sort -u > known
    holds 'k > 0.7 * n' n="$(wc -l < words)" k="$(grep -cxFf known words)"
    valid_json run/log.jsonl
}

@test "every topology generates the same, and so do --sample-every's" {
    have_mpi
    local flags="--recipe fp32 --steps 16 --lr 5e-3 --micro-batch 2 --global-batch 256 --generate 70 --prompt the --samples 2 --sample-every 8 --sample-len 50" other temperature
    for temperature in 0 0.9; do
        on 1 one $flags --temperature $temperature
        on 2 two $flags --temperature $temperature
        on 2 pipeline $flags --temperature $temperature --pp 2
        on 2 shared $flags --temperature $temperature --tp 2
        on 4 both $flags --temperature $temperature --tp 2 --pp 2
        [ "$(tokens one | wc -l)" = 2 ]
        [ "$(texts one | grep -c ' | sample of 50 tokens')" = 2 ]
        for other in two pipeline shared both; do
            [ "$(tokens one)" = "$(tokens $other)" ] || { echo "$other at $temperature"; return 1; }
            [ "$(texts one)" = "$(texts $other)" ] || { echo "samples of $other"; return 1; }
        done
        if [ $temperature = 0 ]; then [ "$(tokens one | sort -u | wc -l)" = 1 ]; else [ "$(tokens one | sort -u | wc -l)" = 2 ]; fi
    done
}

@test "each recipe and shape generates; the likeliest token is what every filter leaves at last" {
    have_mpi
    local flags
    while read -r flags; do
        on 1 zero --steps 4 --lr 5e-3 --generate 40 --temperature 0 $flags
        on 1 k --steps 4 --lr 5e-3 --generate 40 --top-k 1 $flags
        on 1 p --steps 4 --lr 5e-3 --generate 40 --top-p 1e-6 --temperature 2 $flags
        on 1 all --steps 4 --lr 5e-3 --generate 40 --temperature 5 $flags
        [ "$(tokens zero)" = "$(tokens k)" ] && [ "$(tokens zero)" = "$(tokens p)" ] && [ "$(tokens zero)" != "$(tokens all)" ] || { echo "failed: $flags"; return 1; }
    done <<'FLAGS'
--recipe fp8
--recipe fp8 --fp8-scaling current --recompute 2
--recipe fp8 --fp8-scaling block
--recipe fp8 --recompute 0 --bf16-layers first:1
--recipe bf16 --position learned
--recipe fp32 --tie-embeddings no --heads 1
--seq-len 1 --micro-batch 16
--seq-len 2 --heads 4 --position learned
FLAGS
}

@test "tokens by number, and as text by a tokenizer file; a prompt longer than the window" {
    have_mpi
    local long
    long=$(seq -s ' ' 0 60)
    on 1 numbers --train-data "$data/a.bin" --vocab 100 --steps 0 --generate 5 --prompt " 7 8  9 " --recipe fp32 --temperature 0
    [[ $(tail -n 1 numbers.out) =~ ^7\ 8\ 9(\ [0-9]+){5}$ ]]
    on 1 text --train-data "$data/a.bin" --vocab 100 --steps 0 --generate 5 --prompt "7 8 9" --recipe fp32 --temperature 0 --tokenizer "$data/tokens.bin"
    [ "$(tail -n 1 text.out)" = "$(tail -n 1 numbers.out | sed 's/ /></g; s/^/</; s/$/>/')" ]
    on 1 long --train-data "$data/a.bin" --vocab 100 --steps 0 --generate 5 --prompt "$long" --recipe fp32 --temperature 0
    on 1 cut --train-data "$data/a.bin" --vocab 100 --steps 0 --generate 5 --prompt "$(seq -s ' ' 29 60)" --recipe fp32 --temperature 0
    [ "$(tokens long)" = "$(tokens cut)" ] # its last 32 tokens are all that is seen
    on 1 none --train-data "$data/a.bin" --vocab 100 --steps 0 --generate 3 --tokenizer "$data/tokens.bin"
    grep -q '^<99>' none.out # without a prompt it starts at the end of a text
}

@test "a model in a file generates without data" {
    local golden=$BATS_TEST_DIRNAME/golden
    "$TRAIN" --init "$golden/llmc_v3.bin" --seq-len 12 --steps 0 --generate 6 --prompt "1 2 3" --temperature 0 --recipe fp32 --output-dir file > file.out
    [[ $(tail -n 1 file.out) =~ ^1\ 2\ 3(\ [0-9]+){6}$ ]]
    "$TRAIN" --init "$golden/llmc_v3.bin" --train-data "$data/a.bin" --seq-len 12 --steps 0 --generate 6 --prompt "1 2 3" --temperature 0 --recipe fp32 --val-every 0 \
        --output-dir data > data.out
    [ "$(tokens file)" = "$(tokens data)" ]
    "$TRAIN" $TINY --vocab 256 --steps 0 --generate 6 --prompt "the" --output-dir bytes > bytes.out
    [[ $(tail -n 1 bytes/log.jsonl) == *'"text":"the'* ]]
}
