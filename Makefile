# `make run` does all the set-up and runs the main job; `make test` does all the set-up and passes the tests.
# Each step is done only when it has something to do.
SHELL := /bin/bash
export PATH := $(PATH):$(HOME)/.cargo/bin
timed = @setup/timed.sh
CASES ?=

.PHONY: run test check setup build image guest-tool test-units test-e2e soak bench-transport bench-ports fuzz clean

run: setup build image
	$(timed) "dhow start, docker build, docker run" setup/hello.sh

# What this machine must have: Debian's packages and the Rust toolchain.
setup:
	$(timed) "packages" setup/packages.sh
	$(timed) "Rust toolchain" setup/rust.sh

build: setup
	$(timed) "binaries" setup/binaries.sh

image: setup
	$(timed) "system image" image/make.sh build/image

test: test-units test-e2e

# Tests of the parts, on this machine. The image brings the docker CLI that some of them call.
test-units: setup image
	$(timed) "unit tests" cargo test --quiet --workspace --exclude dhow-tests

# Tests against a real VM; CASES narrows them ("CASES=forwards::").
test-e2e: setup build image guest-tool
	$(timed) "end-to-end tests" cargo test --quiet --package dhow-tests --test e2e -- $(CASES)

guest-tool: setup
	$(timed) "guest tool" setup/guest-tool.sh
	@setup/busybox.sh
	@setup/fio.sh

# Kills and power cuts, each DHOW_SOAK (20) times, and ports that come and go, ten times as often: some hours.
soak: setup build image guest-tool
	$(timed) "soak" env DHOW_SOAK=$${DHOW_SOAK:-20} cargo test --quiet --package dhow-tests --test e2e -- 'crash::|published::'

# Fuzz targets for what a guest can feed, FUZZ_SECONDS (600) each; `tests/fuzz/run.sh keep` keeps what they found.
fuzz: setup
	$(timed) "fuzz" tests/fuzz/run.sh

# The way into the guest beside ssh -L, QEMU's hostfwd and bare vsock: a table, in some twenty minutes.
bench-transport: setup build image guest-tool
	$(timed) "what the bench needs" setup/bench-tools.sh
	$(timed) "transport bench" cargo bench --quiet --package dhow-tests --bench transport

# How soon a port is there and free again, and connections a second: a table, in half an hour.
bench-ports: setup build image guest-tool
	$(timed) "what the bench needs" setup/bench-tools.sh
	$(timed) "ports bench" cargo bench --quiet --package dhow-tests --bench ports

# What needs no VM: form, lints on both targets, documentation, licences.
check: setup
	$(timed) "fmt" cargo fmt --all --check
	$(timed) "clippy" cargo clippy --quiet --workspace --all-targets -- -D warnings
	$(timed) "clippy, musl" setup/cargo-musl.sh clippy --quiet --package dhow-agent -- -D warnings
	$(timed) "doc" env RUSTDOCFLAGS="-D warnings" cargo doc --quiet --workspace --no-deps --document-private-items
	@if command -v cargo-deny >/dev/null; then $(MAKE) --no-print-directory audit; else \
	    echo "== deny: left out, cargo-deny is not installed (cargo install cargo-deny)"; fi

.PHONY: audit
audit:
	$(timed) "deny" cargo deny --log-level error check licenses bans sources

clean:
	rm -rf build target
