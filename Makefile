# `make help` lists the targets. Each target installs what it needs into .venv. It needs Python >= 3.11 and a
# package index; `make check` gets Node and buf from that index, too.

PYTHON ?= python3
PYTEST_ARGS ?=
MODULES ?=
# Tests wait more than they compute, so several processes run them. Each process runs whole modules.
PYTEST := python -m pytest -n 4 --dist loadfile
# The device for demo and bench: cpu, cuda or cuda:N.
DEVICE ?= cpu
# For image and test-image: the image's target (cpu or cuda), its name, what it is built on, the program that builds it
# with further options for that, where the source is published, and the program that runs it.
TARGET ?= cpu
IMAGE ?= deconvd:$(TARGET)
BUILDER ?= $(firstword $(foreach name,docker podman buildah,$(shell command -v $(name))))
BASE_IMAGE ?=
BUILD_ARGS ?=
SOURCE ?=
RUNNER ?= $(firstword $(foreach name,docker podman,$(shell command -v $(name))))

BIN := .venv/bin
GENERATOR := .venv/generator
OLDEST := .venv/oldest
STUBS := proto
BUF := $(BIN)/python -m tests.javascript @bufbuild/buf/bin/buf
COVERAGE := .venv/coverage
COVERAGE_TOOL := COVERAGE_FILE=$(COVERAGE)/data $(BIN)/coverage
MEASURED := COVERAGE_FILE=$(COVERAGE)/processes/data $(BIN)/coverage run -m pytest
LANDED := proto/landed.binpb
CUDA := $(if $(filter cuda%,$(DEVICE)),.venv/installed-cuda13)

# Python compiles modules when it imports them. That is quicker than pip, which compiles all that it installs.
export PIP_NO_COMPILE := 1

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test lint check-schema check coverage test-slow check-all soak test-oldest test-torch test-jax test-chainer \
    test-3.11 test-3.12 test-3.13 test-3.14 package mutate check-api format test-gpu generate accept-schema kernels bench image test-image clean

help: ## List the targets
	@sed -nE 's/^([a-z0-9.-]+):.*## (.*)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

demo: .venv/installed-demo $(CUDA) ## Enlarge a photograph and train a decoder, remotely; DEVICE=cuda for a GPU
	$(BIN)/python -m examples.demo --device $(DEVICE)

test: .venv/installed-dev ## Run the tests that need no GPU; PYTEST_ARGS='-k name' for some
	$(BIN)/$(PYTEST) $(PYTEST_ARGS)

lint: .venv/installed-dev ## Check format, lint, types, import rules, spelling and the schema
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell
	$(MAKE) check-schema

check-schema: .venv/installed-dev ## Lint the schema, look for breaks, and see that the generated code is fresh
	$(BIN)/python -m pytest -q tests/test_schema.py $(PYTEST_ARGS)

check: lint ## What each commit must pass: lint, then the tests
	$(MAKE) test PYTEST_ARGS='--ignore=tests/test_schema.py $(PYTEST_ARGS)'

# Slow tests that take gigabytes, or measure how long other calls take: they run alone. Other slow ones run two at a time.
# Only files with slow tests are read.
ALONE := $(foreach name,crowded_residents large_tensors overload receive_limiter,tests/test_$(name).py)
SLOW := $(filter-out $(ALONE),$(shell grep -l 'mark\.slow' tests/test_*.py))

test-slow: .venv/installed-dev ## Run the slow tests
	$(BIN)/python -m pytest -m slow -n 2 --dist loadfile $(SLOW) $(PYTEST_ARGS)
	$(BIN)/python -m pytest -m slow $(ALONE) $(PYTEST_ARGS)

# The schema's tests are lint's. Traced code computes more, so fewer processes than in `test` share the processors. Slow tests
# are not measured: they take memory and time, of which tracing takes some, too, and the others reach all that they reach.
coverage: .venv/installed-dev ## Run the tests that are not slow, and measure coverage against its floor
	rm -rf $(COVERAGE)
	mkdir -p $(COVERAGE)/processes
	$(MEASURED) -n 3 --dist loadfile --ignore=tests/test_schema.py $(PYTEST_ARGS)
	$(COVERAGE_TOOL) combine --quiet $(COVERAGE)/processes
	$(COVERAGE_TOOL) html --quiet --directory $(COVERAGE)/html
	@echo "with what needs a card: $$($(COVERAGE_TOOL) report --omit='*_pb2*' --format=total --fail-under=0) %"
	$(COVERAGE_TOOL) report

