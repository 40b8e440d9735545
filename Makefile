# `make test` passes the tests, `make check` the gate that needs no VM.
.PHONY: check test
check:
	cargo fmt --check
	cargo clippy --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps

test:
	cargo test --workspace
