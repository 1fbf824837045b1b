# SPDX-License-Identifier: Apache-2.0
#
# `make demo` and `make test` install what they need, on Debian 12 as root, and
# are quick when it is there already.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:

# Downloads and tools that are built from the Go module proxy live outside of
# the repository, so that a fresh checkout finds them again.
CACHE ?= $(or $(SYSLATCH_CACHE),$(or $(XDG_CACHE_HOME),$(HOME)/.cache)/syslatch)
CONTAINERD_VERSION := v2.4.2
RUNC_VERSION := v1.5.2
CRIO_VERSION := v1.36.1
GOLANGCI_LINT_VERSION := v2.15.0
TOOLS := $(CACHE)/tools-$(CONTAINERD_VERSION)-$(RUNC_VERSION)
CRIO := $(CACHE)/crio-$(CRIO_VERSION)
TESTBIN := $(CURDIR)/bin/test
export SYSLATCH_CACHE := $(CACHE)
export SYSLATCH_TOOLS := $(TOOLS)

BUILD_PACKAGES := gcc libc6-dev libseccomp-dev pkg-config
TEST_PACKAGES := runc crun busybox-static strace perl mmdebstrap systemd jq podman dbus curl python3 nodejs
VM_PACKAGES := qemu-system-x86 qemu-system-common xz-utils kmod
GENERATE_PACKAGES := clang llvm libbpf-dev clang-format

