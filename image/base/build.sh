#!/usr/bin/env bash
# Part "base": the read-only system that the guest runs, with the modules of the part "kernel".
set -euo pipefail
recipe=$(cd "$(dirname "$0")" && pwd)
source "$recipe/../lib.sh"
part=$1

packages=$(sed -e 's/[[:space:]]*#.*//' -e '/^$/d' "$recipe/packages.list" | paste -sd,)
exclude=('/usr/share/doc/*' '/usr/share/man/*' '/usr/share/info/*' '/usr/share/locale/*' '/usr/share/lintian/*')
debian "$part/base.tar" --variant=essential --include="$packages" \
    "${exclude[@]/#/--dpkgopt=path-exclude=}" \
    --customize-hook="tar-in $CACHE/kernel/modules.tar /" \
    --customize-hook="upload $recipe/finish.sh /finish.sh" \
    --customize-hook='chroot "$1" bash /finish.sh'

# Device nodes are devtmpfs' own; apt's files are mmdebstrap's to the end.
tar --delete --wildcards -f "$part/base.tar" './dev/*' './etc/apt*' './var/lib/apt*' './var/cache/apt*'
# Small clusters: the system is read a bit here and a bit there.
erofs "$part/base.erofs" -zlz4hc,12 -C16384 --tar=f "$part/base.tar"

unpack "$part/base.tar" "$part" './var/lib/dpkg/status' './usr/lib/x86_64-linux-gnu/*.so*' './usr/lib64/*'
rm "$part/base.tar"
