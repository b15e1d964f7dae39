package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// children are processes that end with this program, even if it is killed.
type children []*child

type child struct {
	*exec.Cmd
	ended chan struct{} // closed once the process has ended
	err   error         // valid after ended is closed
}

// start starts a process. The kernel kills the process when the thread that called start ends. So start locks the
// calling goroutine to its thread, which then ends only with that goroutine.
func (c *children) start(cmd *exec.Cmd) (*child, error) {
	runtime.LockOSThread()
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	one := &child{Cmd: cmd, ended: make(chan struct{})}
	go func() {
		one.err = cmd.Wait()
		close(one.ended)
	}()
	*c = append(*c, one)
	return one, nil
}

func (c children) stop() {
	for _, one := range c {
		one.stop()
	}
}

// stop ends the process: by SIGTERM or, if it has not ended after 20 s, by SIGKILL.
func (c *child) stop() {
	_ = c.Process.Signal(syscall.SIGTERM)
	select {
	case <-c.ended:
	case <-time.After(20 * time.Second):
		_ = c.Process.Kill()
		<-c.ended
	}
}

// alive returns an error if the process has ended.
func (c *child) alive() error {
	select {
	case <-c.ended:
		return fmt.Errorf("%s ended by itself: %w", strings.Join(c.Args, " "), cmp.Or(c.err, errors.New("exit status 0")))
	default:
		return nil
	}
}

// buildProgram builds one of the product's programs into a folder.
func buildProgram(ctx context.Context, name, dir string) (string, error) {
	binary := filepath.Join(dir, name)
	build := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags", "-s -w", "-o", binary, "./cmd/"+name)
	build.Dir, build.Env = repo(), append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return "", fmt.Errorf("building %s: %w\n%s", name, err, out)
	}
	return binary, nil
}

// memory returns the resident memory of the process now and at its peak, in bytes.
func (c *child) memory() (now, peak float64, err error) {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", c.Process.Pid))
	if err != nil {
		return 0, 0, err
	}
	return parseMemory(string(status))
}

func parseMemory(status string) (now, peak float64, err error) {
	for line := range strings.Lines(status) {
		var kib float64
		if n, _ := fmt.Sscanf(line, "VmRSS: %f kB", &kib); n == 1 {
			now = kib * 1024
		}
		if n, _ := fmt.Sscanf(line, "VmHWM: %f kB", &kib); n == 1 {
			peak = kib * 1024
		}
	}
	if now == 0 || peak == 0 {
		return 0, 0, fmt.Errorf("/proc/PID/status has no VmRSS or no VmHWM: %.100q", status)
	}
	return now, peak, nil
}

// cpu returns the processor time that the process has used.
func (c *child) cpu() (time.Duration, error) {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", c.Process.Pid))
	if err != nil {
		return 0, err
	}
	return parseCPU(stat)
}

// tick is the unit of processor times in /proc (USER_HZ), the same on all Linux architectures that Go supports.
const tick = time.Second / 100

// parseCPU returns the sum of fields 14 and 15, user and system time. It counts the fields from the last parenthesis,
// because the name of the program in field 2 may contain spaces and parentheses.
func parseCPU(stat []byte) (time.Duration, error) {
	fields := bytes.Fields(stat[bytes.LastIndexByte(stat, ')')+1:])
	if len(fields) < 13 {
		return 0, fmt.Errorf("/proc/PID/stat has too few fields: %.100q", stat)
	}
	var used time.Duration
	for _, field := range fields[11:13] {
		ticks, err := strconv.ParseInt(string(field), 10, 64)
		if err != nil {
			return 0, fmt.Errorf("parsing the processor time in /proc/PID/stat: %w", err)
		}
		used += time.Duration(ticks) * tick
	}
	return used, nil
}
