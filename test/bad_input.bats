#!/usr/bin/env bats
# bad_input.bats: what the binary refuses: one line on stderr that names the flag or file and the value, exit status 2, and nothing written.
#
# Each line of a table is the flags, then a pattern that the one line must match. The same goes for ranks under mpirun: one line, whoever
# says it, and all of them end. mpirun adds a banner of its own.
# shellcheck disable=SC2030,SC2031,SC2086,SC2154 # $TINY is a list of words; output, status and stderr are bats's

load common

setup_file() {
    use_binary
    text_file "$BATS_FILE_TMPDIR/text.txt" 400
    cd "$BATS_FILE_TMPDIR" || return
    shard good.bin uint16 4000 0 99
    shard wide.bin uint32 4000 0 99
    shard few.bin uint16 100 0 99
    : > empty.bin
    : > empty.txt
    perl -e 'print pack("l<3 x1012", 20240520, 1, 0)' > none.bin
    head -c 5000 good.bin > truncated.bin
    head -c 700 good.bin > header.bin
    { cat good.bin && printf x; } > longer.bin
    perl -e 'print pack("l<3 x1012", 20240520, 1, 4000), pack("v*", (5) x 2345, 50257, (5) x 1654)' > token.bin
    perl -e 'print pack("l<3 x1012", 20240801, 7, 4000), pack("V*", (5) x 3999, 4294967295)' > token_wide.bin
    perl -e 'print pack("l<3 x1012", 20240521, 1, 4000), pack("v*", (5) x 4000)' > magic.bin
    perl -e 'print pack("l<3 x1012", 20240520, 2, 4000), pack("v*", (5) x 4000)' > version.bin
    perl -e 'print pack("l<3 x1012", 20240801, 9, 4000), pack("V*", (5) x 4000)' > version32.bin
    perl -e 'print pack("l<3 x1012", 20240801, 8, 4000), pack("V*", (5 | 1 << 31) x 4000)' > mask.bin
    perl -e 'print pack("l<3 x1012", 20240522, 1, 4000), pack("v*", (5) x 4000)' > choice.bin
    cp "$BATS_TEST_DIRNAME/golden/llmc_v3.bin" model.bin
    head -c 30000 model.bin > model_cut.bin
    head -c 600 model.bin > model_header.bin
    { cat model.bin && printf x; } > model_longer.bin
    { perl -e 'print pack("l<2", 20240326, 4)' && tail -c +9 model.bin; } > model_version.bin
    { head -c 20 model.bin && perl -e 'print pack("l<", 3)' && tail -c +25 model.bin; } > model_heads.bin
    printf '1|ab|c|d\n0|abc|de|f\n' | choices eval.bin 1
    head -c 1040 eval.bin > eval_cut.bin
    printf '2|ab|c|d\n' | choices eval_label.bin 1
    printf '0|ab||d\n' | choices eval_empty.bin 1
    printf '0||c|d\n' | choices eval_context.bin 2
    perl -e 'print pack("l<256", 20240328, 2, 100, 99, (0) x 252), "\1x" x 100' > tokens.bin
    head -c 1200 tokens.bin > tokens_cut.bin
    echo "not a folder" > file
    mkdir folder
    cp -r "$BATS_TEST_DIRNAME/golden/hf_gpt2" hf_gpt2
    cp -r "$BATS_TEST_DIRNAME/golden/hf_gpt_neox" hf_neox
    cp -r hf_neox hf_parallel
    sed 's/"use_parallel_residual": false/"use_parallel_residual": true/' hf_neox/config.json > hf_parallel/config.json
    cp -r hf_neox hf_cut
    head -c 9000 hf_neox/model.safetensors > hf_cut/model.safetensors
    cp -r hf_gpt2 hf_part
    rm hf_part/model-00002-of-00003.safetensors
}

setup() { cd "$BATS_FILE_TMPDIR" || return; }

# refuses COMMAND… PATTERN: the status is 2, the only line of stderr starts with the program's name and matches the pattern, stdout is
# empty, and there is no out
refuses() {
    local pattern=${*: -1} start=$SECONDS
    run --separate-stderr timeout 20 "${@:1:$#-1}"
    # shellcheck disable=SC2053 # a pattern
    if [ "$status" != 2 ] || [ "$(wc -l <<< "$stderr")" != 1 ] || [[ $stderr != "train_gpt_fp8: "$pattern ]] || [ -n "$output" ] ||
        [ -e out ] || ((SECONDS - start > 10)); then
        printf 'command: %s\nwanted: %s\nstatus %s after %s s, out %s\nstderr: %s\nstdout: %s\n' \
            "${*:1:$#-1}" "$pattern" "$status" $((SECONDS - start)) \
            "$([ -e out ] && echo "was made" || echo "was not made")" "$stderr" "${output:0:300}"
        rm -rf out
        return 1
    fi
}

