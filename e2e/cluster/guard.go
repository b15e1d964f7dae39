package cluster

import (
	"errors"
	"fmt"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// initialNetnsInode is the inode number of the first network namespace of a machine: fixed since Linux 6.17, handed
// out at boot before. It decides where /proc/1/ns/net may not be read.
const initialNetnsInode = 0xEFFFFFF9

// ownNetns is the namespace the program was started in. For a program run by hand that is the machine's own.
var ownNetns = netnsInode("/proc/self/ns/net")

// ErrMachineNetns is returned instead of entering the machine's own network namespace.
var ErrMachineNetns = errors.New("this is the machine's own network namespace")

func netnsInode(path string) uint64 {
	var st unix.Stat_t
	if unix.Stat(path, &st) != nil {
		return 0
	}
	return st.Ino
}

// refuseMachineNetns returns an error unless path names a network namespace that is certainly not the machine's own.
// Three marks are compared, because none of them is there on every machine.
func refuseMachineNetns(path string) error {
	inode := netnsInode(path)
	if inode == 0 {
		return fmt.Errorf("network namespace %s: %w", path, os.ErrNotExist)
	}
	if inode == initialNetnsInode || inode == ownNetns || inode == netnsInode("/proc/1/ns/net") {
		return fmt.Errorf("entering network namespace %s: %w", path, ErrMachineNetns)
	}
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("opening network namespace %s: %w", path, err)
	}
	defer unix.Close(fd)
	if kind, err := unix.IoctlRetInt(fd, unix.NS_GET_NSTYPE); err != nil || kind != unix.CLONE_NEWNET {
		return fmt.Errorf("%s is not a network namespace", path)
	}
	return nil
}

// onThrowawayThread runs f on a thread that is never given back to the Go runtime: it ends with the goroutine, so that
// no other goroutine can find itself in the namespace that f entered.
//
// The program's first thread cannot end. Left in another namespace it would stay there, and /proc/self with it.
func onThrowawayThread(f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() == os.Getpid() {
			done <- onThrowawayThread(f) // not here: this thread is taken until that is done
			runtime.UnlockOSThread()
			return
		}
		done <- f()
	}()
	return <-done
}

// insideNetns runs f inside the namespace.
func insideNetns(path string, f func() error) error {
	return onThrowawayThread(func() error {
		if err := enterNetns(path); err != nil {
			return err
		}
		return f()
	})
}

// enterNetns moves the calling thread, which must be locked to its goroutine, into the namespace.
func enterNetns(path string) error {
	if err := refuseMachineNetns(path); err != nil {
		return err
	}
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("opening network namespace %s: %w", path, err)
	}
	defer unix.Close(fd)
	if err := unix.Setns(fd, unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("entering network namespace %s: %w", path, err)
	}
	return nil
}

// RequireRoot says in one sentence what is missing when the program lacks the rights to make namespaces.
func RequireRoot() error {
	if os.Geteuid() != 0 {
		return fmt.Errorf("the cluster needs root (network, mount and PID namespaces, cgroups); this is user %d", os.Geteuid())
	}
	if err := checkInstance(); err != nil {
		return err
	}
	return insideNewNetns(func() error { return nil })
}
