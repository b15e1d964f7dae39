// Package e2e has the end-to-end tests of managed mode. NMI is installed with its Helm chart on a real Kubernetes
// cluster. A fake Azure records every request and its source.
//
// It finds faults that appear only when the parts of the product work together: requests take the whole way from an
// unmodified client in a pod through iptables and NMI to IMDS and Entra ID.
package e2e
