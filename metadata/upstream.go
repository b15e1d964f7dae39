package metadata

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httputil"
	"net/netip"
	"net/url"
	"time"

	"golang.org/x/time/rate"

	"github.com/podidentity/podidentity/identity"
)

const instancePath = "/metadata/instance"

// The real service allows a machine 5 requests a second to everything but tokens. All pods of the node share them; one
// that finds none left waits this long at most. A real answer has some 10 KiB.
const (
	passRate     = 5
	passWait     = 2 * time.Second
	passTimeout  = 10 * time.Second
	maxPassBytes = 1 << 20
)

// Upstream passes descriptions of the machine on from the real service: RouteInstance, RouteVersions,
// RouteLoadBalancer, and RouteInfo where no tenant is configured.
type Upstream struct {
	proxy   *httputil.ReverseProxy
	limiter *rate.Limiter
}

type upstreamKey struct{}

// NewUpstream passes requests on to the real service at addr.
func NewUpstream(addr netip.AddrPort) *Upstream {
	u := &Upstream{limiter: rate.NewLimiter(passRate, 1)}
	dial := func(ctx context.Context, network, _ string) (net.Conn, error) {
		// Whatever the URL says, there is one place to go.
		return (&net.Dialer{Timeout: 2 * time.Second}).DialContext(ctx, network, addr.String())
	}
	u.proxy = &httputil.ReverseProxy{
		// Rewrite, unlike Director, adds no X-Forwarded-For, which the real service refuses.
		Rewrite: func(p *httputil.ProxyRequest) {
			target := p.In.Context().Value(upstreamKey{}).(*url.URL)
			p.Out.URL, p.Out.Host = target, addr.String()
			p.Out.Method, p.Out.Body, p.Out.ContentLength = http.MethodGet, nil, 0
			p.Out.Header = http.Header{"Metadata": {"true"}, "User-Agent": {"podidentity-nmi"}}
		},
		Transport: &http.Transport{
			Proxy:                  nil, // the service must never be reached through a proxy
			DialContext:            dial,
			MaxConnsPerHost:        passRate,
			MaxIdleConnsPerHost:    1,
			IdleConnTimeout:        30 * time.Second,
			ResponseHeaderTimeout:  passTimeout,
			MaxResponseHeaderBytes: 16 << 10,
			DisableCompression:     true,
		},
		ModifyResponse: func(r *http.Response) error {
			if r.ContentLength > maxPassBytes {
				return fmt.Errorf("the answer has %d bytes, more than the %d that are passed on", r.ContentLength, maxPassBytes)
			}
			r.Body = bounded{io.LimitReader(r.Body, maxPassBytes), r.Body}
			return nil
		},
		ErrorHandler: func(w http.ResponseWriter, _ *http.Request, err error) {
			unreachable(err).Write(w)
		},
		// Every request has its own line in NMI's log; what the proxy has to say beyond that is about clients that left.
		ErrorLog: log.New(io.Discard, "", 0),
	}
	return u
}

type bounded struct {
	io.Reader
	io.Closer
}

func unreachable(err error) *Error {
	detail := "The metadata service of the machine did not answer"
	if errors.Is(err, context.DeadlineExceeded) {
		detail += " in time"
	}
	return Unavailable(identity.UpstreamUnavailable, detail, time.Second)
}

// Pass answers the request with what the real service says. It returns an error, with nothing written, when the node
// has used up its budget.
func (u *Upstream) Pass(w http.ResponseWriter, r *http.Request, req Request) *Error {
	waiting, cancel := context.WithTimeout(r.Context(), passWait)
	defer cancel()
	if err := u.limiter.Wait(waiting); err != nil {
		return Throttled(identity.UpstreamThrottled, fmt.Sprintf("The pods of this node have used up the %d requests a second that the metadata service allows", passRate), time.Second)
	}
	ctx, cancel := context.WithTimeout(context.WithValue(r.Context(), upstreamKey{}, req.upstreamURL()), passTimeout)
	defer cancel()
	u.proxy.ServeHTTP(w, r.WithContext(ctx))
	return nil
}

// upstreamURL is built from the route and from parsed values alone.
func (req Request) upstreamURL() *url.URL {
	target := &url.URL{Scheme: "http", Host: "imds"}
	switch req.Route {
	case RouteInstance:
		target.Path = instancePath + req.Field
	case RouteVersions:
		target.Path = "/metadata/versions"
	case RouteLoadBalancer:
		target.Path = "/metadata/loadbalancer"
	case RouteInfo:
		target.Path = "/metadata/identity/info"
	}
	q := url.Values{}
	if req.APIVersion != "" {
		q.Set("api-version", req.APIVersion)
	}
	if req.Format != "" {
		q.Set("format", req.Format)
	}
	target.RawQuery = q.Encode()
	return target
}
