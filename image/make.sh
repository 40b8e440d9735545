#!/usr/bin/env bash
# Builds the system image into a folder: `image/make.sh [FOLDER]`. A part is built when its recipe, or that
# of a part it takes from, has changed; nothing else is looked at.
set -euo pipefail
recipes=$(cd "$(dirname "$0")" && pwd)
mkdir -p "${1:-$recipes/../build/image}"
IMAGE_OUT=$(cd "${1:-$recipes/../build/image}" && pwd)
export IMAGE_OUT
source "$recipes/lib.sh"

mkdir -p "$CACHE"
exec 9>"$CACHE/lock"
flock 9

# key FILE_OR_FOLDER... : a hash of the recipe's files and of the keys of the parts before.
key() {
    (cd "$recipes" && find "$@" lib.sh -type f -print0 | sort -z | xargs -0 sha256sum)
}

# part NAME SCRIPT KEY: builds it aside and swaps it in, if its key is new.
part() {
    local name=$1 script=$2 key=$3
    [[ $(cat "$CACHE/$name/key" 2>/dev/null) == "$key" ]] && return
    rm -rf "${CACHE:?}/$name.new"
    mkdir "$CACHE/$name.new"
    step "$name" "$recipes/$script" "$CACHE/$name.new"
    printf '%s\n' "$key" >"$CACHE/$name.new/key"
    rm -rf "${CACHE:?}/$name"
    mv "$CACHE/$name.new" "$CACHE/$name"
    changed=yes
}

changed=
tools_key=$(key tools.sh | sha256sum)
kernel_key=$({ key kernel; echo "$tools_key"; } | sha256sum)
base_key=$({ key base; echo "$kernel_key"; } | sha256sum)
docker_key=$({ key docker; echo "$base_key"; } | sha256sum)
for word in tools_key kernel_key base_key docker_key; do
    declare "$word=${!word%% *}"
done
part tools tools.sh "$tools_key"
part kernel kernel/build.sh "$kernel_key"
part base base/build.sh "$base_key"
part docker docker/build.sh "$docker_key"

# publish FILE: a link into the cache costs no room; where links do not work, a copy does.
files=(kernel/vmlinuz kernel/initramfs.cpio.zst base/base.erofs docker/docker.erofs)
for file in "${files[@]}"; do
    [[ -e $IMAGE_OUT/${file#*/} ]] || changed=yes
done
[[ -n $changed || ! -e $IMAGE_OUT/manifest.toml ]] || exit 0

# manifest: what the files are. The host refuses a file that is not the one named here.
manifest() {
    local file path
    cat <<END
# Made by image/make.sh: the files of one system image, and what is in them.
format = 1
release = "$SUITE"
arch = "$ARCH"
kernel = "$(<"$CACHE/kernel/release")"
docker = "$(<"$CACHE/docker/version")"
END
    for file in "${files[@]}"; do
        path=$IMAGE_OUT/${file#*/}
        printf '\n[files."%s"]\nsize = %d\nsha256 = "%s"\n' "${file#*/}" "$(stat -c %s "$path")" \
            "$(sha256sum "$path" | cut -d' ' -f1)"
    done
    printf '\n[packages]\n"linux-image" = "%s"\n' "$(<"$CACHE/kernel/version")"
    sed 's/^\([^\t]*\)\t\(.*\)$/"\1" = "\2"/' "$CACHE/docker/versions"
    printf '\n[packages.base]\n'
    awk -v RS= 'match($0, /^Package: [^\n]+/) { name = substr($0, 10, RLENGTH - 9) }
        match($0, /\nVersion: [^\n]+/) { print "\"" name "\" = \"" substr($0, RSTART + 10, RLENGTH - 10) "\"" }' \
        "$CACHE/base/var/lib/dpkg/status"
}

# The manifest goes first and comes last: a folder with a manifest is whole.
rm -f "$IMAGE_OUT/manifest.toml"
for file in "${files[@]}"; do
    cp --force --link "$CACHE/$file" "$IMAGE_OUT/" 2>/dev/null || cp --force "$CACHE/$file" "$IMAGE_OUT/"
done
manifest >"$IMAGE_OUT/manifest.new"
mv "$IMAGE_OUT/manifest.new" "$IMAGE_OUT/manifest.toml"

for file in "${files[@]}"; do
    note "$(printf '%-20s %6.1f MB' "${file#*/}" "$(($(stat -c %s "$IMAGE_OUT/${file#*/}") / 100000))e-1")"
done
note "kernel $(<"$CACHE/kernel/release"), docker $(<"$CACHE/docker/version"), in $IMAGE_OUT"
