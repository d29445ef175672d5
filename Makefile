# The two commands: `make demo` and `make test`. Both set everything up on a fresh machine.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup demo test test-ray test-spatialdata sanitize test-others check release-check format bench bench-compare gpu gpu-cache triton-versions clean

setup: $(VENV)/.done

# torch first and by itself: the version of constraints.txt, so that no other one is pulled in behind it.
$(VENV)/.done: setup.py constraints.txt
	@echo "installing into $(VENV): minutes, several gigabytes"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip setuptools
	$(BIN)/pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install --quiet -c constraints.txt -e ".[dev]"
	-$(BIN)/pip install --quiet -c constraints.txt --no-deps lazyslide-models  # for a test; wants Python 3.11 or later
	-$(BIN)/pip install --quiet -c constraints.txt --no-deps --ignore-requires-python ttsem  # asks for 3.12, runs with 3.11
	touch $@

demo: setup
	$(BIN)/stflow-fast demo --out demo --overwrite

# Tests share the cores by files, with one thread each unless they ask for more. Slow extras have targets of their own.
TEST_WORKERS ?= 2
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -q --durations=10 -n $(TEST_WORKERS) --dist loadfile \
		-m "not (ray or spatialdata or others)"

test-ray test-spatialdata: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -q -m $(@:test-%=%)

# Kernels run on the CPU from Triton's IR by ttsem, which stops at what a GPU forgives: accesses out of bounds, races, reads
# of what nobody wrote (tests/sanitizer). A minute or two of two cores.
sanitize: setup
	OMP_NUM_THREADS=1 TRITON_INTERPRET=0 PYTEST_PLUGINS=tests.sanitizer.session \
		$(BIN)/python -m pytest tests/sanitizer -q --durations=5 -n $(TEST_WORKERS)

# Predictions as other versions of anndata read them, and as squidpy and scanpy draw them: each in an environment of its
# own, made once (minutes, and the network). The tests skip unless the two variables name interpreters.
OTHERS ?= $(CURDIR)/$(VENV)/others
ANNDATAS := $(OTHERS)/anndata-0.10 $(OTHERS)/anndata-0.11
test-others: setup $(ANNDATAS:=/.done) $(OTHERS)/squidpy/.done
	STFLOW_ANNDATA_PYTHONS=$(OTHERS)/anndata-0.10/bin/python:$(OTHERS)/anndata-0.11/bin/python \
		STFLOW_SQUIDPY_PYTHON=$(OTHERS)/squidpy/bin/python \
		$(BIN)/python -m pytest tests -q -m others

# anndata 0.10 is older than numpy 2.
$(OTHERS)/anndata-%/.done:
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet "anndata==$*.*" $(if $(filter 0.10,$*),"numpy<2")
	touch $@

$(OTHERS)/squidpy/.done:
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet squidpy
	touch $@

# Types are checked of what is installed, where kernels/ is stflow_fast/kernels and benchmarks/ is stflow_fast/benchmarks.
TYPED := build/typed
check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	rm -rf $(TYPED)
	$(BIN)/python setup.py --quiet build_py --build-lib $(TYPED)
	cd $(TYPED) && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache

# What would be published: sdist and wheel in build/release, what they hold, and the wheel in an empty environment of its
# own: demo, benchmark, doctor. Minutes, and the network. RELEASE_FLAGS=--borrow takes the libraries of .venv instead.
RELEASE_FLAGS ?=
release-check: setup
	$(BIN)/python .ci/release_check.py $(RELEASE_FLAGS)

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Lines are added to benchmarks/results/<device>.jsonl, and what this commit has there already is left out: what was
# interrupted, or lacked the time, goes on with the next `make bench`. BENCH_MINUTES are of each line below; two cores of
# an AMD EPYC take some three hours for all. Three million spots come last: they lack memory on most hosts.
# A glance at changes instead: python -m pytest benchmarks --benchmark-json=FILE
BENCH_MINUTES ?= 45
BENCH_MOST = reference,reference_compiled,eager_stflow,message_passing,flex_attention,flash_attention,dense_softmax
# The published network over all pairs takes 9 seconds at 250 spots, 3 minutes at 1,000, and has no memory at 3,000.
BENCH_ALL = $(BENCH_MOST),dense_attention
# Beside ours and FlexAttention, what takes the square of the spots: for rows that say how much that is.
BENCH_LARGE = reference,eager_stflow,flex_attention,dense_softmax,dense_attention
# What threads gain, and what other programs on the same cores cost: one busy process for each of two cores.
BENCH_BUSY = --spots 1e4 --threads 1,2 --busy 0,2 --busy-nice 0,10 --rounds 3 --seconds 1200 \
	--providers reference,eager_stflow
