#!/usr/bin/env bash
# Puts Debian's static busybox into build/hello, without installing it: containers are made of it.
set -euo pipefail
cd "$(dirname "$0")/.."
source setup/lib.sh
[[ -x build/hello/busybox ]] && exit 0
mkdir -p build/hello
lists
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
# apt's own user need not read our folder: it would say so at length.
(cd "$folder" && apt-get -qq -o APT::Sandbox::User= download busybox-static && dpkg-deb -x busybox-static_*.deb root)
install -m 0755 "$(find "$folder/root" -type f -path "*bin/busybox")" build/hello/busybox
