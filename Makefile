# Every target sets up what it needs in .venv. `make` or `make help` lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Variants of the step that `make bench MODEL=…` measures: what one would write, then ours as it is and leaner.
BF16 := teacher_dtype=bfloat16
STEPS := stock:$(BF16) stock:compile=model,$(BF16) ours:$(BF16) \
  ours:$(BF16),logits_dtype=bfloat16,activation_budget_gib=4.4

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-gpu bench lint format clean

help: ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check torch -c constraints.txt
	DS_BUILD_OPS=0 $(BIN)/python -m pip install -q --disable-pip-version-check -e '.[dev]' -c constraints.txt
	@touch $@

setup: $(STAMP) ## Make .venv with everything in it (versions of constraints.txt)

demo: $(STAMP) ## Upcycle SmolLM2-135M to MLA, distil it and write the report (about 10 minutes on two cores)
	$(BIN)/posttrain run x_ecomla scale=demo

test: $(STAMP) ## Run the tests (under ten minutes on two cores)
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-gpu: $(STAMP) ## Run the tests that need a CUDA device (without one they are skipped)
	$(BIN)/python -m pytest -m gpu

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

clean: ## Remove .venv and caches; outputs/ stays
	rm -rf $(VENV) .pytest_cache .ruff_cache build *.egg-info
