package main

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
)

// calls has the numbers of requests that the API server, Entra ID and IMDS received.
type calls struct {
	// To the API server: all requests for Secrets, including active watches, and requests for ServiceAccount tokens.
	secrets, assertions int
	// To Entra ID: for the metadata of a tenant, for tokens, and others.
	documents, tokens, otherEntra int
	imds                          int
}

func (c calls) minus(b calls) calls {
	return calls{c.secrets - b.secrets, c.assertions - b.assertions, c.documents - b.documents, c.tokens - b.tokens, c.otherEntra - b.otherEntra, c.imds - b.imds}
}

func (c calls) plus(b calls) calls { return c.minus(calls{}.minus(b)) }

// calls returns the current counts of the services.
func (r *environment) calls(ctx context.Context, k clients) (calls, error) {
	stats, err := r.azure.Stats(ctx)
	if err != nil {
		return calls{}, err
	}
	c := calls{documents: stats.Entra.ByClass["openid"], tokens: stats.Entra.Token.Requests, imds: stats.IMDS.All.Requests}
	c.otherEntra = stats.Entra.All.Requests - c.documents - c.tokens
	text, err := k.kube.CoreV1().RESTClient().Get().AbsPath("/metrics").DoRaw(ctx)
	if err != nil {
		return calls{}, fmt.Errorf("reading the metrics of the API server: %w", err)
	}
	return c, c.readAPI(string(text))
}

// readAPI adds the counts in the API server's metrics to c. apiserver_request_total counts a watch when it ends, and
// apiserver_longrunning_requests counts the active watches: their sum counts each watch once.
func (c *calls) readAPI(metrics string) error {
	known := false
	for line := range strings.Lines(metrics) {
		name, rest, _ := strings.Cut(line, "{")
		if name != "apiserver_request_total" && name != "apiserver_longrunning_requests" {
			continue
		}
		known = true
		var to *int
		switch {
		case strings.Contains(rest, `resource="secrets"`):
			to = &c.secrets
		case strings.Contains(rest, `resource="serviceaccounts"`) && strings.Contains(rest, `subresource="token"`):
			to = &c.assertions
		default:
			continue
		}
		fields := strings.Fields(rest)
		n, err := strconv.ParseFloat(fields[len(fields)-1], 64)
		if err != nil {
			return fmt.Errorf("reading the metric %s of the API server: %w", name, err)
		}
		*to += int(n)
	}
	if !known {
		return errors.New("the metrics of the API server contain neither apiserver_request_total nor apiserver_longrunning_requests")
	}
	return nil
}
