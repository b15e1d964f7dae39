// Package netnstest runs tests in network namespaces of their own. It protects the computer: a test that changes rules,
// links or programs never runs in the computer's own network namespace.
package netnstest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Tests against a real kernel change rules and links, so they run in a child process with its own network namespace.
// parentNamespace is the environment variable with the inode of the parent's network namespace; it also marks the
// process as the child.
const parentNamespace = "PODIDENTITY_TEST_PARENT_NETNS"

// initialNamespace is the inode of the first network namespace since Linux 6.17.
const initialNamespace = 0xEFFFFFF9

// RunIsolated runs body in a child process with fresh network and mount namespaces. In the parent it starts the child
// and reports the child's result; in the child it runs body. If the computer does not allow namespaces, the test fails
// instead of being skipped: a test that did not run proves nothing.
func RunIsolated(t *testing.T, body func(t *testing.T)) {
	t.Helper()
	if os.Getenv(parentNamespace) != "" {
		if err := checkNamespace(); err != nil {
			t.Fatalf("refusing to run: %v", err)
		}
		body(t)
		return
	}
	own, err := namespaceInode("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	var pattern []string
	for part := range strings.SplitSeq(t.Name(), "/") {
		pattern = append(pattern, "^"+regexp.QuoteMeta(part)+"$")
	}
	timeout := "8m"
	if deadline, ok := t.Deadline(); ok { // that of go test -timeout; a quarter remains to report what the child prints
		timeout = (time.Until(deadline) * 3 / 4).String()
	}
	child := exec.CommandContext(t.Context(), "/proc/self/exe", "-test.run="+strings.Join(pattern, "/"), "-test.v", "-test.timeout="+timeout, "-test.count=1")
	child.Env = append(os.Environ(), fmt.Sprintf("%s=%d", parentNamespace, own))
	child.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	child.WaitDelay = 5 * time.Second // processes that the child started may have its output open
	runtime.LockOSThread()            // Pdeathsig is sent when the thread ends.
	defer runtime.UnlockOSThread()
	out, err := child.CombinedOutput()
	switch {
	case err != nil && len(out) == 0:
		t.Fatalf("this test cannot create the network namespaces that it needs (run as root with CAP_SYS_ADMIN and CAP_NET_ADMIN): %v", err)
	case err != nil:
		t.Fatalf("the test failed in its own network namespace: %v\n%s", err, out)
	case !bytes.Contains(out, []byte("--- PASS: "+t.Name()+" ")):
		t.Fatalf("the test did not run in its own network namespace:\n%s", out)
	default:
		t.Logf("%s", out)
	}
}

// checkNamespace checks, in three ways, that the process is not in the network namespace of the computer itself.
func checkNamespace() error {
	own, err := namespaceInode("/proc/self/ns/net")
	if err != nil {
		return err
	}
	if parent := os.Getenv(parentNamespace); parent == fmt.Sprint(own) {
		return fmt.Errorf("still in the network namespace of the parent (%s)", parent)
	}
	if own == initialNamespace {
		return errors.New("in the initial network namespace")
	}
	if first, err := namespaceInode("/proc/1/ns/net"); err == nil && first == own {
		return errors.New("in the network namespace of process 1")
	}
	return nil
}

func namespaceInode(path string) (uint64, error) {
	var stat unix.Stat_t
	if err := unix.Stat(path, &stat); err != nil {
		return 0, fmt.Errorf("looking at %s: %w", path, err)
	}
	return stat.Ino, nil
}

// OnThreadIn runs do on a thread in one of the other namespaces. Sockets opened there stay there.
func OnThreadIn(t *testing.T, name string, do func()) {
	t.Helper()
	failed := make(chan error)
	go func() {
		defer close(failed)
		runtime.LockOSThread() // Never unlocked: the thread ends with this goroutine.
		file, err := os.Open("/run/netns/" + name)
		if err != nil {
			failed <- err
			return
		}
		defer file.Close()
		if err := unix.Setns(int(file.Fd()), unix.CLONE_NEWNET); err != nil {
			failed <- fmt.Errorf("entering network namespace %s: %w", name, err)
			return
		}
		do()
	}()
	if err := <-failed; err != nil {
		t.Fatal(err)
	}
}

// Run runs a command in the namespace of the calling thread and returns what it prints.
func Run(t *testing.T, command string, args ...string) string {
	t.Helper()
	out, err := exec.CommandContext(context.Background(), command, args...).CombinedOutput() // t.Context() has ended when cleanup functions run
	if err != nil {
		// Not Fatal: this may be another goroutine than the test's.
		t.Errorf("%s %s: %v\n%s", command, strings.Join(args, " "), err, out)
	}
	return string(out)
}
