#!/usr/bin/env bats
# hf.bats: models of other programs in and out through the binary: the same bits from every topology, and a model that goes on where it stood. Formats are
# tested in hf.cpp and safetensors.cpp, losses against transformers' in train_gpt_fp8.cpp and by scripts/hf_check.py.
# shellcheck disable=SC2030,SC2031,SC2086,SC2154 # flags are lists of words; output, status and stderr are bats's

load common

setup_file() {
    use_binary
    export OMP_WAIT_POLICY=passive golden="$BATS_TEST_DIRNAME/golden"
    text_file "$BATS_FILE_TMPDIR/text.txt" 400
    export shape='--layers 2 --heads 4 --width 64 --seq-len 16 --micro-batch 2 --vocab 300'
}

setup() { cd "$BATS_FILE_TMPDIR" || return; }

# same_tensors DIR1 DIR2: both have the same tensors in one file, whatever wrote it
same_tensors() {
    perl -e '
        sub tensors {
            open my $f, "<:raw", "$_[0]/model.safetensors" or die "$_[0]: $!";
            local $/; my $all = <$f>; my $n = unpack("Q<", $all); my ($header, %t) = (substr($all, 8, $n));
            while ($header =~ /"([^"]+)":\{"dtype":"(\w+)","shape":\[([\d,]*)\],"data_offsets":\[(\d+),(\d+)\]\}/g) {
                $t{$1} = "$2 $3 " . substr($all, 8 + $n + $4, $5 - $4);
            }
            return %t;
        }
        my (%a, %b); %a = tensors($ARGV[0]); %b = tensors($ARGV[1]);
        die "other tensors" if join(",", sort keys %a) ne join(",", sort keys %b) || !%a;
        for (sort keys %a) { die "$_ differs" if $a{$_} ne $b{$_} }' "$1" "$2"
}

@test "a model of transformers goes in and comes out with the same bits, without data" {
    local recipe
    for recipe in bf16 fp32; do
        "$TRAIN" --init "$golden/hf_gpt_neox" --recipe $recipe --steps 0 --seq-len 8 --export-dtype bf16 --export-hf neox --output-dir log > out
        grep -q '^the model is in neox, in bf16$' out
        same_tensors "$golden/hf_gpt_neox" neox
        "$TRAIN" --init "$golden/hf_gpt2" --recipe $recipe --steps 0 --seq-len 8 --export-dtype bf16 --export-hf gpt2 --output-dir log > out
        # its files are several, ours one: once more through ours
        "$TRAIN" --init gpt2 --recipe $recipe --steps 0 --seq-len 8 --export-dtype fp32 --export-hf gpt2_fp32 --output-dir log > out
        "$TRAIN" --init gpt2_fp32 --recipe $recipe --steps 0 --seq-len 8 --export-dtype bf16 --export-hf gpt2_again --output-dir log > out
        cmp gpt2/model.safetensors gpt2_again/model.safetensors
        cmp gpt2/config.json gpt2_again/config.json
    done
    [ ! -e gpt2/model.safetensors.index.json ]
    [ "$(find . -name '*unfinished*' -o -name '*replaced*' | wc -l)" = 0 ]
}

