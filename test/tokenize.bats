#!/usr/bin/env bats
# tokenize.bats: what scripts/tokenize.py writes, byte by byte, with the tokenizer that needs no package; and that the trainer reads it.
# shellcheck disable=SC2030,SC2031,SC2086,SC2154 # $TINY is a list of words; output, status and stderr are bats's

load common

setup_file() { use_binary; }

setup() {
    cd "$BATS_TEST_TMPDIR" || return
    python3 -c '' 2> /dev/null || skip "no python3 here"
    tokenize=$BATS_TEST_DIRNAME/../scripts/tokenize.py
}

bytes() { "$tokenize" --tokenizer bytes "$@"; }

# is_file FILE PERL: the file is what this expression packs
is_file() {
    perl -e "binmode STDOUT; print $2" > expected
    cmp expected "$1"
}

header() { echo "pack('l<256', $1, (0) x 253)"; } # three numbers

@test "documents become shards: files, lines, paragraphs, records" {
    printf 'ab\ncd\n\n\nef\r\n' > a.txt
    printf 'x' > b.txt
    printf '{"text": "\\u00e9", "n": 1}\n\n{"text": "z"}\n' > c.jsonl
    bytes --out file a.txt b.txt
    is_file file_000000.bin "$(header 20240520,1,15), pack('v*', 256, unpack('C*', qq(ab\ncd\n\n\nef\r\n)), 256, 120)"
    bytes --out line --documents line a.txt c.jsonl
    is_file line_000000.bin "$(header 20240520,1,14), pack('v*', 256, 97, 98, 256, 99, 100, 256, 101, 102, 256, 0xc3, 0xa9, 256, 122)"
    bytes --out paragraph --documents paragraph a.txt
    is_file paragraph_000000.bin "$(header 20240520,1,9), pack('v*', 256, unpack('C*', qq(ab\ncd)), 256, 101, 102)"
    sed 's/text/body/' c.jsonl > d.jsonl
    bytes --out field --field body d.jsonl
    is_file field_000000.bin "$(header 20240520,1,5), pack('v*', 256, 0xc3, 0xa9, 256, 122)"
    [ "$(bytes --ids ab)" = "97 98" ]
}

@test "shards are cut at --shard-tokens, and any number of workers writes the same" {
    text_file text.txt 150000 # some MB, so that there are several pieces of work
    perl -ne 'chomp; print qq({"text": "$_"}\n)' text.txt > text.jsonl
    local workers
    for workers in 1 3; do bytes --out w$workers --workers $workers --shard-tokens 1000000 --documents line text.txt text.jsonl; done
    local file last files=(w1_*.bin) again=(w3_*.bin)
    [ ${#files[@]} -gt 3 ] && [ ${#files[@]} = ${#again[@]} ]
    for file in "${files[@]}"; do cmp "$file" "w3${file#w1}"; done
    perl -pe 'chomp; s/^/\0/' text.txt text.txt > expected # 256 stands as 0 here, which is in no text
    last=${files[-1]}
    for file in "${files[@]}"; do
        tail -c +1025 "$file" | perl -0777 -ne 'print pack("C*", map { $_ == 256 ? 0 : $_ } unpack("v*", $_))'
        [ "$file" = "$last" ] || [ "$(stat -c %s "$file")" = 2001024 ] || return 1
    done > got
    cmp expected got
}

@test "instruction tuning: what is asked is masked, answers count and so do their ends" {
    printf '{"prompt": "a?", "response": "bc"}\n' > a.jsonl
    printf '{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}, {"role": "user", "content": "z"}, {"role": "assistant", "content": "w"}]}\n' > b.jsonl
    bytes --sft --out tuned a.jsonl b.jsonl
    is_file tuned_000000.bin "$(header 20240801,8,49), pack('V*', map({ \$_ | 1 << 31 } 256, 97, 63), 98, 99, 256, map({ \$_ | 1 << 31 } 256, unpack('C*', qq(user: x\nassistant: ))),
        121, 256, map({ \$_ | 1 << 31 } unpack('C*', qq(user: z\nassistant: ))), 119, 256)"
}

@test "multiple choice, in both widths" {
    printf '{"context": "ab", "endings": ["c", "de"], "label": 1}\n{"ctx": "", "completions": ["x", "y", "z"], "label": "2"}\n' > a.jsonl
    bytes --choices --out a.bin a.jsonl
    is_file a.bin "pack('l<256', 20240522, 1, 2, 32, (0) x 252), pack('v*', 65535, 30, 0, 1, 2, 2, 97, 98, 2, 32, 99, 3, 32, 100, 101,
        65535, 32, 1, 2, 3, 1, 256, 2, 32, 120, 2, 32, 121, 2, 32, 122)"
    perl -e 'print qq({"context": "), "a" x 40000, qq(", "endings": ["c", "d"], "label": 0}\n)' > long.jsonl # 80 kB in words of 16 bits
    bytes --choices --join '' --out long.bin long.jsonl
    is_file long.bin "pack('l<256', 20240522, 2, 1, 160040, (0) x 252), pack('V*', 4294967295, 160040, 0, 0, 2, 40000, (97) x 40000, 1, 99, 1, 100)"
}

