#!/usr/bin/env bash
# Part "docker": the bundle with containerd, dockerd and the docker CLI.
set -euo pipefail
recipe=$(cd "$(dirname "$0")" && pwd)
source "$recipe/../lib.sh"
part=$1

umask 022
packages=(docker.io containerd runc docker-cli docker-buildx docker-compose tini)
debian "$part/docker.tar" --variant=extract --include="$(IFS=, && echo "${packages[*]}")" \
    "$(known "${packages[@]}")"
unpack "$part/docker.tar" "$part/all" './usr/bin/*' './usr/sbin/*' './usr/libexec/docker/*' ./packages
rm "$part/docker.tar"

from=$part/all/usr
bundle=$part/bundle
mkdir -p "$bundle"/{bin,cli-plugins,etc}
install -m 0755 "$from"/bin/{containerd,containerd-shim-runc-v2,ctr,docker} \
    "$from"/sbin/{docker-proxy,dockerd,runc} "$bundle/bin"
install -m 0755 "$from/bin/tini-static" "$bundle/bin/docker-init"
install -m 0755 "$from"/libexec/docker/cli-plugins/docker-{buildx,compose} "$bundle/cli-plugins"
install -m 0644 "$recipe"/etc/* "$bundle/etc"
# What dockerd is given before its end, so that its containers end with it.
sed 's/"live-restore": true/"live-restore": false/' "$recipe/etc/daemon.json" >"$bundle/etc/daemon-end.json"
if cmp -s "$bundle/etc/daemon.json" "$bundle/etc/daemon-end.json"; then
    echo 'daemon.json has no live-restore that could be switched off' >&2
    exit 1
fi

for package in "${packages[@]}"; do
    printf '%s\t%s\n' "$package" "$(version "$part/all/packages" "$package")"
done >"$part/versions"
version "$part/all/packages" docker.io >"$part/version"
sed "s/@VERSION@/$(<"$part/version")/" "$recipe/bundle.toml" >"$bundle/bundle.toml"

# What the daemons load must be in the base: its own loader says what it finds.
libraries=$CACHE/base/usr/lib/x86_64-linux-gnu
for program in "$bundle"/bin/* "$bundle"/cli-plugins/*; do
    found=$("$CACHE/base/usr/lib64/ld-linux-x86-64.so.2" --inhibit-cache --library-path "$libraries" --list "$program" 2>&1) || true
    if missing=$(grep -vE "^[[:space:]]*$|statically linked|linux-vdso|=> $libraries/|ld-linux|not a dynamic" <<<"$found"); then
        printf 'the base lacks a library of %s:\n%s\n' "${program##*/}" "$missing" >&2
        exit 1
    fi
done

# The daemons in lz4, which a guest without KVM unpacks fastest; what people call now and then in zstd,
# without which the bundle would not keep to its size.
erofs "$part/docker.erofs" -zlz4hc,12:zstd,6 -C65536 --compress-hints="$recipe/compress.hints" \
    --all-root "$bundle"
# The CLI stays beside it: a host without one takes it from here.
mkdir "$part/cli"
mv "$bundle/bin/docker" "$bundle/cli-plugins/docker-buildx" "$part/cli"
rm -rf "${part:?}"/{all,bundle}
