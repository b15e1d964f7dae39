// Package standard holds the end-to-end tests of standard mode: MIC and NMI as users install them, with the chart, on a
// real Kubernetes cluster, first with both nodes in one scale set, then as two virtual machines. The stand-in for Azure
// gives a token of an identity on a node only while ARM has it attached to the machine beneath.
package standard
