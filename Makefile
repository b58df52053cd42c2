# Everything a developer runs. Each target makes .venv when it is missing.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help

.PHONY: help
help: ## Show this list
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: demo
demo: $(READY) ## Classify real digits with the original and the optimized model, and time both
	$(BIN)/convmixer-fast demo

# On all cores; tests that share what takes long to make run one after the other.
PYTEST = $(BIN)/python -m pytest -n auto --dist loadgroup --max-worker-restart 0

.PHONY: test
test: $(READY) ## Run the tests, of long sweeps a few points (ARGS=options of pytest)
	$(PYTEST) -m "not exhaustive" $(ARGS)

.PHONY: test-all
test-all: $(READY) ## Run every test, with all points of the sweeps
	$(PYTEST) $(ARGS)

.PHONY: bench
bench: $(READY) ## Time models and ops with every runtime installed: tables, pictures, a report
	$(BIN)/python -m benchmarks standard $(ARGS)

# The gpu targets use $(PYTHON) as it is: a GPU machine has its own PyTorch, and no network.
GPU_ARGS = $(if $(OUT),--output $(OUT)) $(if $(REHEARSE),--rehearse) $(ARGS)

.PHONY: gpu-first
gpu-first: ## On a CUDA machine: correctness, models, kernels, tiles, tests in 6 minutes (OUT=folder)
	$(PYTHON) -m benchmarks.gpu first $(GPU_ARGS)

.PHONY: gpu-second
gpu-second: ## On a CUDA machine, with tables updated: the same, with Nsight Compute (OUT=folder)
	$(PYTHON) -m benchmarks.gpu second $(GPU_ARGS)

.PHONY: coverage
coverage: $(READY) ## Run every test and show what they do not reach
	$(PYTEST) --cov --cov-report=term-missing:skip-covered $(ARGS)

.PHONY: sanitize
sanitize: $(READY) ## Run the CPU kernels' tests under AddressSanitizer and UndefinedBehaviorSanitizer
	$(BIN)/python -m tests.sanitize

.PHONY: fuzz
fuzz: $(READY) ## Try random ops, models and files for ten minutes (ARGS=--minutes 60 --only images)
	$(BIN)/python -m tests.fuzz $(ARGS)

.PHONY: soak
soak: $(READY) ## Serve for ten minutes from eight threads; answers and memory are checked
	$(BIN)/python -m tests.fuzz.load $(ARGS)

.PHONY: lint
lint: $(READY) ## Check style and formatting (ruff)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.PHONY: format
format: $(READY) ## Rewrite the sources in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: typecheck
typecheck: $(READY) ## Check types (mypy)
	$(BIN)/mypy -p convmixer_fast

.PHONY: docs
docs: $(READY) ## Build the documentation in build/docs
	$(BIN)/pip install -q mkdocs-material "mkdocstrings[python]"
	$(BIN)/mkdocs build --strict

.PHONY: docs-serve
docs-serve: $(READY) ## Show the documentation on http://127.0.0.1:8000, as it changes
	$(BIN)/pip install -q mkdocs-material "mkdocstrings[python]"
	$(BIN)/mkdocs serve

.PHONY: train
train: $(READY) ## Train the digits model that ships with the package again
	$(BIN)/python examples/train_digits.py --output convmixer_fast/data/digits.safetensors

.PHONY: clean
clean: ## Remove what was built, and .venv
	rm -rf build dist *.egg-info convmixer_fast/_C*.so $(VENV)
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# timm and torchvision come without their dependencies: theirs would replace the
# PyTorch build that was chosen above by another one.
$(READY): constraints.txt pyproject.toml setup.py $(wildcard csrc/*.cpp csrc/cpu/*)
	@echo "== 1/4 virtual environment in $(VENV)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "== 2/4 PyTorch and build tools"
	$(BIN)/pip install -c constraints.txt torch setuptools wheel pybind11
	@echo "== 3/4 libraries"
	$(BIN)/pip install -c constraints.txt $(shell sed -n 's/^\([a-z][a-z0-9_-]*\)==.*/\1/p' constraints.txt | grep -vxE 'torch|timm|torchvision')
	$(BIN)/pip install --no-deps -c constraints.txt timm torchvision
	@echo "== 4/4 convmixer_fast and its extension, half a minute"
	CONVMIXER_FAST_EXT=1 $(BIN)/pip install --no-deps --no-build-isolation -e .
	touch $@
