// Package standard has the end-to-end tests of standard mode: MIC and NMI, installed with their Helm chart on a real
// Kubernetes cluster. They run first with both nodes in one scale set, then with each node as a virtual machine.
//
// They find faults that appear only when MIC and NMI work together: the fake Azure issues a token of a managed identity
// on a node only while that identity is attached to the node's machine in the fake ARM.
package standard
