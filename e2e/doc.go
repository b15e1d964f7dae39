// Package e2e holds the end-to-end tests: the product as users install it, with its chart, on a real Kubernetes cluster,
// with a stand-in for Azure that records what reaches it and from where.
package e2e
