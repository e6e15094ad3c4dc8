# Every target sets up what it needs: a virtual environment, torch, timm, and the package with its native libraries.
# A second run finds all of that in place.
VENV ?= .venv
PYTHON ?= python3
# the versions that are tested; others: make test CONSTRAINTS=/dev/null TORCH=torch==2.13.0
CONSTRAINTS ?= constraints.txt
TORCH ?= torch torchvision

BIN := $(VENV)/bin
install = $(1)/bin/python -m pip --disable-pip-version-check install --quiet --constraint $(CONSTRAINTS)
PIP := $(call install,$(VENV))
SOURCES := setup.py convit_kernels/schemas.py $(shell find csrc -type f)

.PHONY: demo test test-tools gpu ttsem steady kernels bench results docs lint sanitize mutants dist dist-test hub clean
.DELETE_ON_ERROR:

demo: $(VENV)/built
	$(BIN)/python -m convit_kernels demo $(ARGS)
	mkdir -p build
	$(BIN)/python examples/evaluate.py --picture build/attention.png

# Two processes take the tests, file by file (ARGS="-n 0": this one alone, for a debugger); a thread that waits leaves its
# core to the other's. Triton's interpreter is a matter of the whole process, so its tests have runs of their own.
PYTEST := OMP_WAIT_POLICY=passive $(BIN)/python -m pytest --numprocesses 2 --dist loadfile
test: $(VENV)/built
	$(PYTEST) tests $(ARGS)
	TRITON_INTERPRET=1 $(PYTEST) tests/interpreted $(ARGS)

# The tests beside other projects' tools, in an environment of their own that sees the packages of the main one: these
# tools may want other versions than it has.
TOOLS_VENV ?= .venv-tools
test-tools: $(VENV)/built $(TOOLS_VENV)/ready
	$(TOOLS_VENV)/bin/python -m pytest tests/tools tests/test_export.py::TestOnnx $(ARGS)

PURELIB := -c 'import sysconfig; print(sysconfig.get_path("purelib"))'
$(TOOLS_VENV)/ready: $(VENV)/ready pyproject.toml constraints.txt
	$(BIN)/python -m venv --clear --without-pip $(TOOLS_VENV)
	$(BIN)/python $(PURELIB) > "$$($(TOOLS_VENV)/bin/python $(PURELIB))/main.pth"
	$(call install,$(TOOLS_VENV)) 'convit_kernels[test-tools]'
	touch $@

# Ten minutes on a GPU: all that needs one, each step with a limit of its own, into build/gpu (ARGS=--rehearse: the same
# steps on a CPU). It builds the CUDA library for that GPU alone, so the next target builds it anew.
gpu: $(VENV)/ready
	rm -f $(VENV)/built
	PYTHON=$(BIN)/python tools/gpu_day.sh $(ARGS)

# The Triton kernels by a second executor, on a CPU, in an environment of its own: it wants Python 3.12, one torch and one
# triton. The tests that launch kernels themselves: PyTorch's dispatcher is not deceived about where a tensor is.
TTSEM_VENV ?= .venv-ttsem
TTSEM_TESTS := $(patsubst %,tests/interpreted/test_triton_%.py,forward backward)
PYTHON312 ?= $(shell for python in python3.12 $(HOME)/.pyenv/versions/3.12.*/bin/python; do \
	$$python -c 'import sys; print(sys.executable)' 2>/dev/null && break; done)
ttsem:
	@if [ -z "$(PYTHON312)" ]; then echo "skipped: there is no Python 3.12 here (PYTHON312=... names one)"; else \
	$(MAKE) $(TTSEM_VENV)/ready && $(TTSEM_VENV)/bin/python -m tools.under_ttsem $(TTSEM_TESTS) $(ARGS); fi

$(TTSEM_VENV)/ready:
	$(PYTHON312) -m venv --clear $(TTSEM_VENV)
	$(TTSEM_VENV)/bin/python -m pip --disable-pip-version-check install --quiet 'ttsem[triton]==0.1.0'
	touch $@

