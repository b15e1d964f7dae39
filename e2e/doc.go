// Package e2e has the end-to-end tests of managed mode: NMI, installed with its Helm chart on a real Kubernetes cluster,
// and a fake Azure that records every request and its source.
//
// It protects against a product whose parts work one by one and not together: here requests take the whole way from an
// unmodified client in a pod through iptables and NMI to IMDS and Entra ID.
package e2e
