package cluster

import (
	"context"
	"errors"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestWaitEndsWhenAProcessItDependsOnEnds(t *testing.T) {
	log := filepath.Join(t.TempDir(), "log")
	p, err := newSpawner().start("failing", log, exec.Command("sh", "-c", "echo out of order; exit 3"))
	if err != nil {
		t.Fatal(err)
	}
	err = waitFor(t.Context(), "something", time.Minute, []*process{p}, polled(func(context.Context) error { return errors.New("not yet") }))
	if err == nil || !strings.Contains(err.Error(), "exit status 3") || !strings.Contains(err.Error(), "out of order") {
		t.Errorf("the error is %v, want one with the exit status and the log of the process", err)
	}
}

func TestWaitReturnsTheLastErrorAfterItsLimit(t *testing.T) {
	missing := errors.New("not yet")
	err := waitFor(t.Context(), "something", 10*time.Millisecond, nil, polled(func(context.Context) error { return missing }))
	if !errors.Is(err, missing) || !strings.Contains(err.Error(), "not ready after 10ms") {
		t.Errorf("the error is %v, want one with the limit and the last error of the check", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	err = waitFor(ctx, "something", time.Minute, nil, polled(func(context.Context) error { return missing }))
	if !errors.Is(err, context.Canceled) {
		t.Errorf("the error of a canceled wait is %v, want context.Canceled", err)
	}
}
