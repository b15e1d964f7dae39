package cluster

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// instance distinguishes clusters that run side by side on one host. They have the same addresses, each in its own
// network namespaces, but different names and folders. The supervisor and bin/cluster inherit PODIDENTITY_CLUSTER.
var instance = os.Getenv("PODIDENTITY_CLUSTER")

var (
	// namePrefix begins the names of the cluster's network namespaces and cgroups, and of the links in podid-cp.
	// cleanUp finds leftovers by this prefix, so it removes nothing of another program.
	namePrefix = "podid" + instance + "-"

	// runDir contains all state of the running cluster, and is its lock (see lockRun). It is not in /run, which is
	// often a small tmpfs: the nodes' images are stored here. The path is short, because a socket path has at most 107
	// bytes.
	runDir = "/var/lib/podidentity-e2e" + instance
)

const (
	// netnsDir is the folder of iproute2, so that `ip netns exec podid-node1 …` works too.
	netnsDir = "/run/netns"

	rootModule = "github.com/podidentity/podidentity"
)

var (
	pkiDir        = filepath.Join(runDir, "pki")
	stateFile     = filepath.Join(runDir, "state.json")
	controlSocket = filepath.Join(runDir, "control.sock")
	azureSocket   = filepath.Join(runDir, "azure.sock")
	azureDir      = filepath.Join(runDir, "azure")
	azureConfig   = filepath.Join(runDir, "azure.json")
	defaultLogDir = filepath.Join(runDir, "logs")
	adminConfig   = filepath.Join(pkiDir, "admin.kubeconfig")
)

// checkInstance returns an error unless instance is empty or a number from 1 to 999 without leading zeros: it is part
// of paths and of the names of links, which have at most 15 bytes.
func checkInstance(instance string) error {
	if len(instance) > 3 || strings.Trim(instance, "0123456789") != "" || strings.HasPrefix(instance, "0") {
		return fmt.Errorf("PODIDENTITY_CLUSTER is %q: it must be empty or a number from 1 to 999 without leading zeros", instance)
	}
	return nil
}

// upCommand returns the command that starts a cluster, for messages. Without PODIDENTITY_CLUSTER the command would
// start another cluster.
func upCommand(instance string) string {
	if instance == "" {
		return "bin/cluster up"
	}
	return "PODIDENTITY_CLUSTER=" + instance + " bin/cluster up"
}

// downCommand is the command that removes the cluster, for messages.
var downCommand = "PODIDENTITY_CLUSTER=" + instance + " bin/cluster down"

// adminEnv is the environment with which kubectl and helm use this cluster only. They neither read nor change the
// caches and settings of the user.
func adminEnv() []string {
	return []string{
		"KUBECONFIG=" + adminConfig,
		"KUBECACHEDIR=" + filepath.Join(runDir, "kube-cache"),
		"KUBERC=off",
		"HELM_CACHE_HOME=" + filepath.Join(runDir, "helm"),
		"HELM_CONFIG_HOME=" + filepath.Join(runDir, "helm"),
		"HELM_DATA_HOME=" + filepath.Join(runDir, "helm"),
	}
}

// cacheDir creates and returns the folder for what is built or downloaded. The names of its contents identify their
// version, except for the project's own programs, which are built again before each use. The folder may be deleted
// while no cluster runs.
func cacheDir() (string, error) {
	base, err := os.UserCacheDir()
	if err != nil {
		return "", fmt.Errorf("finding the cache folder: %w", err)
	}
	dir := filepath.Join(base, "podidentity")
	return dir, os.MkdirAll(dir, 0o755)
}

// RepoDir is the root of the checkout: the first folder with the product's go.mod, upwards from the working directory,
// then upwards from the program's own folder (bin/cluster).
func RepoDir() (string, error) {
	var starts []string
	if wd, err := os.Getwd(); err == nil {
		starts = append(starts, wd)
	}
	if exe, err := os.Executable(); err == nil {
		starts = append(starts, filepath.Dir(exe))
	}
	for _, start := range starts {
		for dir := start; ; dir = filepath.Dir(dir) {
			mod, err := os.ReadFile(filepath.Join(dir, "go.mod"))
			if err == nil && strings.HasPrefix(string(mod), "module "+rootModule+"\n") {
				return dir, nil
			}
			if dir == filepath.Dir(dir) {
				break
			}
		}
	}
	return "", errors.New("no checkout of Pod Identity found: no go.mod of module " + rootModule + " in " + strings.Join(starts, " or ") + " or a folder above; start this program in the checkout")
}

func e2eDir() (string, error) {
	repo, err := RepoDir()
	return filepath.Join(repo, "e2e"), err
}
