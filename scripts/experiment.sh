# experiment.sh: what the scripts of the experiments share; they source it with their arguments. A script's --help is the comment at its top.
# shellcheck shell=bash disable=SC2034 # they read QUICK

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
