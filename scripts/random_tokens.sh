# random_tokens.sh: what benches train on; they source it.
# shellcheck shell=bash

# random_tokens FILE VOCABULARY COUNT: a shard of llm.c with so many random tokens
random_tokens() {
    perl -e '
        my ($vocab, $count, $x, @tokens) = (@ARGV, 1);
        for (1 .. $count) { $x = $x * 16807 % 2147483647; push @tokens, ($x >> 4) % $vocab; }
        binmode STDOUT;
        print pack("l<3 x1012", 20240520, 1, scalar @tokens), pack("v*", @tokens);
    ' "$2" "$3" > "$1"
}
