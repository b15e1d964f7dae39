# What users and CI call. `make help` lists it.

GO      ?= go
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
LDFLAGS := -s -w -X main.version=$(VERSION)
FUZZ    ?= 10m
STORIES ?= 100000

.DEFAULT_GOAL := help
.PHONY: help build cross test unit lint generate verify-generated chart e2e tools prerequisites \
	demo bench cluster-up cluster-down fuzz clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 20

build: ## bin/nmi and bin/mic for this machine
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags "$(LDFLAGS)" -o bin/ ./cmd/...

cross: ## check that nmi and mic build for amd64 and arm64
	for arch in amd64 arm64; do \
		CGO_ENABLED=0 GOARCH=$$arch $(GO) build -trimpath -ldflags "$(LDFLAGS)" -o bin/$$arch/ ./cmd/... || exit 1; done

bin/cluster: FORCE
	$(GO) -C e2e build -o ../bin/cluster ./cmd/cluster
FORCE:

demo: bin/cluster ## the product at work on a cluster on this machine, with explanations; takes all down again
	$(GO) -C e2e run ./cmd/demo

bench: bin/cluster ## measure; prints the figures and writes bench.json
	$(GO) -C e2e run ./cmd/bench -o ../bench.json

cluster-up: bin/cluster ## the demo's cluster, left running
	bin/cluster up

cluster-down: bin/cluster ## take it down
	bin/cluster down

test: prerequisites ## everything that CI runs
	$(MAKE) -j2 --output-sync=target lint verify-generated cross unit
	$(MAKE) e2e
	@echo "all tests passed"

# Tests that need root fail without it; none is skipped, and a skip would be a failure.
GOTEST := sh e2e/gotest.sh $(GO)

unit: ## unit, fuzz seeds and kernel tests, with the race detector
	$(GOTEST) . -race ./...
	$(GOTEST) e2e -race ./azure
	$(GOTEST) e2e -race -run 'Whatever|KilledAtAny' ./mic
	$(GOTEST) e2e ./crds ./chart ./mic ./docs ./cmd/reference

e2e: bin/cluster ## end-to-end tests on a real cluster
	$(GOTEST) e2e -p 1 -timeout 40m ./cluster ./cmd/bench . ./standard

lint: tools ## gofmt, go vet and staticcheck
	@test -z "$$(gofmt -l . | tee /dev/stderr)" || { echo "run gofmt -w on these" >&2; exit 1; }
	$(GO) vet ./... && $(GO) -C e2e vet ./...
	bin/staticcheck ./... && cd e2e && ../bin/staticcheck ./...

tools:
	$(GO) -C e2e build -o ../bin/controller-gen sigs.k8s.io/controller-tools/cmd/controller-gen
	$(GO) -C e2e build -o ../bin/staticcheck honnef.co/go/tools/cmd/staticcheck

CRDS := deploy/podidentity/crds
generate: tools ## deep copies, CRDs and the reference in docs/
	bin/controller-gen object crd paths=./api/... output:crd:dir=$(CRDS)
	$(GO) -C e2e run ./cmd/reference

verify-generated: tools ## fail if generated files are not up to date
	@t=$$(mktemp -d) && trap 'rm -rf '$$t EXIT && \
	bin/controller-gen object crd paths=./api/... output:object:dir=$$t output:crd:dir=$$t/crds && \
	diff $$t/zz_generated.deepcopy.go api/v1/zz_generated.deepcopy.go && diff -r $$t/crds $(CRDS) || \
	{ echo "generated files are not up to date; run make generate and commit" >&2; exit 1; }
	$(GO) -C e2e run ./cmd/reference -check

prerequisites: ## install the Debian packages that the tests need on this machine
	sh e2e/prerequisites.sh

fuzz: ## each fuzz target for FUZZ (10m), and STORIES (100000) fresh stories of MIC
	$(GO) -C e2e test ./mic -run Whatever -fresh -stories $(STORIES) -timeout 0
	$(GO) test ./metadata -run '^$$' -fuzz '^FuzzPath$$' -fuzztime $(FUZZ)
	$(GO) test ./metadata -run '^$$' -fuzz '^FuzzParseRequest$$' -fuzztime $(FUZZ)
	$(GO) test ./metadata -run '^$$' -fuzz '^FuzzParseHostToken$$' -fuzztime $(FUZZ)
	$(GO) test ./identity -run '^$$' -fuzz '^FuzzDecide$$' -fuzztime $(FUZZ)
	$(GO) test ./mic/azure -run '^$$' -fuzz '^FuzzParseProviderID$$' -fuzztime $(FUZZ)
	$(GO) test ./mic/azure -run '^$$' -fuzz '^FuzzARMError$$' -fuzztime $(FUZZ)
	$(GO) test ./nmi/token -run '^$$' -fuzz '^FuzzSecret$$' -fuzztime $(FUZZ) -fuzzminimizetime 1x
	$(GO) test ./nmi/token -run '^$$' -fuzz '^FuzzCertificate$$' -fuzztime $(FUZZ) -fuzzminimizetime 1x

clean: ## remove what was built here
	rm -rf bin bench.json
