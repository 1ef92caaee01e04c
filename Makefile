# Two commands on a fresh machine: `make demo` and `make test`. Both build .venv from the pins on first use.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: demo test test-all test-engines test-others mutation lint types bench docs notebooks sanitize fuzz clean help

help:            ## list the targets
	@grep -E '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */\1\t/'

$(STAMP): pyproject.toml setup.py constraints.txt $(wildcard csrc/*.* csrc/cuda/*)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing the pinned environment into $(VENV) (about two minutes, once)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch torchvision
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

demo: $(STAMP)   ## decompose the bundled model on scenes it draws; panels in out/demo
	@$(BIN)/clipfast demo --out out/demo

# Workers read what pytest compiled, whatever the environment says of writing it: each would take 20 s longer to start.
TESTING := PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal -p no:benchmark

test: $(STAMP)   ## run the tests, one process per core
	@$(TESTING) -m "not slow"

test-all: $(STAMP)  ## the same with the slow tests: kernels compiled, workers killed, whole commands, dry runs of benchmarks
	@$(MAKE) --no-print-directory --jobs 2 test-engines test-others

# The tests of the engines wait most of the time for processes that start, so they run beside all others. What they print
# comes at their end.
test-engines: $(STAMP)
	@mkdir -p build
	@$(TESTING) tests/dataset/engines > build/test-engines.log 2>&1; status=$$?; cat build/test-engines.log; exit $$status

test-others: $(STAMP)
	@$(TESTING) --ignore tests/dataset/engines

mutation: $(STAMP)  ## do the tests notice changes to the mathematics? 340 mutants, 20 to 35 minutes
	@$(BIN)/python tests/mutation/run.py

lint: $(STAMP)   ## ruff: style and imports
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check --quiet .

types: $(STAMP)  ## mypy --strict over the package
	@$(BIN)/mypy

# csrc/ as setup.py builds it, with the compiler's sanitizers. On a CPU without AVX-512 its code is compiled to AVX2, so
# that it runs, too (csrc/each_isa.h).
SANITIZED      := build/sanitized
SANITIZER_FLAGS = -std=gnu++17 -O1 -g -Wall -Wextra -Wno-psabi -fvisibility=hidden -fno-math-errno -fPIC \
                  -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer \
                  $$($(BIN)/python -m pybind11 --includes)
ifeq ($(shell grep -m 1 -o avx512vl /proc/cpuinfo 2>/dev/null),)
SANITIZER_FLAGS += -DCLIPFAST_EMULATE_AVX512
endif

$(SANITIZED)/%.o: csrc/%.cpp $(wildcard csrc/*.h) Makefile
	@mkdir -p $(@D)
	@$(CXX) $(SANITIZER_FLAGS) -c $< -o $@

$(SANITIZED)/_native.so: $(patsubst csrc/%.cpp,$(SANITIZED)/%.o,$(wildcard csrc/*.cpp))
	@$(CXX) -fsanitize=address,undefined -shared $^ -o $@

# Python is not built with the sanitizers, so their library is loaded before it, and libstdc++, whose throw it intercepts.
# Leaks are not reported: Python and torch keep memory to the end. Memory that was never written is NaN in every dtype. A
# sanitizer's report goes to stderr as the process ends, so pytest does not capture that, and does not restart workers.
RUN_SANITIZED := LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
                 ASAN_OPTIONS=detect_leaks=0:max_malloc_fill_size=1073741824:malloc_fill_byte=255 \
                 UBSAN_OPTIONS=print_stacktrace=1 CLIPFAST_NATIVE_LIBRARY=$(SANITIZED)/_native.so \
                 $(BIN)/python -m pytest -n auto --maxprocesses 4 --max-worker-restart 0 --capture=sys -p no:benchmark \
                 tests/kernels/test_native_library.py::test_named_library_is_the_one_under_test
EXAMPLES ?= 2000

sanitize: $(STAMP)  ## the tests of csrc/ under AddressSanitizer and UBSan
	@$(MAKE) --no-print-directory -j 4 $(SANITIZED)/_native.so
	@$(RUN_SANITIZED) $(addprefix tests/kernels/test_native,.py _edges.py _fuzz.py _linear.py)

fuzz: $(STAMP)   ## random calls of csrc/ under the same, EXAMPLES=2000 of each kind, different in every run
	@$(MAKE) --no-print-directory -j 4 $(SANITIZED)/_native.so
	@CLIPFAST_FUZZ=$(EXAMPLES) $(RUN_SANITIZED) tests/kernels/test_native_fuzz.py

docs: $(STAMP)   ## build the documentation into out/docs; warnings are errors
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

notebooks: $(STAMP)  ## run the notebooks of the documentation and save their outputs
	@$(BIN)/python docs/notebooks.py

bench: $(STAMP)  ## benchmarks on this machine; JSON in benchmarks/results
	@$(BIN)/python -m pytest benchmarks --benchmark-only

clean:           ## remove what the targets made
	rm -rf $(VENV) out build dist *.egg-info clipfast/kernels/_native* clipfast/kernels/_cuda*