@test "the trainer reads all of it" {
    text_file text.txt 2000
    bytes --out text --documents line text.txt
    printf '{"context": "the cat", "endings": ["sees", "xyz"], "label": 0}\n' > quiz.jsonl
    bytes --choices --out quiz.bin quiz.jsonl
    bytes --write-tokenizer bytes.bin
    is_file bytes.bin "pack('l<256', 20240328, 2, 257, 256, (0) x 252), map({ chr(1) . chr } 0 .. 255), chr(13), '<|endoftext|>'"
    "$TRAIN" --train-data 'text_*.bin' --vocab 257 $TINY --steps 60 --lr 1e-2 --recipe fp32 --eval-data quiz.bin --tokenizer bytes.bin --generate 40 \
        --prompt "$(bytes --ids 'the cat')" --temperature 0 --output-dir run > run.out
    [ "$(last acc run)" = 1 ]
    tail -n 1 run/log.jsonl
    [[ $(tail -n 1 run/log.jsonl) == *'"text":"the cat'* ]]
}

# refuses PATTERN ARGUMENTS…: exit 2, one line, nothing written
refuses() {
    local pattern=$1
    shift
    run --separate-stderr bytes "$@"
    # shellcheck disable=SC2053 # a pattern
    if [ "$status" != 2 ] || [ "$(wc -l <<< "$stderr")" != 1 ] || [[ $stderr != "tokenize.py: "$pattern ]] || compgen -G 'out*' > /dev/null; then
        printf 'arguments: %s\nwanted: %s\nstatus %s: %s\n' "$*" "$pattern" "$status" "$stderr"
        ls
        return 1
    fi
}

@test "bad input is refused with its file and line, and nothing is written" {
    printf '{"text": "a"}\n' > good.jsonl
    printf '{"text": "a"}\n\n{"text": 5}\n' > number.jsonl
    printf '{"text": "a"}\n{"text": "b\n' > broken.jsonl
    printf '[1]\n' > list.jsonl
    printf '{"body": "a"}\n' > body.jsonl
    printf '{"text": "\xff"}\n' > latin.jsonl
    printf '{"text": "\\ud800"}\n' > half.jsonl
    printf '{"prompt": "a", "response": "b"}\n{"prompt": "a"}\n' > sft.jsonl
    printf '{"messages": [{"role": "user", "content": "b"}]}\n' > silent.jsonl
    printf '{"messages": "hello"}\n' > text.jsonl
    printf '{"context": "a", "endings": ["b", "c"], "label": 2}\n' > label.jsonl
    printf '{"context": "a", "endings": ["b"], "label": 0}\n' > one.jsonl
    printf '{"context": "a", "endings": ["b", ""], "label": 0}\n' > empty.jsonl
    : > nothing.txt
    printf '{"text": 5}\n' > taken_000000.bin
    local workers
    for workers in 1 2; do
        refuses "number.jsonl:3: text is no text but 5" --workers $workers --out out good.jsonl number.jsonl
        refuses "broken.jsonl:2: this is no JSON*" --workers $workers --out out broken.jsonl
    done
    refuses "list.jsonl:1: a record is a JSON object*" --out out list.jsonl
    refuses "body.jsonl:1: there is no field 'text'; its fields are 'body'" --out out body.jsonl
    refuses "latin.jsonl:1: byte 10 is not UTF-8" --out out latin.jsonl
    refuses "half.jsonl:1: text has half a surrogate pair*" --out out half.jsonl
    refuses "sft.jsonl:2: there is no field 'response'*" --sft --out out sft.jsonl
    refuses "silent.jsonl:1: no message is by the role assistant*" --sft --out out silent.jsonl
    refuses "text.jsonl:1: messages is no list*" --sft --out out text.jsonl
    refuses "label.jsonl:1: the label is 2; allowed for 2 endings: 0 to 1" --choices --out out label.jsonl
    refuses "one.jsonl:1: the endings are no list of two texts or more" --choices --out out one.jsonl
    refuses "empty.jsonl:1: ending 1 is empty" --choices --join '' --out out empty.jsonl
    refuses "the input has no document*" --documents line --out out nothing.txt
    refuses "there is no file 'missing.txt'" --out out missing.txt
    refuses "there is no input*" --out out
    refuses "--out NAME is missing*" good.jsonl
    refuses "--out: there is a taken_000000.bin already*" --out taken good.jsonl
    refuses "--sft and --choices*" --sft --choices --out out good.jsonl
    refuses "argument --shard-tokens: '0' is no whole number from 1 on" --shard-tokens 0 --out out good.jsonl
    refuses "--tokenizer: 'gpt5' is not known; allowed: bytes, gpt2, FILE.json, hf:NAME" --tokenizer gpt5 --out out good.jsonl
    refuses "--tokenizer: there is no file 'missing.json'" --tokenizer missing.json --out out good.jsonl
}

