package main

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// sumOf adds up the values of all lines of a metric, in the text form that Prometheus reads, that have all of the labels
// (name="value").
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

// writing are the verbs with which objects are written, as the API server counts them, and as methods of HTTP.
var writing = []string{"POST", "PUT", "PATCH", "DELETE"}

// requests is what was asked of the API server.
type requests struct {
	all, writes float64
}

// readRequests takes from the metrics of a client of the API server what it has asked.
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

// written are the kinds of objects that nobody but MIC writes where only MIC is.
var written = []string{"azureassignedidentities", "configmaps", "events"}

// readWrites takes from the API server's metrics how often such objects were written.
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