# What torch.compile compiled before would make first calls short.
BENCH = TORCHINDUCTOR_CACHE_DIR=$$(mktemp -d) $(BIN)/stflow-fast benchmark --resume --minutes $(BENCH_MINUTES) --out benchmarks/results

# What the first table of benchmarks/README.md shows comes first. Genes before it, so that the file has all numbers of them in one run; 50
# are measured again beside the other providers, and so is what is timed with one thread and two, and beside busy ones.
bench: setup
	$(BENCH) --workload sample,denoise --spots 1e4 --genes 50,500,18000 --providers reference,eager_stflow \
		--rounds 3 --seconds 150
	$(BENCH) --workload sample $(BENCH_BUSY)
	$(BENCH) --workload sample --spots 3e3,1e4 --rounds 3 --seconds 320 --providers $(BENCH_ALL)
	$(BENCH) --workload sample --spots 1e5,3e5,605471 --seconds 1200 --providers $(BENCH_LARGE)
	$(BENCH) --workload sample --spots 2e4,3e4 --seconds 300 --providers reference,eager_stflow,flash_attention,flex_attention
	$(BENCH) --workload sample --spots 4e4 --rounds 1 --seconds 600 --providers reference,eager_stflow
	$(BENCH) --workload train_step $(BENCH_BUSY)
	$(BENCH) --workload train_step --spots 1e3,3e3,1e4,3e4 --rounds 3 --seconds 120 \
		--providers reference,eager_stflow,message_passing,flash_attention
	$(BENCH) --workload sample --spots 1e6 --rounds 1 --seconds 1800 --providers reference,eager_stflow
	$(BENCH) --workload denoise --spots 1e3,3e4,1e5 --rounds 3 --seconds 120 --providers reference,eager_stflow
	$(BENCH) --workload sample --spots 1e4 --layout uniform,visium,clustered --providers reference --rounds 3
	$(BENCH) --workload sample --spots 1e4 --k 4,8,16,32 --providers reference --rounds 3
	$(BENCH) --workload graph --spots 1e3,1e4,1e5,605471,1e6,3e6 --rounds 3
	$(BENCH) --workload sample --spots 1e5 --seconds 600 --providers message_passing
	$(BENCH) --workload sample --spots 1e3 --rounds 3 --providers $(BENCH_MOST)
	$(BENCH) --workload sample --spots 250,500 --rounds 3 --seconds 90 --providers $(BENCH_ALL)
	$(BENCH) --workload sample --spots 1e3 --rounds 1 --seconds 1200 --providers dense_attention
	-$(BENCH) --workload sample --spots 3e6 --rounds 1 --seconds 9000 --minutes 180 --providers reference,eager_stflow
	$(BIN)/stflow-fast benchmark --report

# Is HEAD (the working tree where none is named) slower than BASE? make bench-compare BASE=HEAD~1
bench-compare: setup
	$(BIN)/python -m benchmarks compare "$(BASE)" $(HEAD)

# Compiles the kernels of `make gpu` without a GPU, for a machine with this Triton and Python, into carried/, and copies the
# golden files there.
GPU_TRITON ?= 3.6.0
GPU_TRITON_PYTHON ?= 3.12
gpu-cache: setup
	$(BIN)/python -m benchmarks.gpu.pack --triton $(GPU_TRITON) --python $(GPU_TRITON_PYTHON)

# What other versions of Triton make of the kernels, without a GPU: wheels into build/gpu (3 GB, once), a page and numbers
# into benchmarks/results. Ten to twenty minutes of one core.
TRITON_VERSIONS ?= 3.6.0,3.7.1,3.8.0,3.9.0
triton-versions: setup
	$(BIN)/python -m benchmarks triton_versions --versions $(TRITON_VERSIONS)

# On a machine with a GPU and its own torch and triton: needs no network, and no git where COMMIT names the commit. What to
# type, and what comes back: benchmarks/gpu/README.md. GPU_FLAGS=--rehearse runs the same plan on the CPU, tiny.
GPU_PYTHON ?= python3
GPU_OUT ?= benchmarks/results
GPU_MINUTES ?= 7
GPU_FLAGS ?=
gpu:
	$(GPU_PYTHON) -m pip install --quiet --no-deps --no-build-isolation -e .
	$(GPU_PYTHON) -m benchmarks gpu --out $(GPU_OUT) --minutes $(GPU_MINUTES) $(GPU_FLAGS)

clean:
	rm -rf $(VENV) demo build carried *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks .import_linter_cache
