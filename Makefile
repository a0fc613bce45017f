# The project's commands. Each makes .venv when it is missing or older than what it is made from.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready

.PHONY: demo test lint format peer bench proto docs clean help

help:
	@echo "make demo    two replica groups train, one joins late, is killed, recovers   (about a minute)"
	@echo "make test    the whole test suite"
	@echo "make lint    style, types, import rules, generated files"
	@echo "make format  rewrite the code in the project's style"
	@echo "make peer    install the measured peer into .peer/"
	@echo "make bench   measure against the peer"
	@echo "make proto   generate code and tables from proto/ and torchft/config.py"

$(READY): pyproject.toml constraints.txt
	@echo "installing into $(VENV) (PyTorch among it: some minutes the first time)"
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(READY)
	$(PY) -m torchft.cli.main demo

# Two at a time: most tests wait for processes, sockets and clocks more than they compute.
test: $(READY)
	$(PY) -m pytest -n 2 --dist worksteal

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports
	$(PY) scripts/generate_proto.py --check
	$(PY) -m torchft.config --check docs/configuration.md

format: $(READY)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

peer: $(READY)
	$(PY) scripts/install_peer.py

bench: $(READY) peer
	$(PY) -m benchmarks

proto: $(READY)
	$(PY) scripts/generate_proto.py
	$(PY) -m torchft.config > docs/configuration.md

clean:
	rm -rf $(VENV) .peer .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
