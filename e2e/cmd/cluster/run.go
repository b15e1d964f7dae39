package main

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"github.com/podidentity/podidentity/e2e/cluster"
)

func kubectlCommand() *cobra.Command {
	return passThrough(&cobra.Command{
		Use:   "kubectl ARGS…",
		Short: "Run kubectl on the cluster, as admin",
		Long: `Runs the cluster's own kubectl as admin, inside the control plane's network namespace: the API server can be
reached only from the cluster's namespaces. Returns kubectl's exit status.`,
		Example: `  cluster kubectl get pods -A -o wide`,
	}, func(c *cluster.Cluster, args []string) error { return c.ExecKubectl(args) })
}

func helmCommand() *cobra.Command {
	return passThrough(&cobra.Command{
		Use:     "helm ARGS…",
		Short:   "Run helm on the cluster, as admin",
		Long:    `Runs helm as admin, inside the control plane's network namespace. Returns helm's exit status.`,
		Example: `  cluster helm --namespace podidentity-system get values podidentity`,
	}, func(c *cluster.Cluster, args []string) error { return c.ExecHelm(args) })
}

// passThrough makes cmd pass all its arguments to the function run, unparsed. Only with --help or -h as its single
// argument, cmd shows its help instead.
func passThrough(cmd *cobra.Command, run func(*cluster.Cluster, []string) error) *cobra.Command {
	cmd.DisableFlagParsing = true
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if len(args) == 1 && (args[0] == "--help" || args[0] == "-h") {
			return cmd.Help()
		}
		c, err := cluster.Open()
		if err != nil {
			return err
		}
		return run(c, args)
	}
	return cmd
}

func inPodCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "in-pod NAMESPACE/POD -- PROGRAM ARGS…",
		Short: "Run a program of this host inside a pod's network",
		Long: `Runs a program of this host inside the network namespace of a running pod: its packets are those of the pod.
Files, environment and user are the host's. The program cannot look up host names in DNS: the name servers in the
host's /etc/resolv.conf cannot be reached from the pod's network. Returns the program's exit status.`,
		Example: `  cluster in-pod default/try -- curl -s -H Metadata:true "http://169.254.169.254/metadata/instance?api-version=2021-02-01"`,
		RunE: func(cmd *cobra.Command, args []string) error {
			target, program, err := targetAndProgram(cmd, args)
			if err != nil {
				return err
			}
			namespace, pod, ok := strings.Cut(target, "/")
			if !ok || namespace == "" || pod == "" || strings.Contains(pod, "/") {
				return fmt.Errorf("%q is not NAMESPACE/POD", target)
			}
			c, err := cluster.Open()
			if err != nil {
				return err
			}
			return c.ExecInPod(cmd.Context(), namespace, pod, program[0], program[1:])
		},
	}
}

func inNodeCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "in-node NODE -- PROGRAM ARGS…",
		Short: "Run a program of this host inside a node's network",
		Long: `Runs a program of this host inside the network namespace of a node (node1 or node2): to show its rules, routes
and sockets. Returns the program's exit status.`,
		Example: `  cluster in-node node1 -- iptables-save -t nat`,
		RunE: func(cmd *cobra.Command, args []string) error {
			node, program, err := targetAndProgram(cmd, args)
			if err != nil {
				return err
			}
			if _, err := cluster.NodeNetns(node); err != nil {
				return err
			}
			c, err := cluster.Open()
			if err != nil {
				return err
			}
			return c.ExecInNode(node, program[0], program[1:])
		},
	}
}

// targetAndProgram returns the one argument before "--", and the arguments after it: the program and its arguments. The
// "--" is required, so that flags of the program are not parsed as flags of this command.
func targetAndProgram(cmd *cobra.Command, args []string) (target string, program []string, err error) {
	if cmd.ArgsLenAtDash() != 1 || len(args) < 2 {
		return "", nil, fmt.Errorf("usage: cluster %s", cmd.Use)
	}
	return args[0], args[1:], nil
}

func superviseCommand() *cobra.Command {
	return &cobra.Command{
		Use:    "supervise",
		Short:  "Run the cluster for the process that holds the other ends of descriptors 3 and 4",
		Hidden: true,
		Args:   cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			owner, events := os.NewFile(3, "owner"), os.NewFile(4, "events")
			if owner == nil || events == nil {
				return errors.New("descriptors 3 and 4 are missing: only the program that starts a cluster runs this command")
			}
			return cluster.Supervise(owner, events)
		},
	}
}

func nodeInitCommand() *cobra.Command {
	return &cobra.Command{
		Use:    "node-init PLAN",
		Short:  "Be the first process of a node",
		Hidden: true,
		Args:   cobra.ExactArgs(1),
		RunE:   func(_ *cobra.Command, args []string) error { return cluster.NodeInit(args[0]) },
	}
}
