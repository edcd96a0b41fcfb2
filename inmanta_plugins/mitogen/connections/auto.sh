# shellcheck shell=sh
# Starts the best interpreter there is, with the arguments that it is given.

# In a subshell, so that no variable of the search is left in the environment of the interpreter. In
# a function, since bash before version 4 can't read a "case" right inside of "$(...)".
search() {
    # shellcheck source=interpreters.sh
    . interpreters.sh
    order=falling
    names=$VERSIONED_NAMES
    try_each
    order=after
    names=$UNVERSIONED_NAMES
    try_each
    if [ "$best" ]; then
        printf %s "$best"
        return
    fi
    say requested missing - "" auto ""
    printf "%s\n" "$found"
    say searched "$places"
}

set -- "$(search 2>/dev/null)" "$@"
case $1 in /*) exec "$@" ;; esac
printf "%s\n" "$1"
exit 127
