// Cluster runs Pod Identity on a real two-node Kubernetes on this host, for tests and for trying things out. It is the
// program that `make cluster-up` and `make cluster-down` run. It is also the supervisor, the first process of a node
// and the fake Azure in each cluster that the demo, the tests and the benchmarks start.
//
// This is the command line of package e2e/cluster. The comment of that package describes the supervisor, the nodes, and
// how the host is protected from the cluster.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	err := command().ExecuteContext(ctx)
	stop()
	if err == nil {
		return
	}
	fmt.Fprintln(os.Stderr, "error:", err)
	os.Exit(1)
}

func command() *cobra.Command {
	root := &cobra.Command{
		Use:   "cluster",
		Short: "Run Pod Identity on a real two-node Kubernetes on this host",
		Long: `Runs Pod Identity on a real two-node Kubernetes on this host, with a fake Azure
(the Instance Metadata Service, Entra ID and Resource Manager).

The cluster lives in network namespaces without a route out: podid-cp (control plane), podid-node1, podid-node2 and
podid-azure. Needs root. What is missing on the host is built or downloaded once; Kubernetes takes about ten minutes
the first time.

Clusters can run beside each other: with PODIDENTITY_CLUSTER=N in the environment (1 to 999), each command concerns
cluster N, whose network namespaces are podidN-cp, podidN-node1, podidN-node2 and podidN-azure.`,
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	root.CompletionOptions.HiddenDefaultCmd = true
	root.AddCommand(upCommand(), downCommand(), kubectlCommand(), helmCommand(), inPodCommand(), inNodeCommand(), azureCommand(),
		superviseCommand(), nodeInitCommand())
	return root
}
