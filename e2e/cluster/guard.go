package cluster

import (
	"errors"
	"fmt"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// initialNetnsInode is the inode number of the host's first network namespace. The number is fixed since Linux 6.17;
// older kernels assign a number at boot.
const initialNetnsInode = 0xEFFFFFF9

// ownNetns is the inode number of the network namespace that the program was started in. This namespace is the host's
// if a user starts the program on the host.
var ownNetns = netnsInode("/proc/self/ns/net")

// ErrHostNetns is returned instead of entering the host's own network namespace.
var ErrHostNetns = errors.New("this is the host's own network namespace, which the cluster must not use")

func netnsInode(path string) uint64 {
	var st unix.Stat_t
	if unix.Stat(path, &st) != nil {
		return 0
	}
	return st.Ino
}

// refuseHostNetns returns an error if path is the host's own network namespace, or if it is not a network namespace. It
// compares the inode number of path with three numbers, because none of them is always that of the host's namespace:
// initialNetnsInode is that number only since Linux 6.17, ownNetns only in a program that was started on the host, and
// the number of /proc/1/ns/net only if this file can be read and PID 1 is the host's.
func refuseHostNetns(path string) error {
	inode := netnsInode(path)
	if inode == 0 {
		return fmt.Errorf("network namespace %s: %w", path, os.ErrNotExist)
	}
	if inode == initialNetnsInode || inode == ownNetns || inode == netnsInode("/proc/1/ns/net") {
		return fmt.Errorf("entering network namespace %s: %w", path, ErrHostNetns)
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

// onThrowawayThread runs f on a thread that never returns to the Go runtime: the thread ends with the goroutine, so no
// other goroutine can run in the namespace that f entered.
//
// onThrowawayThread does not run f on the program's first thread, because that thread cannot end: it would stay in the
// namespace that f entered, and /proc/self would show that namespace.
func onThrowawayThread(f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() == os.Getpid() {
			done <- onThrowawayThread(f) // on another thread, because this one is locked to this goroutine
			runtime.UnlockOSThread()
			return
		}
		done <- f()
	}()
	return <-done
}

// insideNetns runs f inside the network namespace at path.
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
	if err := refuseHostNetns(path); err != nil {
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

// RequireRoot returns an error unless the user is root, PODIDENTITY_CLUSTER is valid and the program can create a
// network namespace.
func RequireRoot() error {
	if os.Geteuid() != 0 {
		return fmt.Errorf("the cluster needs root, to make namespaces and cgroups: run this program as root instead of user %d", os.Geteuid())
	}
	if err := checkInstance(instance); err != nil {
		return err
	}
	return insideNewNetns(func() error { return nil })
}
