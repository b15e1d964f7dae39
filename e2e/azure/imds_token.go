package azure

import (
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"
)

// tokenAnswer has its fields in the order in which the real IMDS sends them and, like
// the real IMDS, strings instead of numbers.
type tokenAnswer struct {
	AccessToken  string `json:"access_token"`
	ClientID     string `json:"client_id"`
	ExpiresIn    string `json:"expires_in"`
	ExpiresOn    string `json:"expires_on"`
	ExtExpiresIn string `json:"ext_expires_in"`
	NotBefore    string `json:"not_before"`
	Resource     string `json:"resource"`
	TokenType    string `json:"token_type"`
}

// parseQuery parses a query like the real IMDS: names are not case-sensitive, & is the
// only separator, and a repeated name is an error. The names in the result are lower
// case.
func parseQuery(raw string) (map[string]string, error) {
	q := map[string]string{}
	for _, pair := range strings.Split(raw, "&") {
		if pair == "" {
			continue
		}
		name, value, _ := strings.Cut(pair, "=")
		name, errName := url.QueryUnescape(name)
		value, errValue := url.QueryUnescape(value)
		if errName != nil || errValue != nil {
			return nil, refusal("Invalid query string")
		}
		name = strings.ToLower(name)
		if _, twice := q[name]; twice {
			return nil, refusal(fmt.Sprintf("Query parameter '%s' is specified more than once", name))
		}
		q[name] = value
	}
	return q, nil
}

func selectorOf(q map[string]string) (selector, error) {
	sel := selector{clientID: q["client_id"], objectID: q["object_id"], resourceID: q["msi_res_id"]}
	given := 0
	for _, name := range []string{"client_id", "object_id", "msi_res_id", "mi_res_id"} {
		if q[name] != "" {
			given++
		}
	}
	if given > 1 {
		return sel, refusal("Only one of client_id, object_id and msi_res_id may be specified")
	}
	if sel.resourceID == "" {
		sel.resourceID = q["mi_res_id"]
	}
	return sel, nil
}

func (m *imds) token(x *requestContext, q map[string]string) response {
	resource := q["resource"]
	x.entry.Resource = truncate(resource)
	if resource == "" {
		return refuse(x, http.StatusBadRequest, "invalid_request", "Required audience parameter not specified")
	}
	sel, err := selectorOf(q)
	if err != nil {
		return refuse(x, http.StatusBadRequest, "invalid_request", err.Error())
	}
	id, err := m.dir.resolve(x.caller.node, sel)
	if err != nil {
		return refuse(x, http.StatusBadRequest, "invalid_request", err.Error())
	}
	x.entry.ClientID = id.ClientID
	if !knownResource(resource) {
		e := unknownResource(resource, id.TenantID)
		return refuse(x, http.StatusBadRequest, e.oauth, e.describe(newTrace(""), m.now()))
	}
	t, cached, err := m.fetch(x, cacheKey{x.caller.node, id, resource}, q["bypass_cache"] == "true")
	if err != nil {
		return refuse(x, http.StatusInternalServerError, "unknown", err.Error())
	}
	x.entry.TokenID, x.entry.Cached = t.claims.TokenID, cached
	return withServerHeader(jsonResponse(http.StatusOK, tokenAnswer{
		AccessToken: t.raw, ClientID: id.ClientID,
		ExpiresIn:    seconds(t.expires().Sub(m.now())),
		ExpiresOn:    strconv.FormatInt(t.expires().Unix(), 10),
		ExtExpiresIn: seconds(t.lifetime() - time.Second),
		NotBefore:    strconv.FormatInt(t.claims.NotBefore.Unix(), 10),
		Resource:     resource, TokenType: "Bearer",
	}))
}

func seconds(d time.Duration) string { return strconv.FormatInt(int64(max(d, 0)/time.Second), 10) }

// fetch returns a token, and whether it is from the cache. There is a cache because the
// real IMDS caches a token for most of its lifetime. fetch issues a new token if bypass
// is true, if the switch cache is off, or if the lifetime of the cached token differs
// from the switch token-lifetime. It also replaces a cached token in the last five
// minutes of its lifetime or, if the lifetime is shorter than an hour, in the last
// twelfth of it.
func (m *imds) fetch(x *requestContext, key cacheKey, bypass bool) (minted, bool, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !x.faults.cache {
		clear(m.cache) // a request while the cache is off also empties it
	} else if t, ok := m.cache[key]; ok && !bypass && t.lifetime() == x.faults.tokenLifetime.Truncate(time.Second) {
		if t.expires().Sub(m.now()) > min(5*time.Minute, t.lifetime()/12) {
			return t, true, nil
		}
	}
	t, err := m.issuer.mint(key.identity, key.resource, acrKey, x.faults.tokenLifetime)
	if err != nil {
		return minted{}, false, err
	}
	if x.faults.cache {
		if len(m.cache) >= m.maxKeys {
			clear(m.cache)
		}
		m.cache[key] = t
	}
	return t, false, nil
}

// knownResource reports whether a tenant has a service principal for the resource. Each
// tenant of the fake Azure has one for any GUID and any absolute URI, except for a URI
// whose host is under .invalid.
func knownResource(resource string) bool {
	if isGUID(strings.TrimSuffix(resource, "/")) {
		return true
	}
	u, err := url.Parse(resource)
	if err != nil || u.Scheme == "" || u.Host == "" && u.Opaque == "" && u.Path == "" {
		return false
	}
	host := u.Hostname()
	return host != "invalid" && !strings.HasSuffix(host, ".invalid")
}
