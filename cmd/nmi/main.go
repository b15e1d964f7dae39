// Command nmi runs the Node Managed Identity server on a node, and removes what it installed there.
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

	"github.com/podidentity/podidentity/cmd/nmi/options"
	"github.com/podidentity/podidentity/nmi"
	"github.com/podidentity/podidentity/nmi/telemetry"
	"github.com/podidentity/podidentity/nmi/token"
)

// version is set when a release is built.
var version = "dev"

func main() {
	// NMI runs on every node, so its memory matters more than its CPU time. A percentage below the default of 100 makes
	// Go collect garbage earlier. That costs little CPU time, because the heap of NMI is small. The environment
	// variable GOGC has precedence.
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(60)
	}
	// With AZURE_REGIONAL_AUTHORITY_NAME or MSAL_FORCE_REGION the Azure SDK uses a regional endpoint of Entra ID, and may
	// ask IMDS for the region. NMI uses no regional endpoints.
	for _, name := range []string{"AZURE_REGIONAL_AUTHORITY_NAME", "MSAL_FORCE_REGION"} {
		_ = os.Unsetenv(name) // fails only for an invalid name
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := command().ExecuteContext(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "nmi:", err)
		os.Exit(1)
	}
}

func command() *cobra.Command {
	o := options.New()
	run := &cobra.Command{
		Use:   "nmi",
		Short: "Give the pods of this node the Azure identities that are bound to them",
		Long: `NMI responds to the requests that pods of this node send to the Azure Instance Metadata Service (IMDS).

It captures them with eBPF and iptables, finds the pod by its cgroup or address, checks AzureIdentity and AzureIdentityBinding,
fetches the token and responds as IMDS would. When NMI stops, its eBPF programs and iptables rules stay, so that no pod
outside the host network reaches the real token endpoint; "nmi uninstall" removes them.`,
		Args:          cobra.NoArgs,
		Version:       version,
		SilenceUsage:  true,
		SilenceErrors: true,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return o.WithLoggers(func(logs telemetry.Loggers) error {
				logs.Main.Info("starting NMI", zap.String("version", version))
				return nmi.Run(cmd.Context(), o.Config(version), logs)
			})
		},
	}
	run.CompletionOptions.DisableDefaultCmd = true // nobody types this command often enough to need shell completion
	o.AddFlags(run.Flags())
	run.AddCommand(uninstall(o), parsePKCS12())
	return run
}

func uninstall(o *options.Options) *cobra.Command {
	var wait bool
	c := &cobra.Command{
		Use:   "uninstall",
		Short: "Remove from this node everything that NMI installed there",
		Long: `Removes NMI's eBPF programs, iptables rules and chains, and network interface from this node, in whichever iptables back end
the rules are.
From then on pods reach IMDS directly. The command can be repeated at any time.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return o.WithLoggers(func(logs telemetry.Loggers) error {
				if err := nmi.Uninstall(cmd.Context(), o.Config(version), logs.Main); err != nil {
					return err
				}
				logs.Main.Info("this node has no iptables rules, no eBPF programs and no network link of NMI any more; pods reach IMDS directly, and through it every identity that is attached to the VM")
				if wait {
					<-cmd.Context().Done()
				}
				return nil
			})
		},
	}
	o.AddCaptureFlags(c.Flags())
	c.Flags().BoolVar(&wait, "wait-for-signal", false, "when done, keep running until a signal comes; for a DaemonSet that removes NMI from all nodes")
	c.Flags().BoolVar(&wait, "hold", false, "")
	_ = c.Flags().MarkHidden("hold") // the earlier name of --wait-for-signal
	return c
}

// parsePKCS12 returns the hidden command that NMI runs in a child process to parse a PKCS#12 file from a Secret.
func parsePKCS12() *cobra.Command {
	return &cobra.Command{
		Use:    token.ParseCommand,
		Hidden: true,
		Args:   cobra.NoArgs,
		RunE:   func(*cobra.Command, []string) error { return token.ParsePKCS12Main(os.Stdin, os.Stdout) },
	}
}
