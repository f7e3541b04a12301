# make quickstart   install into .venv, then text to report in minutes on two CPU cores
# make test         install into .venv with what the tests need, then run them
# make test-slow    the tests that take minutes each: every ready config on several processes, fuzzing
# make controls     the quickstart's controls, reported beside it
# make desk         the whole embedded corpus, up to 90 minutes on two CPU cores
# make sweep        five sizes, two arms, two seeds, and the scaling laws through them
# make benchmark    the rates of this machine
# make lint         ruff

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: quickstart test test-slow controls desk sweep benchmark smoke lint clean

quickstart: $(VENV)/installed
	$(BIN)/mlpmem run --config=configs/quickstart.py
	@echo "The report: $(CURDIR)/runs/quickstart/report/index.html"

controls: $(VENV)/installed
	$(BIN)/mlpmem controls --config=configs/quickstart.py

desk: $(VENV)/installed
	$(BIN)/mlpmem run --config=configs/desk.py
	@echo "The report: $(CURDIR)/runs/desk/report/index.html"

sweep: $(VENV)/installed
	$(BIN)/mlpmem sweep --config=configs/sweeps/quickstart_sizes.py --workers=2
	$(BIN)/mlpmem fit --runs=runs/quickstart_sizes --output=runs/quickstart_sizes/fit
	@echo "The picture: $(CURDIR)/runs/quickstart_sizes/fit/fit.svg"

smoke: $(VENV)/installed
	$(BIN)/mlpmem run --config=configs/smoke.py

benchmark: $(VENV)/installed-bench
	$(BIN)/mlpmem benchmark --config=configs/quickstart.py --json=runs/benchmark.json

test: $(VENV)/installed-test
	$(BIN)/python -m pytest --numprocesses=auto --maxprocesses=4 --dist=loadfile

test-slow: $(VENV)/installed-test
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/installed-test
	$(BIN)/ruff check .

clean:
	rm -rf $(VENV) *.egg-info

$(VENV)/bin/pip:
	$(PYTHON) -c 'import sys; sys.exit("mlpmem_jax needs Python 3.11, 3.12 or 3.13; set PYTHON=...") if not (3, 11) <= sys.version_info[:2] <= (3, 13) else None'
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: setup.py $(VENV)/bin/pip
	$(BIN)/pip install --quiet --disable-pip-version-check -e .
	@touch $@

$(VENV)/installed-test: setup.py $(VENV)/bin/pip
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[test,torch,hub,gguf,plan,bench]'
	@touch $@ $(VENV)/installed

$(VENV)/installed-bench: setup.py $(VENV)/bin/pip
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[bench]'
	@touch $@ $(VENV)/installed
