# The commands of the README: `make kd`, `make grpo`, `make study` and `make test`. Each sets up what it needs in .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# real data for the tests that want it; they skip with a reason where the folder is absent
SRLM_DATA ?= $(abspath $(wildcard ../shared/data))
export SRLM_DATA

.PHONY: kd grpo sft study test test-slow bench bench-gpu clean

kd: $(VENV)/run
	$(BIN)/torchrun train.py --mode kd

grpo: $(VENV)/run
	$(BIN)/torchrun train.py --mode grpo

sft: $(VENV)/run
	$(BIN)/torchrun train.py --mode sft

study: $(VENV)/run
	$(BIN)/python -m eval.study recipes/study/mini.toml --seeds 0

test: $(VENV)/dev
	$(BIN)/python -m pytest -q -m "not slow" --durations=10 tests

test-slow: $(VENV)/dev
	$(BIN)/python -m pytest -q -m slow --durations=0 tests

bench: $(VENV)/run
	$(BIN)/python -m bench.kd_step --data $(SRLM_DATA)/gsm8k/train.jsonl --tokenizer $(SRLM_DATA)/qwen2.5-tokenizer
	$(BIN)/python -m bench.grpo_step --data $(SRLM_DATA)/gsm8k/train.jsonl --tokenizer $(SRLM_DATA)/qwen2.5-tokenizer

bench-gpu: $(VENV)/run
	for what in head attention decode train_step; do $(BIN)/python -m bench.$$what || exit; done

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
