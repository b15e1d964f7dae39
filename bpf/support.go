package bpf

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// checkPins checks that dir, or if it does not exist the folder in which it is to be, is in bpffs.
func checkPins(dir string) error {
	for _, path := range []string{dir, filepath.Dir(dir)} {
		var stat unix.Statfs_t
		err := unix.Statfs(path, &stat)
		if errors.Is(err, unix.ENOENT) {
			continue
		}
		if err != nil {
			return fmt.Errorf("checking that %s is in bpffs: %w", path, err)
		}
		if stat.Type == unix.BPF_FS_MAGIC {
			return nil
		}
		return fmt.Errorf("%w: %s is not in bpffs, so programs there would end with NMI; mount bpffs on the node, for example with `mount -t bpf bpf /sys/fs/bpf`", ErrUnsupported, path)
	}
	return fmt.Errorf("%w: neither %s nor the folder above exists; mount bpffs on the node, for example with `mount -t bpf bpf /sys/fs/bpf`, and mount it into the container of NMI", ErrUnsupported, dir)
}

// hostNetns returns the cookie of the network namespace of the calling process. Kernels have it since 5.14.
func hostNetns() (uint64, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, fmt.Errorf("opening a socket: %w", err)
	}
	defer unix.Close(fd)
	cookie, err := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
	if errors.Is(err, unix.ENOPROTOOPT) {
		return 0, fmt.Errorf("%w: the kernel is older than 5.14; update the kernel, or give --capture=iptables", ErrUnsupported)
	}
	if err != nil {
		return 0, fmt.Errorf("reading the cookie of the network namespace: %w", err)
	}
	return cookie, nil
}

// checkPrograms checks that the kernel accepts the programs. It loads them, and removes them at once.
func checkPrograms() error {
	spec, err := loadPrograms()
	if err != nil {
		return err
	}
	collection, err := ebpf.NewCollection(spec)
	if err != nil {
		return explainLoad(err)
	}
	collection.Close()
	return nil
}

// explainLoad adds to an error of loading programs what to do.
func explainLoad(err error) error {
	var rejected *ebpf.VerifierError
	switch {
	case errors.Is(err, unix.EPERM), errors.Is(err, os.ErrPermission):
		return fmt.Errorf("%w: the kernel does not allow NMI to load its programs; add BPF and NET_ADMIN to securityContext.capabilities.add of the container, and check that its seccomp profile allows the system call bpf: %w", ErrUnsupported, err)
	case errors.As(err, &rejected):
		return fmt.Errorf("%w: the verifier of this kernel rejects a program of NMI; use --capture=iptables and report this: %w", ErrUnsupported, err)
	case errors.Is(err, ebpf.ErrNotSupported), errors.Is(err, unix.EINVAL):
		return fmt.Errorf("%w: the kernel lacks a feature that the programs of NMI need; update the kernel, or give --capture=iptables: %w", ErrUnsupported, err)
	}
	return fmt.Errorf("loading the programs of NMI: %w", err)
}
