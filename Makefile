# Two commands do everything on a fresh Debian 12 machine (root, package registries, a current Rust by rustup):
#   make demo                    the main job: a virtual cluster that moves itself while HPL runs
#   make test                    all tests
.DEFAULT_GOAL := help
SHELL := /bin/bash
GUESTS ?= qemu
SEED ?=
CARGO ?= cargo
DEMO = target/release/violin-demo --guests $(GUESTS) $(if $(SEED),--seed $(SEED),)

.PHONY: help demo demo-falsify test check build image setup setup-sandbox bench-smoke bench-fabric clean

help: ## this list
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo '  GUESTS=sandbox          guests are namespaces instead of QEMU VMs (no hypervisor needed)'
	@echo '  SEED=N                  repeat a demo'

demo: ## the main job on real parts; report in target/demo/report.json
	@scripts/setup $(GUESTS)
	@scripts/build $(GUESTS)
	@$(DEMO) --out target/demo

demo-falsify: ## shows that the demo can fail
	@scripts/setup $(GUESTS)
	@scripts/build $(GUESTS)
	@scripts/demo-falsify $(GUESTS)

build: ## build the daemons and tools
	@scripts/build $(GUESTS)

image: ## build the guest image (once; again when its recipe changes)
	@scripts/setup qemu
	@scripts/build qemu

test: ## install what tests need and run them all
	@scripts/setup test
	@scripts/build qemu
	@scripts/test

check: ## format, lints, documentation, licences
	@pkg-config --exists libvirt || scripts/setup qemu
	@scripts/check

bench-smoke: ## bulk TCP over the fabric as a ratio to raw veth, JSON
	@scripts/setup sandbox
	@$(CARGO) build --release -p violin-benches -p switchd
	@target/release/bench-smoke

bench-fabric: ## the fabric against kernel VXLAN and rivals: table, target/bench/fabric.json and .svg; QUICK=1: 8 minutes
	@scripts/setup bench
	@$(CARGO) build --release -p violin-benches -p switchd
	@VIOLIN_BIN=target/release target/release/bench-fabric --out target/bench

clean: ## remove what was built
	$(CARGO) clean
