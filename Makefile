# `make demo` runs the main job, `make test` the tests. Both need Python 3.11 or later and nothing else.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= out

.PHONY: demo test lint slow clean

demo: $(VENV)/.installed
	mkdir -p $(OUT)
	$(BIN)/sws-export examples/shapes --out $(OUT)/engine.plan --tokens 8 --keep-onnx
	$(BIN)/sws-export sample $(OUT)/engine.onnx examples/shapes --trust-code --out $(OUT)/pictures.png \
		--prompt "red circle center" --prompt "blue cross top and white square bottom" \
		--prompt "green triangle left and yellow circle right" --prompt "" \
		--seed 2 --seed 3 --steps 16 --guidance 3

test: lint
	$(BIN)/python -m pytest

lint: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

slow: $(VENV)/.installed
	$(BIN)/python -m pytest -m slow

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[cpu,rtx,dev]'
	touch $@

clean:
	rm -rf $(VENV) $(OUT) build
