# make demo | test | lint | bench: each makes .venv and installs what it needs, once. Afterwards nothing needs a network.
#
# PYTHON=python3.12 chooses the interpreter. TESTS="tests/test_rules.py -x" narrows `make test`.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check --quiet --quiet
TORCH  := $(shell sed -n 's/^torch==/torch==/p' constraints.txt)
TESTS  ?=
DEMO   ?=
BENCH  ?=

DEPS    := $(VENV)/installed-dependencies
PACKAGE := $(VENV)/installed-package
FILES   := $(VENV)/installed-files

# One thread per process: two test processes share two cores. No hub is asked for anything.
export HF_HUB_OFFLINE = 1
export TOKENIZERS_PARALLELISM = false

.DEFAULT_GOAL := help
.PHONY: help install demo test lint bench clean FORCE

help:
	@sed -n '1,3s/^# \{0,1\}//p' Makefile

# torch comes first and alone, so that the machine's own index chooses the build (CPU or CUDA).
$(DEPS): pyproject.toml constraints.txt
	@echo "installing dependencies into $(VENV) (once)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) install $(TORCH)
	@$(PIP) install --constraint constraints.txt setuptools wheel
	@$(PIP) install --constraint constraints.txt --no-build-isolation --editable '.[dev,demo]'
	@touch $@

# The editable install links file by file, so a file that comes or goes needs it again: offline, without dependencies.
$(FILES): FORCE | $(DEPS)
	@find plugin callbacks conf recipes -type f -not -path '*/__pycache__/*' | LC_ALL=C sort > $@.new
	@if cmp -s $@.new $@ && ls -d build/__editable__.apportion-* > /dev/null 2>&1; then rm $@.new; else mv $@.new $@; fi

$(PACKAGE): $(DEPS) $(FILES)
	@$(PIP) install --no-deps --no-build-isolation --no-index --editable .
	@touch $@

install: $(PACKAGE)

demo: install
	@$(BIN)/python -m apportion.recipes.demo $(DEMO)

bench: install
	@$(BIN)/python -m apportion.recipes.bench $(BENCH)

test: install
	@OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadgroup $(TESTS)

lint: install
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy -p apportion

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
