#!/usr/bin/env bash
# Part "tools": mkfs.erofs, depmod and the packers of the image's own release, unpacked and never installed.
set -euo pipefail
source "$(dirname "$0")/lib.sh"
part=$1

debian "$part/tools.tar" --variant=extract --include=erofs-utils,kmod,zstd,cpio,xz-utils
unpack "$part/tools.tar" "$part" './usr/bin/*' './usr/sbin/*' './usr/lib64/*' './usr/lib/x86_64-linux-gnu/*.so*'
rm "$part/tools.tar"
