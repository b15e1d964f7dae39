package iptables

import (
	"context"
	"errors"
	"testing"
	"time"

	"go.uber.org/zap"
)

func TestProcessesTakeTurns(t *testing.T) {
	inNamespaces(t, func(t *testing.T) {
		first, err := takeTurn(context.Background(), zap.NewNop(), generosity)
		if err != nil {
			t.Fatal(err)
		}
		short, cancel := context.WithTimeout(context.Background(), 5*turnRetry)
		defer cancel()
		if _, err := takeTurn(short, zap.NewNop(), generosity); !errors.Is(err, context.DeadlineExceeded) {
			t.Fatalf("a second one got the turn: %v", err)
		}
		second := make(chan func())
		go func() {
			done, err := takeTurn(context.Background(), zap.NewNop(), generosity)
			if err != nil {
				t.Error(err)
			}
			second <- done
		}()
		first()
		select {
		case done := <-second:
			done()
		case <-time.After(generosity):
			t.Fatal("the turn was never passed on")
		}
	})
}

func TestAnotherNamespaceIsAnotherTurn(t *testing.T) {
	inNamespaces(t, func(t *testing.T) {
		buildNetwork(t)
		done, err := takeTurn(context.Background(), zap.NewNop(), generosity)
		if err != nil {
			t.Fatal(err)
		}
		defer done()
		inNS(t, "pod", func() {
			other, err := takeTurn(context.Background(), zap.NewNop(), generosity)
			if err != nil {
				t.Error(err)
				return
			}
			other()
		})
	})
}

func TestWhoeverHoldsTheTurnForeverDoesNotKeepRulesBroken(t *testing.T) {
	inNamespaces(t, func(t *testing.T) {
		done, err := takeTurn(context.Background(), zap.NewNop(), patience)
		if err != nil {
			t.Fatal(err)
		}
		defer done()
		start := time.Now()
		other, err := takeTurn(context.Background(), zap.NewNop(), patience)
		if err != nil {
			t.Fatal(err)
		}
		other()
		if waited := time.Since(start); waited < patience {
			t.Errorf("went on after %v", waited)
		}
	})
}
