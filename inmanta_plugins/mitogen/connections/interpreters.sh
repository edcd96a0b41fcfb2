# shellcheck shell=sh
# shellcheck disable=SC2030,SC2031  # a PATH is changed in subshells, for one command
# shellcheck disable=SC2015  # "continue" is for each of the conditions
# shellcheck disable=SC2153  # the words in capitals come from interpreters.py
# shellcheck disable=SC2154  # $names is set by who calls try_each
# Finds Python interpreters and asks each for its version: what probe.sh and auto.sh share.
#
# POSIX sh for dash, bash, busybox, zsh, mksh, ksh and yash. No text or message of a program is
# looked at, only exit statuses and files, so that no locale matters. MINIMUM, PROBE_SECONDS and the MOST_…
# are set by interpreters.py, which also takes comments and indentation out.

# python3.N, newest first, and what an interpreter may be called else.
VERSIONED_NAMES="python3.20 python3.19 python3.18 python3.17 python3.16 python3.15 python3.14 \
python3.13 python3.12 python3.11 python3.10 python3.9 python3.8 python3.7 python3.6"
# shellcheck disable=SC2034  # auto.sh uses it
UNVERSIONED_NAMES="python3 python platform-python"

# Where they are looked for, after the directories on the user's PATH.
PLACES="/usr/local/bin:/usr/bin:/bin:/usr/libexec:/usr/local/python*/bin:/opt/*/bin:/opt/python/*/bin:\
/opt/rh/*/root/usr/bin:/usr/pkg/bin:/snap/bin:/run/current-system/sw/bin"
HOME_PLACES="${HOME-}/.local/bin:${HOME-}/.pyenv/versions/*/bin:${HOME-}/.local/share/uv/python/*/bin"

# Runs on any Python since 2.5. It imports what mitogen's first stages do and a build may lack (pty:
# not in Debian's python3-minimal) and writes: rank, version, executable. The rank is 0 for one that
# is too old; among the others the higher the better, with 100 more for a released CPython that is
# no debug build. Links are resolved since mitogen starts the interpreter anew with an argv[0] that
# does not exist, from which a relocated one (uv's) finds its library only by the real path. Not so
# for a virtual environment, which would be lost.
PYTHON_CODE="import sys;sys.path=[p for p in sys.path if p];\
import binascii,fcntl,logging,math,os,pickle,pty,select,socket,termios,threading,zlib;\
d=os.path.dirname;\
b=[m.__file__ for m in (pickle,pty,socket,threading) if d(m.__file__)!=d(os.__file__)];\
b and sys.exit(b[0]+' takes the place of a module of the standard library');\
v=sys.version_info;e=sys.executable;g=getattr;\
r=v[0]==3 and v[:2]>=($MINIMUM) and v[1]+100*(v[3]=='final' and \
sys.implementation.name=='cpython' and not hasattr(sys,'gettotalrefcount'));\
e=sys.prefix==g(sys,'base_prefix',sys.prefix) and os.path.realpath(e) or e;\
n=chr(10);\
os.write(1,(n+'@py@%d %d.%d.%d '%((r,)+v[:3])).encode()+g(os,'fsencode',str)(e)+n.encode())"

set +f +e +u +x +v +C

# Not every host has timeout, and busybox's old one takes other arguments.
timeout=$(PATH=/usr/bin:/bin:$PATH; command -v timeout) &&
    "$timeout" -k 1 9 /bin/sh -c : 2>/dev/null || timeout=''

# Runs a command for a limited time.
limited() {
    if [ "$timeout" ]; then
        "$timeout" -k 1 "$PROBE_SECONDS" "$@" </dev/null
        return
    fi
    "$@" </dev/null &
    child=$!
    (
        exec >/dev/null 2>&1
        sleep "$PROBE_SECONDS" &
        sleeper=$!
        trap 'kill $sleeper' TERM
        wait $sleeper && kill -9 $child
    ) &
    watcher=$!
    wait $child
    child=$?
    kill $watcher 2>/dev/null
    return $child
}

# Prints a word of a report. What isn't plain goes in hexadecimal: mitogen fails on bytes that
# aren't UTF-8, and its ssh, sudo and su methods act on words like "Permission denied" and
# "password" wherever these appear.
encode() {
    LC_ALL=C
    PATH=$PATH:/usr/bin:/bin
    case $1 in
    *[!A-Za-z0-9/._+:@,=~*-]* | "")
        printf %%
        printf %s "$1" | tail -c "$MOST_OUTPUT" | od -An -v -tx1 | tr -d " \n"
        ;;
    *) printf %s "$1" ;;
    esac
}

# Prints a line of the report.
say() {
    line=
    for word; do line="$line $(encode "$word")"; done
    printf "\n[[inmanta-python%s]]\n" "$line"
}

# Reads what PYTHON_CODE wrote: rank, version, executable. False where it wrote nothing.
read_answer() {
    case $output in *@py@[0-9]*) ;; *) return 1 ;; esac
    answer=${output##*@py@}
    answer=${answer%%"
"*}
    rank=${answer%% *}
    answer=${answer#* }
    version=${answer%% *}
    executable=${answer#* }
}

# Whether a file has been tried already, under whatever name.
is_known() {
    saved_ifs=$IFS
    IFS=:
    for word in $seen; do
        IFS=$saved_ifs
        [ "$word" -ef "$1" ] && return
    done
    IFS=$saved_ifs
    return 1
}

# Tries the interpreters called $names in all places; $best becomes the best one. The shims of pyenv
# and asdf are passed over for what they stand for. With order=falling, for versioned names, it stops
# as soon as nothing better can come; with order=after, for the other names after these, what links
# to a versioned name beside it is no news.
try_each() {
    saved_ifs=$IFS
    IFS=:
    # shellcheck disable=SC2086  # patterns of directories, to be expanded
    set -- $places
    IFS=$saved_ifs
    for name in $names; do for directory; do
        case $directory in */shims | */shims/) continue ;; /*) ;; *) continue ;; esac
        file=${directory%/}/$name
        [ -f "$file" ] && [ -x "$file" ] && ! is_known "$file" || continue
        case $order$best in after/*)
            for word in $VERSIONED_NAMES; do [ "$file" -ef "${file%/*}/$word" ] && continue 2; done
            ;;
        esac
        seen=$seen:$file
        tried=$((tried + 1))
        [ $tried -gt "$MOST_TRIED" ] && return
        output=$(limited "$file" -c "$PYTHON_CODE" 2>/dev/null)
        ended=$?
        if read_answer; then
            found=$found$(say found "$version" "$file")
            if [ "$rank" -gt "$best_rank" ]; then
                best_rank=$rank
                best=$file
                [ "$executable" -ef "$file" ] && best=$executable
            fi
            case $order in falling) [ "$rank" -ge $((100 + ${name#*.})) ] && return ;; esac
        else
            found=$found$(say broken $ended "$file")
            case $ended in 124 | 137 | 143)
                silent=$((silent + 1))
                [ $silent -ge "$MOST_SILENT" ] && return
                ;;
            esac
        fi
    done; done
}

found='' best='' seen='' order='' tried=0 best_rank=0 silent=0
places=$PATH:$PLACES
# A home directory counts only when the user owns it: one who became root may have kept another's.
# shellcheck disable=SC3067  # every shell that is named above has -O
[ -O "$HOME" ] && places=$places:$HOME_PLACES
