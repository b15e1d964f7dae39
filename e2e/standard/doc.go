// Package standard has the end-to-end tests of standard mode: MIC and NMI, installed with their Helm chart on a real
// Kubernetes cluster, first with both nodes in one scale set, then as two virtual machines.
//
// It protects against a MIC and an NMI that work alone and not together: the fake Azure issues a token for an identity
// on a node only while ARM has that identity attached to the node's machine.
package standard
