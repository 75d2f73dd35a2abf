# Every target builds .venv first and uses it. On a machine with a GPU: make quickstart TORCH=torch
TORCH ?= torch==2.13.0
PYTHON ?= python3
OLDEST_TRANSFORMERS := 5.17.0
BIN := .venv/bin
PIP := $(BIN)/pip --disable-pip-version-check

.PHONY: quickstart test test-slow test-oldest test-beside bench check docs format clean

quickstart: .venv/.ready
	$(BIN)/phi3v train easy-vqa --out runs/easy-vqa --resume auto

test: .venv/.ready
	$(BIN)/pytest

test-slow: .venv/.ready
	$(BIN)/pytest -m slow -n 0

# The model and the data on the oldest transformers that is supported; .venv has the newest.
test-oldest: .venv-oldest/.ready
	.venv-oldest/bin/pytest tests/model tests/data

# With packages that cannot live among the others: azure-ai-ml wants other versions of opentelemetry than wandb does, and
# torchao, where PEFT finds it, complains at every start of parts that this torch cannot load and we do not use.
test-beside: .venv/.ready .venv-beside/.ready
	PYTHONPATH=.venv-beside $(BIN)/pytest tests/test_launch.py tests/model/test_fp8.py

bench: .venv/.ready
	$(BIN)/python -m benchmarks.bench
	$(BIN)/python -m benchmarks.plan
	$(BIN)/python -m benchmarks.ranks --ranks 2

check: .venv/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site, in site/. A link that leads nowhere, also within a page, is an error.
docs: .venv/.ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

format: .venv/.ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv .venv-oldest .venv-beside

# torch first and by itself: otherwise another package's requirement would bring a CUDA build of several GB.
.venv/.ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(PIP) install --quiet "$(TORCH)"
	$(PIP) install --quiet --editable ".[dev]"
	touch $@

.venv-oldest/.ready: pyproject.toml
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip --disable-pip-version-check install --quiet "$(TORCH)"
	.venv-oldest/bin/pip --disable-pip-version-check install --quiet --editable ".[dev]" "transformers==$(OLDEST_TRANSFORMERS)"
	touch $@

.venv-beside/.ready: .venv/.ready
	$(PIP) install --quiet --target .venv-beside "azure-ai-ml>=1.28"
	$(PIP) install --quiet --target .venv-beside --no-deps "torchao==0.17.0"
	touch $@
