# `make demo` trains and evaluates on phantom X-rays, `make test` runs the tests; CONTRIBUTING.md names the rest.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PHANTOM := data/phantom
PROMPTS := [Clear lungs and a heart of normal size., Large left pleural effusion., Severe cardiomegaly., \
	Large right pneumothorax.]
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: setup demo demo-simclr demo-gloria demo-dalle demo-finetune test test-crash check docs phantom reference clean

setup: $(VENV)/.installed

# torch and torchvision are installed together, pinned as a pair, so that their versions match.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("vilmedic needs Python 3.10 or newer, this is " + sys.version.split()[0] if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

phantom: setup
	$(BIN)/python data/make_phantom.py --root $(PHANTOM) --train 4000 --validate 500 --test 500 --size 128 --seed 0

demo: phantom
	$(BIN)/python bin/train.py config/phantom/convirt.yml name=demo-convirt trainor.seed=0 ckpt=auto
	$(BIN)/python bin/ensemble.py config/phantom/convirt.yml name=demo-convirt

demo-simclr: phantom
	$(BIN)/python bin/train.py config/phantom/simclr.yml name=demo-simclr trainor.seed=0 ckpt=auto
	$(BIN)/python bin/ensemble.py config/phantom/simclr-eval.yml name=demo-simclr

demo-gloria: phantom
	$(BIN)/python bin/train.py config/phantom/gloria.yml name=demo-gloria trainor.seed=0 ckpt=auto
	$(BIN)/python bin/ensemble.py config/phantom/gloria.yml name=demo-gloria

# Train a VAE and DALLE on its codes, generate images for four prompts, classify their findings.
demo-dalle: phantom
	$(BIN)/python bin/train.py config/phantom/dalle-vae.yml name=demo-dalle-vae trainor.seed=0 ckpt=auto
	$(BIN)/python bin/train.py config/phantom/dalle.yml name=demo-dalle model.vae.ckpt=ckpt/demo-dalle-vae trainor.seed=0 ckpt=auto
	$(BIN)/python bin/ensemble.py config/phantom/dalle.yml name=demo-dalle
	$(BIN)/python bin/ensemble.py config/phantom/dalle.yml name=demo-dalle \
		ensemblor.generate_images=True ensemblor.prompt='$(PROMPTS)'

# Fine-tune the encoder of `make demo` and a random one on three label fractions with three seeds;
# prints one table and writes ckpt/finetune/comparison_fraction.png.
demo-finetune: phantom
	$(BIN)/python bin/train.py config/phantom/convirt.yml name=demo-convirt trainor.seed=0 ckpt=auto
	$(BIN)/python bin/sweep.py config/downstream/phantom.yml name=finetune --jobs 2 \
		model.cnn.pretrained=ckpt/demo-convirt,False dataset.fraction=0.01,0.1,1.0 \
		trainor.seed=0,1,2 'dataset.fraction_seed=$${trainor.seed}' 'ensemblor.splits=[test]'
	$(BIN)/python bin/compare.py ckpt/finetune/* --plot dataset.fraction

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell *.md Makefile benchmarks bin config data/*.py docs tests vilmedic

# Build the site in build/site. Broken links, broken anchors and pages missing from the menu are
# errors (but not with --quiet).
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "Open build/site/index.html"

# Reference implementations for the tests, without their own dependencies, which are not needed.
reference: $(VENV)/.reference

$(VENV)/.reference: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps dalle-pytorch==1.6.6 \
		einops==0.8.2 axial-positional-embedding==0.3.12 rotary-embedding-torch==0.9.1 lightly==1.5.22
	touch $@

# Two processes with one thread each; all tests of a file run in the same process.
test: setup reference
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile tests

# Kill every system at 20 random moments and compare the resumed run with an uninterrupted one.
test-crash: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.crash --kills 20
