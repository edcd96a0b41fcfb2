#!/bin/sh
# Makes a virtual environment with this module in it (editable), unless it is there and up to date.
#
#   tools/make_env.sh DIRECTORY PYTHON [PIP_ARGUMENT...]
#
# It is made anew when the interpreter, the arguments, this folder's path or one of the files that
# state requirements has changed.
set -eu

directory=$1
python=$2
shift 2

fail() {
    echo "$*" >&2
    exit 1
}

described=$("$python" -c 'import sys; print(sys.version, sys.prefix)' 2>/dev/null) ||
    fail "No Python runs as '$python'. Name another: make PYTHON=/path/to/python3.13"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "'$python' is Python ${described%% *}, this needs 3.11 or later: make PYTHON=python3.13"
has_venv() { "$python" -c 'import ensurepip, venv' 2>/dev/null; }
has_venv || tools/prepare_host.sh python3-venv
has_venv || fail "'$python' has no venv module (Debian: apt-get install python3-venv)."

stamp=$(
    {
        echo "$described" "$PWD" "$@"
        cat setup.cfg setup.py requirements-dev.txt ./*/requirements.txt tools/make_env.sh
    } | sha256sum
)
[ "$(cat "$directory/.stamp" 2>/dev/null)" = "$stamp" ] && exit 0

echo "Making $directory with Python ${described%% *}"
rm -rf "$directory"
"$python" -m venv "$directory"
"$directory/bin/python" -m pip install -qq --disable-pip-version-check -e . "$@"
echo "$stamp" >"$directory/.stamp"