# refuses_each: a table from stdin of "flags | pattern", each after flags that are good
refuses_each() {
    local flags words pattern bad=0
    while IFS='|' read -r flags pattern; do
        eval "words=($flags)"
        refuses "$TRAIN" --train-data text.txt $TINY --steps 4 --output-dir out "${words[@]}" "${pattern# }" || bad=1
    done
    [ $bad = 0 ]
}

@test "what is good is not refused" { # else all below would pass by a mistake in the flags that they share
    run -0 --separate-stderr "$TRAIN" --train-data text.txt $TINY --steps 4 --output-dir "$BATS_TEST_TMPDIR/out"
    [ -z "$stderr" ]
    run -0 --separate-stderr "$TRAIN" --train-data good.bin $TINY --vocab 100 --steps 1 --output-dir "$BATS_TEST_TMPDIR/out"
    run -0 --separate-stderr "$TRAIN" --train-data wide.bin $TINY --vocab 100 --steps 1 --output-dir "$BATS_TEST_TMPDIR/out"
    run -0 --separate-stderr "$TRAIN" --train-data good.bin --init model.bin --seq-len 12 --val-every 0 --steps 1 \
        --output-dir "$BATS_TEST_TMPDIR/out"
    run -0 --separate-stderr "$TRAIN" --train-data token.bin $TINY --vocab 50258 --steps 1 --output-dir "$BATS_TEST_TMPDIR/out"
}

@test "exports that cannot be" {
    mkdir export notes
    echo "mine" > notes/notes.txt
    refuses_each <<'EOT'
--export-dtype bf16 | --export-dtype*--export-hf*
--hf-tokenizer hf_gpt2 | --hf-tokenizer*--export-hf*
--export-hf x --hf-tokenizer hf_gpt2 | --hf-tokenizer: 'hf_gpt2' has none of tokenizer.json*
--export-hf x --hf-tokenizer nowhere | --hf-tokenizer: there is no folder 'nowhere'*
--export-hf notes | --export-hf: 'notes' is no earlier export*notes.txt*
--export-hf hf_gpt2 | --export-hf: 'hf_gpt2' is no earlier export*another program*
--export-hf file | --export-hf: 'file' is there and is no folder*
--export-hf nowhere/x | --export-hf: there is no folder 'nowhere'*
--export-hf . | --export-hf: '.' cannot be replaced*
--export-hf out | --export-hf: 'out' is --output-dir*
--export-hf x --export-llmc x/ | --export-hf and --export-llmc are both*
--export-hf '' | --export-hf: the value is empty*
--export-llmc x | --export-llmc: llm.c's models have learned positions*
--export-llmc x --position learned --tie-embeddings no | --export-llmc:*token embedding*
--export-llmc x --position learned --export-dtype fp16 | --export-llmc:*fp16*
--export-llmc good.bin --position learned | --export-llmc: 'good.bin' is there and is no llm.c model*
--export-llmc folder --position learned | --export-llmc: 'folder' is there*
--export-dtype fp8 --export-hf x | --export-dtype: 'fp8' is not known*
EOT
    [ ! -e x ]
    [ "$(cat notes/notes.txt)" = mine ]
    refuses "$TRAIN" --layers 2 --heads 2 --width 64 --steps 0 --export-hf x --output-dir out '--vocab is missing*'
    refuses "$TRAIN" --layers 2 --heads 2 --width 64 --steps 0 --val-split 0.1 --export-hf x --output-dir out '--val-split*'
    refuses "$TRAIN" --init hf_gpt2 --seq-len 8 --export-hf x --output-dir out '--train-data is missing*'
}

@test "unknown flags and stray words" {
    refuses_each <<'EOT'
--frobnicate 3 | unknown flag '--frobnicate'*--help*
--micro-bach 4 | unknown flag '--micro-bach'*--micro-batch*
--learning-rate 1 | unknown flag '--learning-rate'*
-Q 3 | unknown flag '-Q'*
-b4 | unknown flag '-b4'*-b*'4'*
stray | stray argument 'stray'*
--train-data text.txt good.bin | stray argument 'good.bin'*--train-data*
--resumed | unknown flag '--resumed'*
--no-steps | unknown flag '--no-steps'*
EOT
}

