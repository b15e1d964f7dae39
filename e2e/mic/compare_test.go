//go:build !race

package mic

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/podidentity/podidentity/e2e/azure"
)

// This file compares the fake API server with a real one in two ways. It sends the same random requests to both servers
// and compares the responses. It runs MIC with each server on the same random sequences of operations, and compares the
// objects and the identities attached in the fake ARM.
//
// The real server runs without the controller-manager and without kubelets. So the fake's garbage collector, namespace
// controller and kubelets are turned off. With both servers, a running pod that is deleted with a grace period is never
// removed.

const (
	comparedSequences = 4
	comparedRequests  = 300

	// convergenceTime is long enough for MIC to converge after the operations of a sequence.
	convergenceTime = 3 * time.Minute
	never           = 1000 * time.Hour
)

func TestTheFakeAPIServerBehavesLikeARealOne(t *testing.T) {
	server := startRealServer(t)
	t.Run("requests", func(t *testing.T) {
		for seed := range uint64(2) {
			server.reset(t)
			requests := randomRequests(rand.New(rand.NewPCG(seed, 3<<32)), comparedRequests/2)
			got, want := sendToFake(t, requests), sendAll(server.client(), requests)
			for i, r := range requests {
				if diff := cmp.Diff(want[i], got[i], cmpopts.IgnoreUnexported(apiResult{})); diff != "" {
					t.Errorf("seed %d, request %d, %s (-real +fake):\n%s", seed, i, r, diff)
				}
			}
		}
	})
	for seed := range uint64(comparedSequences) {
		t.Run(fmt.Sprintf("sequence %d", seed), func(t *testing.T) {
			server.reset(t)
			operations := randomOperations(rand.New(rand.NewPCG(seed, 4<<32)))
			fake := runWithFake(t, operations)
			runWithReal(t, server, operations, fake)
		})
	}
}

// comparedRun runs MIC on a sequence of operations, with the fake API server or the real one.
type comparedRun struct {
	*simulation
	client  apiClient
	leader  *process
	killed  atomic.Bool // the leader was killed at a write
	log     []string
	results []string // of the operations
	// waitDone waits for convergence before a step. In runWithFake it then stores the snapshot. In runWithReal it
	// compares the snapshot with that of runWithFake.
	waitDone func(step int, snapshot func() []string)
}

func newComparedRun(t *testing.T) *comparedRun {
	run := &comparedRun{simulation: newSimulation(t)}
	run.cfg.DetachDelay, run.cfg.ReconcileInterval = 10*time.Second, 30*time.Second
	run.api.collectDelay, run.api.namespaceDelay, run.api.podStop = never, never, never
	return run
}

// runWithFake runs the operations with the fake API server. It returns a snapshot for each time that it waited for
// convergence.
func runWithFake(t *testing.T, operations []operation) (snapshots [][]string) {
	synctest.Test(t, func(t *testing.T) {
		run := newComparedRun(t)
		defer run.close()
		for _, name := range namespaces {
			run.addNamespace(name)
		}
		run.waitDone = func(step int, snapshot func() []string) {
			for range convergenceTime / time.Second {
				time.Sleep(time.Second)
				run.restartIfKilled()
			}
			for _, wrong := range run.convergenceErrors() {
				t.Errorf("fake API server, before operation %d: %s", step, wrong)
			}
			snapshots = append(snapshots, snapshot())
		}
		run.run(operations)
	})
	return snapshots
}

// runWithReal runs the operations with the real API server. want has the snapshots of runWithFake. runWithReal checks
// that its own snapshots are the same.
func runWithReal(t *testing.T, server *realServer, operations []operation, want [][]string) {
	synctest.Test(t, func(t *testing.T) {
		run := newComparedRun(t)
		defer run.close()
		run.handle = server.handle
		ctx, cancel := context.WithCancel(context.Background())
		defer cancel()
		go server.limitClock(ctx)
		run.waitDone = func(step int, snapshot func() []string) {
			if len(want) == 0 {
				t.Fatal("the run with the fake API server has fewer snapshots than that with the real one")
			}
			diff := ""
			for range 2 * convergenceTime / time.Second {
				time.Sleep(time.Second)
				run.restartIfKilled()
				if diff = cmp.Diff(snapshot(), want[0]); diff == "" {
					break
				}
			}
			if want = want[1:]; diff != "" {
				t.Fatalf("before operation %d the snapshots differ (-real +fake):\n%s\noperations:\n%s", step, diff, strings.Join(run.log, "\n"))
			}
		}
		run.run(operations)
	})
}

// run creates the initial objects, starts MIC and runs the operations.
func (run *comparedRun) run(operations []operation) {
	conn := newConnection("test", 0)
	defer conn.disconnect()
	run.client = apiClient{conn.apiTransport(run.api, run.handle)}
	for name, providerID := range sorted(nodeProviders) {
		if id := machineOfProviderID(providerID); id != "" {
			if _, exists := run.arm.Machine(id); !exists {
				requireNoError(run.t, run.arm.AddMachine(azure.Machine{ID: id}))
			}
		}
		run.require(run.client.send(http.MethodPost, "nodes", "", nodeObject(name)), http.StatusCreated)
	}
	for _, name := range managedNames {
		if name != "ghost" {
			run.addManagedIdentity(name)
		}
	}
	run.refused[azure.FoldID(identityID("ghost"))] = true
	run.attachForeignIdentity("kubelet", scaleSetID("Set-A"))
	run.leader = run.start()
	for step, o := range operations {
		if o.afterConvergence {
			run.waitDone(step, run.snapshot)
		}
		result := o.run(run)
		run.results = append(run.results, fmt.Sprintf("operation %02d %s: %s", step, o, result))
		run.log = append(run.log, formatTime(time.Now())+" "+run.results[len(run.results)-1])
		time.Sleep(o.pause)
	}
	run.leader.conn.hook(nil, nil)
	run.waitDone(len(operations), run.snapshot)
}

func (run *comparedRun) require(r apiResult, code int) {
	if r.Code != code {
		run.t.Fatalf("creating an initial object failed: the API server answered %d %s; want %d", r.Code, r.Reason, code)
	}
}

// restartIfKilled starts the next leader if the current leader was killed at a write.
func (run *comparedRun) restartIfKilled() {
	if run.killed.CompareAndSwap(true, false) {
		run.leader.kill()
		run.leader = run.start()
	}
}
