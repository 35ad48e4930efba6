# experiment.sh: what the scripts of the experiments share; they source it with their arguments. A script's --help is the comment at its top.
# shellcheck shell=bash disable=SC2034,SC2154 # they read what is set here, and set rows and cut

fail() {
    printf '%s: %s\n' "$(basename -- "$0")" "$*" >&2
    exit 2
}

for argument; do
    case $argument in
        --quick) QUICK=1 ;;
        --help)
            sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p}' "scripts/$(basename -- "$0")" # they have gone to the repository's top
            exit 0
            ;;
        *) fail "unknown argument '$argument'; allowed: --quick, --help, and the variables that --help names" ;;
    esac
done

# small_gpt: the model that is trained and its training, where no variable says otherwise; with --quick so small that it takes seconds
small_gpt() {
    if [ -n "${QUICK:-}" ]; then
        : "${STEPS:=30}" "${LAYERS:=1}" "${HEADS:=2}" "${WIDTH:=32}" "${SEQ_LEN:=32}" "${WARMUP:=2}" "${SEEDS:=1 2}"
    fi
    : "${STEPS:=400}" "${LAYERS:=4}" "${HEADS:=4}" "${WIDTH:=128}" "${SEQ_LEN:=128}" "${LR:=3e-3}" "${WARMUP:=20}" "${SEEDS:=1 2 3}" "${BUDGET:=30}"
}

# above_zero NAME…: these variables are whole numbers above 0
above_zero() {
    local name
    for name; do
        [[ ${!name} =~ ^[1-9][0-9]{0,6}$ ]] || fail "$name: '${!name}' is not a whole number above 0"
    done
}

# the_seeds: SEEDS are whole numbers, at least one
the_seeds() {
    local seed
    for seed in $SEEDS; do
        [[ $seed =~ ^[0-9]{1,9}$ ]] || fail "SEEDS: '$seed' is not a whole number"
    done
    [[ $SEEDS =~ [0-9] ]] || fail "SEEDS is empty"
}

# the_rows: ROWS, or all of them, are names in the first column of $rows
the_rows() {
    local name known
    known=$(awk -F '|' 'NF { print $1 }' <<< "$rows")
    ROWS=${ROWS:-$known}
    for name in $ROWS; do
        grep -qxF -- "$name" <<< "$known" || fail "ROWS: '$name' is not known; allowed: ${known//$'\n'/ }"
    done
}

# flags_of ROW: the words of its third column
flags_of() { awk -F '|' -v name="$1" '$1 == name { print $3 }' <<< "$rows"; }

# losses FILE: of a log.jsonl "loss,steps,optimizer bytes,skipped steps"; loss: mean of the last 20 steps, nan where one of them has none
losses() {
    awk '
        { gsub(/[ \t]/, "") }
        /"loss":/ && match($0, /"loss":[^,]*/) {
            loss[++n] = substr($0, RSTART + 7, RLENGTH - 7)
            if (match($0, /"optimizer":[0-9]+/)) { bytes = substr($0, RSTART + 12, RLENGTH - 12) }
            skipped += !/"skipped":null/
        }
        END {
            for (i = n > 20 ? n - 19 : 1; i <= n; i++) { if (loss[i] == "null") { bad = 1 }; sum += loss[i]; k++ }
            printf "%s,%d,%s,%d\n", bad || !k ? "nan" : sprintf("%.6f", sum / k), n, bytes, skipped
        }' "$1"
}

# mpi: `launch` becomes what starts ranks, -np and a program to follow. MPIRUN is of the MPI that the program was built with.
mpi() {
    MPIRUN=${MPIRUN:-mpirun}
    command -v "$MPIRUN" > /dev/null || fail "there is no $MPIRUN here (package openmpi-bin)"
    launch=("$MPIRUN")
    if "$MPIRUN" --version 2> /dev/null | grep -q 'Open MPI'; then
        launch+=(--bind-to none --oversubscribe)
        [ "$(id -u)" != 0 ] || launch+=(--allow-run-as-root)
    fi
}

# Functions of awk for a csv of lines "row,seed" and what losses() says: figures by row, and verdicts about two rows into `verdicts`. A difference counts
# where it is larger than the two spreads over seeds together: with one seed there is none, and verdicts are chance.
# shellcheck disable=SC2016
judge='
function read_losses(csv,    line, f, r, j, d) {
    while ((getline line < csv) > 0) {
        split(line, f, ",")
        if (f[1] == "row") { continue }
        n[f[1]]++; bytes[f[1]] = f[5]; skips[f[1]] += f[6]
        if (f[3] == "nan") { lost[f[1]]++; continue }
        x[f[1], ++k[f[1]]] = f[3]; sum[f[1]] += f[3]
    }
    for (r in n) {
        if (k[r]) { mean[r] = sum[r] / k[r] }
        for (j = 1; j <= k[r]; j++) { d = x[r, j] - mean[r]; square[r] += d * d }
        spread[r] = k[r] > 1 ? sqrt(square[r] / (k[r] - 1)) : 0
    }
}
function room(a, b) { return spread[a] + spread[b] }
function loss_of(r) { return lost[r] ? "lost " lost[r] " of " n[r] : sprintf("%.4f", mean[r]) }
function say(held, claim, a, b) {
    printf "%s\t%s\t%s %s, %s %s, spreads together %.4f\n", held ? "held" : "NOT held", claim, a, loss_of(a), b, loss_of(b), room(a, b) > verdicts
}
function measured(a, b, claim) {
    if (n[a] && n[b]) { return 1 }
    printf "not measured\t%s\t\n", claim > verdicts
    return 0
}
function no_higher(a, b) { return !lost[a] && !lost[b] && mean[a] - mean[b] <= room(a, b) }
function equal(a, b, claim) { if (measured(a, b, claim)) { say(no_higher(a, b), claim, a, b) } }
function worse(a, b, claim) { if (measured(a, b, claim)) { say(lost[a] > lost[b] || mean[a] - mean[b] > room(a, b), claim, a, b) } }
'

# show_verdicts FILE, and what was cut
show_verdicts() {
    awk -F '\t' '{ printf "%-13s %s%s\n", $1 ":", $2, $3 == "" ? "" : "; " $3 }' "$1"
    ((${#cut[@]} == 0)) || { printf '\ncut by BUDGET=%s minutes:' "$BUDGET" && printf ' %s;' "${cut[@]}" && echo; }
}
