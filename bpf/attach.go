package bpf

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// hook is a hook of the cgroup of all pods and the program that is attached there.
type hook struct {
	name    string // of the pinned eBPF link, and in the result of Sync
	program string
	attach  ebpf.AttachType
}

// hooks returns the hooks in the order of installation. The programs that record owners come before those that
// redirect: NMI closes a redirected connection without an owner. The drop is last, because it needs the marks of
// mark_host_socket.
func hooks() []hook {
	return []hook{
		{"sock_create", programsProgMarkHostSocket, ebpf.AttachCGroupInetSockCreate},
		{"getpeername4", programsProgShowDialed4, ebpf.AttachCgroupInet4GetPeername},
		{"getpeername6", programsProgShowDialed6, ebpf.AttachCgroupInet6GetPeername},
		{"sockops", programsProgRecordConnection, ebpf.AttachCGroupSockOps},
		{"connect4", programsProgCaptureConnect4, ebpf.AttachCGroupInet4Connect},
		{"connect6", programsProgCaptureConnect6, ebpf.AttachCGroupInet6Connect},
		{dropHook, programsProgDropMetadata, ebpf.AttachCGroupInetEgress},
	}
}

// dropHook is the name of the last hook.
const dropHook = "egress"

func linkPath(pins string, h hook) string { return filepath.Join(pins, linkPrefix+h.name) }

// attachment is the program at a hook.
type attachment struct {
	link    link.Link // nil if nothing is pinned
	cgroup  uint64    // 0 if the eBPF link is detached or its cgroup is deleted
	program ebpf.ProgramID
}

// readAttachment returns what is pinned for the hook. The caller closes its eBPF link.
func readAttachment(pins string, h hook) (attachment, error) {
	l, err := link.LoadPinnedLink(linkPath(pins, h), nil)
	if errors.Is(err, fs.ErrNotExist) {
		return attachment{}, nil
	}
	if err != nil {
		return attachment{}, fmt.Errorf("reading the link for %s: %w", h.name, err)
	}
	info, err := l.Info()
	if err != nil {
		return attachment{}, errors.Join(fmt.Errorf("reading the link for %s: %w", h.name, err), l.Close())
	}
	a := attachment{link: l, program: info.Program}
	if cgroup := info.Cgroup(); cgroup != nil {
		a.cgroup = cgroup.CgroupId
	}
	return a, nil
}

func (a attachment) close() {
	if a.link != nil {
		a.link.Close()
	}
}

// attach makes program the program of the hook at the cgroup root, whose ID is rootID. It replaces the program of an
// existing eBPF link at once. Programs that others attached to the hook stay.
func attach(pins, root string, rootID uint64, h hook, program *ebpf.Program) error {
	old, err := readAttachment(pins, h)
	if err != nil {
		return err
	}
	defer old.close()
	if old.cgroup == rootID {
		if err := old.link.Update(program); err != nil {
			return fmt.Errorf("replacing the program for %s: %w", h.name, err)
		}
		return nil
	}
	l, err := link.AttachCgroup(link.CgroupOptions{Path: root, Attach: h.attach, Program: program})
	if err != nil {
		if errors.Is(err, unix.EPERM) {
			err = fmt.Errorf("%w; check that the container of NMI has the capabilities BPF and NET_ADMIN, and with `bpftool cgroup tree` that no program at this cgroup or above it was attached without the flag multi: such a program excludes others", err)
		}
		return fmt.Errorf("attaching the program for %s to cgroup %s: %w", h.name, root, err)
	}
	defer l.Close() // the pin keeps the eBPF link in force
	path := linkPath(pins, h)
	if err := os.Remove(path + newSuffix); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("removing what an interrupted installation left of the link for %s: %w", h.name, err)
	}
	err = l.Pin(path + newSuffix)
	if err == nil {
		err = os.Rename(path+newSuffix, path)
	}
	if err != nil {
		return fmt.Errorf("pinning the link for %s: %w", h.name, err)
	}
	return nil
}

// newSuffix is the end of the name of a pin that is about to replace another.
const newSuffix = "_new"

// detach removes the program of the hook, also if another process holds the eBPF link open.
func detach(pins string, h hook) error {
	old, err := readAttachment(pins, h)
	if err != nil || old.link == nil {
		return err
	}
	defer old.close()
	if err := old.link.Detach(); err != nil {
		return fmt.Errorf("detaching the program for %s: %w", h.name, err)
	}
	if err := os.Remove(linkPath(pins, h)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("removing the link for %s: %w", h.name, err)
	}
	return nil
}
