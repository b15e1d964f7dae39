// Package nmi is the agent that runs on each node: it responds to the requests that the node's pods send to IMDS. The
// package has the configuration and connects the parts.
//
// A token request passes through the packages in one direction. The rules of package iptables redirect the packet to
// NMI. Package server accepts the connection, and package metadata parses the request. Package request then calls four
// packages: cluster finds the pod, identity decides, credentials gets the Secret or the assertion if the identity needs
// one, and token returns the token from its cache or fetches it. Package server writes the response and the log line.
//
// NMI prevents a pod from getting a token that is meant for another pod. The address of the connection is the only
// property of a pod's request that the pod does not choose. NMI decides about a token request only if exactly one live
// pod of this node has this address. Only a client on the loopback address of the node may name a pod instead
// (/host/token). NMI limits what a pod can cause: the number of concurrent connections, requests and waits, the rate of
// fetches, and the length of each log line. If something is unavailable (a cache that has not synced, the API server,
// Azure), NMI never guesses: it responds with an error that makes clients retry. The rules keep all pods outside the
// host network from the real token endpoint; the documentation of package iptables names the limits of the rules.
package nmi
