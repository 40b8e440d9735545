#!/usr/bin/env bash
# `run.sh` runs every fuzz target for FUZZ_SECONDS (300) of one core, beginning with its seeds; a finding is left in
# artifacts/ and fails the run. `run.sh keep` makes the smallest set of inputs that covers what was found the seeds.
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
case ${1:-run} in
run)
    for target in "${TARGETS[@]}"; do
        mkdir -p "corpus/$target" "seeds/$target"
        cargo fuzz run --fuzz-dir . "$target" "corpus/$target" "seeds/$target" -- \
            -max_total_time="${FUZZ_SECONDS:-300}" -timeout=60 -rss_limit_mb=4096 -print_final_stats=1
    done
    ;;
keep)
    for target in "${TARGETS[@]}"; do
        cp "seeds/$target/"* "corpus/$target/" 2>/dev/null || true
        cargo fuzz cmin --fuzz-dir . "$target" "corpus/$target"
        rm -rf "seeds/$target"
        cp -r "corpus/$target" "seeds/$target"
    done
    ;;
*)
    echo "usage: run.sh [run|keep]" >&2
    exit 2
    ;;
esac
