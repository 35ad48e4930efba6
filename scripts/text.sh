#!/usr/bin/env bash
# text.sh: makes the text that the demo trains on.
#
#   text.sh OUT              29 MB of English from the Debian package dict-gcide (the Collaborative International Dictionary of English)
#   DATA=FILE text.sh OUT    your own text
#
# The dictionary comes from where it is nearest: OUT itself if it was made before, a dict-gcide that is installed, else its package by
# `apt-get download`, unpacked and not installed. OUT is written beside and renamed, so it is whole or not there.
set -euo pipefail
export LC_ALL=C

fail() {
    printf 'text.sh: %s\n' "$*" >&2
    exit 1
}

say_size() { printf 'text: %s, %s bytes%s\n' "$out" "$(stat -Lc %s "$out")" "$1"; }

if [ $# != 1 ] || [ -z "$1" ]; then
    fail "usage: [DATA=FILE] text.sh OUT"
fi
out=$1
mkdir -p "$(dirname "$out")"
scratch=$(mktemp -d)
new=
trap 'rm -rf "$scratch" ${new:+"$new"}' EXIT

# keep SOURCE NOTE: SOURCE's valid UTF-8 becomes OUT.
keep() {
    local before after
    new=$(mktemp "$out.XXXXXX")
    iconv -c -f UTF-8 -t UTF-8 < "$1" > "$new" || true # -c leaves out what is not UTF-8, and still says so by its status
    before=$(stat -Lc %s "$1")
    after=$(stat -c %s "$new")
    ((after > 0 && before - after <= before / 100)) || fail "$1 is not text: of its $before bytes $((before - after)) are not UTF-8"
    chmod 644 "$new"
    mv "$new" "$out"
    new=
    if ((before > after)); then
        say_size "$2; $((before - after)) bytes that were not UTF-8 left out"
    else
        say_size "$2"
    fi
}

if [ -n "${DATA:-}" ]; then
    if [ ! -f "$DATA" ] || [ ! -r "$DATA" ]; then
        fail "DATA=$DATA is not a file that can be read"
    fi
    keep "$DATA" " from $DATA"
    exit 0
fi
if [ -s "$out" ]; then
    say_size " (made before)"
    exit 0
fi

# apt-get download writes where it stands; a temporary folder serves root and users alike. Without the option root is warned that the
# sandbox user cannot enter it.
download() { (cd "$scratch" && apt-get -qq -o APT::Sandbox::User="$(id -un)" download dict-gcide); }
dictionary=/usr/share/dictd/gcide.dict.dz
if [ ! -r "$dictionary" ]; then
    else_do="give your own text by DATA=FILE, or put any English text at $out"
    command -v apt-get > /dev/null || fail "no apt-get here to fetch the package dict-gcide: $else_do"
    echo "text: fetching the package dict-gcide (15 MB)"
    if ! download; then
        as_root=()
        [ "$(id -u)" = 0 ] || as_root=(sudo -n)
        echo "text: once more after apt-get update"
        "${as_root[@]}" apt-get -qq update || true
        download || fail "apt-get download dict-gcide failed: $else_do"
    fi
    dpkg-deb -x "$scratch"/dict-gcide_*.deb "$scratch/package"
    dictionary=$scratch/package$dictionary
fi

# A dictd file is gzip in chunks that zcat reads. Off go the licence before the first entry (a line with \pronunciation\), the
# pronunciations, the braces of cross-references, the tags that name each paragraph's source, and the indentation; paragraphs stay parted
# by an empty line.
zcat < "$dictionary" > "$scratch/raw"
awk '
    !started { started = /^[^ ].* \\/ }
    !started { next }
    { gsub(/ *\\[^\\]*\\/, ""); gsub(/[{}]/, "") }
    { gsub(/ *\[([^]]*(Webster|WordNet|PJC|Century Dict)[^]]*|AS|RDH)\]/, "") }
    { gsub(/[ \t]+/, " "); sub(/^ /, ""); sub(/ $/, "") }
    $0 == "" { gap = 1; next }
    { if (gap) { print "" }; gap = 0; print }
' "$scratch/raw" > "$scratch/text"
keep "$scratch/text" " of English from dict-gcide"
