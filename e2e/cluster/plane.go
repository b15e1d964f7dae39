package cluster

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"

	"github.com/vishvananda/netlink"
)

// Plane is a control plane without nodes and controllers: etcd and an API server. It can run beside a cluster: its
// network namespace has no name and only the loopback interface, and its files are in a folder of the caller. It ends
// with the program that started it.
type Plane struct {
	cp    *controlPlane
	netns *os.File
}

// StartPlane starts a Plane and returns when the API server is ready. dir is a folder of the caller for certificates,
// data and logs.
func StartPlane(ctx context.Context, dir string, progress func(string)) (*Plane, error) {
	if err := RequireRoot(); err != nil {
		return nil, err
	}
	bin, err := EnsureBinaries(ctx, progress)
	if err != nil {
		return nil, err
	}
	netns, err := loopbackNetns()
	if err != nil {
		return nil, err
	}
	p := &Plane{netns: netns, cp: &controlPlane{
		bin: bin, netns: fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), netns.Fd()), dir: dir, pki: filepath.Join(dir, "pki"), logDir: dir,
		spawn: newSpawner(), onStart: func(string, *process) error { return nil }, // the processes end with this program: no record of them is needed
	}}
	if err := p.start(ctx); err != nil {
		return nil, errors.Join(err, p.Stop())
	}
	return p, nil
}

func (p *Plane) start(ctx context.Context) error {
	c := p.cp
	if err := writePKI(c.pki); err != nil {
		return err
	}
	var err error
	if c.api, err = newAPIClient(c.pki, c.netns); err != nil {
		return err
	}
	if err := c.startEtcd(ctx); err != nil {
		return err
	}
	return c.startAPIServer(ctx)
}

// loopbackNetns creates a network namespace whose loopback interface has the address of the control plane.
func loopbackNetns() (file *os.File, err error) {
	err = insideNewNetns(func() error {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		address := &netlink.Addr{IPNet: &net.IPNet{IP: net.ParseIP(controlPlaneIP), Mask: net.CIDRMask(32, 32)}}
		if err := errors.Join(netlink.LinkSetUp(lo), netlink.AddrAdd(lo, address)); err != nil {
			return fmt.Errorf("configuring lo with the address %s in a new network namespace: %w", controlPlaneIP, err)
		}
		file, err = os.Open("/proc/thread-self/ns/net")
		return err
	})
	return file, err
}

// Stop ends the processes. The data of etcd is in memory and is lost.
func (p *Plane) Stop() error {
	return errors.Join(p.cp.stop(), p.netns.Close())
}

// Kubeconfig is the path of the admin's kubeconfig. The API server's address in it can be reached only from inside the
// plane's network namespace.
func (p *Plane) Kubeconfig() string { return filepath.Join(p.cp.pki, "admin.kubeconfig") }

// DialContext connects from inside the plane's network namespace; see [Admin.DialContext].
func (p *Plane) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	return DialFrom(p.cp.netns, nil)(ctx, network, address)
}

// Command returns a command that runs a program of the host inside the plane's network namespace.
func (p *Plane) Command(ctx context.Context, program string, args ...string) (*exec.Cmd, error) {
	return inNetnsAt(ctx, p.cp.netns, program, args...)
}

// Kubectl runs kubectl as admin and returns what it printed.
func (p *Plane) Kubectl(ctx context.Context, args ...string) (string, error) {
	cmd, err := p.Command(ctx, p.cp.bin.kube("kubectl"), args...)
	if err != nil {
		return "", err
	}
	cmd.Env = append(os.Environ(), "KUBECONFIG="+p.Kubeconfig(), "KUBECACHEDIR="+filepath.Join(p.cp.dir, "kube-cache"), "KUBERC=off")
	return run(cmd)
}