@test "numbers that are none, or out of range" {
    refuses_each <<'EOT'
--seq-len abc | --seq-len: 'abc'*whole number*
--seq-len 12x | --seq-len: '12x'*whole number*
--seq-len 1e3 | --seq-len: '1e3'*whole number*
--seq-len '' | --seq-len: ''*
--seq-len | --seq-len needs a value*
--seq-len --steps 3 | --seq-len needs a value*
--micro-batch -1 | --micro-batch: '-1' is out of range; allowed: 1 *
--micro-batch 0 | --micro-batch: '0' is out of range; allowed: 1 *
-b 0 | -b (--micro-batch): '0' is out of range; allowed: 1 *
--micro-batch 99999999999999999999 | --micro-batch: '99999999999999999999' is out of range*
--global-batch 0 | --global-batch: '0' is out of range*
--steps -2 | --steps: '-2' is out of range; allowed: -1 *
--layers 0 | --layers: '0' is out of range*
--heads -2 | --heads: '-2' is out of range*
--lr 0 | --lr: '0' is out of range; allowed: above 0*
--lr -1e-3 | --lr: '-1e-3' is out of range*
--lr fast | --lr: 'fast' is not a number*
--lr nan | --lr: 'nan' is not a number*
--lr inf | --lr: 'inf'*
--lr 1e400 | --lr: '1e400'*
--min-lr-frac 1.5 | --min-lr-frac: '1.5' is out of range; allowed: 0 to 1*
--beta2 1 | --beta2: '1' is out of range*below 1*
--val-split 1 | --val-split: '1' is out of range*below 1*
--val-split -0.1 | --val-split: '-0.1' is out of range*
--seed -1 | --seed: '-1' is out of range*
--recompute 3 | --recompute: '3' is out of range; allowed: 0 to 2*
--clip -1 | --clip: '-1' is out of range*
--sample-len 0 | --sample-len: '0' is out of range*
--grad-dtype fp16 | --grad-dtype: 'fp16'*fp32*bf16*e4m3*e5m2*
--grad-scaling half | --grad-scaling: 'half'*pre*post*sqrt*auto*
--grad-reduce tree | --grad-reduce: 'tree'*ring*direct*
--grad-accum-dtype e5m2 | --grad-accum-dtype: 'e5m2'*fp32*bf16*e4m3*
--grad-accum-rounding up | --grad-accum-rounding: 'up'*nearest*stochastic*
--master-dtype int8 | --master-dtype: 'int8'*fp32*bf16*fp16*e4m3*e5m2*
--m-dtype fp64 | --m-dtype: 'fp64'*fp32*e5m2*
--v-dtype 8 | --v-dtype: '8'*fp32*e5m2*ue5m3*
--m-dtype ue5m3 | --m-dtype: 'ue5m3' is not known; allowed: fp32*e5m2*
--master-dtype ue5m3 | --master-dtype: 'ue5m3' is not known; allowed: fp32*e5m2*
--opt-block 129 | --opt-block: '129' is not known; allowed: 0, 128*
--opt-block -1 | --opt-block: '-1' is not known; allowed: 0, 128*
--master-rounding down | --master-rounding: 'down'*nearest*stochastic*
--moment-rounding 1 | --moment-rounding: '1'*nearest*stochastic*
--recipe fp4 | --recipe: 'fp4'*fp8*bf16*
--lr-schedule step | --lr-schedule: 'step'*cosine*wsd*
--position sine | --position: 'sine'*rope*learned*
--tie-embeddings maybe | --tie-embeddings: 'maybe'*yes*no*
--bf16-layers middle:1 | --bf16-layers: 'middle:1'*first:N*
--fp8-min-size -1 | --fp8-min-size: '-1' is out of range; allowed: 0 *
--fp8-min-size small | --fp8-min-size: 'small' is not a whole number*
--bf16-layers first:-1 | --bf16-layers: 'first:-1'*first:N*
-a 2 | -a (--overfit-batch): '2'*0 or 1*
--overfit-batch=1 | --overfit-batch*'1'*
EOT
}

