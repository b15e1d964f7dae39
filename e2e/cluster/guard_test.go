package cluster

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"
)

func TestHostNetworkNamespaceIsNeverEntered(t *testing.T) {
	// Entering namespaces must not move the program's first thread, to which /proc/self refers.
	for range 200 {
		if err := insideNewNetns(func() error { return nil }); err != nil {
			t.Fatal(err)
		}
	}
	if inode := netnsInode("/proc/self/ns/net"); inode != ownNetns {
		t.Fatalf("the program's first thread is in namespace %d; it was started in %d", inode, ownNetns)
	}
	entered := false
	err := insideNetns("/proc/self/ns/net", func() error { entered = true; return nil })
	if !errors.Is(err, ErrHostNetns) || entered {
		t.Errorf("entering the host's namespace: error %v, entered %v, want ErrHostNetns and false", err, entered)
	}
	if err := refuseHostNetns("/proc/self/ns/mnt"); err == nil {
		t.Error("a mount namespace is accepted as a network namespace")
	}
	file := filepath.Join(t.TempDir(), "plain")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := refuseHostNetns(file); err == nil {
		t.Error("a regular file is accepted as a network namespace")
	}
	if err := refuseHostNetns(file + "-absent"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("refuseHostNetns of a file that does not exist: error %v, want os.ErrNotExist", err)
	}
}

func TestProcessWithReusedPIDIsNotKilled(t *testing.T) {
	cmd := exec.Command("sleep", "60")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = cmd.Process.Kill(); _ = cmd.Wait() }()
	now, err := identify(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	before := processID{PID: now.PID, Start: now.Start - 1} // an earlier process with this PID
	if err := before.kill(); err != nil {
		t.Fatal(err)
	}
	if before.alive() || !now.alive() {
		t.Fatalf("the earlier process is alive: %v, want false; the current process is alive: %v, want true", before.alive(), now.alive())
	}
	if err := now.kill(); err != nil {
		t.Fatal(err)
	}
	if err := now.waitGone(5 * time.Second); err != nil {
		t.Error(err)
	}
}

func TestDialFromAcceptsOnlyIPAddresses(t *testing.T) {
	if _, err := DialFrom(netnsPath("absent"), nil)(t.Context(), "tcp", "localhost:80"); err == nil {
		t.Error("a host name was accepted: it would be resolved outside of the namespace")
	}
	if _, err := DialFrom(netnsPath("absent"), nil)(t.Context(), "tcp", "10.10.0.1:80"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("dialing in a namespace that does not exist: error %v, want os.ErrNotExist", err)
	}
}
