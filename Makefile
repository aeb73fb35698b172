# Every target is one line that a person could type; each sets up what it needs first (own .venv, nothing global).
# pip's environment variables (PIP_INDEX_URL, PIP_FIND_LINKS, ...) reach pip as they are.

PYTHON ?= python3
IMAGE ?= examples/receipt.jpg
QUESTION ?= What is the date?
ZOOM ?= auto
SAVE ?= out/demo.png
REFERENCE ?=
RUNS ?= runs/evidence
DATA ?=
WORKERS ?= 2
ARGS ?=

BIN := .venv/bin
READY := .venv/.ready

# Waiting torch threads must sleep, not spin: with spinning ones a busy machine is many times slower.
export OMP_WAIT_POLICY ?= passive
export OMP_NUM_THREADS ?= 1

# Python compiles each module where it is first imported (pip would compile all of them, most of which nobody imports)
# and keeps the result for the hundreds of processes of the tests.
unexport PYTHONDONTWRITEBYTECODE

# Paths and questions go to the shell as environment variables, so that spaces, quotes and dollar signs stay as typed.
export QZOOM_MAKE_IMAGE := $(value IMAGE)
export QZOOM_MAKE_QUESTION := $(value QUESTION)
export QZOOM_MAKE_SAVE := $(value SAVE)
export QZOOM_MAKE_REFERENCE := $(value REFERENCE)
export QZOOM_MAKE_RUNS := $(value RUNS)
export QZOOM_MAKE_DATA := $(value DATA)

.PHONY: help setup demo test test-clients test-vllm lint format parity bench results

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile

setup: $(READY) ## Make .venv with the exact versions of constraints.txt

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "qzoom needs Python 3.11 or newer; name one with: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --no-compile "$$(grep '^torch==' constraints.txt)" -c constraints.txt
	$(BIN)/python -m pip install -q --no-compile -e '.[dev]' -c constraints.txt
	@touch $(READY)

demo: setup ## Ask about a picture: make demo IMAGE=page.jpg QUESTION="What is the date?"
	@$(BIN)/qzoom ask --zoom $(ZOOM) --save "$$QZOOM_MAKE_SAVE" -- "$$QZOOM_MAKE_IMAGE" "$$QZOOM_MAKE_QUESTION"

test: setup ## Run the tests: make test ARGS="tests/cli -k json"
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

test-clients: setup ## Run client libraries against a server, in .venv-clients
	test -x .venv-clients/bin/python || $(PYTHON) -m venv .venv-clients
	.venv-clients/bin/python -m pip install -q -r tests/clients/requirements.txt
	if command -v npm > /dev/null; then cp tests/clients/package.json .venv-clients && npm install --silent --no-audit --no-fund --prefix .venv-clients; fi
	QZOOM=$(BIN)/qzoom NODE_FOLDER=.venv-clients .venv-clients/bin/python -m pytest -q -c /dev/null --noconftest $(CURDIR)/tests/clients/check_clients.py $(ARGS)

VLLM := .venv-vllm/bin/python
.venv-vllm/.ready: constraints-vllm.txt pyproject.toml tests/integrations/vllm/torchvision_ops.py
	test -x $(VLLM) || $(PYTHON) -m venv .venv-vllm
	$(VLLM) -m pip install -q --no-deps -r constraints-vllm.txt
	$(VLLM) -m pip install -q --no-deps --no-build-isolation -e .
	site=$$($(VLLM) -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])') && cp tests/integrations/vllm/torchvision_ops.py "$$site" && echo 'import torchvision_ops' > "$$site/torchvision_ops.pth"
	@touch $@

test-vllm: .venv-vllm/.ready ## Run the plug-in in a real vLLM, on the CPU, in .venv-vllm (3 GB)
	VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1 $(VLLM) -m pytest tests/integrations/vllm -p no:cacheprovider $(ARGS)

lint: setup ## ruff (rules and layout) and mypy
	$(BIN)/ruff check && $(BIN)/ruff format --check && $(BIN)/mypy

format: setup ## Let ruff mend layout and imports
	$(BIN)/ruff check --fix && $(BIN)/ruff format

parity: setup ## Compare with the authors' recorded arithmetic: make parity REFERENCE=DIR
	@test -n "$$QZOOM_MAKE_REFERENCE" || { echo "Name the folder of recorded cases: make parity REFERENCE=DIR" >&2; exit 2; }
	@$(BIN)/python -m tests.parity "$$QZOOM_MAKE_REFERENCE"

bench: setup ## Time the engine beside transformers' own generate
	$(BIN)/python benchmarks/engine.py $(ARGS)

results: setup ## Make docs/results.md from what the benchmarks kept: make results RUNS=runs/evidence DATA=receipts
	@$(BIN)/python -m benchmarks.results --runs "$$QZOOM_MAKE_RUNS" $${QZOOM_MAKE_DATA:+--data "$$QZOOM_MAKE_DATA"}
