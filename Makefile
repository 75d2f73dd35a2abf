# Every target builds the environment it needs and uses it. On a machine with a GPU: make quickstart TORCH=torch
TORCH ?= torch==2.13.0
PYTHON ?= python3
OLDEST_TRANSFORMERS := 5.17.0
BIN := .venv/bin
INSTALL := pip --disable-pip-version-check install --quiet

.PHONY: quickstart test test-slow test-oldest test-newest test-minimal test-beside
.PHONY: bench check docs format lines constraints clean

quickstart: .venv/.ready
	$(BIN)/phi3v train easy-vqa --out runs/easy-vqa --resume auto

test: .venv/.ready
	$(BIN)/pytest

test-slow: .venv/.ready
	$(BIN)/pytest -m slow -n 0

# The model and the data on the oldest supported transformers; .venv has the one in constraints.txt.
test-oldest: .venv-oldest/.ready
	.venv-oldest/bin/pytest tests/model tests/data

# Everything on the newest release of every package, without constraints.txt, in an environment built again each time.
test-newest:
	rm -rf .venv-newest
	$(call environment,.venv-newest,--editable ".[dev]")
	.venv-newest/bin/pytest

# Without any extra: every module is importable, every --help works, every missing extra is named.
test-minimal: .venv-minimal/.ready
	rm -rf build
	.venv-minimal/bin/$(INSTALL) --no-deps --force-reinstall .
	.venv-minimal/bin/python -I .ci/minimal.py

# With packages that cannot live among the others: azure-ai-ml needs other versions of opentelemetry than wandb does, and
# where PEFT finds torchao, every start warns about parts of it that this torch cannot load and phi3v does not use.
test-beside: .venv/.ready .venv-beside/.ready
	PYTHONPATH=.venv-beside $(BIN)/pytest tests/plan/test_jobs.py tests/model/test_fp8.py

bench: .venv/.ready
	$(BIN)/python -m benchmarks.bench
	$(BIN)/python -m benchmarks.plan
	$(BIN)/python -m benchmarks.ranks --ranks 2

# Style, types, the order of the packages, spelling.
check: .venv/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/codespell src tests docs README.md

# The site, in site/. A broken link, also within a page, is an error.
docs: .venv/.ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

format: .venv/.ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Lines of code by package, without blank lines, comments and docstrings.
lines:
	$(PYTHON) .ci/code_lines.py src/phi3v

# Pin what .venv has now, after `make test` passed in it.
constraints:
	$(BIN)/python .ci/constraints.py > constraints.txt

clean:
	rm -rf .venv .venv-oldest .venv-newest .venv-minimal .venv-beside build

# $(call environment,FOLDER,WHAT TO INSTALL). torch comes first and by itself: otherwise another package's requirement
# would bring a CUDA build of several GB.
define environment
	$(PYTHON) -m venv $(1)
	$(1)/bin/$(INSTALL) "$(TORCH)"
	$(1)/bin/$(INSTALL) $(2)
	touch $(1)/.ready
endef

.venv/.ready: pyproject.toml constraints.txt
	$(call environment,.venv,--constraint constraints.txt --editable ".[dev]")

# transformers 5.17 needs huggingface_hub 1.x.
.venv-oldest/.ready: pyproject.toml constraints.txt
	grep -vE "^(transformers|huggingface-hub)==" constraints.txt > .venv-oldest.txt
	$(call environment,.venv-oldest,--constraint .venv-oldest.txt --editable ".[dev]" "transformers==$(OLDEST_TRANSFORMERS)")
	rm .venv-oldest.txt

.venv-minimal/.ready: pyproject.toml constraints.txt
	$(call environment,.venv-minimal,--constraint constraints.txt .)

.venv-beside/.ready: .venv/.ready
	$(BIN)/$(INSTALL) --target .venv-beside "azure-ai-ml>=1.28"
	$(BIN)/$(INSTALL) --target .venv-beside --no-deps "torchao==0.17.0"
	touch $@
