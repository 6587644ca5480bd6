# Set-up, the main job, the tests. Needs Python 3.11 or newer with venv, and the package registry.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: help venv demo test lint bench bench-kernels compile-kernels results clean
help:
	@echo "make demo             decode with offloaded experts and compare predictors (two to seven minutes)"
	@echo "make test             all tests"
	@echo "make bench            exactness, resident speed, transfers, overhead (minutes, on a quiet machine)"
	@echo "make bench-kernels    the experts' CPU path against transformers' own (minutes, on a quiet machine)"
	@echo "make compile-kernels  compile every Triton kernel, no GPU needed; writes docs/kernels_compiled.csv"
	@echo "make results          the figures of README and docs/results.md (20 to 40 minutes, on a quiet machine)"
	@echo "make lint             ruff and mypy"
	@echo "make venv             set up $(VENV) only; the others do it when needed"
	@echo "make clean            remove $(VENV), packed experts and outputs"

venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "gatecast needs Python 3.11 or newer, '$(PYTHON)' is older: make PYTHON=python3.12" >&2; exit 1; }
	@echo "setting up $(VENV) (a few minutes, once)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]' 2>$(VENV)/pip.log || \
		{ grep -v '^WARNING: Location' $(VENV)/pip.log | tail -n 5 >&2; echo "installing failed; the whole log is $(VENV)/pip.log" >&2; exit 1; }
	@touch $(STAMP)

demo: $(STAMP)
	$(BIN)/python -m experiments.decode experiment=demo

test: $(STAMP)
	$(BIN)/python -m pytest -n auto --maxprocesses=4 --dist=loadfile

bench: $(STAMP)
	$(BIN)/python -m experiments.bench

bench-kernels: $(STAMP)
	$(BIN)/python -m scripts.bench_kernels outputs/kernels/bench_kernels.json

compile-kernels: $(STAMP)
	$(BIN)/python -m kernels.aot --csv docs/kernels_compiled.csv

results: $(STAMP)
	$(BIN)/python -m experiments.decode experiment=demo repeats=9 hydra.run.dir=outputs/results/slots_25
	$(BIN)/python -m experiments.decode experiment=demo repeats=9 cache.slots=0.45 hydra.run.dir=outputs/results/slots_45
	$(BIN)/python -m experiments.bench hydra.run.dir=outputs/results/bench
	$(BIN)/python -m scripts.results_page outputs/results

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) .cache outputs multirun