# Packages stand in for themselves here: what is asked of them, and what becomes of their answers
@test "data sets, and packages that are missing or fail" {
    mkdir packages
    printf 'def load_dataset(name, config, split):\n    assert (name, config, split) == ("some/web", "small", "test")\n    return [{"text": "ab"}, {"text": "c"}]\n' > packages/datasets.py
    printf 'raise ImportError("it is not here")\n' > packages/tiktoken.py
    printf 'raise ImportError("nor is it")\n' > packages/tokenizers.py
    printf 'class AutoTokenizer:\n    def from_pretrained(name, use_fast):\n        raise OSError(name + " is not on the hub\\nlong story")\n' > packages/transformers.py
    export PYTHONPATH=$PWD/packages
    bytes --out web --dataset some/web:small:test
    is_file web_000000.bin "$(header 20240520,1,5), pack('v*', 256, 97, 98, 256, 99)"
    refuses "--dataset: other/web cannot be had: *" --dataset other/web --out out
    echo '{}' > small.json
    bytes() { "$tokenize" "$@"; }
    refuses "the Python package tiktoken is needed for this and cannot be imported (it is not here); python3 -m pip install tiktoken gets it" --tokenizer gpt2 --ids a
    refuses "the Python package tokenizers is needed*" --tokenizer small.json --ids a
    refuses "--tokenizer: some/model cannot be had: some/model is not on the hub" --tokenizer hf:some/model --ids a
}

# A small tokenizer.json of the package's own training
@test "a tokenizer.json gives what its package gives, and a file that turns it back into text" {
    python3 -c 'import tokenizers' 2> /dev/null || skip "no Python package tokenizers here"
    text_file text.txt 500
    python3 -c '
import tokenizers, tokenizers.models, tokenizers.pre_tokenizers, tokenizers.decoders, tokenizers.trainers
t = tokenizers.Tokenizer(tokenizers.models.BPE())
t.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
t.decoder = tokenizers.decoders.ByteLevel()
trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
t.train(["text.txt"], trainer)
t.save("small.json")
import struct, subprocess, sys
subprocess.run([sys.argv[1], "--tokenizer", "small.json", "--out", "bpe", "text.txt"], check=True)
subprocess.run([sys.argv[1], "--tokenizer", "small.json", "--write-tokenizer", "small.bin"], check=True)
text = open("text.txt").read()
ids = [t.token_to_id("<|endoftext|>")] + t.encode(text).ids
data = open("bpe_000000.bin", "rb").read()
assert data == struct.pack("<256i", 20240520, 1, len(ids), *[0] * 253) + struct.pack(f"<{len(ids)}H", *ids)
table, pieces, at = open("small.bin", "rb").read(), [], 1024
assert struct.unpack_from("<4i", table) == (20240328, 2, t.get_vocab_size(), ids[0])
while at < len(table):
    pieces.append(table[at + 1 : at + 1 + table[at]])
    at += 1 + table[at]
assert len(pieces) == t.get_vocab_size() and b"".join(pieces[i] for i in ids[1:]) == text.encode()
for word in ("caf\u00e9", "\U0001f600 \x00\x7f\u00ad"):
    assert b"".join(pieces[i] for i in t.encode(word).ids) == word.encode()
' "$tokenize"
}
