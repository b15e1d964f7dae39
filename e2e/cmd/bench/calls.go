package main

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
)

// calls is what was asked of others since they began.
type calls struct {
	// The API server: requests for Secrets of any kind, watches under way among them, and for tokens of ServiceAccounts.
	secrets, assertions int
	// Entra ID: what it is asked about a tenant, for tokens, and anything else.
	documents, tokens, otherEntra int
	imds                          int
}

func (c calls) minus(b calls) calls {
	return calls{c.secrets - b.secrets, c.assertions - b.assertions, c.documents - b.documents, c.tokens - b.tokens, c.otherEntra - b.otherEntra, c.imds - b.imds}
}

func (c calls) plus(b calls) calls { return c.minus(calls{}.minus(b)) }

// calls asks those who were asked.
func (r *environment) calls(ctx context.Context, k clients) (calls, error) {
	stats, err := r.azure.Stats(ctx)
	if err != nil {
		return calls{}, err
	}
	c := calls{documents: stats.Entra.ByClass["openid"], tokens: stats.Entra.Token.Requests, imds: stats.IMDS.All.Requests}
	c.otherEntra = stats.Entra.All.Requests - c.documents - c.tokens
	text, err := k.kube.CoreV1().RESTClient().Get().AbsPath("/metrics").DoRaw(ctx)
	if err != nil {
		return calls{}, fmt.Errorf("asking the API server what it was asked: %w", err)
	}
	return c, c.readAPI(string(text))
}

// readAPI takes the counts of the API server from its metrics. It counts a watch once that ends, and those that run
// elsewhere: the two together are those that have begun.
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
			return fmt.Errorf("reading the API server's metrics: %w", err)
		}
		*to += int(n)
	}
	if !known {
		return errors.New("the API server does not count its requests")
	}
	return nil
}
