# dysk: page blobs as Linux disks. `make demo` shows it, `make test` proves it.

CARGO ?= cargo

.PHONY: all build demo test setup lint bench soak audit clean

all: build

build:
	$(CARGO) build --release --bins

demo: ## The main job end to end on an embedded store.
	tests/setup demo
	$(CARGO) build --release --bins
	tests/demo/run target/release

test: ## Everything that has to pass before a change lands.
	tests/setup packages
	$(MAKE) --no-print-directory -j2 setup lint
	$(CARGO) build --bins --tests
	tests/all

setup:
	tests/setup test

lint:
	$(CARGO) fmt --check
	$(CARGO) clippy --all-targets -- -D warnings
	tests/licences
	git ls-files -z tests benches .ci deploy | xargs -0 grep -lZ '^#!/bin/\(ba\)\?sh' | xargs -0 -r shellcheck -x

bench: ## Ratios inside one run; see docs/performance.md.
	tests/setup bench
	$(CARGO) build --release --bins
	$(CARGO) bench

soak: ## The long forms of what test does briefly; seeds are printed and replay a run.
	tests/setup soak
	$(CARGO) build --bins --tests
	DYSK_SIM_HISTORIES=30000 $(CARGO) test --test simulation
	DYSK_LATE_ROUNDS=1000 $(CARGO) test --test volume late_writes::
	DYSK_KILLS=200 DYSK_TAKEOVERS=50 $(CARGO) test --test kernel kill:: -- --include-ignored --nocapture
	DYSK_POWER_CUTS=30 $(CARGO) test --test kernel power:: -- --nocapture
	DYSK_DATABASE_CUTS=20 $(CARGO) test --test kernel databases:: -- --nocapture
	DYSK_OUTAGE_SECONDS=600 $(CARGO) test --test kernel storms:: -- --nocapture
	DYSK_ALL_SCENARIOS=1 $(CARGO) test --test kernel disks:: -- --nocapture
	$(CARGO) test --test deploy -- --ignored --nocapture --test-threads=1
	DYSK_TIMES_MEMORY=10 $(CARGO) test --test kernel memory:: -- --nocapture
	$(CARGO) test --release --test kernel figures:: -- --ignored --nocapture --test-threads=1

audit: ## Licences, bans and advisories by cargo-deny; fetches the advisory database.
	command -v cargo-deny >/dev/null || $(CARGO) install --locked cargo-deny
	$(CARGO) deny check

clean:
	$(CARGO) clean
	rm -rf build
