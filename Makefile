# `make demo`, `make test` and `make test-all` do all set-up themselves. PYTHON may be any CPython from 3.10.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO_STAMP := $(VENV)/.installed-demo
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS)
# torch pinned in pyproject.toml; on a machine without a GPU, PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"
# saves several GB of CUDA.
PIP_FLAGS ?=
# A file's tests run in one process, as some share a service or a node, and the files in the order of tests/conftest.py.
TEST_PROCESSES ?= 2
PYTEST := $(BIN)/python -m pytest -q -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

# What a release's bill of materials lists: all that serves radiographs. What makes bundles isn't in it, nor what is NVIDIA's.
RUNTIME ?= node,openvino,report,serve,signing,table
RELEASE := build/release

.PHONY: demo test test-all lint docs soak real release clean

$(DEMO_STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e ".[openvino,train]"
	touch $@

$(STAMP): $(DEMO_STAMP)
	$(PIP) -e ".[dev]"
	$(PIP) --no-deps "axe-playwright-python>=0.1.8"  # for its copy of axe-core; tests drive the browser without Playwright
	touch $@

demo: $(DEMO_STAMP)  ## phantom data -> trained model -> fp32, fp16, int8 bundles -> report
	$(BIN)/python -m training.demo

test: $(STAMP) lint  ## the quick tests
	$(PYTEST) -m "not slow"

test-all: $(STAMP) lint  ## everything that must pass
	$(PYTEST)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(STAMP)  ## the documentation as a site that needs no network, in site/
	$(BIN)/python -m mkdocs build --strict

soak: $(STAMP)  ## the long checks in full, about a quarter of an hour
	$(BIN)/python -m benchmarks.robustness.soak
	$(BIN)/python -m benchmarks.robustness.hostile_images
	$(BIN)/python -m benchmarks.statistics.coverage

real: $(STAMP)  ## make real CHECKPOINT=FILE: everything on real radiographs; CHEXNET_CHESTXRAY14 names their folder
	$(BIN)/python -m benchmarks.cpu.real $(CHECKPOINT)

release:  ## dist/: wheel, sdist, bill of materials, licences, checksums; of the last commit, with the same bytes for everybody
	@test -z "$$(git status --porcelain)" || { echo "error: found changes that are in no commit, needed none. Commit or remove them." >&2; exit 2; }
	rm -rf dist $(RELEASE)
	$(PYTHON) -m venv $(RELEASE)/tools
	$(PYTHON) -m venv --without-pip $(RELEASE)/runtime
	$(RELEASE)/tools/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) ".[release]"
	SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct) $(RELEASE)/tools/bin/python -m build --no-isolation
	$(RELEASE)/tools/bin/twine check --strict dist/*
	$(RELEASE)/tools/bin/python -m pip --python $(RELEASE)/runtime/bin/python install --quiet --disable-pip-version-check \
	  $(PIP_FLAGS) "$$(ls $(CURDIR)/dist/*.whl)[$(RUNTIME)]"
	rm $(RELEASE)/runtime/lib/python*/site-packages/chexnet_deploy-*/direct_url.json  # says where the wheel lay on this machine
	$(RELEASE)/runtime/bin/chexnet-deploy doctor
	$(RELEASE)/tools/bin/cyclonedx-py environment $(RELEASE)/runtime/bin/python --pyproject pyproject.toml --output-reproducible \
	  --output-file dist/sbom.cdx.json
	$(RELEASE)/tools/bin/pip-licenses --python $(RELEASE)/runtime/bin/python --with-system --with-urls --format markdown \
	  --output-file dist/third-party-licenses.md
	cp CHANGELOG.md LICENSE dist
	cd dist && sha256sum * > SHA256SUMS

clean:
	rm -rf $(VENV) demo site build dist
