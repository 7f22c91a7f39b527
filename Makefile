# Every target sets up what it needs in .venv. `make` or `make help` lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Composition needs no torch, so that another version of Hydra is tried in a small environment of its own.
NEXT := .venv-hydra-next
NEXT_STAMP := $(NEXT)/.installed
NEXT_PACKAGES := hydra-core omegaconf pydantic typer rich pyyaml jinja2 psutil \
  pytest pytest-timeout pytest-xdist hypothesis
COMPOSED := $(NEXT)/composed.json

# Variants of the step that `make bench MODEL=…` measures: what one would write, then ours as it is and leaner.
BF16 := teacher_dtype=bfloat16
STEPS := stock:$(BF16) stock:compile=model,$(BF16) ours:$(BF16) \
  ours:$(BF16),logits_dtype=bfloat16,activation_budget_gib=4.4

.DEFAULT_GOAL := help
.PHONY: help setup demo test fuzz test-hydra-next test-gpu test-slurm bench lint format clean

help: ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-15s %s\n", $$1, $$2}'

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check torch -c constraints.txt
	DS_BUILD_OPS=0 $(BIN)/python -m pip install -q --disable-pip-version-check -e '.[dev]' -c constraints.txt
	@touch $@

setup: $(STAMP) ## Make .venv with everything in it (versions of constraints.txt)

demo: $(STAMP) ## Upcycle SmolLM2-135M to MLA, distil it and write the report (about 10 minutes on two cores)
	$(BIN)/posttrain run x_ecomla scale=demo

test: $(STAMP) ## Run the tests (about half an hour on two cores)
	$(BIN)/python -m pytest -n 2 --dist loadfile

fuzz: $(STAMP) ## Run the tests that draw examples on new ones, not those that `make test` draws each time (a minute)
	$(BIN)/python -m pytest -n 2 --hypothesis-profile=default $$(grep -rl '^@given' tests)

# Without conftest.py, whose fixtures are for tests that have torch.
test-hydra-next: $(STAMP) $(NEXT_STAMP) ## Compose everything that is shipped on the pre-release of Hydra too (under a minute)
	PYTHONPATH=. $(BIN)/python scripts/composed.py --out $(COMPOSED)
	PYTHONPATH=. $(NEXT)/bin/python scripts/composed.py --same-as $(COMPOSED)
	$(NEXT)/bin/python -m pytest -n 2 --noconftest tests/recipes/test_all_yaml.py tests/config

$(NEXT_STAMP): constraints-hydra-next.txt
	@rm -rf $(NEXT)
	$(PYTHON) -m venv $(NEXT)
	@$(NEXT)/bin/python -m pip install -q --disable-pip-version-check $(NEXT_PACKAGES) -c $< \
	  || { echo 'test-hydra-next: NOT RUN: the versions of $< cannot be installed (see above; no network?)' >&2; exit 1; }
	@touch $@

test-gpu: $(STAMP) ## Run the tests that need a CUDA device (without one they are skipped)
	$(BIN)/python -m pytest -m gpu

test-slurm: $(STAMP) ## Run the tests on a small real Slurm, which is installed and started (needs root and apt-get; a quarter of an hour)
	$(BIN)/python -m pytest -m slurm tests/slurm

bench: $(STAMP) ## Check and time the operators beside their peers; MODEL=FOLDER: training step and roll-outs too
	$(BIN)/python kernels/benchmarks/run.py
ifdef MODEL
	$(BIN)/python scripts/bench_distill_step.py --model $(MODEL) --parts --csv kernels/benchmarks/results \
	  --time-limit 150 --steps 30 --variants $(STEPS)
	$(BIN)/python scripts/bench_rollout.py --model $(MODEL) --prompts 64 256 1024 --peers
endif

lint: $(STAMP) ## Check style and imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP) ## Put the code into shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## Remove the environments and caches; outputs/ stays
	rm -rf $(VENV) $(NEXT) .pytest_cache .ruff_cache build *.egg-info
