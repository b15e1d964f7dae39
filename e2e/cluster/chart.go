package cluster

import (
	"context"
	"fmt"
	"os"
	"path"
	"path/filepath"
)

const (
	// ChartNamespace is where the chart is installed.
	ChartNamespace = "podidentity-system"
	chartRelease   = "podidentity"
)

// InstallChart installs the product's chart, or upgrades it, with the NMI image of this checkout, and waits until it
// is ready. NMI may read all Secrets and act for all ServiceAccounts, and trusts the stand-in for Entra ID. args are
// further arguments of `helm upgrade`.
func (c *Cluster) InstallChart(ctx context.Context, args ...string) error {
	image, err := BuildNMIImage(ctx, c.say)
	if err != nil {
		return err
	}
	return c.InstallChartWith(ctx, image, args...)
}

// InstallChartWith installs the chart with a given NMI image.
func (c *Cluster) InstallChartWith(ctx context.Context, image Image, args ...string) error {
	repo, err := RepoDir()
	if err != nil {
		return err
	}
	if err := c.ImportImages(ctx, image); err != nil {
		return err
	}
	all := append([]string{"upgrade", "--install", chartRelease, filepath.Join(repo, "deploy", "podidentity"),
		"--namespace", ChartNamespace, "--create-namespace", "--wait", "--timeout", "2m",
		"--set-string", "image.repository=" + path.Dir(image.Name), "--set-string", "image.imagePullPolicy=Never",
		"--set-string", "nmi.image=" + path.Base(image.Name), "--set-string", "nmi.tag=" + image.Tag,
		"--set", "nmi.secretNamespaces=all", "--set", "nmi.federatedNamespaces=all"}, args...)
	if _, err := os.Stat(c.EntraCA()); err == nil {
		all = append(all, "--set-file", "nmi.caBundle="+c.EntraCA())
	}
	cmd, err := c.HelmCommand(ctx, all...)
	if err != nil {
		return err
	}
	cmd.Dir = repo
	if _, err := run(cmd); err != nil {
		return fmt.Errorf("installing the chart: %w%s", err, indented(c.podProblems(ctx)))
	}
	return nil
}

// podProblems says what the chart's pods wait for; helm only says that it waited.
func (c *Cluster) podProblems(ctx context.Context) string {
	pods, _ := c.Kubectl(ctx, "--namespace", ChartNamespace, "get", "pods", "--output", "wide")
	events, _ := c.Kubectl(ctx, "--namespace", ChartNamespace, "get", "events", "--field-selector", "type=Warning", "--sort-by", ".lastTimestamp")
	logs, _ := c.Kubectl(ctx, "--namespace", ChartNamespace, "logs", "--selector", "app.kubernetes.io/name=podidentity", "--tail", "10", "--prefix", "--all-containers")
	return pods + lastLines(events, 10) + "\n" + logs
}
