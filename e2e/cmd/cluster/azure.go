package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/podidentity/podidentity/e2e/azure"
	"github.com/podidentity/podidentity/e2e/cluster"
)

func azureCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "azure",
		Short: "Show and control the fake Azure",
		Long: `Shows what the fake Azure (the Instance Metadata Service, Entra ID and Resource Manager) received, and sets
its behavior: latency, throttling, errors, hangs.`,
	}
	requireSubcommand(cmd)
	cmd.AddCommand(azureLogCommand(), azureSetCommand(), azureStatsCommand(), azureIdentityCommand(), azureAppCommand(), azureTrustCommand(),
		armCommand(), azureServeCommand())
	return cmd
}

// requireSubcommand makes an unknown subcommand of cmd an error. By default cobra prints the help and returns no error.
// Without a subcommand, cmd still prints its help.
func requireSubcommand(cmd *cobra.Command) {
	cmd.Args = cobra.NoArgs
	cmd.RunE = func(cmd *cobra.Command, _ []string) error { return cmd.Help() }
}

// fakeAzure returns a client of the fake Azure of the running cluster.
func fakeAzure() (*azure.Client, error) {
	c, err := cluster.Open()
	if err != nil {
		return nil, err
	}
	return c.Azure(), nil
}

func azureLogCommand() *cobra.Command {
	var since int
	var follow bool
	cmd := &cobra.Command{
		Use:   "log",
		Short: "Print the requests to IMDS and Entra ID, one JSON object per line",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			client, err := fakeAzure()
			if err != nil {
				return err
			}
			return printLog(cmd.Context(), client.Log, func(e azure.Entry) int { return e.Seq }, since, follow)
		},
	}
	logFlags(cmd, &since, &follow)
	return cmd
}

func logFlags(cmd *cobra.Command, since *int, follow *bool) {
	cmd.Flags().IntVar(since, "since", 0, "only entries with a sequence number (seq) greater than `N`")
	cmd.Flags().BoolVar(follow, "follow", false, "continue with new entries until interrupted")
}

func printLog[T any](ctx context.Context, read func(context.Context, int) ([]T, error), seq func(T) int, since int, follow bool) error {
	out := json.NewEncoder(os.Stdout)
	for {
		entries, err := read(ctx, since)
		if err != nil {
			return err
		}
		for _, e := range entries {
			if err := out.Encode(e); err != nil {
				return err
			}
			since = seq(e)
		}
		if !follow {
			return nil
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(300 * time.Millisecond):
		}
	}
}

func azureSetCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "set [KEY=VALUE…]",
		Short: "Set switches; without arguments, show them",
		Long: `Sets switches of the fake Azure: all of them or, if one is invalid, none. Without arguments all
switches and their values are shown. reset=all restores the defaults before the other switches are set.`,
		Example: `  cluster azure set
  cluster azure set imds.latency=2s imds.throttle=5
  cluster azure set reset=all`,
		RunE: func(cmd *cobra.Command, args []string) error {
			changes := map[string]string{}
			for _, arg := range args {
				key, value, ok := strings.Cut(arg, "=")
				if !ok || key == "" {
					return fmt.Errorf("%q is not KEY=VALUE", arg)
				}
				if _, twice := changes[key]; twice {
					return fmt.Errorf("the switch %s is given twice", key)
				}
				changes[key] = value
			}
			client, err := fakeAzure()
			if err != nil {
				return err
			}
			if len(changes) > 0 {
				return client.Set(cmd.Context(), changes)
			}
			switches, err := client.Switches(cmd.Context())
			if err != nil {
				return err
			}
			return printJSON(switches)
		},
	}
}

func azureStatsCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "stats",
		Short: "Print the counts of requests",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			client, err := fakeAzure()
			if err != nil {
				return err
			}
			stats, err := client.Stats(cmd.Context())
			if err != nil {
				return err
			}
			return printJSON(stats)
		},
	}
}