@test "flags that do not go together" {
    refuses_each <<'EOT'
--width 65 | --width: 65 is not divisible by --heads 2*
--width 66 --heads 22 --position rope | --width: 66 over --heads 22*even*
--global-batch 200 | --global-batch: 200 tokens*micro-batch 4*seq-len 32*128*
--global-batch 64 | --global-batch: 64 tokens*128*
--warmup 5 | --warmup: 5 is more than the 4 steps*
--micro-batch 1000000 --seq-len 1000000 | --micro-batch 1000000*--seq-len 1000000*
--fp8-fwd e5m2 --fp8-bwd e5m2 | --fp8-fwd e5m2*--fp8-bwd e5m2*
--fp8-fwd e5m2 | --fp8-fwd e5m2*--fp8-bwd e5m2*
--recipe bf16 --fp8-fwd e4m3 | --fp8-fwd*--recipe bf16*
--recipe bf16 --fp8-bwd e5m2 | --fp8-bwd*--recipe bf16*
--recipe fp32 --fp8-scaling current | --fp8-scaling*--recipe fp32*
--recipe bf16 --fp8-scaling block | --fp8-scaling*--recipe bf16*
--fp8-scaling blocks | --fp8-scaling: 'blocks'*allowed: delayed, current, block*
--fp8-scaling block --fp8-fwd e5m2 --fp8-bwd e5m2 | --fp8-fwd e5m2*--fp8-bwd e5m2*
--recipe bf16 --fp8-min-size 1024 | --fp8-min-size*--recipe bf16*
--recipe bf16 --bf16-layers first:1 | --bf16-layers*--recipe bf16*
--grad-dtype e4m3 --grad-scaling auto | --grad-scaling*--grad-reduce direct*--grad-reduce ring*
--recipe bf16 --grad-scaling pre | --grad-scaling*--grad-dtype fp32*
--grad-dtype bf16 --grad-scaling pre --grad-reduce ring | --grad-scaling*--grad-dtype bf16*
--grad-dtype fp32 --grad-accum-dtype bf16 | --grad-accum-dtype bf16*narrower than --grad-dtype fp32*
--recipe fp8-lm --grad-dtype bf16 --grad-accum-dtype e4m3 | --grad-accum-dtype e4m3*narrower than --grad-dtype bf16*
--recipe bf16 --grad-accum-rounding nearest | --grad-accum-rounding*fp32*
--log-tensors | --log-tensors*1 replica*
--recipe bf16 --opt-block 128 | --opt-block 128*fp32 or bf16*no scales*
--opt-block 128 --master-dtype bf16 --m-dtype bf16 --v-dtype fp32 | --opt-block 128*fp32 or bf16*no scales*
--recipe bf16 --master-rounding stochastic | --master-rounding*fp32*--master-dtype*
--master-rounding nearest --master-dtype fp32 | --master-rounding*fp32*--master-dtype*
--recipe bf16 --moment-rounding stochastic --master-dtype bf16 | --moment-rounding*fp32*--m-dtype*--v-dtype*
--moment-rounding nearest --m-dtype fp32 --v-dtype fp32 | --moment-rounding*fp32*--m-dtype*--v-dtype*
--recipe fp32 --master-dtype bf16 | --master-dtype bf16*recipe fp32*
--recipe fp8-lm --fp8-fwd e5m2 | --fp8-fwd e5m2*--fp8-bwd e5m2*
--bf16-layers first:1,last:2 | --bf16-layers: first:1,last:2*2 layers*
--val-data text.txt --val-split 0.1 | --val-split: 0.1*--val-data*
--val-data text.txt --val-split 0.1 --val-every 1 | --val-split: 0.1*--val-data*
--steps -1 --global-batch 1280000 | --global-batch: 1280000 tokens*epoch*
--vocab 100 | --train-data: text.txt: the token at offset * is 1*vocabulary of 100*
--staged | --staged is for GPU builds*
--matmul-choice timed | --matmul-choice is for GPU builds*
--matmul-choice library | --matmul-choice is for GPU builds*
--matmul-cache none | --matmul-cache is for GPU builds*
--matmul-choice first | --matmul-choice: 'first' is not known; allowed: timed, library*
EOT
    refuses "$TRAIN" --train-data text.txt --layers 2 --heads 2 --steps 4 --output-dir out '*--width*'
    refuses "$TRAIN" --layers 2 --heads 2 --width 64 --steps 4 --output-dir out '--train-data is missing*'
    refuses "$TRAIN" --layers 2 --heads 2 --width 64 --steps 0 --output-dir out '--vocab is missing*'
    refuses "$TRAIN" --layers 2 --heads 2 --width 64 --steps 0 --val-split 0.1 --vocab 256 --output-dir out '--val-split: there is no --train-data*'
    refuses env OMP_NUM_THREADS=5000 "$TRAIN" --train-data text.txt $TINY --steps 4 --output-dir out 'OMP_NUM_THREADS is "5000"*4096*'
}

@test "llm.c's flags that are not carried are refused by name" {
    local flag
    for flag in f w ge nm lg pn pr pg pi pf ps h; do
        refuses "$TRAIN" --train-data text.txt $TINY --steps 4 --output-dir out -$flag 1 "-$flag of llm.c is not carried: ?*"
    done
}

@test "multiple-choice files that cannot be scored" {
    refuses_each <<'EOT'
--eval-data missing.bin | --eval-data: cannot open 'missing.bin': No such file*
--eval-data eval.bin,missing.bin | --eval-data: cannot open 'missing.bin'*
--eval-data eval.bin, | --eval-data: 'eval.bin,' has an empty entry*
--eval-data '' | --eval-data:*empty*
--eval-data folder | --eval-data: 'folder' is not a file*
--eval-data good.bin | --eval-data: 'good.bin' is no multiple-choice file: it starts with 20240520, not 20240522*
--eval-data empty.bin | --eval-data: 'empty.bin' is no multiple-choice file: it has 0 bytes*
--eval-data eval_cut.bin | --eval-data: 'eval_cut.bin' is cut short*example 0*
--eval-data eval_label.bin | --eval-data: 'eval_label.bin': the label of example 0 is 2; allowed for its 2 completions: 0 to 1*
--eval-data eval_empty.bin | --eval-data: 'eval_empty.bin': completion 0 of example 0 is empty*
--eval-data eval_context.bin | --eval-data: 'eval_context.bin': the context of example 0 is empty*
--eval-data eval.bin --train-data good.bin --vocab 100 | --eval-data: 'eval.bin': in a completion of example 0 is the token 100; allowed in a vocabulary of 100: 0 to 99*
--eval-data eval.bin --seq-len 1 --global-batch 4 | --eval-data: 'eval.bin': completion 0 of example 1 has 2 tokens, and --seq-len 1*
EOT
    refuses "$TRAIN" --train-data text.txt $TINY --steps 4 --output-dir out -h 1 '-h of llm.c is not carried: --eval-data FILE*'
}

