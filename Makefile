# The two commands of the README. Each sets up its environment by itself, once.
PYTHON ?= python3
VENV ?= .venv
EXPERIMENT ?= tiny
# Processes of the tests; each makes its own towns, so that more than eight take long to begin.
JOBS ?= $(shell n=$$(nproc 2>/dev/null || sysctl -n hw.ncpu); echo $$(( n < 8 ? n : 8 )))
# Two numerical threads a process is right for a laptop; set OMP_NUM_THREADS yourself on larger machines.
export ODVLA_DATA ?= data
export ODVLA_RUNS ?= runs

.PHONY: demo test lint install clean

demo: $(VENV)/installed
	$(VENV)/bin/python lightning_app.py fit $(EXPERIMENT)

test: $(VENV)/installed
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(VENV)/bin/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "odvla needs Python 3.11 or newer, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
