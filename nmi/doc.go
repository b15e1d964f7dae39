// Package nmi is the node's server: it answers the metadata requests of the pods of one node.
//
// The way of a token request goes through the packages in one direction. The rules of package iptables bring the
// packet here (run.go puts them in place). Package metadata parses the request (server.go). The pod is found by the
// address the packet came from (pods.go, on the caches of watch.go). Package identity decides (tokens.go), and a
// request whose identity is on its way to the machine waits for it (waiting.go, on the news of assignments.go). Package
// token answers from its cache or fetches. Package metadata writes the answer.
//
// What it protects against: a pod that gets a token meant for another. The address a connection comes from is the
// only thing known of a caller that the caller did not choose, so it must stand for exactly one live pod of this node
// before anything else is asked. Everything a pod can cause is bounded: connections, requests, waiting, fetches, log
// lines. When something is missing (a cache not filled yet, the API server, Azure) the answer is an error that makes
// clients come again, never a guess, and never the way to the real token endpoint.
package nmi
