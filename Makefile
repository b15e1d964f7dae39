# The targets that users and CI call. `make help` lists most of them.

GO      ?= go
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
LDFLAGS := -s -w -X main.version=$(VERSION)
FUZZ    ?= 10m
SEQUENCES ?= 100000

# One set of build flags for programs, tests and tools, so that each package is compiled once and then found in Go's
# build cache. The race detector needs cgo and a second set: see the target race. Without debug information (DWARF) the
# compiler takes a seventh less CPU time. Stack traces do not need it; a debugger does: call go without make.
GOFLAGS_SHARED     := -trimpath -gcflags=all=-dwarf=false
export GOFLAGS     := $(filter-out $(GOFLAGS_SHARED),$(GOFLAGS)) $(GOFLAGS_SHARED)
export CGO_ENABLED := 0

# The programs iptables, ip and sysctl of Debian are in these folders, which su does not add to PATH.
export PATH := $(PATH):/usr/local/sbin:/usr/sbin:/sbin

.DEFAULT_GOAL := help
.PHONY: help build cross check format lint unit values race random chart arm64 generate verify-generated \
	e2e e2e-cluster e2e-managed e2e-standard programs test test-with-cluster test-without-cluster prerequisites demo bench bench-reuse chaos cluster-up cluster-down fuzz clean

help: ## print this list
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 20

build: ## build bin/nmi and bin/mic for this computer
	$(GO) build -ldflags "$(LDFLAGS)" -o bin/ ./cmd/...

cross: ## build bin/ARCH/nmi and bin/ARCH/mic for amd64 and arm64
	for arch in amd64 arm64; do \
		GOARCH=$$arch $(GO) build -ldflags "$(LDFLAGS)" -o bin/$$arch/ ./cmd/... || exit 1; done

# The modules of Kubernetes are downloaded while bin/cluster compiles. GOGC=200 reduces the CPU time of the compiler.
bin/cluster: FORCE
	@$(GO) -C e2e/cluster/binaries mod download & \
		GOGC=200 $(GO) -C e2e build -o ../bin/cluster ./cmd/cluster; status=$$?; wait; exit $$status
FORCE:

demo: bin/cluster ## show the product on a cluster on this computer, with explanations; removes everything afterwards
	$(GO) -C e2e run ./cmd/demo

bench: bin/cluster ## measure; prints the figures and writes bench.json
	$(GO) -C e2e run ./cmd/bench -o ../bench.json

bench-reuse: ## move an address between two pods 1,000,000 times (20 minutes), and add the result to bench.json
	PODIDENTITY_REUSE_ROUNDS=1000000 PODIDENTITY_REUSE_RESULT=$(CURDIR)/bench.json \
	$(GO) test -count=1 -v -timeout 3h -run 'TestAnAddressThatMovesBetweenPods/by_cgroup' ./nmi

cluster-up: bin/cluster ## start the demo's cluster and leave it running
	bin/cluster up

cluster-down: bin/cluster ## remove the cluster
	bin/cluster down

# The short loop: no cluster, no race detector.
check: ## format, lint and unit tests: what to run before each commit
	$(MAKE) --no-print-directory lint
	$(MAKE) --no-print-directory unit

format: bin/golangci-lint ## format the Go code
	bin/golangci-lint fmt
	cd e2e && ../bin/golangci-lint fmt

# golangci-lint reads .golangci.yml. It also checks the format.
lint: bin/golangci-lint ## golangci-lint
	bin/golangci-lint run
	cd e2e && ../bin/golangci-lint run
	cd tools && ../bin/golangci-lint run
	@unformatted=$$(gofmt -l $$(git ls-files '*.go')) && [ -z "$$unformatted" ] || { echo "not formatted: $$unformatted" >&2; exit 1; } # also what no build on this computer has

bin/golangci-lint: FORCE
	$(GO) -C tools build -o ../bin/golangci-lint github.com/golangci/golangci-lint/v2/cmd/golangci-lint
