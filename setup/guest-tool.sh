#!/usr/bin/env bash
# Builds the static program that end-to-end tests run in the guest and in containers, into build/bin.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH=$PATH:$HOME/.cargo/bin
target=$PWD/target
[[ -z ${CARGO_TARGET_DIR:-} ]] || target=$(realpath -m "$CARGO_TARGET_DIR")

setup/cargo-musl.sh build --quiet --profile agent --package dhow-guest-tool
mkdir -p build/bin
install -m 0755 "$target/x86_64-unknown-linux-musl/agent/guest-tool" build/bin/guest-tool
