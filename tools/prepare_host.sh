#!/bin/sh
# Installs the Debian packages that it is given, or those that the tests use, where that can be done:
# as root, with apt. Elsewhere it does nothing and says nothing; the tests say what they miss.
set -eu

tests_use="openssh-server openssh-client sudo opendoas zsh busybox mksh podman crun netavark aardvark-dns
    iproute2 acl attr locales libc-l10n passwd procps util-linux python3"
packages=${*:-$tests_use}

[ "$(id -u)" = 0 ] && command -v apt-get dpkg-query >/dev/null || exit 0

# shellcheck disable=SC2086
missing=$(
    for package in $packages; do
        case $(dpkg-query -W -f '${Status}' "$package" 2>/dev/null) in
        *" installed") ;;
        *) echo "$package" ;;
        esac
    done
)
[ -n "$missing" ] || exit 0

# shellcheck disable=SC2086
echo "Installing:" $missing
export DEBIAN_FRONTEND=noninteractive
log=$(mktemp)
trap 'rm -f "$log"' EXIT
# The services of these packages are not for the tests, which start servers of their own.
policy=/usr/sbin/policy-rc.d
if [ ! -e $policy ]; then
    printf '#!/bin/sh\nexit 101\n' >$policy
    chmod +x $policy
    trap 'rm -f "$log" $policy' EXIT
fi
install() { apt-get install -q -y --no-install-recommends "$@" >>"$log" 2>&1 </dev/null; }
apt-get update -q >"$log" 2>&1 </dev/null || true
# One by one where not all can be had, for each release has its own.
# shellcheck disable=SC2086
install $missing || for package in $missing; do
    install "$package" || echo "Could not install $package: $(grep '^E:' "$log" | tail -n 1)" >&2
done