bin/controller-gen: FORCE
	$(GO) -C tools build -o ../bin/controller-gen sigs.k8s.io/controller-tools/cmd/controller-gen

# Each test that needs root fails without it. A skipped test is a failure.
GOTEST := sh e2e/gotest.sh $(GO)

unit: ## unit, fuzz seed and kernel tests, without the race detector
	$(GOTEST) . ./...
	$(GOTEST) e2e ./azure

# Packages whose goroutines share data. The others are functions on values, and are tested without the race detector.
RACE := ./nmi/... ./mic/... ./bpf/... ./iptables/... ./internal/...

race: ## the tests of packages with goroutines, with the race detector
	CGO_ENABLED=1 $(GOTEST) . -race $(RACE)
	CGO_ENABLED=1 $(GOTEST) e2e -race ./azure
	CGO_ENABLED=1 $(GOTEST) e2e -race -run 'RandomSequences|KilledAtAny' ./mic

values: # the unit tests that race leaves out
	$(GOTEST) . $$($(GO) list ./... | grep -vxF "$$($(GO) list $(RACE))")

random: ## random sequences of events for MIC, with an API server and Azure in memory; a few also with a real API server
	$(GOTEST) e2e -timeout 40m ./mic

chart: ## the tests of CRDs, chart and documents, with an API server
	$(GOTEST) e2e -timeout 40m ./crds ./chart ./docs ./cmd/reference ./cmd/cluster

# A type check of the programs and all their dependencies takes 23 CPU seconds. Compiling them for a second architecture
# takes minutes, in each run with an empty build cache. What is lost: no compiler, assembler or linker for arm64 runs in
# `make test`. `make cross` and the Dockerfile run them.
arm64: ## check that nmi and mic type check for arm64
	$(GO) -C tools run ./typecheck .. arm64 ./cmd/...

e2e: e2e-cluster e2e-managed e2e-standard ## end-to-end tests on a real cluster

e2e-cluster: bin/cluster # the cluster itself
	$(GOTEST) e2e -p 1 -timeout 40m ./cluster ./cmd/bench

e2e-managed: bin/cluster # NMI without MIC
	$(GOTEST) e2e -timeout 40m .

e2e-standard: bin/cluster # NMI and MIC
	$(GOTEST) e2e -timeout 40m ./standard

# The steps with a cluster run one after the other: on two cores two clusters at the same time take longer, because the
# load tests of one delay the pods of the other. The steps without a cluster run beside them. `make -j2` runs both
# groups: a background job of the shell would continue after an interrupt.
WITH_CLUSTER := e2e-standard e2e-managed e2e-cluster
WITHOUT_CLUSTER := lint verify-generated arm64 values chart race random
steps = (for step in $(1); do sh .ci/step.sh $$step $(MAKE) --no-print-directory $$step || exit 1; done)

test: prerequisites ## everything that CI runs; prints how long each step took
	@sh .ci/step.sh --start
	@status=0; $(call steps,programs) && $(MAKE) --no-print-directory -k -j2 test-with-cluster test-without-cluster || status=1; \
		sh .ci/step.sh --table programs $(WITH_CLUSTER) $(WITHOUT_CLUSTER); exit $$status
	@echo "all tests passed"

test-with-cluster:
	+@$(call steps,$(WITH_CLUSTER))
test-without-cluster:
	+@$(call steps,$(WITHOUT_CLUSTER))

programs: bin/cluster # what clusters run

# bpf2go compiles bpf/capture.c. The object is the same for amd64 and arm64. Which bytes clang writes depends on its
# version: the committed files are those of Debian 12.
bin/bpf2go: FORCE
	$(GO) -C tools build -o ../bin/bpf2go github.com/cilium/ebpf/cmd/bpf2go
