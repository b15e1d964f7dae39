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

// processID identifies a process until the host is rebooted: the kernel reuses PIDs, but not with the same start time.
type processID struct {
	PID   int    `json:"pid"`
	Start uint64 `json:"start"` // clock ticks since boot, field 22 of /proc/PID/stat
}

func identify(pid int) (processID, error) {
	start, _, err := procStat(pid)
	return processID{PID: pid, Start: start}, err
}

// procStat reads the start time and the state of a process.
func procStat(pid int) (start uint64, state byte, err error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, 0, err
	}
	// The name before the last parenthesis may contain any characters, also spaces and parentheses.
	fields := bytes.Fields(data[bytes.LastIndexByte(data, ')')+1:])
	if len(fields) < 20 {
		return 0, 0, fmt.Errorf("unexpected contents of /proc/%d/stat", pid)
	}
	start, err = strconv.ParseUint(string(fields[19]), 10, 64)
	return start, fields[0][0], err
}

// alive reports whether the process has not ended. The first thread of a killed process may end before the others: then
// the process already looks like a zombie, but still holds its locks and files.
func (p processID) alive() bool {
	start, state, err := procStat(p.PID)
	return p.PID > 1 && err == nil && start == p.Start && (state != 'Z' || hasOtherThreads(p.PID))
}

func hasOtherThreads(pid int) bool {
	threads, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
	return err == nil && len(threads) > 1
}

// open returns a pidfd of the process. A pidfd never refers to another process, even if the kernel reuses the PID. open
// returns false if the process has ended, even if another process has its PID by then.
func (p processID) open() (fd int, ok bool, err error) {
	if p.PID <= 1 {
		return -1, false, nil
	}
	fd, err = unix.PidfdOpen(p.PID, 0)
	if errors.Is(err, unix.ESRCH) {
		return -1, false, nil
	}
	if err != nil {
		return -1, false, err
	}
	if !p.alive() {
		return -1, false, unix.Close(fd)
	}
	return fd, true, nil
}

// kill sends SIGKILL to the process. It does nothing if the process has ended, even if another process has its PID by
// then: the pidfd refers to the same process in the check and in the signal.
func (p processID) kill() error {
	fd, ok, err := p.open()
	if err != nil {
		return fmt.Errorf("killing process %d: %w", p.PID, err)
	}
	if !ok {
		return nil
	}
	defer unix.Close(fd)
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("killing process %d: %w", p.PID, err)
	}
	return nil
}

// waitGone returns nil when the process has ended, and an error after the limit. The process need not be a child: a
// pidfd becomes readable when its process ends.
func (p processID) waitGone(limit time.Duration) error {
	fd, ok, err := p.open()
	if err != nil {
		return fmt.Errorf("waiting for the end of process %d: %w", p.PID, err)
	}
	if !ok {
		return nil
	}
	defer unix.Close(fd)
	for deadline := time.Now().Add(limit); ; {
		events := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		n, err := unix.Poll(events, int(max(0, time.Until(deadline)).Milliseconds()))
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return fmt.Errorf("waiting for the end of process %d: %w", p.PID, err)
		case n > 0:
			return nil
		case !time.Now().Before(deadline):
			return fmt.Errorf("process %d has not ended after %s", p.PID, limit)
		}
	}
}

// process is a child of the supervisor, or of the program that started a Plane. done is closed once the process has
// ended. err is valid after that.
type process struct {
	processID
	name string
	log  string
	done chan struct{}
	err  error
}

// spawner starts all children on one thread that lives as long as the program: the kernel sends the parent-death signal
// when the thread that started the child ends, even if the program continues.
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

// start runs cmd with its output in the file log. The kernel kills the child when this program ends for any reason.
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
	// Before Wait the child still has its entry in /proc, with its start time, even if it has ended (a zombie).
	p.processID, err = identify(cmd.Process.Pid)
	go func() {
		p.err = cmd.Wait()
		close(p.done)
	}()
	if err != nil {
		return nil, fmt.Errorf("%s was started as process %d, but its start time cannot be read: %w", name, cmd.Process.Pid, err)
	}
	return p, nil
}

// stop sends SIGKILL to the process and waits up to 10 s for its end. SIGKILL is safe, because no process of the
// cluster has data to save.
func (p *process) stop() error {
	if p == nil {
		return nil
	}
	if err := p.kill(); err != nil {
		return err
	}
	select {
	case <-p.done:
		return nil
	case <-time.After(10 * time.Second):
		return fmt.Errorf("%s (process %d) did not end within 10 s of SIGKILL", p.name, p.PID)
	}
}

// ended returns nil while the process runs. After the end of the process it returns an error that contains the last
// lines of the process's log.
func (p *process) ended() error {
	select {
	case <-p.done:
		return fmt.Errorf("%s has ended (process %d, exit error: %v)%s", p.name, p.PID, p.err, logTail(p.log))
	default:
		return nil
	}
}

// startLimit is how long one process may take to become ready. It is long, because a busy host is slow. It does not
// delay the error of a process that ends: waitFor returns that error at once.
const startLimit = 3 * time.Minute

// errTooLate is the cancellation cause of the context in waitFor when the limit is over.
var errTooLate = errors.New("the limit is over")

// waitFor calls wait, which returns when an event has happened. Errors name the event by the parameter what. After the
// limit, waitFor cancels the context of wait, and its error contains the last lines of the logs of all processes in the
// parameter on. If one of these processes ends first, waitFor cancels the context at once, and its error contains the
// last lines of the log of the ended process.
func waitFor(ctx context.Context, what string, limit time.Duration, on []*process, wait func(context.Context) error) error {
	ctx, end := context.WithCancelCause(ctx)
	defer end(nil)
	for _, p := range on {
		go func() {
			select {
			case <-p.done:
				end(p.ended())
			case <-ctx.Done():
			}
		}()
	}
	limited, cancel := context.WithTimeoutCause(ctx, limit, errTooLate)
	defer cancel()
	err := wait(limited)
	if err == nil {
		return nil
	}
	switch cause := context.Cause(limited); {
	case cause == nil:
		return fmt.Errorf("waiting for %s: %w", what, err)
	case !errors.Is(cause, errTooLate):
		return fmt.Errorf("waiting for %s: %w", what, cause)
	}
	tails := ""
	for _, p := range on {
		tails += logTail(p.log)
	}
	return fmt.Errorf("waiting for %s: not ready after %s: %w%s", what, limit, err, tails)
}

// polled returns a function for waitFor that repeats a check every 50 ms until the check returns nil. It is for
// conditions that report no event. When the context ends, the function returns the last error of the check.
func polled(check func(context.Context) error) func(context.Context) error {
	return func(ctx context.Context) error {
		ticker := time.NewTicker(50 * time.Millisecond)
		defer ticker.Stop()
		var last error
		for {
			err := check(ctx)
			if err == nil {
				return nil
			}
			if last == nil || ctx.Err() == nil {
				last = err // the error of a check that was cut off says nothing
			}
			select {
			case <-ctx.Done():
				return last
			case <-ticker.C:
			}
		}
	}
}

// inNetns returns a command that runs in a network namespace of the cluster.
func inNetns(ctx context.Context, name, program string, args ...string) (*exec.Cmd, error) {
	return inNetnsAt(ctx, netnsPath(name), program, args...)
}

func inNetnsAt(ctx context.Context, path, program string, args ...string) (*exec.Cmd, error) {
	if err := refuseHostNetns(path); err != nil {
		return nil, err
	}
	return exec.CommandContext(ctx, "nsenter", append([]string{"--net=" + path, "--", program}, args...)...), nil
}
