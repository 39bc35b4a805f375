# `make demo` exports the example, `make test` runs the tests. Both need Python 3.11 or later and nothing else.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= out
CHROMIUM ?= chromium
# Test processes. A file of tests stays in one process, so that its fixtures are made once. Files run in the order
# of their paths, which has the long ones (tests/acceptance) first and many short ones at the end.
WORKERS ?= 2
# Both test processes, and the hundreds of processes that tests start, would compile the package again.
unexport PYTHONDONTWRITEBYTECODE
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: demo quick test slow lint format style imports types pass-tests all-tests lint-windows images clean

demo: $(VENV)/.installed
	mkdir -p $(OUT)
	$(BIN)/sws-export examples/shapes --out $(OUT)/engine.plan --tokens 8 --keep-onnx
	$(BIN)/sws-export sample $(OUT)/engine.onnx examples/shapes --trust-code --out $(OUT)/images.png \
		--prompt "red circle center" --prompt "blue cross top and white square bottom" \
		--prompt "green triangle left and yellow circle right" --prompt "" \
		--seed 2 --seed 3 --steps 16 --guidance 3

# The images of README.md, from the example.
images: $(VENV)/.installed
	mkdir -p $(OUT)
	$(BIN)/sws-export examples/shapes --out $(OUT)/shapes.onnx --debug-outputs
	$(BIN)/sws-export sample $(OUT)/shapes.onnx examples/shapes --trust-code --out docs/images/samples.png \
		--prompt "red circle center" --prompt "green triangle left and yellow circle right" \
		--prompt "blue cross top and white square bottom" --seed 2 --steps 20
	$(BIN)/sws-export report $(OUT)/shapes.onnx --out $(OUT)/report.html
	$(CHROMIUM) --headless --no-sandbox --hide-scrollbars --window-size=960,1032 \
		--screenshot=docs/images/report.png $(OUT)/report.html

# Lint, types and the tests of the graph passes, side by side: about a minute.
quick: $(VENV)/.installed
	$(MAKE) --jobs $(WORKERS) --output-sync --no-print-directory pass-tests lint

pass-tests: $(VENV)/.installed
	$(PYTEST) tests/graph_passes

# Types without a cache take half a minute, on one processor: they are checked beside the tests.
test: $(VENV)/.installed
	$(MAKE) --jobs $(WORKERS) --no-print-directory all-tests lint

all-tests: $(VENV)/.installed
	$(PYTEST)

# What takes real model sizes or minutes: run before a release.
slow: lint-windows
	$(BIN)/python -m pytest -m slow

lint: format style imports types

format: $(VENV)/.installed
	$(BIN)/ruff format --check .

style: $(VENV)/.installed
	$(BIN)/ruff check .

imports: $(VENV)/.installed
	$(BIN)/lint-imports

types: $(VENV)/.installed
	$(BIN)/mypy

# One cache for both platforms would be rebuilt by each run.
lint-windows: $(VENV)/.installed
	$(BIN)/mypy --platform win32 --cache-dir .mypy_cache/win32

# Most of what is installed is never imported: pip would compile it for a minute, on one processor.
PIP_INSTALL := $(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) torch
	$(PIP_INSTALL) --editable '.[cpu,rtx,dev]'
	touch $@

clean:
	rm -rf $(VENV) $(OUT) build
