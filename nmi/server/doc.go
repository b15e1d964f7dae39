// Package server serves the requests of pods over HTTP: it accepts connections within limits, parses each request with
// package metadata, gets the tokens from package request, writes the response, and logs one line per request. It also serves
// NMI's probes and metrics, and tokens for programs of the node.
//
// It protects the node against its pods, which it does not trust: the address of the connection is the only thing it uses to
// identify a caller, and connections, headers and durations are limited.
package server