# $(call install,PACKAGES): apt is asked only if one is missing. A fresh machine runs
# one of its own at boot.
install = @missing=(); for p in $(1); do dpkg-query -W -f '$${Status}' $$p 2>/dev/null | grep -q 'ok installed' || missing+=($$p); done; \
	if (( $${\#missing[@]} )); then echo "installing $${missing[*]}"; \
	for i in {1..60}; do apt-get update -qq && break; (( i < 60 )) && sleep 5; done; \
	DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 install -y -qq --no-install-recommends "$${missing[@]}" >/dev/null; fi

.PHONY: help
help: ## Show this help
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: build
build: deps-build ## Build bin/syslatch, bin/syslatchd and bin/syslatch-hook
	go build -o bin/ ./cmd/...

.PHONY: generate
generate: ## Rebuild the committed BPF objects (prints instruction counts)
	$(call install,$(GENERATE_PACKAGES))
	go generate ./bpf

.PHONY: generated
generated: ## Check that the committed BPF objects are what their sources make
	@sums=$$(sha256sum bpf/*_x86_bpfel.*); $(MAKE) --no-print-directory generate; \
	sha256sum --quiet -c <<<"$$sums" || { echo "the BPF objects were not made of these sources: commit what is there now"; exit 1; }

.PHONY: deps-build deps
deps-build:
	$(call install,$(BUILD_PACKAGES))

deps: deps-build $(TOOLS)/.done ## Install what the tests need
	$(call install,$(TEST_PACKAGES))

$(TOOLS)/.done:
	mkdir -p $(TOOLS)
	GOFLAGS= GOBIN=$(TOOLS) go install github.com/containerd/containerd/v2/cmd/{containerd,ctr,containerd-shim-runc-v2}@$(CONTAINERD_VERSION)
	$(call install,$(BUILD_PACKAGES))
	GOFLAGS= GOBIN=$(TOOLS) go install -tags seccomp github.com/opencontainers/runc@$(RUNC_VERSION)
	touch $@

.PHONY: test
test: generated unit e2e vm ## Run all tests: unit and kernel tests, end to end, and in the guests

.PHONY: unit
unit: deps ## Unit and kernel tests on this machine
	go test $$(go list ./... | grep -vE '/(test/e2e|test/podman|test/readme|contrib)$$')
	go test -count=1 ./contrib ./test/readme # these run programs: the test cache doesn't see that they changed

.PHONY: e2e
e2e: deps build ## End-to-end tests with real containerd and podman on this machine
	go test -count=1 -p 1 -timeout 20m ./test/e2e ./test/podman

.PHONY: testbin
testbin: deps build
	mkdir -p $(TESTBIN)
	cp bin/syslatch bin/syslatchd bin/syslatch-hook $(TESTBIN)/
	CGO_ENABLED=0 go build -o $(TESTBIN)/ ./test/workloads/... ./test/podman/odd
	CGO_ENABLED=0 GOARCH=386 go build -o $(TESTBIN)/odd386 ./test/podman/odd
	gcc -O1 -static -o $(TESTBIN)/forms test/workloads/forms/forms.c
	gcc -m32 -O1 -ffreestanding -fno-pic -no-pie -nostdlib -static -o $(TESTBIN)/compat test/workloads/compat/compat.c
	gcc -O1 -static -o $(TESTBIN)/attacks test/workloads/attacks/attacks.c
	gcc -O1 -static -pthread -o $(TESTBIN)/injected test/workloads/injected/injected.c
	for p in ./bpf ./internal/cgroup ./internal/inject ./internal/monitor ./internal/seccomp ./internal/store ./contrib ./cmd/syslatch ./test/oracle ./test/e2e ./test/podman; do \
		go test -c -o $(TESTBIN)/$$(basename $$p).test $$p; done
	go run ./test/images/build # guests have no network

# The guests run side by side: each keeps one core busy.
.PHONY: vm
vm: testbin ## The tests of kernels and engines in guests, on Debian's kernels 6.12 and 6.1 with cgroup v2
	$(call install,$(VM_PACKAGES))
	export VM_TIMEOUT=4800; status=0; \
	test/vm/run 6.1 -- test/vm/job $(TESTBIN) >bin/vm-6.1.log 2>&1 & other=$$!; \
	test/vm/run 6.12 -- test/vm/job $(TESTBIN) || status=$$?; \
	wait $$other || status=$$?; cat bin/vm-6.1.log; exit $$status

# CRI-O takes 6 minutes to build, so this is no part of make test. Its go.mod asks for
# candidates of Kubernetes modules, which not every proxy keeps: the releases do. In
# the guest, which is slow, only what is about CRI-O itself runs, and what needs more
# than root in a container has.
.PHONY: crio
crio: testbin $(CRIO)/pinns ## The end-to-end tests with CRI-O, which is built for them, in place of containerd
	$(call install,$(VM_PACKAGES))
	SYSLATCH_CRIO=$(CRIO) go test -count=1 -timeout 30m ./test/e2e
	cd test/e2e && SYSLATCH_CRIO=$(CRIO) SYSLATCH_TEST_BIN=$(TESTBIN) VM_TIMEOUT=3600 \
		../vm/run 6.12 -- $(TESTBIN)/e2e.test -test.v -test.timeout 50m -test.run 'CRIO(Facts|Hook|Refuses|Trace)|Privileged|Limit|DeadPlugin|ContainerdRestart'

$(CRIO)/pinns:
	rm -rf $(CRIO).src && mkdir -p $(CRIO)
	source=$$(cd $(CRIO) && go mod download -json github.com/cri-o/cri-o@$(CRIO_VERSION) | jq -r .Dir); cp -r --no-preserve=mode $$source $(CRIO).src
	cd $(CRIO).src && sed -i 's|\(k8s.io/[a-z-]* v[0-9.]*\)-rc.0|\1|' go.mod && \
		GOFLAGS=-mod=mod go build -o $(CRIO)/ -tags 'containers_image_openpgp exclude_graphdriver_btrfs exclude_graphdriver_devicemapper seccomp' ./cmd/crio
	gcc -O2 -o $@ $(CRIO).src/pinns/src/*.c
	rm -rf $(CRIO).src

.PHONY: demo
demo: deps build ## Show the main job with real output
	go run ./test/demo

.PHONY: bench
bench: deps build ## Measure what syslatch costs: the tables of docs/benchmarks.md (BENCH_DOC=FILE updates it, BENCH_JSON=FILE)
	@mkdir -p $(TESTBIN)
	@go build -o $(TESTBIN)/ ./test/bench
	@$(TESTBIN)/bench $(if $(BENCH_DOC),-doc $(BENCH_DOC)) $(if $(BENCH_JSON),-json $(BENCH_JSON)) $(BENCH_FLAGS)

# Built on demand, in a minute or two: only these targets need it.
GOLANGCI_LINT := $(CACHE)/golangci-lint-$(GOLANGCI_LINT_VERSION)/golangci-lint
$(GOLANGCI_LINT):
	GOFLAGS= GOBIN=$(dir $@) go install github.com/golangci/golangci-lint/v2/cmd/golangci-lint@$(GOLANGCI_LINT_VERSION)

.PHONY: lint
lint: deps-build $(GOLANGCI_LINT) ## Static checks and formatting, by .golangci.yml
	$(GOLANGCI_LINT) run ./...

.PHONY: fmt
fmt: $(GOLANGCI_LINT) ## Format Go and BPF C
	$(GOLANGCI_LINT) fmt ./...
	$(call install,$(GENERATE_PACKAGES))
	clang-format -i bpf/*.c bpf/*.h

.PHONY: clean
clean: ## Remove what was built here; the cache stays
	rm -rf bin
