package main

import (
	"context"

	"github.com/spf13/cobra"

	"github.com/podidentity/podidentity/e2e/azure"
)

func armCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "arm",
		Short: "Show and change the virtual machines and scale sets of the fake Resource Manager",
		Long: `Shows the virtual machines and scale sets of the nodes as Azure Resource Manager has them, its requests, and when which
identity was attached; attaches and detaches identities manually; makes requests fail.

A machine is named by its resource ID or by a node that is on it, an identity by its client, object or resource ID. How
long a PATCH takes and the like are switches: see "cluster azure set".`,
	}
	cmd.AddCommand(armMachinesCommand(), armLogCommand(), armChangesCommand(),
		armManualCommand("attach", "Attach an identity to a machine, as a user in the portal would", (*azure.Client).AttachTo),
		armManualCommand("detach", "Detach an identity from a machine, as a user in the portal would", (*azure.Client).DetachFrom),
		armStateCommand(), armFaultCommand(), armIdentityFaultCommand())
	return cmd
}

func armMachinesCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "machines",
		Short: "List the machines, their nodes and what is attached to them",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			client, err := fakeAzure()
			if err != nil {
				return err
			}
			machines, err := client.Machines(cmd.Context())
			if err != nil {
				return err
			}
			return printJSON(machines)
		},
	}
}

func armLogCommand() *cobra.Command {
	var since int
	var follow bool
	cmd := &cobra.Command{
		Use:   "log",
		Short: "Print the requests to Resource Manager, one JSON object per line",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			client, err := fakeAzure()
			if err != nil {
				return err
			}
			return printLog(cmd.Context(), client.ARMLog, func(e azure.ARMRequest) int { return e.Seq }, since, follow)
		},
	}
	logFlags(cmd, &since, &follow)
	return cmd
}

func armChangesCommand() *cobra.Command {
	var since int
	var follow bool
	cmd := &cobra.Command{
		Use:   "changes",
		Short: "Print which identity was attached to and detached from which machine, one JSON object per line",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			client, err := fakeAzure()
			if err != nil {
				return err
			}
			return printLog(cmd.Context(), client.ARMChanges, func(c azure.ARMChange) int { return c.Seq }, since, follow)
		},
	}
	logFlags(cmd, &since, &follow)
	return cmd
}

func armManualCommand(verb, short string, do func(c *azure.Client, ctx context.Context, machine, identity string) error) *cobra.Command {
	return &cobra.Command{
		Use:     verb + " MACHINE IDENTITY",
		Short:   short,
		Example: `  cluster azure arm ` + verb + ` node1 11111111-0000-4000-8000-000000000001`,
		Args:    cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			client, err := fakeAzure()
			if err != nil {
				return err
			}
			return do(client, cmd.Context(), args[0], args[1])
		},
	}
}

func armStateCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "state MACHINE [STATE]",
		Short: "Set a machine's provisioning state, such as Deleting; without a state, reset it",
		Args:  cobra.RangeArgs(1, 2),
		RunE: func(cmd *cobra.Command, args []string) error {
			client, err := fakeAzure()
			if err != nil {
				return err
			}
			return client.SetProvisioningState(cmd.Context(), args[0], append(args, "")[1])
		},
	}
}

func armFaultCommand() *cobra.Command {
	var f azure.ARMFault
	var remove bool
	cmd := &cobra.Command{
		Use:   "fault [MACHINE|/subscriptions/S]",
		Short: "Make requests fail; without arguments, list the faults",
		Long: `Sets the fault of requests for a machine, for a subscription or, without an argument, for all. It replaces a fault of the
same resource and operation. The most specific fault applies.`,
		Example: `  cluster azure arm fault node1 --operation patch --status 429 --retry-after 30 --count 2
  cluster azure arm fault node1 --drop --apply       the PATCH is applied, its response is lost
  cluster azure arm fault --clear`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			client, err := fakeAzure()
			if err != nil {
				return err
			}
			f.Resource = append(args, "")[0]
			switch {
			case remove:
				return client.ClearARMFaults(cmd.Context(), f.Resource)
			case len(args) > 0 || cmd.Flags().NFlag() > 0:
				return client.SetARMFault(cmd.Context(), f)
			}
			faults, err := client.ARMFaults(cmd.Context())
			if err != nil {
				return err
			}
			return printJSON(faults)
		},
	}
	flags := cmd.Flags()
	flags.StringVar(&f.Operation, "operation", "", "only of this `KIND`: get, patch or poll")
	flags.IntVar(&f.Count, "count", 0, "number of requests that fail (default: all until it is cleared)")
	flags.DurationVar(&f.Latency, "latency", 0, "wait before anything else")
	flags.IntVar(&f.Status, "status", 0, "answer with this HTTP status")
	flags.StringVar(&f.Code, "code", "", "ARM's error `CODE`, with --status and --fails")
	flags.StringVar(&f.Message, "message", "", "the error's text")
	flags.IntVar(&f.RetryAfter, "retry-after", 0, "the answer's Retry-After in `SECONDS`")
	flags.BoolVar(&f.Hang, "hang", false, "do not answer until the client leaves")
	flags.BoolVar(&f.Drop, "drop", false, "cut the connection")
	flags.BoolVar(&f.Fails, "fails", false, "accept a PATCH and let its operation fail")
	flags.BoolVar(&f.Apply, "apply", false, "apply the request nevertheless")
	flags.BoolVar(&remove, "clear", false, "clear the faults of the resource; without one all, also those of identities")
	return cmd
}

func armIdentityFaultCommand() *cobra.Command {
	var f azure.IdentityFault
	var naming string
	cmd := &cobra.Command{
		Use:   "identity-fault RESOURCE-ID",
		Short: "Make Resource Manager refuse to attach an identity; without flags, remove the fault",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			client, err := fakeAzure()
			if err != nil {
				return err
			}
			f.Identity, f.Naming = args[0], azure.Naming(naming)
			return client.SetIdentityFault(cmd.Context(), f)
		},
	}
	cmd.Flags().BoolVar(&f.Denied, "denied", false, "callers may not assign it (LinkedAuthorizationFailed)")
	cmd.Flags().BoolVar(&f.Missing, "missing", false, "as if it did not exist (FailedIdentityOperation)")
	cmd.Flags().StringVar(&naming, "naming", "", "`HOW` the error names it: details, text or none (default: the switch arm.naming)")
	return cmd
}
