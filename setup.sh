#!/usr/bin/env bash
# Make this checkout ready: packages of the distribution (only what is missing), then .venv with
# the locked packages from PyPI.  ./demo and ./test call it; a second call returns at once.
#
#   ./setup.sh          what the product needs
#   ./setup.sh --dev    what its tests need, too
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
export PATH="$PATH:/usr/sbin:/sbin"

lock=requirements.lock
[ "${1:-}" != --dev ] || lock=requirements-dev.lock

say() { printf '%s\n' "$*" >&2; }
give_up() { say "$*"; exit 78; }
have() { command -v "$1" >/dev/null; }

find_python() {
    for name in python3 python3.13 python3.12 python3.11; do
        if have "$name" && "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
            echo "$name"
            return
        fi
    done
}

# Whether .venv holds what the locks say; what the tests need includes what the product needs.
ready() {
    local name
    for name in requirements-dev.lock "$lock"; do
        [ ! -f ".venv/.ready-$name" ] || [ "$(cat ".venv/.ready-$name")" != "$(stamp "$name")" ] || return 0
    done
    return 1
}

stamp() { sha256sum pyproject.toml requirements-build.lock "$1" | sha256sum | cut -c1-64; }

# Packages of Debian and Ubuntu that are not there yet.
missing_packages() {
    have qemu-system-x86_64 || echo qemu-system-x86
    have mke2fs || echo e2fsprogs
    if [ "$lock" = requirements-dev.lock ]; then
        have qemu-img || echo qemu-utils
        have nft || echo nftables
        have ip || echo iproute2
        have ssh || echo openssh-client
        have git || echo git
        have nginx || echo nginx-light
        have miniupnpd || echo miniupnpd-nftables # the program alone: it starts no service
    fi
    ready || missing_for_venv
}

missing_for_venv() {
    local python version=python3
    python=$(find_python)
    if [ -n "$python" ]; then
        version=$("$python" -c 'import sys; print("python3.%d" % sys.version_info.minor)')
        ! "$python" -c 'import ensurepip, venv' 2>/dev/null || return 0
    elif have python3; then
        version=python3.11 # Ubuntu 22.04: python3 is older, a newer one has its own name
        echo $version
    else
        echo python3
    fi
    echo "$version-venv"
}

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi
}

install_packages() {
    local missing needs_lists=no
    missing=$(missing_packages | sort -u | xargs)
    # The demo's disk is made from a kernel package: apt must know one.
    if have apt-cache; then
        apt-cache show linux-image-cloud-amd64 >/dev/null 2>&1 || apt-cache show linux-image-virtual >/dev/null 2>&1 || needs_lists=yes
    fi
    [ -n "$missing" ] || [ $needs_lists = yes ] || return 0
    have apt-get || give_up "This needs Debian or Ubuntu, or else these installed by hand: ${missing:-apt}"
    [ "$(id -u)" = 0 ] || have sudo || give_up "Please type as root: apt-get update && apt-get install $missing"
    say "About to use apt as root: apt-get update${missing:+, then apt-get install $missing}"
    as_root env DEBIAN_FRONTEND=noninteractive apt-get -q update </dev/null >&2
    [ -z "$missing" ] ||
        as_root env DEBIAN_FRONTEND=noninteractive apt-get -q -y --no-install-recommends install $missing </dev/null >&2
    case " $missing " in *" nginx-light "*) # the tests start their own: it shall serve nobody here
        ! have systemctl || as_root systemctl disable --now nginx >/dev/null 2>&1 || true ;;
    esac
    [ -n "$(find_python)" ] || give_up "Python 3.11 or newer is needed; this distribution's python3 is older. Debian 12, Ubuntu 24.04 and newer have it."
}

install_venv() {
    local quiet=-q
    ! ready || return 0
    .venv/bin/python -m pip --version >/dev/null 2>&1 || "$(find_python)" -m venv --clear .venv
    say "Installing $(grep -c '^[a-z0-9]' "$lock") locked packages from PyPI into .venv (a minute or two)"
    [ ! -t 2 ] || quiet=
    pip_install() { .venv/bin/python -m pip install --disable-pip-version-check --no-input "$@" >&2; }
    pip_install -q --require-hashes -r requirements-build.lock
    # The lock is complete, and in two places it knows better than the packages' own pins: no resolving.
    pip_install $quiet --no-deps --require-hashes --no-build-isolation -r "$lock"
    pip_install -q --no-deps --no-build-isolation -e .
    stamp "$lock" >".venv/.ready-$lock"
}

install_packages
install_venv
