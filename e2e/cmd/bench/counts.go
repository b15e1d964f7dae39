package main

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// sumOf returns the sum of the values of a metric over all lines that have each of the labels (name="value"). metrics
// is in the text format of Prometheus.
func sumOf(metrics, name string, labels ...string) (float64, error) {
	var sum float64
	for line := range strings.Lines(metrics) {
		rest, ok := strings.CutPrefix(line, name+"{")
		if !ok {
			continue
		}
		// Label values here hold neither braces nor commas.
		has, value, ok := strings.Cut(rest, "}")
		if !ok {
			continue
		}
		have := strings.Split(has, ",")
		if slices.ContainsFunc(labels, func(l string) bool { return !slices.Contains(have, l) }) {
			continue
		}
		n, err := strconv.ParseFloat(strings.TrimSpace(value), 64)
		if err != nil {
			return 0, fmt.Errorf("reading the metric %s: %w", name, err)
		}
		sum += n
	}
	return sum, nil
}

// writing are the HTTP methods that write objects, which are also the verbs in the API server's metrics.
var writing = []string{"POST", "PUT", "PATCH", "DELETE"}

// requests counts requests to the API server.
type requests struct {
	all, writes float64
}

// readRequests reads the number of requests from the metrics of a client of the API server.
func readRequests(metrics string) (requests, error) {
	var r requests
	var err error
	if r.all, err = sumOf(metrics, "rest_client_requests_total"); err != nil {
		return r, err
	}
	for _, method := range writing {
		n, err := sumOf(metrics, "rest_client_requests_total", fmt.Sprintf("method=%q", method))
		if err != nil {
			return r, err
		}
		r.writes += n
	}
	return r, nil
}

// written are the resources that only MIC writes in this environment.
var written = []string{"azureassignedidentities", "configmaps", "events"}

// readWrites reads from the API server's metrics how many requests wrote the resources in written.
func readWrites(metrics string) (float64, error) {
	var writes float64
	for _, resource := range written {
		for _, verb := range writing {
			n, err := sumOf(metrics, "apiserver_request_total", fmt.Sprintf("resource=%q", resource), fmt.Sprintf("verb=%q", verb))
			if err != nil {
				return 0, err
			}
			writes += n
		}
	}
	return writes, nil
}
