# `make demo` and `make test` start from a bare clone: each installs what is missing into .venv.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
RUN := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed

.PHONY: help install demo test test-slow test-matrix format lint docs benchmark clean

help:
	@echo "make demo     install, make the digits data, train with four losses, write a report"
	@echo "make test     install and run the tests"
	@echo "make test-slow    the tests that take minutes: 20 killed runs, thousands of steps"
	@echo "make test-matrix  the tests with other versions of Python, PyTorch and Detectron2"
	@echo "make lint     formatter check, linter, type checker"
	@echo "make format   format the code"
	@echo "make docs     regenerate the tables and figures in README.md and docs/"
	@echo "make benchmark  measure the losses and the models on this machine, then make docs"

install: $(INSTALLED)

$(INSTALLED): requirements/torch.txt requirements/base.txt requirements/detectron2.txt \
		requirements/digits.txt requirements/lab.txt requirements/dev.txt setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "make needs Python 3.11 or newer: make PYTHON=/path/to/python3.11"; exit 1; }
	$(RUN) -m pip --version || $(PYTHON) -m venv --clear $(VENV)
	$(RUN) -m pip install --disable-pip-version-check -r requirements/torch.txt \
		-r requirements/base.txt -r requirements/lab.txt -r requirements/dev.txt
	$(RUN) -m pip install --disable-pip-version-check --no-deps -r requirements/digits.txt
	$(RUN) -m pip install --disable-pip-version-check --upgrade --no-deps --only-binary=:all: \
		--python-version 3.10 --require-hashes -r requirements/detectron2.txt \
		--target "$$($(RUN) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
	$(RUN) -m pip install --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

demo: $(INSTALLED)
	$(RUN) tools/demo.py

test: $(INSTALLED)
	$(RUN) -m pytest

test-slow: $(INSTALLED)
	$(RUN) -m pytest -m slow --numprocesses=0

test-matrix: $(INSTALLED)
	$(RUN) tools/test_matrix.py

lint: $(INSTALLED)
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m mypy

format: $(INSTALLED)
	$(RUN) -m ruff format .
	$(RUN) -m ruff check --fix .

docs: $(INSTALLED)
	$(RUN) tools/docs.py
	$(RUN) tools/plot.py

benchmark: $(INSTALLED)
	$(RUN) tools/benchmark_losses.py
	$(RUN) tools/benchmark_model.py
	$(RUN) tools/docs.py

clean:
	rm -rf $(VENV) .matrix output build dist *.egg-info
