package cluster

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// processID names a process for good: the kernel reuses PIDs, but not together with the moment of the start.
type processID struct {
	PID   int    `json:"pid"`
	Start uint64 `json:"start"` // clock ticks since boot, field 22 of /proc/PID/stat
}

func identify(pid int) (processID, error) {
	start, _, err := procStat(pid)
	return processID{PID: pid, Start: start}, err
}

// procStat reads when a process started, and its state.
func procStat(pid int) (start uint64, state byte, err error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, 0, err
	}
	// The name before the last parenthesis may hold anything, spaces and parentheses too.
	fields := bytes.Fields(data[bytes.LastIndexByte(data, ')')+1:])
	if len(fields) < 20 {
		return 0, 0, fmt.Errorf("unexpected contents of /proc/%d/stat", pid)
	}
	start, err = strconv.ParseUint(string(fields[19]), 10, 64)
	return start, fields[0][0], err
}

func (p processID) alive() bool {
	start, state, err := procStat(p.PID)
	return p.PID > 1 && err == nil && start == p.Start && state != 'Z'
}

// kill ends the process unless its PID belongs to another one by now. The descriptor pins the process between the
// check and the signal.
func (p processID) kill(sig syscall.Signal) error {
	if p.PID <= 1 {
		return nil
	}
	fd, err := unix.PidfdOpen(p.PID, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("ending process %d: %w", p.PID, err)
	}
	defer unix.Close(fd)
	if !p.alive() {
		return nil
	}
	if err := unix.PidfdSendSignal(fd, unix.Signal(sig), nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("ending process %d: %w", p.PID, err)
	}
	return nil
}

func (p processID) waitGone(limit time.Duration) error {
	for deadline := time.Now().Add(limit); p.alive(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			return fmt.Errorf("process %d is still there after %s", p.PID, limit)
		}
	}
	return nil
}

// process is a child of the supervisor. done is closed once it has ended; err is valid from then on.
type process struct {
	processID
	name string
	log  string
	done chan struct{}
	err  error
}

// spawner starts all children on one thread that lives as long as the program: the kernel sends the parent-death
// signal when the thread that made the child ends, not when the program does.
type spawner chan func()

func newSpawner() spawner {
	s := make(spawner)
	go func() {
		runtime.LockOSThread()
		for f := range s {
			f()
		}
	}()
	return s
}

// start runs cmd with its output in the file log. The child is killed when the supervisor ends, however it ends.
func (s spawner) start(name, log string, cmd *exec.Cmd) (*process, error) {
	out, err := os.OpenFile(log, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		return nil, fmt.Errorf("starting %s: %w", name, err)
	}
	defer out.Close()
	cmd.Stdout, cmd.Stderr = out, out
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
	cmd.Dir = "/"

	started := make(chan error)
	s <- func() { started <- cmd.Start() }
	if err := <-started; err != nil {
		return nil, fmt.Errorf("starting %s: %w", name, err)
	}
	p := &process{name: name, log: log, done: make(chan struct{})}
	// Before Wait the child cannot vanish: at worst it is a zombie, which still has its start time.
	p.processID, err = identify(cmd.Process.Pid)
	go func() {
		p.err = cmd.Wait()
		close(p.done)
	}()
	if err != nil {
		return nil, fmt.Errorf("starting %s: %w", name, err)
	}
	return p, nil
}

// stop kills the process and waits for its end. Nothing that runs in the cluster has anything to save.
func (p *process) stop() error {
	if p == nil {
		return nil
	}
	if err := p.kill(syscall.SIGKILL); err != nil {
		return err
	}
	select {
	case <-p.done:
		return nil
	case <-time.After(10 * time.Second):
		return fmt.Errorf("%s (process %d) did not end within 10 s of SIGKILL", p.name, p.PID)
	}
}

// ended returns an error with the end of the log if the process is gone.
func (p *process) ended() error {
	select {
	case <-p.done:
		return fmt.Errorf("%s ended by itself (%v)%s", p.name, p.err, logTail(p.log))
	default:
		return nil
	}
}

// await polls until ready returns nil. It gives up at once when one of the processes that it waits for has ended.
func await(ctx context.Context, what string, limit time.Duration, on []*process, ready func() error) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	ticker := time.NewTicker(50 * time.Millisecond)
	defer ticker.Stop()
	for {
		last := ready()
		if last == nil {
			return nil
		}
		for _, p := range on {
			if err := p.ended(); err != nil {
				return fmt.Errorf("waiting for %s: %w", what, err)
			}
		}
		select {
		case <-ctx.Done():
			tails := ""
			for _, p := range on {
				tails += logTail(p.log)
			}
			if cause := context.Cause(ctx); !errors.Is(cause, context.DeadlineExceeded) {
				return fmt.Errorf("waiting for %s: %w", what, cause)
			}
			return fmt.Errorf("waiting for %s: not there after %s: %w%s", what, limit, last, tails)
		case <-ticker.C:
		}
	}
}

// inNetns is a command that runs in a network namespace of the cluster.
func inNetns(ctx context.Context, name, program string, args ...string) (*exec.Cmd, error) {
	return inNetnsAt(ctx, netnsPath(name), program, args...)
}

func inNetnsAt(ctx context.Context, path, program string, args ...string) (*exec.Cmd, error) {
	if err := refuseMachineNetns(path); err != nil {
		return nil, err
	}
	return exec.CommandContext(ctx, "nsenter", append([]string{"--net=" + path, "--", program}, args...)...), nil
}
