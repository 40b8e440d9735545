#!/usr/bin/env bash
# Builds the two binaries into build/bin: dhow for this machine, dhow-agent static for the guest.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH=$PATH:$HOME/.cargo/bin
target=$PWD/target
[[ -z ${CARGO_TARGET_DIR:-} ]] || target=$(realpath -m "$CARGO_TARGET_DIR")

cargo build --quiet --release --package dhow
setup/cargo-musl.sh build --quiet --profile agent --package dhow-agent
mkdir -p build/bin
# put FILE...: into build/bin by a rename, so that a program that runs is not written over.
put() {
    for file in "$@"; do
        cmp --silent "$file" "build/bin/${file##*/}" && continue
        install -m 0755 "$file" "build/bin/.${file##*/}.new"
        mv "build/bin/.${file##*/}.new" "build/bin/${file##*/}"
    done
}
put "$target/release/dhow" "$target/x86_64-unknown-linux-musl/agent/dhow-agent"
printf 'dhow %s, dhow-agent %s (bytes), in build/bin\n' "$(stat -c %s build/bin/dhow)" "$(stat -c %s build/bin/dhow-agent)"
