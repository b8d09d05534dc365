# make demo   sets everything up and forgets ten people in front of you
# make test   sets everything up and runs the tests
# Python 3.11 is all that has to be there. TORCH_INDEX=URL picks another index for torch (e.g. PyTorch's CPU index):
# on Linux the default wheel may bring CUDA.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   ?= .venv
BIN     = $(VENV)/bin
OUT    ?= out/demo
PIP     = $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt
# Two OpenMP threads on two contended cores are many times slower than one.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM = false

.PHONY: demo test slow lint types bench docs bases clean
.DEFAULT_GOAL := demo

$(VENV)/.run: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(if $(TORCH_INDEX),$(PIP) torch --index-url $(TORCH_INDEX))
	$(PIP) -e .
	touch $@

$(VENV)/.dev: $(VENV)/.run
	$(PIP) -e '.[dev]'
	touch $@

demo: $(VENV)/.run
	HF_HUB_OFFLINE=1 $(BIN)/peft-unlearn demo --out $(OUT)

test: $(VENV)/.dev
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

slow: $(VENV)/.dev
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m slow

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(VENV)/.dev
	HF_HUB_OFFLINE=1 $(BIN)/python tests/bench/run.py
	HF_HUB_OFFLINE=1 $(BIN)/python tests/bench/experts.py
	HF_HUB_OFFLINE=1 $(BIN)/python tests/bench/stack.py
	HF_HUB_OFFLINE=1 $(BIN)/python tests/bench/merge.py --gb 1
	HF_HUB_OFFLINE=1 $(BIN)/python tests/bench/attacks.py adapters/published/simnpo

docs: $(VENV)/.dev
	$(BIN)/python docs/generate.py

bases: $(VENV)/.dev
	$(BIN)/python adapters/bases/build people
	$(BIN)/python adapters/bases/build domains

clean:
	rm -rf $(VENV) out dist build