@test "tokenizer files that are none, or another model's" {
    run -0 "$TRAIN" --train-data good.bin --vocab 100 $TINY --steps 0 --tokenizer tokens.bin --output-dir "$BATS_TEST_TMPDIR/out"
    refuses_each <<'EOT'
--tokenizer tokens.bin | --tokenizer: a model of text files*
--train-data good.bin --vocab 101 --tokenizer tokens.bin | --tokenizer: 'tokens.bin' has 100 tokens, and the model's vocabulary is 101*
--train-data good.bin --vocab 100 --tokenizer tokens_cut.bin | --tokenizer: 'tokens_cut.bin' is cut short: it ends in token 88 of 100*
--train-data good.bin --vocab 100 --tokenizer good.bin | --tokenizer: 'good.bin' is no tokenizer file: it starts with 20240520, not 20240328*
--train-data good.bin --vocab 100 --tokenizer missing.bin | --tokenizer: cannot open 'missing.bin': No such file*
EOT
}

@test "generation that cannot be" {
    refuses_each <<'EOT'
--prompt the | --prompt says how tokens are generated*--generate N with it
--samples 2 --sample-every 1 | --samples says how tokens are generated*--generate N with it
--temperature 0.5 | --temperature says how tokens are generated*--generate N or --sample-every N with it
--top-k 5 | --top-k says how*
--top-p 0.5 | --top-p says how*
--generate -1 | --generate: '-1' is out of range; allowed: 0 *
--generate 5 --temperature -1 | --temperature: '-1' is out of range*
--generate 5 --top-p 0 | --top-p: '0' is out of range; allowed: above 0, 1 or less*
--generate 5 --top-k -1 | --top-k: '-1' is out of range*
--generate 5 --samples 0 | --samples: '0' is out of range*
--generate 5 --prompt '' | --prompt:*empty*
--train-data good.bin --vocab 100 --generate 5 --prompt 'the dog' | --prompt: 'the dog' is no list of tokens by number*tokenize.py*
--train-data good.bin --vocab 100 --generate 5 --prompt '5 6x' | --prompt: '5 6x' is no list of tokens by number*
--train-data good.bin --vocab 100 --generate 5 --prompt '5 -6' | --prompt: '5 -6' is no list of tokens by number*
--train-data good.bin --vocab 100 --generate 5 --prompt '5 99999999999999999999' | --prompt: '5 99999999999999999999' is no list*
--train-data good.bin --vocab 100 --generate 5 --prompt '99 100' | --prompt: the token 100 is not allowed in a vocabulary of 100: 0 to 99*
--train-data good.bin --vocab 100 --generate 5 --prompt ' ' | --prompt: ' ' has no token*
--vocab 150 --generate 5 --prompt 'é' | --prompt: the token 195 is not allowed in a vocabulary of 150: 0 to 149*
EOT
}

@test "data that cannot be trained on" {
    refuses_each <<'EOT'
--train-data missing.bin | --train-data: missing.bin*No such file*
--train-data 'missing*.bin' | --train-data: 'missing\*.bin' matches no file*
--train-data 'nowhere/*.bin' | --train-data: 'nowhere/\*.bin'*
--train-data folder | --train-data: folder is a folder*
--train-data /dev/null | --train-data: /dev/null*
--train-data empty.bin | --train-data: empty.bin is empty*
--train-data empty.txt | --train-data: empty.txt is empty*
--train-data none.bin | --train-data: none.bin is empty*0 tokens*
--train-data truncated.bin | --train-data: truncated.bin is truncated*5000*9024*
--train-data longer.bin | --train-data: longer.bin is truncated or damaged*9025*9024*
--train-data header.bin | --train-data: header.bin is truncated*700*1024*
--train-data magic.bin | --train-data: magic.bin*20240521*20240520*
--train-data version.bin | --train-data: version.bin*version 2*1*
--train-data version32.bin --vocab 9 | --train-data: version32.bin*version 9*7, and 8 with a loss mask*
--train-data mask.bin | --train-data: mask.bin*--vocab N is required*
--train-data mask.bin --vocab 5 | --train-data: mask.bin*offset 0 is 5;*0 to 4*
--train-data choice.bin | --train-data: choice.bin*multiple-choice*
--train-data model.bin | --train-data: model.bin*model*
--train-data token.bin | --train-data: token.bin: the token at offset 2345 is 50257*50256*
--train-data good.bin --vocab 99 | --train-data: good.bin: the token at offset * is 99*vocabulary of 99*
--train-data wide.bin | --train-data: wide.bin*uint32*--vocab*
--train-data token_wide.bin --vocab 100 | --train-data: token_wide.bin: the token at offset 3999 is 4294967295*
--train-data few.bin --vocab 100 | --train-data:*few.bin*3 windows*--micro-batch 4*
--train-data few.bin --vocab 100 --seq-len 100 | --train-data: few.bin has 100 tokens*--seq-len 100*101*
--train-data text.txt,good.bin | --train-data: text.txt is text but good.bin*
--train-data good.bin,wide.bin --vocab 100 | --train-data: good.bin*uint16*wide.bin*uint32*
--train-data 0.5:text.txt,text.txt | --train-data: some entries*no weight*
--train-data 0:text.txt,1:text.txt | --train-data: the weight*0:text.txt*
--train-data -1:text.txt | --train-data: the weight*-1:text.txt*
--train-data text.txt, | --train-data: 'text.txt,'*empty*
--train-data '' | --train-data:*empty*
--val-data missing.txt --val-every 1 | --val-data: missing.txt*
--val-data good.bin --val-every 1 | --val-data:*good.bin*
--val-data few.bin --train-data good.bin --vocab 100 --val-every 1 | --val-data:*few.bin*3 windows*
--val-split 0.999 --val-every 1 | --train-data: the training part*
EOT
}

