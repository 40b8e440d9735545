#!/usr/bin/env bash
# Makes sure that there is a Rust toolchain; `rust-toolchain.toml` says which. Prints nothing where there is one.
# Where cargo is missing, rustup is installed into the user's home, from Debian or by a package of Python's index.
set -euo pipefail
cd "$(dirname "$0")/.."
source setup/lib.sh

if ! PATH=$PATH:$HOME/.cargo/bin command -v cargo >/dev/null; then
    lists
    # (`apt-cache show` is content with a name that another package merely mentions.)
    if apt-get -qq --simulate install rustup >/dev/null 2>&1; then
        apt install -y rustup
    else
        python3 -m venv build/tools/python
        build/tools/python/bin/pip -q install puccinialin
        # A rustup of its own, made the user's by links. It tries what it installed, which must not be the
        # toolchain of this checkout: that one comes below.
        RUSTUP_TOOLCHAIN=stable build/tools/python/bin/python -m puccinialin \
            --location build/tools/rust >/dev/null
        mkdir -p "$HOME/.cargo/bin"
        ln -sf "$PWD"/build/tools/rust/cargo/bin/* "$HOME/.cargo/bin/"
    fi
fi
export PATH=$PATH:$HOME/.cargo/bin
# The first call fetches the pinned toolchain, unless rustup was told to fetch nothing by itself.
cargo --version >/dev/null 2>&1 || rustup toolchain install || {
    echo "setup: no Rust toolchain $(sed -n 's/^channel = //p' rust-toolchain.toml); install it with rustup" >&2
    exit 1
}
