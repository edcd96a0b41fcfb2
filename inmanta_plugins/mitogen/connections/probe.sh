# shellcheck shell=sh
# shellcheck disable=SC2030,SC2031  # a PATH is changed in subshells, for one command
# shellcheck disable=SC2153  # the words in capitals come from interpreters.py
# Says what is wrong with an interpreter, and which others there are.
#
# Arguments: the number of words of the python_path, these words, and whatever mitogen adds. Ends
# with status 1 always: it starts no mitogen.

# shellcheck source=interpreters.sh
. interpreters.sh

# Sets $state to what a path is: ok, missing (nobody can execute it) or denied (this user can't).
# Of one that is not seen, its directories and links are followed to the first thing that is: when
# that is a directory which the user may not search, nobody can say that the interpreter is missing.
look_at() {
    state=missing
    if [ -d "$1" ]; then return; fi
    if [ -f "$1" ] && [ -x "$1" ]; then
        state=ok
    elif [ -e "$1" ]; then
        case $(PATH=/usr/bin:/bin:$PATH; ls -ldL "$1" 2>/dev/null) in
        -??[xs]* | -?????[xs]* | -????????[xt]*) state=denied ;;
        esac
    else
        place=$1
        links=0
        until [ -e "$place" ] || [ "$place" = . ]; do
            links=$((links + 1))
            if [ $links -lt 40 ] && [ -L "$place" ] &&
                target=$(PATH=$PATH:/usr/bin:/bin; readlink "$place"); then
                case $target in /*) place=$target ;; *) place=${place%/*}/$target ;; esac
            else
                case ${place%/*} in "") place=/ ;; "$place") place=. ;; *) place=${place%/*} ;; esac
            fi
        done
        [ -d "$place" ] && ! [ -x "$place" ] && state=denied
    fi
}

# The same for a name, which is looked for on PATH: sets $file too, and $exists where anything is. A closed directory there
# ($closed) denies nothing by itself, even if programs take it for that and end with 126.
look_up() {
    case $1 in */*)
        file=$1
        exists=''
        { [ -e "$1" ] || [ -L "$1" ]; } && exists=1
        look_at "$1"
        return
        ;;
    esac
    worst=missing closed='' exists='' name=$1 saved_ifs=$IFS
    IFS=:
    set -f
    # shellcheck disable=SC2086  # the directories
    set -- $PATH
    set +f
    IFS=$saved_ifs
    for directory; do
        file=${directory:-.}/$name
        look_at "$file"
        [ $state = ok ] && return
        if [ -e "$file" ] || [ -L "$file" ]; then
            exists=1
            [ $worst = missing ] && worst=$state
        elif [ $state = denied ]; then
            closed=1
        fi
    done
    state=$worst
}

# Sets $wanted to the interpreter among the arguments of a program that starts it (env, nice, sh).
find_word() {
    shift
    set -f
    # shellcheck disable=SC2048  # the words in an argument too, as in sh -c "exec python9"
    for word in $*; do
        case $word in
        -* | *=* | [0-9]* | exec | *[\"\;\$]*) ;;
        *python* | *pypy*) wanted=$word; break ;;
        *) [ "$wanted" ] || wanted=$word ;;
        esac
    done
    set +f
}

# Sets $state for the requested command, which is run as mitogen would, with PYTHON_CODE in place of
# mitogen's. A status of 127 says "not there" for whatever a program or a script (of pyenv, or one
# whose own interpreter is gone) was to start; an executable that ends with it by itself did start.
judge() {
    wanted=$1 ended=- version='' rank=0 output=''
    look_up "$1"
    [ $state = ok ] || return
    output=$(limited "$@" -c "$PYTHON_CODE" 2>&1)
    ended=$?
    if read_answer; then
        state=usable output=''
        [ "$rank" -gt 0 ] || state=old
        return
    fi
    state=failed
    seen=$file
    case $ended in
    126 | 127) ;;
    124 | 137 | 143)
        output="$output
no answer within $PROBE_SECONDS seconds, or killed"
        return
        ;;
    *) return ;;
    esac
    case ${1##*/} in
    *python* | *pypy*) ;;
    *)
        wanted=''
        find_word "$@"
        : "${wanted:=$1}"
        ;;
    esac
    if [ "$wanted" != "$1" ]; then
        if [ $ended = 127 ]; then
            state=missing
            return
        fi
        closed=''
        look_up "$wanted"
        case $state$closed$exists in ok* | missing) state=failed ;; esac
        return
    fi
    first=''
    { IFS= read -r first <"$file"; } 2>/dev/null
    case $first in "#!"*) ;; *) return ;; esac
    first=${first#??}
    # shellcheck disable=SC2086  # the interpreter of a script and its argument
    set -- $first
    { [ $ended = 127 ] || ! [ -e "$1" ]; } && state=missing
}

count=$1
shift
left=$count
while [ "$left" -gt 0 ]; do
    set -- "$@" "$1"
    shift
    left=$((left - 1))
done
shift $(($# - count))
judge "$@"
say requested $state $ended "$version" "$wanted" "$output"
[ "$rank" -gt 0 ] && exit 1
names="python3 $VERSIONED_NAMES python platform-python"
try_each 2>/dev/null
printf "%s\n" "$found"
say searched "$places"
exit 1