@test "models that cannot be read" {
    local flags pattern
    while IFS='|' read -r flags pattern; do
        refuses "$TRAIN" --train-data good.bin --seq-len 12 --val-every 0 --steps 2 --output-dir out $flags "${pattern# }"
    done <<'EOT'
--init model_cut.bin | --init: 'model_cut.bin' is cut short*36352*30000*
--init model_header.bin | --init: 'model_header.bin'*600*
--init model_longer.bin | --init: 'model_longer.bin' is too long*
--init model_version.bin | --init: 'model_version.bin'*version 4*
--init model_heads.bin | --init: 'model_heads.bin'*3 heads, width 16*
--init good.bin | --init: 'good.bin'*20240520*20240326*
--init text.txt | --init: 'text.txt'*
--init folder | --init: 'folder'*
--init empty.bin | --init: 'empty.bin'*
--init hf_parallel | --init: 'hf_parallel/config.json' has use_parallel_residual true*one after the other*
--init hf_cut | --init: cannot read 'hf_cut/model.safetensors'*
--init hf_part | --init: cannot read 'hf_part/model-00002-of-00003.safetensors'*
--init hf_gpt2 --vocab 256 | --vocab: 256*hf_gpt2*40*
--init hf_gpt2 --seq-len 13 | --seq-len: 13*12 positions*hf_gpt2*
--init hf_gpt2 --position rope --seq-len 8 | --position: 'hf_gpt2' has learned*
--init hf_neox --position learned | --position: 'hf_neox' has rotary*
--init hf_neox --tie-embeddings yes | --tie-embeddings: 'hf_neox' has a head of its own*
--init d13 | --init: *'d13'*d12*
--init missing.bin | --init: *'missing.bin'*
--init model.bin --seq-len 13 | --seq-len: 13*12 positions*model.bin*
--init model.bin --layers 3 | --layers: 3*model.bin*2*
--init model.bin --vocab 50257 | --vocab: 50257*model.bin*100*
--init model.bin --position rope | --position:*model.bin*
--init model.bin --tie-embeddings no | --tie-embeddings:*model.bin*
EOT
    shard tokens.bin uint16 4000 0 100 # the file's vocabulary is 100: this token is one too many
    refuses "$TRAIN" --train-data tokens.bin --init model.bin --seq-len 12 --steps 2 --output-dir out \
        '--train-data: tokens.bin: the token at offset * is 100*'
}

@test "output folders that cannot be written" {
    local good="$TRAIN --train-data text.txt $TINY --steps 4 --output-dir"
    refuses $good file "--output-dir: 'file' is a file*"
    [ "$(cat file)" = "not a folder" ]
    refuses $good file/below "--output-dir: 'file'*"
    refuses $good /proc/below "--output-dir:*'/proc/below'*"
    refuses $good '' "--output-dir:*empty*"
    mkdir -p busy/log.jsonl
    refuses $good busy "--output-dir:*'busy/log.jsonl'*"
    if [ "$(id -u)" != 0 ]; then # root may write everywhere
        mkdir -m 555 readonly
        refuses $good readonly "--output-dir:*'readonly'*"
    fi
}

@test "a run that is refused leaves the log of the run before as it was" {
    mkdir -p "$BATS_TEST_TMPDIR/old"
    echo old > "$BATS_TEST_TMPDIR/old/log.jsonl"
    refuses "$TRAIN" --train-data token.bin $TINY --steps 4 --output-dir "$BATS_TEST_TMPDIR/old" '--train-data: token.bin*'
    refuses "$TRAIN" --train-data text.txt $TINY --global-batch 200 --output-dir "$BATS_TEST_TMPDIR/old" '--global-batch: 200*'
    [ "$(ls -A "$BATS_TEST_TMPDIR/old")" = log.jsonl ]
    [ "$(cat "$BATS_TEST_TMPDIR/old/log.jsonl")" = old ]
}