@test "every topology reads and writes the same" {
    have_mpi
    local position tied topology
    for position in rope learned; do
        for tied in yes no; do
            rm -rf one several one_more
            "$TRAIN" $shape --position $position --tie-embeddings $tied --recipe fp32 --steps 0 --export-hf one --output-dir log > out
            for topology in "2 --tp 2" "2 --pp 2" "2 --zero 1" "4 --tp 2 --zero 2" "4 --tp 2 --pp 2"; do
                mpi ${topology%% *} "$TRAIN" --init one --seq-len 16 --micro-batch 2 --recipe fp32 --steps 0 --export-hf several --output-dir log ${topology#* } > out 2>&1 || {
                    cat out
                    return 1
                }
                cmp one/model.safetensors several/model.safetensors
                cmp one/config.json several/config.json
            done
        done
    done
    # masters in FP16 and in parts by tensor: what they hold, from whoever holds it
    "$TRAIN" --init one --seq-len 16 --recipe fp8-lm --steps 0 --export-dtype fp32 --export-hf fp8 --output-dir log > out
    mpi 2 "$TRAIN" --init one --seq-len 16 --recipe fp8-lm --zero 1 --steps 0 --export-dtype fp32 --export-hf several --output-dir log > out
    cmp fp8/model.safetensors several/model.safetensors
    run ! cmp -s fp8/model.safetensors one/model.safetensors
    "$TRAIN" --init one --seq-len 16 --recipe fp8 --steps 0 --export-dtype fp32 --export-hf fp8 --output-dir log > out
    mpi 2 "$TRAIN" --init one --seq-len 16 --recipe fp8 --zero 1 --steps 0 --export-dtype fp32 --export-hf several --output-dir log > out
    cmp fp8/model.safetensors several/model.safetensors
}

@test "a trained model goes out at the end of its run, and goes on with the loss that it had" {
    local flags="--train-data text.txt --val-data text.txt --val-batches 4 --val-every 20 --seq-len 16 --micro-batch 2 --recipe fp32" position
    for position in rope learned; do
        rm -rf model
        "$TRAIN" $flags $shape --position $position --steps 20 --lr 1e-2 --export-hf model --output-dir before > out
        "$TRAIN" --val-data text.txt --val-batches 4 --init model --seq-len 16 --micro-batch 2 --recipe fp32 --steps 0 --output-dir after > out
        holds 'x < 0.8 * y' x="$(last val_loss before)" y="$(first val_loss before)"
        [ "$(last val_loss before)" = "$(first val_loss after)" ]
    done
    # by llm.c's format too, in which the vocabulary is padded
    "$TRAIN" --init model --seq-len 16 --recipe fp32 --steps 0 --export-llmc model.bin --output-dir log > out
    "$TRAIN" --init model.bin --seq-len 16 --recipe fp32 --steps 0 --export-hf from_bin --export-llmc again.bin --output-dir log > out
    cmp model.bin again.bin
    same_tensors model from_bin
    "$TRAIN" --init "$golden/llmc_v5.bin" --seq-len 12 --recipe bf16 --steps 0 --export-llmc v5.bin --output-dir log > out
    [ "$(stat -c %s v5.bin)" = "$(stat -c %s "$golden/llmc_v5.bin")" ]
    cmp -n 1024 v5.bin "$golden/llmc_v5.bin"
}

@test "a tokenizer goes along, from --init or from --hf-tokenizer" {
    mkdir tokenizer
    echo '{"a": 1}' > tokenizer/tokenizer.json
    echo '{"b": 1}' > tokenizer/vocab.json
    "$TRAIN" --init "$golden/hf_gpt2" --steps 0 --seq-len 8 --export-hf with --hf-tokenizer tokenizer --output-dir log > out
    "$TRAIN" --init with --steps 0 --seq-len 8 --export-hf later --output-dir log > out
    cmp tokenizer/tokenizer.json later/tokenizer.json
    cmp tokenizer/vocab.json later/vocab.json
    "$TRAIN" --init later --steps 0 --seq-len 8 --export-hf later --output-dir log > out # over itself
    cmp tokenizer/vocab.json later/vocab.json
}

@test "a full disk is said, ends with status 1, and leaves the export before" {
    "$TRAIN" $shape --recipe fp32 --steps 0 --export-hf full --output-dir log > out
    cp -r full earlier
    run -1 --separate-stderr bash -c 'trap "" XFSZ; ulimit -f 100; exec "$@"' limited "$TRAIN" $shape --seed 5 --recipe fp32 --steps 0 --export-hf full --output-dir log
    [[ $stderr == "train_gpt_fp8: cannot write 'full.unfinished-"*"': File too large"* ]]
    diff -r full earlier
    [ "$(find . -name '*unfinished*' | wc -l)" = 0 ]
}
