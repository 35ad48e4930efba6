#!/usr/bin/env bash
# setup.sh: installs what the build, the tests and the demo need on Debian and Ubuntu, from their own packages, and says what each is for.
#
#   setup.sh            installs what is missing; run again, it finds nothing to do
#   setup.sh --check    only looks: silent and 0 when nothing is missing, else names it and ends with 1
#   setup.sh --demo     either of them, without what only the tests need
#
# What counts is that a tool or header is found, wherever it came from, not that a package is installed. Some things we can do without (MPI,
# the plot): where they cannot be installed we say what is lost and go on. NO_MPI=1 does not ask for MPI at all.
set -euo pipefail
export LC_ALL=C

check_only='' tests=1
for argument; do
    case $argument in
        --check) check_only=1 ;;
        --demo) tests='' ;;
        *)
            echo "setup.sh: unknown argument $argument: allowed are --check and --demo" >&2
            exit 2
            ;;
    esac
done

# package, needed or wished (or needed by the tests), how it is recognised (a command, or a header of the C++ compiler), what it is for
table="
g++             needed command:g++                        compiles the trainer and the tests
make            needed command:make                       runs the build
libdnnl-dev     needed header:oneapi/dnnl/dnnl.hpp        oneDNN: the matrix products on CPUs
libjson-c-dev   needed header:json-c/json.h               reads and writes JSON: logs, checkpoints, model files
libxxhash-dev   needed header:xxhash.h                    XXH3: the checksums of checkpoints
libcmocka-dev   tests  header:cmocka.h                    the unit tests stand on it
bats            tests  command:bats                       runs the end-to-end tests
libopenmpi-dev  wished command:mpicc                      lets several processes train together
openmpi-bin     wished command:mpirun                     starts them
gnuplot-nox     wished command:gnuplot                    draws the loss curves
"
if [ -n "${NO_MPI:-}" ] && [ "${NO_MPI:-}" != 0 ]; then
    table=$(grep -v openmpi <<< "$table")
fi

has() {
    case $1 in
        command:*) command -v "${1#command:}" > /dev/null ;;
        header:*) printf '#if !__has_include(<%s>)\n#error absent\n#endif\n' "${1#header:}" | "${CXX:-g++}" -x c++ -E - > /dev/null 2>&1 ;;
    esac
}

# look: leaves the packages whose thing is not there in $needed and $wished.
look() {
    local package kind thing
    needed=() wished=()
    while read -r package kind thing _; do
        if [ -z "$package" ] || has "$thing"; then
            continue
        fi
        case $kind in
            needed | "${tests:+tests}") needed+=("$package") ;;
            wished) wished+=("$package") ;;
        esac
    done <<< "$table"
}

why_of() { awk -v package="$1" '$1 == package { $1 = $2 = $3 = ""; sub(/^ +/, ""); print }' <<< "$table"; }

look
if [ ${#needed[@]} = 0 ] && [ ${#wished[@]} = 0 ]; then
    [ -n "$check_only" ] || echo "setup: everything is there already"
    exit 0
fi
if [ -n "$check_only" ]; then
    echo "setup: missing: ${needed[*]} ${wished[*]}"
    exit 1
fi

# could_not REASON: ends with the names of what we cannot do without, or goes on without what we can.
could_not() {
    local package
    look
    for package in "${wished[@]}"; do
        echo "setup: going on without $package ($1): $(why_of "$package")" >&2
    done
    for package in "${needed[@]}"; do
        echo "setup: $package is missing and could not be installed ($1): $(why_of "$package")" >&2
    done
    exit $((${#needed[@]} > 0))
}

packages=("${needed[@]}" "${wished[@]}")
if ! command -v apt-get > /dev/null; then
    could_not "this is neither Debian nor Ubuntu: install the equivalent by your own package manager"
fi
as_root=()
if [ "$(id -u)" != 0 ]; then
    command -v sudo > /dev/null || could_not "this user is not root and there is no sudo: as root, apt-get install ${packages[*]}"
    as_root=(sudo)
    [ -t 0 ] || as_root+=(-n) # nobody is there to type a password
fi
log=$(mktemp)
trap 'rm -f "$log"' EXIT
# apt: apt-get, whose many lines are shown only where it fails
apt() {
    if ! "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -qq -o Dpkg::Use-Pty=0 "$@" > "$log" 2>&1; then
        sed 's/^/    /' "$log" >&2
        return 1
    fi
}
apt_install() { apt install -y --no-install-recommends "$@"; }

echo "setup: installing by apt-get:"
for package in "${packages[@]}"; do
    printf '  %-15s %s\n' "$package" "$(why_of "$package")"
done
updated=
update() {
    echo "setup: apt-get update ($1)"
    apt update || could_not "apt-get update failed"
    updated=1
}
apt-get -qq --simulate install "${packages[@]}" > /dev/null 2>&1 || update "the package lists are missing or old"
if ! apt_install "${packages[@]}"; then
    [ -n "$updated" ] || update "that failed, so the lists may be old"
    for package in "${packages[@]}"; do
        apt_install "$package" || true # one by one: what can be installed is, and what cannot is named
    done
fi
hash -r
look
if [ ${#needed[@]} != 0 ] || [ ${#wished[@]} != 0 ]; then
    could_not "apt-get install failed, see above"
fi
echo "setup: done"
