#!/usr/bin/env bash
# Part "kernel": Debian's cloud kernel, the initramfs with the modules of the early boot, and the tree of
# modules that the base takes over.
set -euo pipefail
recipe=$(cd "$(dirname "$0")" && pwd)
source "$recipe/../lib.sh"
part=$1

# list FILE: its lines without comments.
list() { sed -e 's/[[:space:]]*#.*//' -e '/^$/d' "$1"; }

# The tree is made by whoever builds, and read by all in the guest.
umask 022
debian "$part/kernel.tar" --variant=extract --include=linux-image-cloud-amd64 \
    "$(known linux-image-cloud-amd64)"
unpack "$part/kernel.tar" "$part/all" './boot/vmlinuz*' './usr/lib/modules/*' ./packages
rm "$part/kernel.tar"

modules=("$part"/all/usr/lib/modules/*)
release=${modules[0]##*/}
install -m 0644 "$part/all/boot/vmlinuz-$release" "$part/vmlinuz"

# Which modules stay: those listed and all that these depend on, without the denied ones.
all=$part/all/usr/lib/modules/$release
ln -s usr/lib "$part/all/lib"
tool depmod -b "$part/all" "$release"
list "$recipe/keep.list" | sed 's,^\^,^kernel/,' >"$part/keep"
list "$recipe/deny.list" | sed 's,^\^,^kernel/,' >"$part/deny"
sed 's/://' "$all/modules.dep" | grep -E -f "$part/keep" | tr ' ' '\n' | sed '/^$/d' | sort -u |
    grep -v -E -f "$part/deny" >"$part/kept"

# Uncompressed: erofs and the initramfs compress them again, and the guest has no xz to undo.
tree=$part/modules/usr/lib/modules/$release
mkdir -p "$tree"
ln -s usr/lib "$part/modules/lib"
tar -C "$all" -c -T "$part/kept" | tar -C "$tree" -x
cp "$all"/modules.{order,builtin,builtin.modinfo} "$tree"
find "$tree" -name '*.ko.xz' -print0 | while IFS= read -r -d '' module; do
    tool xz -d "$module"
done
# Without their signatures: nothing asks for them here, and checking them is most of the time that a
# module's insertion takes under emulation. What is cut (include/linux/module_signature.h): the signature,
# its description of 12 bytes that ends with its length, and the marker of 28 bytes.
find "$tree" -name '*.ko' -print0 | while IFS= read -r -d '' module; do
    if [[ $(tail -c 28 "$module") == '~Module signature appended~' ]]; then
        length=$((16#$(tail -c 32 "$module" | head -c 4 | od -An -tx1 | tr -d ' \n')))
        truncate -s "-$((length + 40))" "$module"
    fi
done
sed -i 's/\.ko\.xz$/.ko/' "$tree/modules.order"
tool depmod -b "$part/modules" "$release"
tar -C "$part/modules" -c --owner=0 --group=0 --sort=name --mtime="@$SOURCE_DATE_EPOCH" \
    -f "$part/modules.tar" "./usr/lib/modules/$release"

# The early modules in the order of insertion: modules.dep names first what is inserted last.
initramfs=$part/initramfs
mkdir -p "$initramfs"/{dev,proc,sys,run} "$initramfs/lib/modules/$release"
list "$recipe/early.list" | while read -r name; do
    if ! grep -E "^[^:]*/${name//[-_]/[-_]}\.ko:" "$tree/modules.dep"; then
        echo "the kernel $release has no module $name" >&2
        exit 1
    fi
done | while IFS= read -r line; do
    tr ' ' '\n' <<<"${line/:/}" | sed '/^$/d' | tac
done | awk '!seen[$0]++' >"$part/order"
tar -C "$tree" -c -T "$part/order" | tar -C "$initramfs/lib/modules/$release" -x
sed "s,^,/lib/modules/$release/," "$part/order" >"$initramfs/lib/modules/dhow-load"
cp "$tree"/modules.dep "$initramfs/lib/modules/$release/"

# "If the archive is followed by another, it begins at a multiple of 4" (early-userspace/buffer-format):
# zeros fill up to 512, so that the host only appends.
find "$initramfs" -exec touch -h -d "@$SOURCE_DATE_EPOCH" {} +
(cd "$initramfs" && find . -mindepth 1 | LC_ALL=C sort |
    tool cpio --quiet --reproducible -o -H newc -R 0:0) |
    tool zstd --quiet -19 >"$part/initramfs.cpio.zst"
truncate -s %512 "$part/initramfs.cpio.zst"

version "$part/all/packages" linux-image-cloud-amd64 >"$part/version"
printf '%s\n' "$release" >"$part/release"
rm -rf "${part:?}"/{all,modules,initramfs,keep,deny,kept,order}