# The tests of equivalence on many draws of rounding: seeds, processors, threads (ARGS=--sample: some, for each change).
steady: $(VENV)/built
	$(BIN)/python tests/steady.py $(ARGS)

# Registers, shared memory and instructions of the Triton kernels on GPUs that need not be here, held to a budget: all at
# the paper's size, and a sample of every configuration that can be chosen (ARGS=--all: each, an hour).
kernels: $(VENV)/built
	$(BIN)/python -m tools.machine_code.budget --check --sample 29 --jobs 2 $(ARGS)

bench: $(VENV)/built
	$(BIN)/python -m pytest benchmarks --benchmark-only $(ARGS)

# The benchmarks, the attention's growth, whole models beside DeiT, the CPU kernels by instruction set and the host's time,
# kept by machine and commit; then the README's table and the pages of docs/benchmarks from them. The growth is of float32: a
# processor without products of bfloat16 would take an hour for eager's.
results: $(VENV)/built
	results=$$($(BIN)/python benchmarks/publish.py --path) && \
	$(BIN)/python -m pytest benchmarks --benchmark-only --benchmark-json=$$results $(ARGS) && \
	$(BIN)/python -m pytest benchmarks --benchmark-only --sweep --dtype float32 \
		--implementations eager,cpu,triton,sdpa -k attention-convit_small-forward \
		--benchmark-json=$${results%.json}-growth.json && \
	$(BIN)/python benchmarks/against_deit.py --out $${results%.json}-models.json && \
	$(BIN)/python benchmarks/units.py --out $${results%.json}-units.json && \
	$(BIN)/python benchmarks/host_time.py --out $${results%.json}-host.json && \
	$(BIN)/python benchmarks/publish.py $$results

# The site in build/site. Its tool reads the sources without importing them, so that neither torch nor a build is needed.
DOCS_VENV ?= .venv-docs
docs: $(DOCS_VENV)/ready
	$(DOCS_VENV)/bin/python tools/docs.py

$(DOCS_VENV)/ready: docs/requirements.txt
	$(PYTHON) -m venv --clear $(DOCS_VENV)
	$(DOCS_VENV)/bin/python -m pip --disable-pip-version-check install --quiet --requirement $<
	touch $@

lint: $(VENV)/built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(shell find csrc torch-ext tests -name '*.cpp' -o -name '*.h' -o -name '*.cu')
	$(BIN)/mypy

