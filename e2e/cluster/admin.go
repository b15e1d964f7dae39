package cluster

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strings"
)

// Admin runs kubectl and helm as administrator of the cluster.
type Admin struct{ bin Binaries }

// Kubeconfig is the path of the admin's kubeconfig. The API server's address in it can be reached only from inside the
// cluster's namespaces.
func (a Admin) Kubeconfig() string { return adminConfig }

// DialContext connects from inside the control plane's namespace. As rest.Config.Dial it lets a client-go client in the
// test process reach the API server.
func (a Admin) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	return DialFrom(netnsPath(ControlPlaneNetns), nil)(ctx, network, address)
}

// KubectlCommand returns a command that runs kubectl as admin.
func (a Admin) KubectlCommand(ctx context.Context, args ...string) (*exec.Cmd, error) {
	return a.command(ctx, a.bin.kube("kubectl"), args...)
}

// HelmCommand returns a command that runs helm as admin.
func (a Admin) HelmCommand(ctx context.Context, args ...string) (*exec.Cmd, error) {
	return a.command(ctx, a.bin.Helm(), args...)
}

func (a Admin) command(ctx context.Context, program string, args ...string) (*exec.Cmd, error) {
	cmd, err := inNetns(ctx, ControlPlaneNetns, program, args...)
	if err != nil {
		return nil, err
	}
	cmd.Env = append(os.Environ(), adminEnv()...)
	return cmd, nil
}

// Kubectl runs kubectl as admin and returns what it printed.
func (a Admin) Kubectl(ctx context.Context, args ...string) (string, error) {
	return a.kubectl(ctx, nil, args...)
}

// Apply creates or updates the objects of a YAML text.
func (a Admin) Apply(ctx context.Context, yaml string) error {
	_, err := a.kubectl(ctx, strings.NewReader(yaml), "apply", "-f", "-")
	return err
}

func (a Admin) kubectl(ctx context.Context, stdin io.Reader, args ...string) (string, error) {
	cmd, err := a.KubectlCommand(ctx, args...)
	if err != nil {
		return "", err
	}
	var stdout, stderr bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = stdin, &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return stdout.String(), fmt.Errorf("kubectl %s: %w%s", strings.Join(args, " "), err, indented(lastLines(stderr.String(), 12)))
	}
	return stdout.String(), nil
}

// ExecKubectl replaces this program by kubectl as admin. It returns only with an error.
func (a Admin) ExecKubectl(args []string) error { return execAdmin(a.bin.kube("kubectl"), args) }

// ExecHelm replaces this program by helm as admin. It returns only with an error.
func (a Admin) ExecHelm(args []string) error { return execAdmin(a.bin.Helm(), args) }

func execAdmin(program string, args []string) error {
	for _, entry := range adminEnv() {
		key, value, _ := strings.Cut(entry, "=")
		if err := os.Setenv(key, value); err != nil {
			return err
		}
	}
	return execInside(netnsPath(ControlPlaneNetns), program, args)
}