func azureIdentityCommand() *cobra.Command {
	var id azure.Identity
	var nodes []string
	var unattached bool
	cmd := &cobra.Command{
		Use:   "identity",
		Short: "Create a user-assigned identity and attach it to nodes; without flags, list the identities",
		Long: `Creates or replaces a user-assigned identity, and attaches it to all nodes, or to those of --node, without a request to
Resource Manager. With --unattached, the identity is only created or replaced.`,
		Example: `  cluster azure identity --client-id 11111111-0000-4000-8000-000000000001 --object-id 22222222-0000-4000-8000-000000000001 \
      --resource-id /subscriptions/` + cluster.SubscriptionID + `/resourceGroups/demo/providers/Microsoft.ManagedIdentity/userAssignedIdentities/demo`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			client, err := fakeAzure()
			if err != nil {
				return err
			}
			if unattached {
				return client.DefineIdentity(cmd.Context(), id)
			}
			if cmd.Flags().NFlag() > 0 {
				return client.AddIdentity(cmd.Context(), id, nodes...)
			}
			identities, err := client.Identities(cmd.Context())
			if err != nil {
				return err
			}
			return printJSON(identities)
		},
	}
	cmd.Flags().StringVar(&id.ClientID, "client-id", "", "client ID (`GUID`)")
	cmd.Flags().StringVar(&id.ObjectID, "object-id", "", "object ID (`GUID`)")
	cmd.Flags().StringVar(&id.ResourceID, "resource-id", "", "resource `ID`")
	cmd.Flags().StringVar(&id.TenantID, "tenant-id", "", "tenant (`GUID`; default: the home tenant)")
	cmd.Flags().StringSliceVar(&nodes, "node", nil, "attach the identity only to this `NODE` (default: all nodes); may be repeated")
	cmd.Flags().BoolVar(&unattached, "unattached", false, "do not attach the identity")
	cmd.MarkFlagsMutuallyExclusive("node", "unattached")
	return cmd
}

func azureAppCommand() *cobra.Command {
	var app azure.App
	var secrets []string
	cmd := &cobra.Command{
		Use:     "app",
		Short:   "Create or replace an application in Entra ID",
		Example: `  cluster azure app --client-id 33333333-0000-4000-8000-000000000001 --object-id 44444444-0000-4000-8000-000000000001 --secret s3cret`,
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			client, err := fakeAzure()
			if err != nil {
				return err
			}
			for _, s := range secrets {
				app.Secrets = append(app.Secrets, azure.AppSecret{Value: s})
			}
			return client.AddApp(cmd.Context(), app)
		},
	}
	cmd.Flags().StringVar(&app.ClientID, "client-id", "", "client ID (`GUID`)")
	cmd.Flags().StringVar(&app.ObjectID, "object-id", "", "object ID of its service principal (`GUID`)")
	cmd.Flags().StringSliceVar(&app.Tenants, "tenant-id", nil, "tenant (`GUID`; default: the home tenant); may be repeated")
	cmd.Flags().StringSliceVar(&secrets, "secret", nil, "client `SECRET` of the application; may be repeated")
	return cmd
}

func azureTrustCommand() *cobra.Command {
	var clientID string
	cmd := &cobra.Command{
		Use:     "trust NAMESPACE/SERVICEACCOUNT",
		Short:   "Let pods of a ServiceAccount get tokens of an application or an identity (a federated credential)",
		Example: `  cluster azure trust default/default --client-id 33333333-0000-4000-8000-000000000001`,
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			namespace, account, ok := strings.Cut(args[0], "/")
			if !ok || namespace == "" || account == "" {
				return fmt.Errorf("%q is not NAMESPACE/SERVICEACCOUNT", args[0])
			}
			c, err := cluster.Open()
			if err != nil {
				return err
			}
			return c.Trust(cmd.Context(), clientID, namespace, account)
		},
	}
	cmd.Flags().StringVar(&clientID, "client-id", "", "client ID (`GUID`) of the application or the identity")
	return cmd
}

func azureServeCommand() *cobra.Command {
	var config string
	cmd := &cobra.Command{
		Use:    "serve",
		Short:  "Run the fake Azure in the current network namespace",
		Hidden: true,
		Args:   cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if config == "" {
				return errors.New("--config is required")
			}
			return cluster.ServeAzure(cmd.Context(), config)
		},
	}
	cmd.Flags().StringVar(&config, "config", "", "configuration `FILE`")
	return cmd
}

func printJSON(value any) error {
	out := json.NewEncoder(os.Stdout)
	out.SetIndent("", "  ")
	return out.Encode(value)
}
