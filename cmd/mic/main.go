// Command mic runs the Managed Identity Controller of standard mode, says what it would do, and removes what it did.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"runtime/debug"
	"syscall"

	"github.com/podidentity/podidentity/cmd/mic/options"

	"github.com/spf13/cobra"
	"go.uber.org/zap"

	"github.com/podidentity/podidentity/mic"
)

// version is set when a release is built.
var version = "dev"

func main() {
	// Of what MIC keeps most stays as it is, so collecting garbage early costs little CPU and saves half of the memory that
	// Go would otherwise let it grow to. GOGC overrides.
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(50)
	}
	// With these the Azure SDK would look for a region, by way of the machine's metadata service, before each token.
	for _, name := range []string{"AZURE_REGIONAL_AUTHORITY_NAME", "MSAL_FORCE_REGION"} {
		_ = os.Unsetenv(name) // fails for no valid name
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := command().ExecuteContext(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "mic:", err)
		os.Exit(1)
	}
}

// command has all flags on all commands: "mic plan" with the arguments of a MIC that runs says what that one does.
func command() *cobra.Command {
	o := options.New()
	run := &cobra.Command{
		Use:   "mic",
		Short: "Attach to the machines of the cluster the Azure identities that their pods need",
		Long: `MIC attaches the managed identities that pods need to the virtual machine or scale set beneath their nodes, and
detaches them when the last pod that needs one there is gone. What it attached stays when it ends, and the next MIC
goes on from there; "mic uninstall" detaches it.`,
		Args:          cobra.NoArgs,
		Version:       version,
		SilenceUsage:  true,
		SilenceErrors: true,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return o.WithLogger(func(log *zap.Logger) error {
				log.Info("starting", zap.String("version", version))
				return mic.Run(cmd.Context(), o.Config(version), log)
			})
		},
	}
	run.CompletionOptions.DisableDefaultCmd = true // nobody types this command often enough
	o.AddFlags(run.PersistentFlags())
	run.AddCommand(plan(o), uninstall(o))
	return run
}

func plan(o *options.Options) *cobra.Command {
	return &cobra.Command{
		Use:   "plan",
		Short: "Print what MIC would attach and detach, and why, and change nothing",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return o.WithLogger(func(log *zap.Logger) error {
				return mic.Plan(cmd.Context(), o.Config(version), log, cmd.OutOrStdout())
			})
		},
	}
}

func uninstall(o *options.Options) *cobra.Command {
	var wait bool
	c := &cobra.Command{
		Use:   "uninstall",
		Short: "Detach what MIC attached, and remove what it wrote into the cluster",
		Long: `Detaches the identities that MIC attached to machines, and no others, releases all AzureAssignedIdentity objects and
removes what MIC wrote down. No MIC may run meanwhile. It may be run again at any time.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return o.WithLogger(func(log *zap.Logger) error {
				if err := mic.Uninstall(cmd.Context(), o.Config(version), log); err != nil {
					return err
				}
				log.Info("uninstalled")
				if !wait {
					return nil
				}
				return waitForSignal(cmd.Context(), o.Config(version).ProbePort)
			})
		},
	}
	c.Flags().BoolVar(&wait, "wait-for-signal", false, "when done, answer /readyz until a signal comes; for a Deployment")
	c.Flags().BoolVar(&wait, "hold", false, "")
	_ = c.Flags().MarkHidden("hold") // the earlier name of --wait-for-signal
	return c
}