# Each test runs once here, and those that are not slow and depend on packages once more, with the oldest packages.
check-all: lint coverage test-slow test-oldest test-torch test-jax test-chainer soak ## All checks but those on a GPU

soak: .venv/installed-dev ## Run honest and hostile clients against a server that is killed and drained, for 90 s
	$(BIN)/python -m tests.soak --seconds 90

# What no version of a package changes, since other tests call the same functions of packages: direct connections, their TLS
# and shared memory, which are sockets, Python's ssl and memory of our own below numpy and gRPC; what the system sets bounds to;
# modules that decide or copy, and do no I/O; the card's and its compiler's, whose libraries are called by ctypes; several servers
# or processes, each of which is one; what a process says to its log and to systemd, and how it ends; and what the checks say of
# this checkout's own files. other_systems runs again what runs here.
UNVERSIONED := accept_loop byte_stream busy_polling direct* drain_stripes early_calls shared_borrowers shared_lines \
    shared_memory_* stalled_stripes stripe_faults striped_* striping* write_progress \
    bad_lines long_links sockets resident_memory small_machine descriptors fairness \
    adaptive_backoff admission* blocking budgets buffer_pool cache fair_queue fair_shares lru pace parallel_copy pieces ports quotas \
    resident_registry* retry_times team workload \
    cuda_* \
    attempt_runner background_loop balancer call_parts several_* sets_of_hosts worker* home_claims \
    cubins hung_device log_* systemd \
    alerts checks contributing decisions dockerfile monitoring names other_systems readme soak

# Neither the demo, the frameworks nor the benchmarks, which need packages that want a newer numpy; nor kubectl, the schema's tools and pyright.
test-oldest: $(OLDEST)/installed ## Run the tests with the oldest packages that pyproject.toml allows
	$(OLDEST)/bin/$(PYTEST) --ignore=tests/frameworks \
	    $(foreach name,array_conversion asyncio_service benchmarks demo kubernetes schema typing $(UNVERSIONED),'--ignore-glob=tests/test_$(name).py') \
	    $(PYTEST_ARGS)

test-torch: ## Run the tests of one framework's arrays; so do test-jax and test-chainer
test-torch test-jax test-chainer: test-%: .venv/%/installed
	.venv/$*/bin/python -m pytest -n 2 --dist loadfile tests/frameworks $(PYTEST_ARGS)

# MODULES='quotas arena' tries some; all take minutes. Each module's own tests are in pyproject.toml, under tool.mutation.
mutate: .venv/installed-mutation ## Change modules that do no I/O in small ways, and see that their tests notice
	$(BIN)/python -m tests.mutation $(MODULES)

check-api: .venv/installed-dev ## Check with pyright, a second type checker, what users see
	$(BIN)/python -m pytest -q tests/test_typing.py

# What make, Node and buf do is the same on each version.
test-3.11: ## Run the tests on Python 3.11; so do test-3.12, test-3.13 and test-3.14 on theirs
test-3.11 test-3.12 test-3.13 test-3.14: test-%: .venv/python-%/installed
	.venv/python-$*/bin/$(PYTEST) --ignore=tests/test_schema.py $(PYTEST_ARGS)

