# `make demo` and `make test` need only make and Python 3.11 or newer; everything else goes into .venv.
#
# torch is most of the download. Its plain Linux package brings the CUDA libraries along, several gigabytes, also on
# a machine without a GPU; to avoid that, point pip at PyTorch's CPU packages first, as PyTorch's own guide says.

VENV := .venv
DOCS := .venv-docs
CLIENTS := .venv-clients
VLLM := .venv-vllm
RELEASE := .venv-release
BIN  := $(VENV)/bin
JOBS ?= 2
ARGS ?=

# Python to make .venv with, as in `make test PYTHON=python3.13`. Empty: the first below that is new enough.
PYTHON ?=
CANDIDATES := $(if $(PYTHON),$(PYTHON),python3.11 python3.12 python3.13 python3.14 python3 python)
SUITABLE := import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))

# One thread per worker: two workers with two threads each on two cores spend their time waiting for each other.
PYTEST := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

unexport PYTHONPATH PYTHONHOME

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow vllm soak mutants clients docs release lint format clean distclean

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

demo: $(VENV)/.installed ## install, then train and compare small models on this machine
	$(BIN)/lrt demo $(ARGS)

test: $(VENV)/.installed-dev ## every test that is not slow; ARGS goes to pytest
	@echo "not among them: the tests of an LRT inside vLLM, which has an environment of its own (make vllm)"
	$(PYTEST) -m "not slow" $(ARGS)

# pytest exits 5 when it finds no test to run; there being no slow test is not a failure.
test-slow: $(VENV)/.installed-dev ## the slow tests
	@$(PYTEST) -m slow $(ARGS) || { code=$$?; [ $$code -eq 5 ] || exit $$code; }

# vLLM's distribution for CPUs, with the torch and transformers that it takes. Each test starts an engine, so that they
# run one after another.
vllm: $(VLLM)/.installed ## LRT inside vLLM: an environment of its own (several gigabytes), and its tests
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(VLLM)/bin/python -m pytest tests/serving_at_scale tests/model/test_states.py $(ARGS)

soak: $(VENV)/.installed-dev ## kill everything a thousand times, and compare (about half an hour; stopped, it goes on)
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python benchmarks/soak.py runs/soak $(ARGS)

# An hour and more; it goes on where it was interrupted. The first run records which tests run which lines.
mutants: $(VENV)/.installed-dev ## break the code in 300 small ways; which does no test notice?
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python benchmarks/mutants.py $(ARGS)

# An environment of their own: they need other versions than the library is tested with. The server runs in .venv.
clients: $(VENV)/.installed-dev $(CLIENTS)/.installed ## real clients against lrt serve (ARGS=--record writes down what they send)
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(CLIENTS)/bin/python -m pytest -c tests/clients/pytest.ini \
	  --rootdir tests/clients --confcutdir tests/clients tests/clients/real_clients.py $(ARGS)

# An environment of its own: Sphinx and its themes have no place among what the library is tested with. The site is
# built with lrt in it, as the notebooks run and docstrings are read.
docs: $(DOCS)/.installed ## build the site into build/docs; every warning is an error
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(DOCS)/bin/python -m sphinx -W --keep-going -b html docs build/docs $(ARGS)

# twine is pinned here: it checks what is uploaded, and has no place in an environment that runs the library.
release: $(VENV)/.installed-dev ## build, check, install the wheel in a clean environment and run the demo's first minute
	rm -rf dist $(RELEASE)
	$(BIN)/python -m build --no-isolation --outdir dist
	$(BIN)/python -m venv $(RELEASE)
	$(RELEASE)/bin/python -m pip install --quiet twine==7.0.0
	$(RELEASE)/bin/python -m twine check --strict dist/*
	$(RELEASE)/bin/python -m pip install --quiet dist/*.whl --constraint constraints.txt
	cd $(RELEASE) && bin/lrt --version && bin/lrt --help >/dev/null
	cd $(RELEASE) && { timeout 60 bin/lrt demo --out demo; code=$$?; [ $$code -eq 124 ] || [ $$code -eq 0 ]; }
	@echo "dist/ is fit to be uploaded"

lint: $(VENV)/.installed-dev ## style, types and import order
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright
	$(BIN)/lint-imports --no-cache

format: $(VENV)/.installed-dev ## rewrite the code in the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove caches and built packages; .venv and runs stay
	rm -rf build dist *.egg-info docs/log docs/study .pytest_cache .ruff_cache .hypothesis .benchmarks .import_linter_cache
	find lrt tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## clean, and remove .venv and the others (.venv-docs, .venv-clients, .venv-vllm, .venv-release) too
	rm -rf $(VENV) $(DOCS) $(CLIENTS) $(VLLM) $(RELEASE)

# The stamps are written last, so an installation that was interrupted is done again, as it is after a change of
# what it read.
$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --editable . --constraint constraints.txt
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --editable '.[dev]' --constraint constraints.txt
	@touch $(VENV)/.installed $@

$(DOCS)/.installed: pyproject.toml constraints.txt docs/requirements.txt docs/constraints.txt | $(DOCS)/bin/python
	$(DOCS)/bin/python -m pip install --editable '.[hf]' --requirement docs/requirements.txt \
	  --constraint constraints.txt --constraint docs/constraints.txt
	@touch $@

$(CLIENTS)/.installed: tests/clients/requirements.txt tests/clients/constraints.txt | $(CLIENTS)/bin/python
	$(CLIENTS)/bin/python -m pip install --requirement tests/clients/requirements.txt \
	  --constraint tests/clients/constraints.txt
	@touch $@

# What is uninstalled was built for CUDA and cannot be loaded beside torch for CPUs; vLLM needs none of it for text.
$(VLLM)/.installed: pyproject.toml constraints-vllm.txt | $(VLLM)/bin/python
	$(VLLM)/bin/python -m pip install --editable . --requirement tests/serving_at_scale/requirements.txt \
	  --constraint constraints-vllm.txt
	$(VLLM)/bin/python -m pip uninstall --yes torchvision torchaudio torchcodec
	@touch $@

$(BIN)/python $(DOCS)/bin/python $(CLIENTS)/bin/python $(VLLM)/bin/python:
	@for python in $(CANDIDATES); do \
	  if "$$python" -c '$(SUITABLE)' >/dev/null 2>&1; then \
	    echo "making $(@D:/bin=) with $$("$$python" -c 'import sys; print("Python", sys.version.split()[0])')"; \
	    "$$python" -m venv $(@D:/bin=) && exit 0; \
	    rm -rf $(@D:/bin=); exit 1; \
	  fi; \
	done; \
	echo "lrt needs Python 3.11 or newer with its venv module; tried: $(CANDIDATES)." >&2; \
	echo "Install it (on Debian and Ubuntu also the package python3-venv), or name one: make PYTHON=/path/to/python" >&2; \
	exit 1
