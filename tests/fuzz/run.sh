#!/usr/bin/env bash
# `run.sh` runs every fuzz target for FUZZ_SECONDS (600) of one core, beginning with the inputs that are kept in seeds/;
# a finding is left in artifacts/ and fails the run. `run.sh keep` keeps the smallest set of inputs that covers what was
# found.
set -euo pipefail
cd "$(dirname "$0")"
readonly VERSION=0.13.2
readonly TARGETS=(decode packet connection)

export PATH=$PATH:$PWD/../../build/tools/bin
if ! command -v cargo-fuzz >/dev/null; then
    cargo install --quiet --locked --root ../../build/tools "cargo-fuzz@$VERSION"
fi
# The flags of sanitizers and coverage are unstable; the toolchain need not be.
export RUSTC_BOOTSTRAP=1
for target in "${TARGETS[@]}"; do
    mkdir -p "corpus/$target"
    [[ ! -e seeds/$target.tar.zst ]] || tar --zstd --extract --skip-old-files --file "seeds/$target.tar.zst" --directory corpus
    case ${1:-run} in
    run)
        cargo fuzz run --fuzz-dir . "$target" "corpus/$target" -- \
            -max_total_time="${FUZZ_SECONDS:-600}" -timeout=60 -rss_limit_mb=4096 -print_final_stats=1
        ;;
    keep)
        cargo fuzz cmin --fuzz-dir . "$target" "corpus/$target"
        # One archive each: a thousand files of some bytes. The same inputs make the same archive.
        mkdir -p seeds
        tar --zstd --create --sort=name --mtime=@0 --owner=0 --group=0 --numeric-owner --file "seeds/$target.tar.zst" \
            --directory corpus "$target"
        ;;
    *)
        echo "usage: run.sh [run|keep]" >&2
        exit 2
        ;;
    esac
done
