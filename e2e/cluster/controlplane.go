package cluster

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"time"
)

// controlPlane is etcd, the API server, the controller-manager and the scheduler in their namespace.
type controlPlane struct {
	bin    Binaries
	netns  string // path of the network namespace
	dir    string // folder for data
	pki    string // folder of the keys and certificates
	logDir string
	spawn  spawner
	api    *apiClient

	onStart func(name string, p *process) error

	etcd, apiserver, manager, scheduler *process
}

func (c *controlPlane) startProcess(ctx context.Context, name, program string, args ...string) (*process, error) {
	cmd, err := inNetnsAt(context.WithoutCancel(ctx), c.netns, program, args...)
	if err != nil {
		return nil, fmt.Errorf("starting %s: %w", name, err)
	}
	p, err := c.spawn.start(name, filepath.Join(c.logDir, name+".log"), cmd)
	if err != nil {
		return nil, err
	}
	return p, c.onStart(name, p)
}

// start starts the processes and returns when pods can be created: the API server is ready and the namespace default
// has its ServiceAccount. onAPI is called as soon as the API server is ready, so that the caller can start the
// kubelets.
func (c *controlPlane) start(ctx context.Context, onAPI func()) error {
	if err := c.startEtcd(ctx); err != nil {
		return err
	}
	if err := c.startAPIServer(ctx); err != nil {
		return err
	}
	onAPI()
	var err error
	c.manager, err = c.startProcess(ctx, "kube-controller-manager", c.bin.kube("kube-controller-manager"),
		"--kubeconfig="+filepath.Join(c.pki, "kcm.kubeconfig"),
		"--service-account-private-key-file="+filepath.Join(c.pki, "sa.key"),
		"--root-ca-file="+filepath.Join(c.pki, "ca.crt"),
		"--use-service-account-credentials=true",
		"--leader-elect=false",
		// With the default rate limit the controllers start only after four seconds.
		"--kube-api-qps=500", "--kube-api-burst=1000",
		// The controller-manager creates this folder. The default is below the host's /usr.
		"--flex-volume-plugin-dir="+filepath.Join(c.dir, "volume-plugins"),
		"--bind-address=127.0.0.1")
	if err != nil {
		return err
	}
	c.scheduler, err = c.startProcess(ctx, "kube-scheduler", c.bin.kube("kube-scheduler"),
		"--kubeconfig="+filepath.Join(c.pki, "scheduler.kubeconfig"),
		"--leader-elect=false",
		"--bind-address=127.0.0.1")
	if err != nil {
		return err
	}
	return waitFor(ctx, "the ServiceAccount of the namespace default", startLimit, []*process{c.manager, c.apiserver}, c.api.awaitServiceAccount)
}

// startEtcd starts etcd and returns when etcd is healthy. The data of etcd is in memory, in a tmpfs: to sync each write
// to a disk would take most of the start time, and the data is discarded anyway. The tmpfs is in etcd's own mount
// namespace, so it disappears when etcd ends.
func (c *controlPlane) startEtcd(ctx context.Context) error {
	dir := filepath.Join(c.dir, "etcd")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	const client, peer = "http://127.0.0.1:2379", "http://127.0.0.1:2380"
	var err error
	c.etcd, err = c.startProcess(ctx, "etcd",
		"unshare", "--mount", "--propagation=private", "--",
		"sh", "-c", `mount -t tmpfs -o mode=0700 podid-etcd "$1" && shift && exec "$@"`, "sh", dir,
		c.bin.debian("etcd"), "--name=default", "--data-dir="+filepath.Join(dir, "data"), "--log-level=warn", "--logger=zap",
		"--listen-client-urls="+client, "--advertise-client-urls="+client,
		"--listen-peer-urls="+peer, "--initial-advertise-peer-urls="+peer, "--initial-cluster=default="+peer)
	if err != nil {
		return err
	}
	probe := &http.Client{Timeout: 2 * time.Second, Transport: &http.Transport{DialContext: DialFrom(c.netns, nil), DisableKeepAlives: true}}
	return waitFor(ctx, "etcd", startLimit, []*process{c.etcd}, polled(func(ctx context.Context) error {
		return checkHealth(ctx, probe, client+"/health")
	}))
}

func (c *controlPlane) startAPIServer(ctx context.Context) error {
	in := func(file string) string { return filepath.Join(c.pki, file) }
	var err error
	c.apiserver, err = c.startProcess(ctx, "kube-apiserver", c.bin.kube("kube-apiserver"),
		"--etcd-servers=http://127.0.0.1:2379",
		"--bind-address=0.0.0.0", "--secure-port="+apiPort, "--advertise-address="+controlPlaneIP,
		"--tls-cert-file="+in("apiserver.crt"), "--tls-private-key-file="+in("apiserver.key"),
		"--client-ca-file="+in("ca.crt"),
		"--kubelet-client-certificate="+in("kubelet-client.crt"), "--kubelet-client-key="+in("kubelet-client.key"),
		"--kubelet-certificate-authority="+in("ca.crt"), "--kubelet-preferred-address-types=InternalIP",
		"--service-account-issuer=https://kubernetes.default.svc.cluster.local",
		"--service-account-key-file="+in("sa.pub"), "--service-account-signing-key-file="+in("sa.key"),
		"--service-cluster-ip-range="+serviceCIDR,
		"--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction",
		"--allow-privileged=true")
	if err != nil {
		return err
	}
	return waitFor(ctx, "the API server", startLimit, []*process{c.apiserver, c.etcd}, polled(c.api.checkReady))
}

func (c *controlPlane) stop() error {
	var errs []error
	for _, p := range []*process{c.scheduler, c.manager, c.apiserver, c.etcd} {
		errs = append(errs, p.stop())
	}
	return errors.Join(errs...)
}

// checkHealth returns nil if etcd reports that it is healthy.
func checkHealth(ctx context.Context, client *http.Client, url string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		body, _ := io.ReadAll(io.LimitReader(resp.Body, 300))
		return fmt.Errorf("GET %s: %s: %s", url, resp.Status, body)
	}
	return nil
}

// runCtr runs ctr, the client of containerd, with a node's socket and returns what it printed.
func runCtr(ctx context.Context, bin Binaries, node string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, bin.debian("ctr"), append([]string{"--address", containerdSocket(node), "--namespace", "k8s.io"}, args...)...)
	out, err := run(cmd)
	if err != nil {
		return out, fmt.Errorf("on %s: %w", node, err)
	}
	return out, nil
}
