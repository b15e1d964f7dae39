package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/podidentity/podidentity/e2e/cluster"
)

const whatNext = `
The cluster runs until "bin/cluster down". To try:

  bin/cluster kubectl get nodes,pods -A -o wide
  bin/cluster in-node node1 -- iptables-save
  bin/cluster kubectl run try --image=` + cluster.TestImage + ` --image-pull-policy=Never
  bin/cluster in-pod default/try -- curl -s -H Metadata:true \
      "http://169.254.169.254/metadata/identity/oauth2/token?api-version=2018-02-01&resource=https://management.azure.com/"
  bin/cluster azure log
`

func upCommand() *cobra.Command {
	var opts cluster.Options
	var noChart bool
	var helmArgs []string
	cmd := &cobra.Command{
		Use:   "up",
		Short: "Start the cluster and the stand-in Azure, and install the chart",
		Long: `Builds what is missing, starts the cluster and the stand-in Azure, loads the images and installs the chart with
helm into the namespace podidentity-system. The cluster runs until "cluster down".

If this is interrupted, or fails, everything is taken down again.`,
		Example: `  cluster up
  cluster up --helm --set=nmi.logLevel=debug
  cluster up --no-chart --log-dir /tmp/logs`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return up(cmd.Context(), opts, !noChart, helmArgs)
		},
	}
	cmd.Flags().BoolVar(&noChart, "no-chart", false, "do not build NMI's image and install the chart")
	cmd.Flags().StringArrayVar(&helmArgs, "helm", nil, "one more `ARGUMENT` for helm, such as --set=KEY=VALUE; may be repeated")
	cmd.Flags().StringVar(&opts.LogDir, "log-dir", "", "keep the logs of all processes in this `FOLDER` (default: in the run folder, gone with the cluster)")
	return cmd
}

func up(ctx context.Context, opts cluster.Options, chart bool, helmArgs []string) (err error) {
	begin := time.Now()
	say := progress()
	opts.Progress = say
	if opts.Program, err = os.Executable(); err != nil {
		return err
	}

	// The image builds while the cluster starts.
	type built struct {
		image cluster.Image
		err   error
	}
	image := make(chan built, 1)
	if chart {
		if err := cluster.RequireRoot(); err != nil {
			return err
		}
		go func() {
			img, err := cluster.BuildNMIImage(ctx, say)
			image <- built{img, err}
		}()
	}
	c, err := cluster.Start(ctx, opts)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, c.Stop())
		}
	}()
	if chart {
		nmi := <-image
		if nmi.err != nil {
			return nmi.err
		}
		say("installing the chart with the image " + nmi.image.Ref())
		if err := c.InstallChartWith(ctx, nmi.image, helmArgs...); err != nil {
			return err
		}
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := c.Detach(); err != nil {
		return err
	}
	say(fmt.Sprintf("up after %.1f s", time.Since(begin).Seconds()))
	fmt.Print(whatNext)
	return nil
}

func downCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "down",
		Short: "Take everything down again",
		Long: `Takes down the cluster that runs on this machine and removes its namespaces, cgroups, mounts and files; also what a
killed one has left behind. Does nothing if there is nothing to do.`,
		Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			begin := time.Now()
			if err := cluster.Down(); err != nil {
				return err
			}
			progress()(fmt.Sprintf("down after %.1f s", time.Since(begin).Seconds()))
			return nil
		},
	}
}

// progress prints steps to standard error. At a terminal the counting of a long build stays on one line.
func progress() func(string) {
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
