package main

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"
)

// maxCold is the greatest number of fresh identities of each source. Each needs a pod of its own, and so does the
// additional identity that createAll creates last.
var maxCold = (pods - 1) / len(sources)

// coldPause is the time between two first tokens. During this time, the API server updates its counts, and NMI's rate
// limit for IMDS recovers, so that the limit does not delay the next request.
const coldPause = 100 * time.Millisecond

// first is how long the request for the first token of one identity took, and the calls that it caused.
type first struct {
	took time.Duration
	cost calls
}

// cold measures the first token of n identities of each source: NMI has no token, credential, Secret or tenant metadata
// for such an identity in a cache, and its pod has never requested a token of this identity. cold requests one token at
// a time and alternates between the sources, so that noise affects all sources equally.
func (r *environment) cold(ctx context.Context, n int) (map[string][]first, error) {
	k, err := newClients(r.cluster)
	if err != nil {
		return nil, err
	}
	freshIdentities, err := r.createAll(ctx, k, n)
	if err != nil {
		return nil, err
	}
	before, err := r.calls(ctx, k)
	if err != nil {
		return nil, err
	}
	all := map[string][]first{}
	for _, one := range freshIdentities {
		took, err := r.requestFirstToken(ctx, one)
		if err != nil {
			return nil, fmt.Errorf("first token of %s (%s): %w", one.name(), one.source, err)
		}
		time.Sleep(coldPause)
		after, err := r.calls(ctx, k)
		if err != nil {
			return nil, err
		}
		all[one.source] = append(all[one.source], first{took, after.minus(before)})
		before = after
	}
	return all, nil
}

// createAll creates the fresh identities, and returns them when NMI knows all of them. It does not request their
// tokens: it creates one more identity last, and requests a token of this last identity until NMI returns one. NMI
// receives the objects of each kind in the order of their changes, so NMI then knows all identities.
func (r *environment) createAll(ctx context.Context, k clients, n int) ([]freshIdentity, error) {
	p, err := r.newCredentials(ctx)
	if err != nil {
		return nil, err
	}
	var freshIdentities []freshIdentity
	for i := range n * len(sources) {
		freshIdentities = append(freshIdentities, p.freshIdentity(sources[i%len(sources)], i))
	}
	if err := inParallel(len(freshIdentities), func(i int) error { return r.create(ctx, k, freshIdentities[i]) }); err != nil {
		return nil, err
	}
	last := p.freshIdentity(managed, len(freshIdentities))
	if err := r.create(ctx, k, last); err != nil {
		return nil, err
	}
	for range 300 {
		if _, err = r.requestFirstToken(ctx, last); err == nil {
			return freshIdentities, nil
		}
		time.Sleep(100 * time.Millisecond)
	}
	return nil, fmt.Errorf("no token of %s, the last new identity, in 300 attempts: %w", last.name(), err)
}

// requestFirstToken requests a token of the identity over a new connection, and returns how long that took.
func (r *environment) requestFirstToken(ctx context.Context, n freshIdentity) (time.Duration, error) {
	client := r.nmi.client(n.pod)
	defer client.http.CloseIdleConnections()
	began := time.Now()
	body, err := client.once(ctx)
	took := time.Since(began)
	if err != nil {
		return 0, err
	}
	var answer struct {
		AccessToken string `json:"access_token"`
	}
	if err := json.Unmarshal(body, &answer); err != nil {
		return 0, fmt.Errorf("decoding the response to the token request: %w", err)
	}
	claims, err := r.azure.Verify(answer.AccessToken)
	if err != nil {
		return 0, err
	}
	if !strings.EqualFold(claims.AppID, n.id.ClientID) {
		return 0, fmt.Errorf("the token is for client ID %s, not for %s", claims.AppID, n.id.ClientID)
	}
	return took, nil
}

// reportCold prints and records the figures of the first tokens. Of 2 to maxCold values, the p99 is the second slowest.
func reportCold(figures map[string]float64, all map[string][]first) {
	printLine("\nfirst token of an identity (nothing cached), for %d identities of each source, one at a time; requests to other services per token\n", len(all[managed]))
	printLine("%12s  %8s %8s   %19s   %14s   %5s", "", "", "", "API server", "Entra ID", "")
	printLine("%12s  %8s %8s   %7s %11s   %6s %7s   %5s", "source", "p50", "p99", "Secrets", "SA tokens", "tenant", "tokens", "IMDS")
	for _, source := range sources {
		var took []time.Duration
		var cost calls
		for _, f := range all[source] {
			took, cost = append(took, f.took), cost.plus(f.cost)
		}
		slices.Sort(took)
		p50, p99 := quantile(took, .5), quantile(took, .99)
		each := func(n int) float64 { return float64(n) / float64(len(took)) }
		printLine("%12s  %8s %8s   %7.2f %11.2f   %6.2f %7.2f   %5.2f", source, p50, p99,
			each(cost.secrets), each(cost.assertions), each(cost.documents), each(cost.tokens), each(cost.imds))
		key := "token.cold." + source
		figures[key+".p50_ms"] = float64(p50.Microseconds()) / 1000
		figures[key+".p99_ms"] = float64(p99.Microseconds()) / 1000
		figures[key+".api_calls"] = each(cost.secrets + cost.assertions)
		figures[key+".entra_calls"] = each(cost.documents + cost.tokens + cost.otherEntra)
		figures[key+".imds_calls"] = each(cost.imds)
	}
}
