# The commands of the README. Each sets up what it needs in .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# real data for the tests that want it; they skip with a reason where the folder is absent
SRLM_DATA ?= $(abspath $(wildcard ../shared/data))
export SRLM_DATA
# One thread a test worker: two that share a core spin while they wait for each other. No GPU: many
# tests compare bits or fp64; what is tested on one is tests/test_gpu.py, by `make bench-gpu`.
TEST := CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --durations=10
JOBS ?= $(shell nproc)

.PHONY: kd grpo sft study lint format test test-slow bench bench-gpu clean

kd: $(VENV)/run
	$(BIN)/python train.py --mode kd

grpo: $(VENV)/run
	$(BIN)/python train.py --mode grpo

sft: $(VENV)/run
	$(BIN)/python train.py --mode sft

study: $(VENV)/run
	$(BIN)/python -m eval.study recipes/study/mini.toml --seeds 0

lint: $(VENV)/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright
	$(BIN)/python -m tests.gates

format: $(VENV)/dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

test: lint
	$(TEST) -m "not slow" -n $(JOBS) --dist worksteal tests

test-slow: $(VENV)/dev
	$(TEST) -m slow tests

bench: $(VENV)/run
	$(BIN)/python -m bench.kd_step --data $(SRLM_DATA)/gsm8k/train.jsonl --tokenizer $(SRLM_DATA)/qwen2.5-tokenizer
	$(BIN)/python -m bench.grpo_step --data $(SRLM_DATA)/gsm8k/train.jsonl --tokenizer $(SRLM_DATA)/qwen2.5-tokenizer

bench-gpu: $(VENV)/run
	failed=0; for part in gate speed train; do $(BIN)/python -m bench.gpu $$part || failed=1; done; exit $$failed

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/run: requirements.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install -q -r requirements.txt
	@touch $@

$(VENV)/dev: requirements.txt requirements-dev.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install -q -r requirements-dev.txt
	@touch $(VENV)/run $@

clean:
	rm -rf $(VENV) .pytest_cache
