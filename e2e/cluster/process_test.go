package cluster

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// firstThreadVariable is the environment variable that makes the test program call endFirstThread.
const firstThreadVariable = "PODIDENTITY_TEST_END_FIRST_THREAD"

func init() {
	if os.Getenv(firstThreadVariable) != "" {
		runtime.LockOSThread() // keeps the main goroutine on the first thread
	}
}

// endFirstThread ends the first thread of this process; the other threads go on. When the kernel kills a process, the
// same can happen for a moment: the first thread ends before the others.
func endFirstThread() {
	go func() {
		time.Sleep(time.Minute) // in case that the test is killed before it kills this process
		os.Exit(0)
	}()
	_, _, _ = unix.Syscall(unix.SYS_EXIT, 0, 0, 0)
}

func TestAProcessWhoseFirstThreadHasEndedIsAlive(t *testing.T) {
	command := exec.Command(os.Args[0])
	command.Env = append(os.Environ(), firstThreadVariable+"=1")
	if err := command.Start(); err != nil {
		t.Fatal(err)
	}
	defer command.Wait()
	defer command.Process.Kill()
	p := processID{PID: command.Process.Pid}
	deadline := time.Now().Add(30 * time.Second)
	for state := byte(0); state != 'Z'; time.Sleep(time.Millisecond) {
		var err error
		if p.Start, state, err = procStat(p.PID); err != nil {
			t.Fatal(err)
		}
		if time.Now().After(deadline) {
			t.Fatalf("the first thread has not ended after 30 s: its state is %q, want 'Z'", state)
		}
	}
	if !p.alive() {
		t.Error("a process whose first thread has ended, and whose other threads still run, counts as ended")
	}
	if err := p.waitGone(50 * time.Millisecond); err == nil {
		t.Error("waitGone returned before the last thread ended")
	}
	if err := p.kill(); err != nil {
		t.Fatal(err)
	}
	if err := p.waitGone(20 * time.Second); err != nil || p.alive() {
		t.Errorf("after SIGKILL: waitGone returned %v and alive %t, want nil and false", err, p.alive())
	}
}

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
