# dysk: page blobs as Linux disks. `make demo` shows it, `make test` proves it.

CARGO ?= cargo

.PHONY: all build demo test lint bench audit clean

all: build

build:
	$(CARGO) build --release --bins

demo: ## The main job end to end on an embedded store.
	tests/setup demo
	$(CARGO) build --release --bins
	tests/demo/run target/release

test: ## Everything that has to pass before a change lands.
	tests/setup test
	$(MAKE) --no-print-directory lint
	$(CARGO) build --bins --tests
	$(CARGO) test

lint:
	$(CARGO) fmt --check
	$(CARGO) clippy --all-targets -- -D warnings
	tests/licences
	git ls-files -z tests .ci deploy | xargs -0 grep -lZ '^#!/bin/\(ba\)\?sh' | xargs -0 -r shellcheck -x

bench: ## Ratios inside one run; see docs/performance.md.
	tests/setup test
	$(CARGO) build --release --bins
	$(CARGO) bench

audit: ## Licences, bans and advisories by cargo-deny; fetches the advisory database.
	command -v cargo-deny >/dev/null || $(CARGO) install --locked cargo-deny
	$(CARGO) deny check

clean:
	$(CARGO) clean
	rm -rf build
