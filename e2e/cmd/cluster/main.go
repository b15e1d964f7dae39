// Cluster runs Pod Identity on a real two-node Kubernetes on this machine: for the demo, for tests, and for trying
// things out. It is the one program behind `make demo`, `make cluster-up` and `make cluster-down`.
//
// The work is in package e2e/cluster, which also says what is protected from what; this is its command line.
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
		Short: "Run Pod Identity on a real two-node Kubernetes on this machine",
		Long: `Runs Pod Identity on a real two-node Kubernetes on this machine, with a stand-in for Azure beside it
(the Instance Metadata Service, Entra ID and Resource Manager).

The cluster lives in network namespaces without a way out: podid-cp (control plane), podid-node1, podid-node2 and
podid-azure. Needs root. What is missing on the machine is built or fetched once; Kubernetes takes about ten minutes
the first time.`,
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	root.CompletionOptions.HiddenDefaultCmd = true
	root.AddCommand(upCommand(), downCommand(), kubectlCommand(), helmCommand(), inPodCommand(), inNodeCommand(), azureCommand(),
		superviseCommand(), nodeInitCommand())
	return root
}
