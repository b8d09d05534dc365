# make demo   sets everything up and forgets ten people in front of you
# make test   sets everything up and runs the tests
# Python 3.11 is all that has to be there. TORCH_INDEX=URL picks another index for torch (e.g. PyTorch's CPU index):
# on Linux the default wheel may bring CUDA.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   ?= .venv
OLDEST ?= .venv-oldest
BIN     = $(VENV)/bin
OUT    ?= out/demo
JOBS   ?= 2
INSTALL = -m pip install -q --disable-pip-version-check
PIP     = $(BIN)/python $(INSTALL) -c constraints.txt
PYTEST  = -m pytest -n $(JOBS) --dist worksteal
# Two OpenMP threads on two contended cores are many times slower than one.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM = false
# Otherwise each process compiles the package, and pytest rewrites every test, again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-oldest coverage slow lint types bench fuzz real docs bases clean
.DEFAULT_GOAL := demo

$(VENV)/.run: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(if $(TORCH_INDEX),$(PIP) torch --index-url $(TORCH_INDEX))
	$(PIP) -e .
	touch $@

$(VENV)/.dev: $(VENV)/.run
	$(PIP) -e '.[dev]'
	touch $@

$(VENV)/.docs: $(VENV)/.dev
	$(PIP) -e '.[docs]'
	touch $@

$(OLDEST)/.dev: pyproject.toml constraints-oldest.txt
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(if $(TORCH_INDEX),$(OLDEST)/bin/python $(INSTALL) -c constraints-oldest.txt torch --index-url $(TORCH_INDEX))
	$(OLDEST)/bin/python $(INSTALL) -c constraints-oldest.txt -e '.[dev]'
	touch $@

demo: $(VENV)/.run
	HF_HUB_OFFLINE=1 $(BIN)/peft-unlearn demo --out $(OUT)

test: $(VENV)/.dev
	HF_HUB_OFFLINE=1 $(BIN)/python $(PYTEST)

test-oldest: $(OLDEST)/.dev
	HF_HUB_OFFLINE=1 $(OLDEST)/bin/python $(PYTEST)

coverage: $(VENV)/.dev
	HF_HUB_OFFLINE=1 $(BIN)/python $(PYTEST) --cov --cov-report=term --cov-report=html:out/coverage

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

# a real model, judged on rows that it never saw: make real MODEL=folder REQUEST=folder
real: $(VENV)/.dev
	$(BIN)/python tests/bench/real.py $(MODEL) --request $(REQUEST) --seeds 0,1 --out docs/real.json

fuzz: $(VENV)/.dev
	$(BIN)/python tests/bench/fuzz.py --n 100000
	$(BIN)/python tests/bench/kills.py --n 300

docs: $(VENV)/.docs
	HF_HUB_OFFLINE=1 $(BIN)/python docs/generate.py
	NO_MKDOCS_2_WARNING=1 HF_HUB_OFFLINE=1 $(BIN)/mkdocs build --strict --quiet

bases: $(VENV)/.dev
	$(BIN)/python adapters/bases/build people
	$(BIN)/python adapters/bases/build domains
	$(BIN)/python adapters/bases/build digits

clean:
	rm -rf $(VENV) $(OLDEST) out dist build
