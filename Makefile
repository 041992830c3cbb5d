# Two commands: `make demo` trains and evaluates on phantom X-rays, `make test` runs the tests.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PHANTOM := data/phantom
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: setup demo test test-crash check phantom clean

setup: $(VENV)/.installed

# torch and torchvision come in one resolver run, pinned as a pair, so that they always match.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("vilmedic needs Python 3.10 or newer, this is " + sys.version.split()[0] if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

phantom: setup
	$(BIN)/python data/make_phantom.py --root $(PHANTOM) --train 4000 --validate 500 --test 500 --size 128 --seed 0

demo: phantom
	$(BIN)/python bin/train.py config/phantom/convirt.yml name=demo-convirt trainor.seed=0
	$(BIN)/python bin/ensemble.py config/phantom/convirt.yml name=demo-convirt

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: setup
	$(BIN)/python -m pytest tests

# Kills every system at 20 random moments and compares what it became with the run never killed.
test-crash: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.crash --kills 20
