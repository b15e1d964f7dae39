// Package server serves the requests of pods over HTTP: it accepts connections within limits, parses each request with
// package metadata, gets the tokens from package request, writes the response, and logs one line per request. It also
// serves NMI's probes and metrics, and tokens for programs of the node.
//
// It protects the node against its pods, which it does not trust. It identifies a pod by nothing but the address of the
// connection. It limits the number of connections, the size of headers and the duration of requests.
package server
