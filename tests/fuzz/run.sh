#!/bin/bash
# Runs every fuzz target for FUZZ_SECONDS (300), beginning with its seeds. What it finds is kept in corpus/, what
# fails in artifacts/.
set -euo pipefail
cd "$(dirname "$0")"

if ! command -v cargo-fuzz >/dev/null; then
    echo "cargo-fuzz is missing: cargo install cargo-fuzz" >&2
    exit 1
fi
# The flags of sanitizers and coverage are unstable; the toolchain need not be.
export RUSTC_BOOTSTRAP=1
for target in decode packet connection; do
    mkdir -p "corpus/$target"
    nice cargo fuzz run --fuzz-dir . "$target" "corpus/$target" "seeds/$target" -- \
        -max_total_time="${FUZZ_SECONDS:-300}" -timeout=60 -rss_limit_mb=4096 -print_final_stats=1
done
