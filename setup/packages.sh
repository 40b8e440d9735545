#!/usr/bin/env bash
# Installs what Dhow is built, run and tested with, on Debian 12 or 13, where it is missing.
# QEMU comes from the release's backports where there are any: multi-threaded emulation in QEMU 7.2 sometimes
# panics the guest.
set -euo pipefail

source "$(dirname "$0")/lib.sh"

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
# The sources of this machine name the mirror; backports are the same mirror's.
backports() {
    local release site
    release=$(. /etc/os-release && echo "$VERSION_CODENAME")
    [[ $release == bookworm ]] || return 1
    site=$(debian_site)
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
