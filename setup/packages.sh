#!/usr/bin/env bash
# Installs what Dhow is built, run and tested with, on Debian 12 or 13, where it is missing.
# QEMU comes from the release's backports where there are any: multi-threaded emulation in QEMU 7.2 sometimes
# panics the guest.
set -euo pipefail

as_root() {
    if [[ $EUID == 0 ]]; then "$@"; else sudo "$@"; fi
}

missing=()
# need COMMAND PACKAGE: the package, if the command is not there.
need() {
    PATH=$PATH:/usr/sbin:/sbin command -v "$1" >/dev/null || missing+=("$2")
}
need gcc build-essential
need curl curl
need mmdebstrap mmdebstrap
need newuidmap uidmap
need passt passt
need python3 python3-venv
need runuser util-linux
need zstd zstd
[[ -e /usr/share/keyrings/debian-archive-keyring.gpg ]] || missing+=(debian-archive-keyring)
[[ -e /etc/ssl/certs/ca-certificates.crt ]] || missing+=(ca-certificates)
qemu=no
command -v qemu-system-x86_64 >/dev/null || qemu=yes
[[ ${#missing[@]} -gt 0 || $qemu == yes ]] || exit 0

if ! command -v apt-get >/dev/null; then
    echo "setup: these are missing and this is no Debian: ${missing[*]} qemu-system-x86; install them with your package manager" >&2
    exit 1
fi
export DEBIAN_FRONTEND=noninteractive
# apt OPERATION...: quiet unless it fails; a lock that another program holds is waited for.
apt() {
    local log
    log=$(mktemp)
    if ! as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=300 -o Acquire::Retries=3 "$@" >"$log" 2>&1; then
        tail -n 30 "$log" >&2
        rm -f "$log"
        return 1
    fi
    rm -f "$log"
}

# The sources of this machine name the mirror; backports are the same mirror's.
backports() {
    local release site
    release=$(. /etc/os-release && echo "$VERSION_CODENAME")
    [[ $release == bookworm ]] || return 1
    # shellcheck disable=SC2016 # apt's own substitution
    site=$(apt-get indextargets --format '$(SITE) $(RELEASE)' 'Identifier: Packages' |
        awk -v release="$release" '$2 == release { print $1; exit }')
    [[ -n $site ]] || return 1
    if ! apt-get indextargets --format '$(RELEASE)' 'Identifier: Packages' | grep -qx "$release-backports"; then
        printf 'deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] %s %s-backports main\n' "$site" "$release" |
            as_root tee /etc/apt/sources.list.d/dhow-backports.list >/dev/null
        if ! apt update; then
            as_root rm -f /etc/apt/sources.list.d/dhow-backports.list
            apt update
            return 1
        fi
    fi
}

apt update
[[ ${#missing[@]} -eq 0 ]] || apt install --no-install-recommends "${missing[@]}"
if [[ $qemu == yes ]]; then
    if backports; then
        apt install --no-install-recommends -t bookworm-backports qemu-system-x86
    else
        apt install --no-install-recommends qemu-system-x86
    fi
fi
