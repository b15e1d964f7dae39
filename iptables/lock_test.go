package iptables

import (
	"context"
	"errors"
	"testing"
	"time"

	"go.uber.org/zap"

	"github.com/podidentity/podidentity/internal/netnstest"
)

func TestOneProcessAtATimeHoldsTheLock(t *testing.T) {
	netnstest.RunIsolated(t, func(t *testing.T) {
		first, err := acquireLock(context.Background(), zap.NewNop(), longTimeout)
		if err != nil {
			t.Fatal(err)
		}
		short, cancel := context.WithTimeout(context.Background(), 5*lockRetryInterval)
		defer cancel()
		if _, err := acquireLock(short, zap.NewNop(), longTimeout); !errors.Is(err, context.DeadlineExceeded) {
			t.Fatalf("a second acquireLock did not wait for the lock until its context ended: %v", err)
		}
		second := make(chan func())
		go func() {
			done, err := acquireLock(context.Background(), zap.NewNop(), longTimeout)
			if err != nil {
				t.Error(err)
			}
			second <- done
		}()
		first()
		select {
		case done := <-second:
			done()
		case <-time.After(longTimeout):
			t.Fatal("the lock was released, but the acquireLock that waited for it did not return")
		}
	})
}

func TestEachNetworkNamespaceHasItsOwnLock(t *testing.T) {
	netnstest.RunIsolated(t, func(t *testing.T) {
		buildNetwork(t)
		done, err := acquireLock(context.Background(), zap.NewNop(), longTimeout)
		if err != nil {
			t.Fatal(err)
		}
		defer done()
		netnstest.OnThreadIn(t, "pod", func() {
			other, err := acquireLock(context.Background(), zap.NewNop(), longTimeout)
			if err != nil {
				t.Error(err)
				return
			}
			other()
		})
	})
}

func TestRulesAreRepairedAlthoughAnotherProcessKeepsTheLock(t *testing.T) {
	netnstest.RunIsolated(t, func(t *testing.T) {
		done, err := acquireLock(context.Background(), zap.NewNop(), shortTimeout)
		if err != nil {
			t.Fatal(err)
		}
		defer done()
		start := time.Now()
		other, err := acquireLock(context.Background(), zap.NewNop(), shortTimeout)
		if err != nil {
			t.Fatal(err)
		}
		other()
		if waited := time.Since(start); waited < shortTimeout {
			t.Errorf("acquireLock continued without the lock after %v, before its limit", waited)
		}
	})
}