define copy_sources
	rm -rf $(1)
	mkdir -p $(1)
	cp -r setup.py pyproject.toml README.md LICENSE NOTICE csrc convit_kernels $(1)
	rm -f $(1)/convit_kernels/*.so
endef

# The CPU library under the compiler's sanitizers, without the tests that only repeat its paths on larger or more data;
# GCC compiles what they add in a third of the time with -Og, and it runs as fast.
# Of the emulated units that of AMX alone, in bfloat16: the others' code is that of the units whose names they have.
# The CUDA kernels of the tables run there, too, compiled for the CPU (tests/cuda_on_cpu), and on small grids under
# ThreadSanitizer, beside the ordinary library, which it does not see. Older ones of it fail where addresses are random in
# many bits, so they are not, where that may be said; and now and then they misread how long a thread's own memory is
# (github.com/google/sanitizers/issues/1322), so they don't ask.
SANITIZED := build/sanitized
SANITIZERS := -Og -fsanitize=address,undefined -fno-sanitize-recover=undefined
runtime = LD_PRELOAD="$$($(CXX) -print-file-name=lib$(1).so) $$($(CXX) -print-file-name=libstdc++.so)"
UNDER_ASAN = env ASAN_OPTIONS=detect_leaks=0 CXXFLAGS="$(SANITIZERS)" $(call runtime,asan)
UNDER_TSAN = $(shell setarch -R true 2>/dev/null && echo setarch -R) env CXXFLAGS="-O1 -fsanitize=thread" \
	TSAN_OPTIONS=ignore_noninstrumented_modules=1:halt_on_error=1:intercept_tls_get_addr=0 OMP_NUM_THREADS=1 \
	$(call runtime,tsan)
sanitize: $(VENV)/built
	$(call copy_sources,$(SANITIZED))
	cd $(SANITIZED) && CONVIT_KERNELS_EMULATE=1 CONVIT_KERNELS_CPU=1 CONVIT_KERNELS_CUDA=0 CXXFLAGS="$(SANITIZERS)" \
		LDFLAGS="$(SANITIZERS)" $(abspath $(BIN))/python setup.py --quiet build_ext --inplace
	cd $(SANITIZED) && $(UNDER_ASAN) $(abspath $(BIN))/python -m pytest \
		$(abspath tests)/test_cpu_attention.py $(abspath tests)/test_relpos.py \
		-k "not compile and not inductor and not average and not any_grid and not larger_blocks and not among_many and \
		not same_bits and not several_chunks and (not emulated and not chunked or \
		amx_bf16_emulated and bfloat16 and (grids or head_dims or any_length))" $(ARGS)
	$(UNDER_TSAN) $(BIN)/python -m pytest tests/test_relpos.py $(ARGS) \
		-k "cuda.cu and (factors or whole_grid or gradients or zero_padding and not grid2)"

# Wrong kernels of the CPU, all in one build: on every instruction set, emulated or not, the tests must notice each of
# them. Wrong CUDA kernels of the tables on the CPU, where it takes a sanitizer to notice some.
MUTANTS := build/mutants
mutants: $(VENV)/built
	$(call copy_sources,$(MUTANTS))
	$(BIN)/python tests/native_mutants.py $(MUTANTS)
	cd $(MUTANTS) && CONVIT_KERNELS_EMULATE=1 CONVIT_KERNELS_CPU=1 CONVIT_KERNELS_CUDA=0 CXXFLAGS=-O1 \
		$(abspath $(BIN))/python setup.py --quiet build_ext --inplace
	cd $(MUTANTS) && PYTHONPATH=. $(abspath $(BIN))/python $(abspath tests)/native_mutants.py
	PYTHONPATH=.:tests $(UNDER_ASAN) $(BIN)/python -m cuda_on_cpu.mutants asan
	PYTHONPATH=.:tests $(UNDER_TSAN) $(BIN)/python -m cuda_on_cpu.mutants tsan

# dist/: the sdist, and one wheel for every torch and Python, checked (ARGS=--write: their figures into docs/install.md).
dist: $(VENV)/built
	$(BIN)/python tools/dist.py $(ARGS)

# That wheel in new environments with no compiler in reach: all of them (gigabytes), or those that ARGS names.
dist-test: $(VENV)/built
	$(BIN)/python tools/dist.py
	$(BIN)/python tools/dist_test.py $(ARGS)

# The tree that Hugging Face's kernel-builder takes; it needs Nix and a network to build and publish.
hub: $(VENV)/built
	rm -rf build/hub
	$(BIN)/python -m tools.hub_layout build/hub

clean:
	rm -rf $(VENV) $(DOCS_VENV) $(TOOLS_VENV) $(TTSEM_VENV) build dist *.egg-info convit_kernels/*.so convit_kernels/_build.json

# Each stamp is written last: a set-up that was interrupted is done again, torch's from an empty environment.
$(VENV)/torch: constraints.txt
	$(PYTHON) -m venv --clear $(VENV)
	$(PIP) $(TORCH)
	touch $@

$(VENV)/ready: $(VENV)/torch pyproject.toml
	$(PIP) 'setuptools>=77'
	CONVIT_KERNELS_CPU=0 CONVIT_KERNELS_CUDA=0 $(PIP) --no-build-isolation --editable '.[dev]'
	touch $@

$(VENV)/built: $(VENV)/ready $(SOURCES)
	$(BIN)/python setup.py --quiet build_ext --inplace
	touch $@
