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
		Long: `Shows the virtual machines and scale sets of the nodes, the requests to Azure Resource Manager, and when each identity
was attached or detached. Attaches and detaches identities manually. Makes requests fail.

MACHINE is the resource ID of a machine or the name of one of its nodes. IDENTITY is a client, object or resource ID.
Settings such as the duration of a PATCH are switches: see "cluster azure set".`,
	}
	requireSubcommand(cmd)
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
		Short: "Make requests fail; without arguments and flags, list the faults",
		Long: `Sets the fault of requests for a machine, for a subscription or, with flags alone, for all machines. It replaces a
fault of the same resource and operation. Of several faults that match a request, the most specific applies.`,
		Example: `  cluster azure arm fault node1 --operation patch --status 429 --retry-after 30 --count 2
  cluster azure arm fault node1 --operation patch --drop --apply    # each PATCH takes effect, but gets no response
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
	flags.StringVar(&f.Operation, "operation", "", "only requests of this `KIND`: get, patch or poll (default: all)")
	flags.IntVar(&f.Count, "count", 0, "number of requests to which the fault applies (default: all, until the fault is cleared)")
	flags.DurationVar(&f.Latency, "latency", 0, "wait for this time before the request is handled")
	flags.IntVar(&f.Status, "status", 0, "respond with this HTTP status")
	flags.StringVar(&f.Code, "code", "", "ARM's error `CODE`, with --status and --fails")
	flags.StringVar(&f.Message, "message", "", "text of the error, with --status and --fails")
	flags.IntVar(&f.RetryAfter, "retry-after", 0, "Retry-After header of the response in `SECONDS`, with --status")
	flags.BoolVar(&f.Hang, "hang", false, "do not respond, and keep the connection open until the client disconnects")
	flags.BoolVar(&f.Drop, "drop", false, "do not respond, and reset the connection")
	flags.BoolVar(&f.Fails, "fails", false, "accept a PATCH, but let its operation fail")
	flags.BoolVar(&f.Apply, "apply", false, "with --status, --hang or --drop: the request takes effect nevertheless; with --fails: the identities change although the operation fails")
	flags.BoolVar(&remove, "clear", false, "clear the faults of the machine or the subscription; without an argument, all faults, including those of identities")
	return cmd
}

func armIdentityFaultCommand() *cobra.Command {
	var f azure.IdentityFault
	var naming string
	cmd := &cobra.Command{
		Use:   "identity-fault RESOURCE-ID",
		Short: "Make Resource Manager refuse to attach an identity; without --denied and --missing, remove the fault",
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
	cmd.Flags().BoolVar(&f.Denied, "denied", false, "no caller may assign the identity (LinkedAuthorizationFailed)")
	cmd.Flags().BoolVar(&f.Missing, "missing", false, "refuse the identity as if it did not exist (FailedIdentityOperation)")
	cmd.Flags().StringVar(&naming, "naming", "", "`HOW` the error names the identity: details, text or none (default: the switch arm.naming)")
	return cmd
}