@test "--help is not bad input, and names every flag that is carried" {
    local flag
    run -0 --separate-stderr "$TRAIN" --frobnicate --help
    [ -z "$stderr" ]
    for flag in train-data val-data val-split init layers heads width vocab position tie-embeddings micro-batch seq-len global-batch steps \
        overfit-batch lr warmup min-lr-frac lr-schedule weight-decay clip beta1 beta2 eps skip-loss-z skip-grad-z recipe fp8-scaling \
        fp8-fwd fp8-bwd bf16-layers fp8-min-size grad-dtype grad-reduce grad-scaling grad-accum-dtype grad-accum-rounding \
        master-dtype m-dtype v-dtype opt-block master-rounding moment-rounding recompute output-dir log-tensors val-every val-batches sample-every sample-len profile seed staged matmul-choice matmul-cache; do
        grep -qE -- "^ .* --$flag( |\$)" <<< "$output" || { echo "--$flag is missing"; return 1; }
    done
    awk 'length($0) > 110 { print "too long: " $0; bad = 1 } END { exit bad }' <<< "$output"
}

# ---- on several ranks ----

# refuses_on RANKS COMMAND… PATTERN: mpirun's status is 2, within 10 s, and of the lines exactly one is ours
refuses_on() {
    local ranks=$1 pattern=${*: -1} start=$SECONDS lines
    run timeout 20 mpirun "${mpi_flags[@]}" -np "$ranks" "${@:2:$#-2}"
    lines=$(grep '^train_gpt_fp8:' <<< "$output" || true)
    # shellcheck disable=SC2053 # a pattern
    if [ "$status" != 2 ] || [ "$(wc -l <<< "$lines")" != 1 ] || [[ $lines != "train_gpt_fp8: "$pattern ]] || [ -e out ] ||
        ((SECONDS - start > 10)); then
        printf 'command: %s\nwanted: %s\nstatus %s after %s s, out %s\noutput: %s\n' \
            "${*:2:$#-2}" "$pattern" "$status" $((SECONDS - start)) "$([ -e out ] && echo "was made" || echo "was not made")" "$output"
        rm -rf out
        return 1
    fi
}

@test "on two ranks too: one line, exit 2, and all of them end" {
    have_mpi
    local flags pattern bad=0
    while IFS='|' read -r flags pattern; do
        refuses_on 2 "$TRAIN" --train-data text.txt $TINY --steps 4 --output-dir out $flags "${pattern# }" || bad=1
    done <<'EOT'
--frobnicate 3 | unknown flag '--frobnicate'*
--micro-batch 0 | --micro-batch: '0'*
-n 1 | -n of llm.c*
--width 65 | --width: 65*
--global-batch 128 | --global-batch: 128 tokens*2 ranks = 256*
--train-data missing.bin | --train-data: missing.bin*
--train-data token.bin | --train-data: token.bin: the token at offset 2345 is 50257*
--train-data few.bin --vocab 100 --micro-batch 2 | --train-data:*few.bin*3 windows*2 ranks*
--init model_cut.bin | --init: 'model_cut.bin' is cut short*
--output-dir file | --output-dir: 'file' is a file*
--warmup 5 | --warmup: 5*
EOT
    refuses_on 4 "$TRAIN" --train-data text.txt $TINY --steps 4 --output-dir out --width 65 '--width: 65*' || bad=1
    [ $bad = 0 ]
}

@test "ranks that were started differently are refused" {
    have_mpi
    local good="$TRAIN --train-data text.txt $TINY --steps 4 --output-dir out"
    refuses_on 1 $good --micro-batch 2 : -np 1 $good --micro-batch 4 'rank 1 *micro-batch=4*rank 0*micro-batch=2*'
    refuses_on 2 $good : -np 1 $good --seed 5 'rank 2 *seed=5*rank 0*seed=1337*'
    refuses_on 1 $good --recipe bf16 : -np 1 $good 'rank 1 *recipe=fp8*rank 0*recipe=bf16*'
    # of two flags that read the same only until the recipe has had its say
    refuses_on 1 $good --recipe fp8-lm --grad-reduce direct : -np 1 $good --recipe fp8-lm 'rank 1 *grad-reduce=ring*rank 0*grad-reduce=direct*'
    refuses_on 1 $good --recipe bf16 : -np 1 $good --recipe bf16 --grad-dtype e4m3 'rank 1 *grad-dtype=e4m3*rank 0*grad-dtype=fp32*'
    refuses_on 1 $good : -np 1 $good --grad-reduce ring 'rank 1 *grad-reduce=ring*rank 0*grad-reduce=direct*'
    refuses_on 3 $good --recipe fp8-lm --grad-scaling sqrt : -np 1 $good --recipe fp8-lm 'rank 3 *grad-scaling=auto*rank 0*grad-scaling=sqrt*'
}

@test "what one rank alone meets ends all of them" {
    have_mpi
    local good="$TRAIN --train-data text.txt $TINY --steps 4 --output-dir $BATS_TEST_TMPDIR/out"
    # the second rank works in a folder that has no text
    refuses_on 1 $good : -wdir "$BATS_FILE_TMPDIR/folder" -np 1 $good 'rank 1: --train-data: text.txt*'
    [ ! -e "$BATS_TEST_TMPDIR/out" ]
}

