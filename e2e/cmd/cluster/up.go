package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/podidentity/podidentity/e2e/cluster"
)

const hints = `
The cluster runs until "bin/cluster down". Try:

  bin/cluster kubectl get nodes,pods -A -o wide
  bin/cluster in-node node1 -- iptables-save
  bin/cluster azure log

To request a token, follow docs/try-it.md from the section "Create an identity and a pod".
`

// hintsInStandardMode is text that `up --standard` prints after hints.
const hintsInStandardMode = `
In standard mode, with an identity that is not attached yet:

  bin/cluster azure identity --unattached --client-id 11111111-0000-4000-8000-000000000001 \
      --object-id 22222222-0000-4000-8000-000000000001 \
      --resource-id /subscriptions/` + cluster.SubscriptionID + `/resourceGroups/apps/providers/Microsoft.ManagedIdentity/userAssignedIdentities/shop
  bin/cluster azure set arm.delay=10s
  bin/cluster kubectl get azureassignedidentities -A --watch
  bin/cluster azure arm machines
  bin/cluster azure arm log
`

// nextSteps returns what up prints at the end. instance is the value of PODIDENTITY_CLUSTER. If it is not empty, each
// command begins with it: without it the command would concern another cluster.
func nextSteps(instance string, standard bool) string {
	text := hints
	if standard {
		text += hintsInStandardMode
	}
	if instance != "" {
		text = strings.ReplaceAll(text, "bin/cluster ", "PODIDENTITY_CLUSTER="+instance+" bin/cluster ")
	}
	return text
}

// upOptions are the flags of up.
type upOptions struct {
	cluster.Options
	noChart, standard, vms, bypassNetfilter bool
	helm                                    []string
}

func upCommand() *cobra.Command {
	var opts upOptions
	cmd := &cobra.Command{
		Use:   "up",
		Short: "Start the cluster and the fake Azure, and install the chart",
		Long: `Builds what is missing, starts the cluster and the fake Azure, loads the images and installs the chart with
helm into the namespace podidentity-system. The cluster runs until "cluster down".

If the command fails or is interrupted, it removes the cluster.`,
		Example: `  cluster up
  cluster up --helm --set=nmi.logLevel=debug
  cluster up --standard --vms --helm --set=mic.detachDelay=10s
  cluster up --no-chart --log-dir /tmp/logs`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return up(cmd.Context(), opts)
		},
	}
	cmd.Flags().BoolVar(&opts.standard, "standard", false, "install the chart in standard mode: MIC attaches identities to the virtual machines and scale sets of the nodes")
	cmd.Flags().BoolVar(&opts.vms, "vms", false, "make each node a virtual machine (default: both are in one scale set)")
	cmd.Flags().BoolVar(&opts.noChart, "no-chart", false, "neither build the images nor install the chart")
	cmd.Flags().StringArrayVar(&opts.helm, "helm", nil, "additional `ARGUMENT` for helm, such as --set=KEY=VALUE; may be repeated")
	cmd.Flags().BoolVar(&opts.bypassNetfilter, "bypass-netfilter", false, "make packets of pods to the metadata address bypass the netfilter rules of the nodes, as with eBPF host routing")
	cmd.MarkFlagsMutuallyExclusive("standard", "no-chart")
	cmd.Flags().StringVar(&opts.LogDir, "log-dir", "", "write the logs of all processes to this `FOLDER` (default: in the run folder, which is removed with the cluster)")
	return cmd
}

func up(ctx context.Context, opts upOptions) (err error) {
	begin := time.Now()
	progress := newProgress()
	opts.Progress = progress
	if opts.Program, err = os.Executable(); err != nil {
		return err
	}
	if opts.vms {
		opts.ProviderIDs = cluster.TwoVMs()
	}
	if err := cluster.RequireRoot(); err != nil {
		return err
	}
	var images errgroup.Group
	if !opts.noChart {
		images.Go(func() error { return cluster.BuildProductImages(ctx, progress, opts.standard) }) // while the cluster starts
	}
	c, err := cluster.Start(ctx, opts.Options)
	if err != nil {
		return errors.Join(err, removeFailed(err))
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, c.Stop())
		}
	}()
	if opts.bypassNetfilter {
		for _, node := range c.Nodes() {
			if _, err := c.BypassNetfilter(ctx, node); err != nil {
				return err
			}
		}
	}
	if err := images.Wait(); err != nil {
		return err
	}
	if err := installChart(ctx, c, opts, progress); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := c.Detach(); err != nil {
		return err
	}
	progress(fmt.Sprintf("the cluster is up after %.1f s", time.Since(begin).Seconds()))
	fmt.Print(nextSteps(os.Getenv("PODIDENTITY_CLUSTER"), opts.standard))
	return nil
}

// removeFailed removes what is left after cluster.Start returned startErr. It does not use cluster.Down, which would
// stop a cluster that another process started since Start looked for one: to build Kubernetes takes minutes. Start
// stops its own supervisor, and returns an error if the supervisor does not end.
func removeFailed(startErr error) error {
	if errors.Is(startErr, cluster.ErrRunning) {
		return nil
	}
	if err := cluster.RemoveLeftovers(); !errors.Is(err, cluster.ErrRunning) {
		return err
	}
	return nil
}

func installChart(ctx context.Context, c *cluster.Cluster, opts upOptions, progress func(string)) error {
	switch {
	case opts.noChart:
		return nil
	case opts.standard:
		progress("installing the chart in standard mode")
		return c.InstallStandard(ctx, opts.helm...)
	}
	progress("installing the chart")
	return c.InstallChart(ctx, opts.helm...)
}

func downCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "down",
		Short: "Remove the cluster",
		Long: `Stops the cluster that runs on this host and removes its namespaces, cgroups, mounts and files. Also removes what
a killed cluster has left. Does nothing if there is nothing to do.`,
		Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			begin := time.Now()
			if err := cluster.Down(); err != nil {
				return err
			}
			newProgress()(fmt.Sprintf("the cluster is down after %.1f s", time.Since(begin).Seconds()))
			return nil
		},
	}
}

// newProgress returns a function that prints steps to standard error. At a terminal it updates the count of a long
// build in one line.
func newProgress() func(string) {
	_, err := unix.IoctlGetTermios(int(os.Stderr.Fd()), unix.TCGETS)
	terminal := err == nil
	var mu sync.Mutex
	var counting bool
	return func(line string) {
		mu.Lock()
		defer mu.Unlock()
		isCount := terminal && cluster.IsCount(line)
		switch {
		case counting && isCount:
			fmt.Fprint(os.Stderr, "\r\033[K"+line)
		case isCount:
			fmt.Fprint(os.Stderr, line)
		case counting:
			fmt.Fprint(os.Stderr, "\n"+line+"\n")
		default:
			fmt.Fprintln(os.Stderr, line)
		}
		counting = isCount
	}
}