package: .venv/installed-release ## Build the packages into dist/ and check them, as before a release
	rm -rf dist
	$(BIN)/python -m build --outdir dist
	$(BIN)/python -m twine check --strict dist/*
	$(BIN)/check-wheel-contents dist/*.whl

format: .venv/installed-dev ## Format the code, and mend what lint can mend
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

# Not the frameworks: jax, if it is there, takes most of the card as soon as it is imported.
test-gpu: .venv/installed-dev .venv/installed-cuda13 ## Run the tests that need a CUDA GPU
	$(BIN)/python -m pytest -m gpu --ignore=tests/frameworks $(PYTEST_ARGS)

generate: $(GENERATOR)/installed ## Generate the Python stubs from the schema
	$(GENERATOR)/bin/python -m grpc_tools.protoc --proto_path=proto \
	    --plugin=protoc-gen-mypy=$(GENERATOR)/bin/protoc-gen-mypy \
	    --plugin=protoc-gen-mypy_grpc=$(GENERATOR)/bin/protoc-gen-mypy_grpc \
	    --python_out=$(STUBS) --mypy_out=$(STUBS) --grpc_python_out=$(STUBS) --mypy_grpc_out=$(STUBS) \
	    deconvd/v1/deconvd.proto

accept-schema: .venv/installed-dev ## Make today's schema the one that must not be broken
	$(if $(wildcard $(LANDED)),$(BUF) breaking proto --against $(LANDED))
	$(BUF) build proto --exclude-source-info --output $(LANDED)

kernels: .venv/installed-dev ## Compile the common CUDA kernels for all generations of cards, which takes minutes
	$(BIN)/python -m deconvd_server.device.cuda.kernels.build_archive

bench: .venv/installed-dev $(CUDA) ## Measure operators and whole calls; DEVICE=cuda for a GPU
	$(BIN)/python -m benchmarks.operator --device $(DEVICE)
	$(BIN)/python -m benchmarks.service --device $(DEVICE)

# BUILDAH_FORMAT: podman and buildah drop the HEALTHCHECK from images in their own format. BUILDAH_LAYERS: buildah would
# make one layer of all.
image: ## Build the container image, with docker, podman or buildah; TARGET=cuda for GPUs
	BUILDAH_FORMAT=docker BUILDAH_LAYERS=true $(BUILDER) build --target $(TARGET) --tag $(IMAGE) \
	    $(BASE_IMAGE:%=--build-arg BASE_IMAGE=%) $(SOURCE:%=--build-arg SOURCE=%) \
	    --build-arg VERSION="$$(sed -n 's/^__version__ = "\(.*\)"/\1/p' proto/deconvd/__init__.py)" \
	    --build-arg REVISION="$$(git rev-parse HEAD 2>/dev/null)" $(BUILD_ARGS) .

test-image: image .venv/installed-dev ## Build the image, and test it in containers, with docker or podman
	$(BIN)/python -m pytest -m image tests/test_image.py --image $(IMAGE) --runner "$(RUNNER)" $(PYTEST_ARGS)

clean: ## Remove what the other targets made, .venv included
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis \
	    demo-output dist tests/node/node_modules

.venv/bin/python:
	$(PYTHON) -m venv .venv

$(GENERATOR)/installed: proto/requirements.txt
	$(PYTHON) -m venv --clear $(GENERATOR)
	$(GENERATOR)/bin/python -m pip install --quiet --requirement proto/requirements.txt
	touch $@

$(OLDEST)/installed: pyproject.toml constraints.txt tests/oldest.py | .venv/bin/python
	$(PYTHON) -m venv --clear $(OLDEST)
	$(PYTHON) -m tests.oldest >$(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pip install --quiet --constraint $(OLDEST)/constraints.txt --editable '.[test]'
	touch $@

.venv/torch/installed .venv/jax/installed: .venv/%/installed: pyproject.toml constraints.txt | .venv/bin/python
	$(PYTHON) -m venv --clear .venv/$*
	.venv/$*/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[$*,test-frameworks]'
	touch $@

# Chainer's newest release is of 2022. It needs numpy 1, with its ml_dtypes. numpy.distutils, which it imports, needs a
# setuptools that still has distutils.msvccompiler, and Chainer itself one that has pkg_resources.
.venv/chainer/installed: pyproject.toml constraints.txt | .venv/bin/python
	$(PYTHON) -m venv --clear .venv/chainer
	sed -E '/^(numpy|ml_dtypes|setuptools)==/d' constraints.txt >.venv/chainer/constraints.txt
	.venv/chainer/bin/python -m pip install --quiet --constraint .venv/chainer/constraints.txt \
	    'setuptools<74' wheel 'numpy<2' six typing_extensions filelock
	.venv/chainer/bin/python -m pip install --quiet --no-build-isolation chainer==7.8.1
	.venv/chainer/bin/python -m pip install --quiet --constraint .venv/chainer/constraints.txt \
	    --editable '.[chainer,test-frameworks]'
	touch $@

# Each version has its own environment, of the Python that tests.pythons finds.
.venv/python-%/installed: pyproject.toml constraints.txt | .venv/bin/python
	python=$$($(BIN)/python -m tests.pythons $*) && "$$python" -m venv --clear .venv/python-$*
	.venv/python-$*/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[bench,test]'
	touch $@

.venv/installed-%: pyproject.toml constraints.txt | .venv/bin/python
	.venv/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[$*]'
	touch $@
