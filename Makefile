# `make help` lists the targets. Each sets up what it needs in .venv, from Python >= 3.11 and a
# package index; `make check` takes Node and buf from there too.

PYTHON ?= python3
PYTEST_ARGS ?=
MODULES ?=
# Tests wait more than they compute: several processes run them, a module each.
PYTEST := python -m pytest -n 4 --dist loadfile
# What demo and bench compute on: cpu, cuda or cuda:N.
DEVICE ?= cpu
# What image holds, cpu or cuda; its name; what builds it; and more options for that.
TARGET ?= cpu
IMAGE ?= deconvd:$(TARGET)
BUILDER ?= $(firstword $(foreach name,docker podman buildah,$(shell command -v $(name))))
BUILD_ARGS ?=

BIN := .venv/bin
GENERATOR := .venv/generator
OLDEST := .venv/oldest
STUBS := proto
BUF := $(BIN)/python -m tests.javascript @bufbuild/buf/bin/buf
LANDED := proto/landed.binpb
CUDA := $(if $(filter cuda%,$(DEVICE)),.venv/installed-cuda13)

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test check check-all test-oldest mutate check-api format test-gpu generate accept-schema bench image clean

help: ## List the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

demo: .venv/installed-demo $(CUDA) ## Enlarge a photograph and train a decoder, remotely; DEVICE=cuda for a GPU
	$(BIN)/python -m examples.demo --device $(DEVICE)

test: .venv/installed-dev ## Run the tests that need no GPU; PYTEST_ARGS='-k name' for some
	$(BIN)/$(PYTEST) $(PYTEST_ARGS)

check: .venv/installed-dev ## Check format, lint, types, import rules and the schema, then test
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -q tests/test_schema.py
	$(MAKE) test PYTEST_ARGS='--ignore=tests/test_schema.py $(PYTEST_ARGS)'

check-all: check test-oldest ## All checks but those on a GPU: also slow tests, a soak, and tests with the oldest packages
	$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)
	$(BIN)/python -m tests.soak --seconds 90

# Neither the demo nor the benchmarks, which need packages that want a newer numpy; nor the schema's tools and pyright.
test-oldest: $(OLDEST)/installed ## Run the tests with the oldest packages that pyproject.toml allows
	$(OLDEST)/bin/$(PYTEST) $(foreach name,benchmarks demo schema typing,--ignore=tests/test_$(name).py) \
	    $(PYTEST_ARGS)

# MODULES='quotas arena' tries some; all take minutes. Each module's own tests are in pyproject.toml, under tool.mutation.
mutate: .venv/installed-mutation ## Change modules that do no I/O in small ways, and see that their tests notice
	$(BIN)/python -m tests.mutation $(MODULES)

check-api: .venv/installed-dev ## Check with pyright, a second type checker, what users see
	$(BIN)/python -m pytest -q tests/test_typing.py

format: .venv/installed-dev ## Format the code, and mend what lint can mend
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

test-gpu: .venv/installed-dev .venv/installed-cuda13 ## Run the tests that need a CUDA GPU
	$(BIN)/python -m pytest -m gpu $(PYTEST_ARGS)

generate: $(GENERATOR)/installed ## Generate the Python stubs from the schema
	$(GENERATOR)/bin/python -m grpc_tools.protoc --proto_path=proto \
	    --plugin=protoc-gen-mypy=$(GENERATOR)/bin/protoc-gen-mypy \
	    --plugin=protoc-gen-mypy_grpc=$(GENERATOR)/bin/protoc-gen-mypy_grpc \
	    --python_out=$(STUBS) --mypy_out=$(STUBS) --grpc_python_out=$(STUBS) --mypy_grpc_out=$(STUBS) \
	    deconvd/v1/deconvd.proto

accept-schema: .venv/installed-dev ## Make today's schema the one that must not be broken
	$(if $(wildcard $(LANDED)),$(BUF) breaking proto --against $(LANDED))
	$(BUF) build proto --exclude-source-info --output $(LANDED)

bench: .venv/installed-dev $(CUDA) ## Measure operators and whole calls; DEVICE=cuda for a GPU
	$(BIN)/python -m benchmarks.operator --device $(DEVICE)
	$(BIN)/python -m benchmarks.service --device $(DEVICE)

# BUILDAH_FORMAT: podman and buildah drop the HEALTHCHECK from images in their own format.
image: ## Build the container image, with docker, podman or buildah; TARGET=cuda for GPUs
	BUILDAH_FORMAT=docker $(BUILDER) build --target $(TARGET) --tag $(IMAGE) $(BUILD_ARGS) .

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

.venv/installed-%: pyproject.toml constraints.txt | .venv/bin/python
	.venv/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[$*]'
	touch $@
