// Package nmi is the agent that runs on each node: it responds to the requests that the node's pods send to IMDS. The
// package has the configuration and connects the parts.
//
// A token request passes through the packages in one direction. The rules of package iptables redirect the packet to
// NMI. Package server accepts the connection, and package metadata parses the request. Package request then calls four
// packages: cluster finds the pod, identity decides, credentials reads what proves the identity, and token returns the
// token from its cache or fetches it. Package server writes the response and the log line.
//
// NMI protects against a pod that gets a token meant for another. The address of the connection is the only property of
// a pod's request that the pod does not choose. NMI decides about a token request only if exactly one live pod of this
// node has this address. Only programs of the node may name a pod instead (/host/token). Everything that a pod can
// cause is limited: connections, requests, waits, fetches, log lines. If NMI cannot respond because something is
// unavailable (a cache that has not synced, the API server, Azure), the response is an error that makes clients retry.
// NMI never guesses, and never lets a pod outside the host network reach the real token endpoint.
package nmi
