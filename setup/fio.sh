#!/usr/bin/env bash
# Puts Debian's fio with the libraries that it needs into build/fio, without installing it: an end-to-end test runs it
# here and in a container.
set -euo pipefail
cd "$(dirname "$0")/.."
IMAGE_OUT=$PWD/build/image source image/lib.sh
root=build/fio
[[ ! -x $root/usr/bin/fio ]] || exit 0
# Beside its target, so that the last step is one rename.
mkdir -p build
work=$(mktemp -d "$PWD/build/fio.XXXXXX")
trap 'rm -rf "$work"' EXIT
chmod 0755 "$work"

debian "$work/fio.tar" --variant=extract --include=fio
unpack "$work/fio.tar" "$work" './usr/bin/fio' './usr/lib64/*' './usr/lib/x86_64-linux-gnu/*.so*'
libraries=$work/usr/lib/x86_64-linux-gnu
loader=usr/lib64/ld-linux-x86-64.so.2
mkdir -p "$work/root/usr/bin" "$work/root/lib64" "$work/root/lib"
"$work/$loader" --library-path "$libraries:$libraries/ceph" --list "$work/usr/bin/fio" | awk '$2 == "=>" { print $3 }' |
    xargs cp --dereference --target-directory "$work/root/lib"
cp --dereference "$work/$loader" "$work/root/lib64/"
cp "$work/usr/bin/fio" "$work/root/usr/bin/"
rm -rf "$root"
mv "$work/root" "$root"