bpf2go = cd bpf && ../bin/bpf2go -go-package bpf -output-dir $(1) -target bpfel -type capture_settings -type owner -type connection_record -type endpoint \
	programs capture.c -- -O2 -Wall -Werror -I/usr/include/$$(uname -m)-linux-gnu

CRDS := deploy/podidentity/crds
generate: bin/controller-gen bin/bpf2go ## generate deep copies, CRDs, the eBPF programs and the reference in docs/
	bin/controller-gen object crd paths=./api/... output:crd:dir=$(CRDS)
	$(call bpf2go,.)
	$(GO) -C e2e run ./cmd/reference

verify-generated: bin/controller-gen bin/bpf2go ## check that generated files are up to date
	@t=$$(mktemp -d) && trap 'rm -rf "$$t"' EXIT && \
	{ bin/controller-gen object crd paths=./api/... output:object:dir="$$t" output:crd:dir="$$t/crds" && \
	mkdir "$$t/bpf" && ($(call bpf2go,"$$t/bpf")) || exit 1; } && \
	diff "$$t/zz_generated.deepcopy.go" api/v1/zz_generated.deepcopy.go && diff -r "$$t/crds" $(CRDS) && \
	cmp "$$t/bpf/programs_bpfel.go" bpf/programs_bpfel.go && cmp "$$t/bpf/programs_bpfel.o" bpf/programs_bpfel.o || \
	{ echo "generated files are not up to date; run make generate and commit" >&2; exit 1; }
	$(GO) -C e2e run ./cmd/reference -check

prerequisites: ## install the Debian packages that the tests need on this computer
	sh e2e/prerequisites.sh

chaos: bin/cluster ## what takes long and rarely fails: the API server is down for five minutes, NMI is killed 100 times with each capture, 60 pods swap addresses
	$(GOTEST) e2e -timeout 90m -run 'APIServerIsDown|OneCapture|AddressesOfOthers' -outage 5m -kills 100 -swap-pods 60 -swap-all .

fuzz: ## run each fuzz target for FUZZ (10m), and SEQUENCES (100000) new random sequences of events for MIC
	$(GO) -C e2e test ./mic -run RandomSequences -fresh -sequences $(SEQUENCES) -timeout 0
	$(GO) test ./metadata -run '^$$' -fuzz '^FuzzPath$$' -fuzztime $(FUZZ)
	$(GO) test ./metadata -run '^$$' -fuzz '^FuzzParseRequest$$' -fuzztime $(FUZZ)
	$(GO) test ./metadata -run '^$$' -fuzz '^FuzzParseHostToken$$' -fuzztime $(FUZZ)
	$(GO) test ./identity -run '^$$' -fuzz '^FuzzDecide$$' -fuzztime $(FUZZ)
	$(GO) test ./internal/text -run '^$$' -fuzz '^FuzzOneLine$$' -fuzztime $(FUZZ)
	$(GO) test ./iptables -run '^$$' -fuzz '^FuzzSplitWords$$' -fuzztime $(FUZZ)
	$(GO) test ./mic/azure -run '^$$' -fuzz '^FuzzParseProviderID$$' -fuzztime $(FUZZ)
	$(GO) test ./mic/azure -run '^$$' -fuzz '^FuzzARMError$$' -fuzztime $(FUZZ)
	$(GO) test ./bpf -run '^$$' -fuzz '^FuzzToken$$' -fuzztime $(FUZZ)
	$(GO) test ./nmi/links -run '^$$' -fuzz '^FuzzRemember$$' -fuzztime $(FUZZ)
	$(GO) test ./nmi/token -run '^$$' -fuzz '^FuzzSecret$$' -fuzztime $(FUZZ) -fuzzminimizetime 1x
	$(GO) test ./nmi/token -run '^$$' -fuzz '^FuzzCertificate$$' -fuzztime $(FUZZ) -fuzzminimizetime 1x

clean: ## remove what the build wrote
	rm -rf bin bench.json