@test "the same name for other data on one rank is refused" {
    have_mpi
    local good="$TRAIN --train-data text.txt $TINY --steps 4 --output-dir $BATS_TEST_TMPDIR/out"
    mkdir "$BATS_TEST_TMPDIR/shorter"
    head -c 5000 text.txt > "$BATS_TEST_TMPDIR/shorter/text.txt"
    refuses_on 1 $good : -wdir "$BATS_TEST_TMPDIR/shorter" -np 1 $good \
        'rank 1 was started with train-windows=156, rank 0 with train-windows=*; all ranks need the same data*'
    refuses_on 2 $good : -wdir "$BATS_TEST_TMPDIR/shorter" -np 1 $good 'rank 2 was started with train-windows=156, rank 0 *'
    # one epoch of each: unrefused, the ranks would not even take as many steps, and one would wait for ever
    refuses_on 1 $good --steps -1 : -wdir "$BATS_TEST_TMPDIR/shorter" -np 1 $good --steps -1 'rank 1 was started with *; all ranks need *'
    [ ! -e "$BATS_TEST_TMPDIR/out" ]
}

@test "wrong flags of one rank alone are not passed over in silence" {
    have_mpi
    local good="$TRAIN --train-data text.txt $TINY --steps 4 --output-dir out"
    refuses_on 1 $good : -np 1 $good --frobnicate "*unknown flag '--frobnicate'*"
    # those that only print would end before the others know
    refuses_on 1 $good : -np 1 $good --plan '*rank 1 was started with --plan, rank 0 with neither*'
    refuses_on 1 $good --help : -np 1 $good '*rank 1 was started with neither*, rank 0 with --help*'
    refuses_on 1 env -u OMPI_COMM_WORLD_SIZE $good --help : -np 1 env -u OMPI_COMM_WORLD_SIZE $good '*rank 1 was started with neither*, rank 0 with --help*'
    refuses_on 1 $good --frobnicate : -np 1 $good "*unknown flag '--frobnicate'*"
}

@test "plans that cannot be made, and what only a plan can have" {
    refuses_each <<'EOT'
--json | --json*--plan*
--kernels | --kernels*--plan*
--plan --gpu none --kernels | --kernels*GPUs only*h100*
--world 4 | --world*--plan*
--gpu h100 | --gpu*--plan*
--no-plan --gpu none | --gpu*--plan*
--tp 2 | --tp 2 × --pp 1 need a multiple of 2 ranks, and there is 1; start as many: mpirun -np 2*
--pp 2 | --tp 1 × --pp 2 need a multiple of 2 ranks, and there is 1; start as many: mpirun -np 2*
--tp 0 | --tp: '0' is out of range; allowed: 1 to 1024*
--plan --gpu h300 | --gpu: 'h300' is not known; allowed: h100, h200, b200, a100, l40s, none*
--plan --world 0 | --world: '0' is out of range; allowed: 1 to 16384*
--plan --world 6 --tp 4 | --world: 6 ranks are no multiple of --tp 4 × --pp 1 = 4*
--plan --world 1 --tp 2 --pp 2 | --world: 1 rank is no multiple of --tp 2 × --pp 2 = 4*
--plan --tp 4 | --tp: 4 ranks cannot share the 2 attention heads alike*divisors*
--plan --pp 4 | --pp: 4 stages cannot share the 2 layers alike*divisors*
--plan --tp 2 --micro-batch 1 --seq-len 31 | --tp: 2 ranks cannot share the 31 tokens*
--plan --tp 2 --width 48 | --tp: 2 ranks have 24 of the 48 channels*16*
--plan --width 72 | --width: 72 is not a multiple of 16*
--plan --micro-batch 1 --seq-len 24 | --micro-batch 1 × --seq-len 24 is no multiple of 16 tokens*
--plan --gpu a100 --world 4 --recipe fp8-lm | --grad-reduce ring*9.0*--gpu a100 has 8.0*direct*
--plan --global-batch 100 | --global-batch: 100 tokens are no multiple*
--plan --init nothing.bin | --init: 'nothing.bin'*
--plan --world 2 --tp 2 --fp8-scaling block | --fp8-scaling block with --tp 2*take --fp8-scaling current
--plan --gpu b200 --fp8-scaling block | --fp8-scaling block*9.0*b200 has 10.0*take --fp8-scaling current
--plan --gpu a100 --fp8-scaling block | --fp8-scaling block*9.0*a100 has 8.0*take --fp8-scaling current
--plan --micro-batch 16 --seq-len 31 --fp8-scaling block | --fp8-scaling block: --seq-len 31*multiple of 4*
--plan --recipe bf16 --fp8-scaling current | --fp8-scaling belongs to the recipes fp8*
--plan --gpu none --staged | --staged is for GPU builds*
EOT
}
