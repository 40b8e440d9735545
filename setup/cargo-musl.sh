#!/usr/bin/env bash
# cargo-musl.sh SUBCOMMAND ARGUMENT...: runs cargo for the static musl target.
# Where the target's standard library cannot be added with rustup, it is built from the source that Debian packages
# (the very release of rustc), and linked by zig.
set -euo pipefail
cd "$(dirname "$0")/.."
source setup/lib.sh
export PATH=$PATH:$HOME/.cargo/bin
target=x86_64-unknown-linux-musl
tools=$PWD/build/tools
subcommand=$1
shift

sysroot=$(rustc --print sysroot)
has_target() { [[ -d $sysroot/lib/rustlib/$target/lib ]]; }
if ! has_target && command -v rustup >/dev/null; then
    rustup -q target add "$target" >/dev/null 2>&1 || true
fi
if has_target; then
    exec cargo "$subcommand" --target "$target" "$@"
fi

# The standard library's source, of the same release as rustc, where rustc looks for it: Debian packages it, in this
# release or in the backports of another one.
library() {
    local source=$sysroot/lib/rustlib/src/rust/library folder=$tools/rust-src version site suite
    [[ -e $source/Cargo.lock ]] && return
    version=$(rustc --version | awk '{ print $2 }')
    # The configured mirror's site is asked for the suites that may have it.
    lists
    site=$(debian_site)
    mkdir -p "$folder"/{lists/partial,cache/archives/partial}
    for suite in trixie trixie-backports sid; do
        printf 'deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] %s %s main\n' "$site" "$suite"
    done >"$folder/sources.list"
    local options=(-qq -o "Dir::Etc::SourceList=$folder/sources.list" -o Dir::Etc::SourceParts=- -o "Dir::State::Lists=$folder/lists"
        -o "Dir::Cache=$folder/cache" -o APT::Sandbox::User=)
    apt-get "${options[@]}" update
    package=$(apt-cache "${options[@]}" madison rust-src | awk -v version="$version" 'index($3, version) == 1 { print $3; exit }')
    if [[ -z ${package:-} ]]; then
        echo "setup: rustup cannot add $target, and Debian has no rust-src $version; install either" >&2
        return 1
    fi
    (cd "$folder" && apt-get "${options[@]}" download "rust-src=$package")
    rm -rf "$folder/root"
    dpkg-deb -x "$folder"/rust-src_*.deb "$folder/root"
    rm -rf "$folder"/{lists,cache,rust-src_*.deb}
    mkdir -p "${source%/library}"
    ln -sfn "$folder/root/usr/src/rustc-$version/library" "$source"
}

library
zig=$tools/zig
if [[ ! -x $zig/bin/cargo-zigbuild ]]; then
    python3 -m venv "$zig"
    "$zig/bin/pip" -q install ziglang cargo-zigbuild
fi
export PATH=$zig/bin:$PATH
case $subcommand in
build) subcommand=zigbuild ;;
esac
export RUSTC_BOOTSTRAP=1 RUSTFLAGS="${RUSTFLAGS:-} -C link-self-contained=no"
exec cargo "$subcommand" --target "$target" -Zbuild-std=std,panic_abort "$@"
