package cluster

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
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

// InstallChart installs the product's chart, or upgrades it, with the NMI image of this checkout, and waits until it is
// ready. NMI trusts the fake Entra ID if the cluster has a fake Azure. By default, NMI may read all Secrets and request
// tokens of all ServiceAccounts; args, further arguments of `helm upgrade`, may change that.
func (c *Cluster) InstallChart(ctx context.Context, args ...string) error {
	image, err := BuildNMIImage(ctx, c.progress)
	if err != nil {
		return err
	}
	return c.InstallChartWith(ctx, image, args...)
}

// InstallChartWith is InstallChart with a given NMI image.
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

// The names of files that virtual machines of AKS have in /etc/kubernetes. In this cluster the files are in kubeletDir,
// which a node keeps when it restarts.
const (
	cloudConfigFile = "azure.json"
	customCloudFile = "akscustom.json"
	kubeletDir      = "/var/lib/kubelet" // as the node sees it
)

// InstallStandard installs the chart, or upgrades it, in standard mode, with the images of this checkout, and waits
// until it is ready. MIC requests tokens of the system-assigned identity of its node from IMDS. MIC's pods do not have
// hostNetwork, so these requests go to NMI. MIC reads the address of the fake ARM from the configuration file of a
// custom cloud, because MIC's pods cannot resolve ARM's host name: the cluster has no DNS server. args are further
// arguments of `helm upgrade`.
func (c *Cluster) InstallStandard(ctx context.Context, args ...string) error {
	image, err := BuildMICImage(ctx)
	if err != nil {
		return err
	}
	if err := errors.Join(c.ImportImages(ctx, image), c.writeCloudFiles()); err != nil {
		return err
	}
	return c.InstallChart(ctx, append([]string{"--set", "operationMode=standard",
		"--set-string", "mic.image=" + path.Base(image.Name), "--set-string", "mic.tag=" + image.Tag,
		"--set", "mic.cloudConfig=" + path.Join(kubeletDir, cloudConfigFile),
		"--set", "mic.customCloud.enabled=true", "--set", "mic.customCloud.configPath=" + path.Join(kubeletDir, customCloudFile),
		"--set-file", "mic.caBundle=" + c.EntraCA()}, args...)...)
}

// writeCloudFiles writes the configuration files of the custom cloud into each node. As on AKS, only root can read
// these files.
func (c *Cluster) writeCloudFiles() error {
	arm := "https://" + azureIP + "/"
	for file, content := range map[string]any{
		cloudConfigFile: map[string]any{
			"cloud": "AzureStackCloud", "tenantId": TenantID, "subscriptionId": SubscriptionID, "resourceGroup": ResourceGroup,
			"vmType": "vmss", "aadClientId": "msi", "aadClientSecret": "msi", "useManagedIdentityExtension": true,
		},
		customCloudFile: map[string]any{
			"name": "AzureStackCloud", "resourceManagerEndpoint": arm, "tokenAudience": "https://management.azure.com/",
			"activeDirectoryEndpoint": "https://" + entraHosts[0] + "/",
		},
	} {
		text, err := json.MarshalIndent(content, "", "    ")
		if err != nil {
			return err
		}
		for _, n := range nodeSpecs {
			at := filepath.Join(runDir, n.Name, "kubelet", file)
			if have, err := os.ReadFile(at); err == nil && bytes.Equal(have, text) {
				continue // unchanged; during a second write a running MIC could read half of the file
			}
			if err := os.WriteFile(at, text, 0o600); err != nil {
				return fmt.Errorf("writing %s of node %s: %w", file, n.Name, err)
			}
		}
	}
	return nil
}

// podProblems returns the state, events and logs of the chart's pods: helm reports only that a wait timed out.
func (c *Cluster) podProblems(ctx context.Context) string {
	pods, _ := c.Kubectl(ctx, "--namespace", ChartNamespace, "get", "pods", "--output", "wide")
	events, _ := c.Kubectl(ctx, "--namespace", ChartNamespace, "get", "events", "--field-selector", "type=Warning", "--sort-by", ".lastTimestamp")
	logs, _ := c.Kubectl(ctx, "--namespace", ChartNamespace, "logs", "--selector", "app.kubernetes.io/name=podidentity", "--tail", "10", "--prefix", "--all-containers")
	return pods + lastLines(events, 10) + "\n" + logs
}
