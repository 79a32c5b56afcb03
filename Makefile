# `make` lists the targets.
VENV        := .venv
PY          := $(VENV)/bin/python
READY       := $(VENV)/.ready
JOBS        ?= 2
# Where a machine without an NVIDIA GPU finds the small CPU builds of torch; skipped if it does not answer.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

# Notebooks run with this environment's Python, never with a kernel that a user has installed elsewhere.
export JUPYTER_PREFER_ENV_PATH := 1
# A thread that waits gives its core to another notebook. With two threads for each of two notebooks on two cores,
# waiting threads that keep their cores make a cell take minutes instead of seconds.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: help env book zip pdf axe lab crawl notebooks readme facts test robust processors bench gpu clean

# Everything that was set on the command line, quoted; the scripts refuse names that they do not know.
GIVEN = $(foreach name,$(filter-out PYTHON TORCH_INDEX,$(.VARIABLES)),\
  $(if $(filter command,$(origin $(name))),'$(name)=$(subst ','\'',$($(name)))'))

help:
	@echo "make book       install into $(VENV), run every notebook, build the HTML book"
	@echo "                PRESET= DATASET= CATEGORY= DATA_ROOT= SPLIT= SEED= DEVICE= WEIGHTS=   for all notebooks"
	@echo "                REPOSITORY= SITE=   where the source and the pages are published, instead of book/facts.yml"
	@echo "                OVERRIDES='batch_size=4'   settings that differ from the preset, for all notebooks"
	@echo "                JOBS=           notebooks that run at a time"
	@echo "make zip        pack the pages that make book has built: book.zip opens offline"
	@echo "make pdf        print them into one PDF, with Chromium   CHROMIUM="
	@echo "make axe        check the pages for what shuts readers out: axe-core (npm) in Chromium   ONLY='anovit mala'   CHROMIUM="
	@echo "make lab        paint on the lab page in a browser, from a file and from a server   PICTURES=folder   BROWSER=firefox"
	@echo "make crawl      follow all links of the pages, open each in a browser, wide and as on a phone   ONLY='anovit mala'   BROWSER=firefox"
	@echo "make test       install into $(VENV), run the linters, the tests and the notebooks as committed"
	@echo "make robust     run the notebooks under other arithmetic, and with the smallest preset on real images"
	@echo "                SETTINGS='avx2 default'   these   ONLY='anovit mala'   these notebooks   JOBS="
	@echo "make notebooks  execute the committed notebooks that lag behind the library or the records"
	@echo "                ONLY='anovit mala'   these   ALL=1   all   JOBS=   notebooks that run at a time"
	@echo "make readme     write the lists of methods and data sets into README.md"
	@echo "make facts      write CITATION.cff, .zenodo.json and codemeta.json from book/facts.yml"
	@echo "make processors make the book's own runs again under other arithmetic, for the metrics to expect   ONLY='anovit mala'"
	@echo "make bench      time the metrics, the damage synthesis and the training steps of vitmem and mala"
	@echo "make gpu        what only a GPU can tell: its tests, step times, the runs of the paper presets; ends after nine minutes,"
	@echo "                and the same call goes on   MINUTES="
	@echo "make env        only install into $(VENV)"
	@echo "make clean      remove everything built, except $(VENV)"

env: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PY) -m pip --version >/dev/null 2>&1 || { \
	  for python in $(or $(PYTHON),python3.11 python3); do \
	    $$python -c 'import sys; sys.exit(sys.version_info < (3, 11, 4))' 2>/dev/null && break; python=; \
	  done; \
	  test -n "$$python" || { echo "No Python 3.11.4 or newer found as $(or $(PYTHON),python3.11 or python3); name one: make PYTHON=/path/to/python"; exit 1; }; \
	  $$python -m venv --clear $(VENV) || { echo "$$python cannot make a virtual environment (Debian: apt install python3-venv)"; exit 1; }; }
	@index=; \
	if ! command -v nvidia-smi >/dev/null && \
	  $(PY) -c 'from urllib.request import urlopen; urlopen("$(TORCH_INDEX)/torch/", timeout=5)' 2>/dev/null; then \
	  index="--extra-index-url $(TORCH_INDEX)"; \
	fi; \
	echo "Installing into $(VENV), about 2 GB: two minutes or more $${index:+(torch from $(TORCH_INDEX))}"; \
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt $$index torch torchvision -e ".[book,test,offline,sweep,export,multi]"
	@touch $@

book: $(READY)
	@$(PY) book/build.py $(GIVEN)

zip: $(READY)
	@cd book/_build && rm -f book.zip && $(abspath $(PY)) -m zipfile -c book.zip html && echo $(CURDIR)/book/_build/book.zip

pdf: $(READY)
	@$(PY) book/pdf.py $(GIVEN)

axe: $(READY)
	@$(PY) book/axe.py $(GIVEN)

lab: $(READY)
	@$(PY) book/check_lab.py $(GIVEN)

crawl: $(READY)
	@$(PY) book/crawl.py $(GIVEN)

notebooks: $(READY)
	@$(PY) book/notebooks.py $(GIVEN)

readme: $(READY)
	@$(PY) book/readme.py

facts: $(READY)
	@$(PY) book/facts.py

test: export OMP_NUM_THREADS = 1
test: $(READY)
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy
	$(PY) -m pytest -q -n $(JOBS) --dist loadfile --no-loadscope-reorder
	rm -rf notebooks/runs
	$(PY) -m pytest -q -n $(JOBS) --dist loadfile --no-loadscope-reorder --nbval-lax --nbval-current-env \
	  $$(ls -S notebooks/*.ipynb)  # large ones first, since they take longest

robust: $(READY)
	@$(PY) book/robust.py $(GIVEN)

processors: $(READY)
	@$(PY) experiments/processors.py $(ONLY)

bench: $(READY)
	$(PY) benchmarks/metrics.py
	$(PY) benchmarks/synthesis.py
	$(PY) benchmarks/vitmem.py
	$(PY) benchmarks/mala.py

gpu: $(READY)
	@$(PY) benchmarks/gpu.py $(if $(MINUTES),--minutes $(MINUTES))

clean:
	rm -rf book/_build notebooks/runs .pytest_cache .ruff_cache .mypy_cache
