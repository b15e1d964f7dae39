// Command mic runs the Managed Identity Controller of standard mode, prints its plan, and removes what it attached and
// wrote.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"runtime/debug"
	"syscall"

	"github.com/spf13/cobra"
	"go.uber.org/zap"

	"github.com/podidentity/podidentity/cmd/mic/options"
	"github.com/podidentity/podidentity/mic"
)

// version is set when a release is built.
var version = "dev"

func main() {
	// A GC percentage below the default of 100 makes Go collect garbage earlier, which lowers the peak of the heap. That
	// costs little CPU time: most objects of MIC live long, so there is little garbage. The environment variable GOGC
	// has precedence.
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(50)
	}
	// With AZURE_REGIONAL_AUTHORITY_NAME or MSAL_FORCE_REGION the Azure SDK uses a regional endpoint of Entra ID, and may
	// ask IMDS for the region. MIC uses no regional endpoints.
	for _, name := range []string{"AZURE_REGIONAL_AUTHORITY_NAME", "MSAL_FORCE_REGION"} {
		_ = os.Unsetenv(name) // it fails only for an invalid name
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := command().ExecuteContext(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "mic:", err)
		os.Exit(1)
	}
}

// command returns the root command. All commands have the flags of mic, so that "mic plan" with the arguments of a
// running MIC prints the plan of that MIC.
func command() *cobra.Command {
	o := options.New()
	run := &cobra.Command{
		Use:   "mic",
		Short: "Attach the Azure identities that pods need to the VMs and VMSSs of their nodes",
		Long: `MIC attaches the managed identities that pods need to the VMs and VMSSs of their nodes, and detaches them when no pod
there needs them any more. What MIC attached stays attached when MIC stops, and the next MIC continues from there;
"mic uninstall" detaches it.`,
		Args:          cobra.NoArgs,
		Version:       version,
		SilenceUsage:  true,
		SilenceErrors: true,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return o.WithLogger(func(log *zap.Logger) error {
				log.Info("MIC is starting", zap.String("version", version))
				return mic.Run(cmd.Context(), o.Config(version), log)
			})
		},
	}
	run.CompletionOptions.DisableDefaultCmd = true // this command is not typed often enough for completion
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
		Short: "Detach what MIC attached, and delete what it wrote to the cluster",
		Long: `Detaches the identities that MIC attached to VMs and VMSSs, and no others, and deletes all AzureAssignedIdentity objects
and the ledgers. No MIC may run at the same time. The command can be repeated at any time.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return o.WithLogger(func(log *zap.Logger) error {
				if err := mic.Uninstall(cmd.Context(), o.Config(version), log); err != nil {
					return err
				}
				log.Info("mic uninstall is complete: no AzureAssignedIdentity object and no ledger of MIC is left")
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
