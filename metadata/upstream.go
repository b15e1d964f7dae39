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

// IMDS allows a VM 5 requests per second for everything except tokens. All pods of the node share this budget. A
// request waits for its turn at most forwardWait. A response of IMDS has about 10 KiB, far less than maxForwardBytes.
const (
	forwardRate     = 5
	forwardWait     = 2 * time.Second
	forwardTimeout  = 10 * time.Second
	maxForwardBytes = 1 << 20
)

// Upstream forwards requests for descriptions of the VM to IMDS: RouteInstance, RouteVersions, RouteLoadBalancer, and
// RouteInfo if no tenant is configured.
type Upstream struct {
	proxy   *httputil.ReverseProxy
	limiter *rate.Limiter
}

type upstreamKey struct{}

// NewUpstream returns an Upstream that forwards requests to IMDS at addr.
func NewUpstream(addr netip.AddrPort) *Upstream {
	u := &Upstream{limiter: rate.NewLimiter(forwardRate, 1)}
	dial := func(ctx context.Context, network, _ string) (net.Conn, error) {
		// Always connect to addr, whatever the URL contains.
		return (&net.Dialer{Timeout: 2 * time.Second}).DialContext(ctx, network, addr.String())
	}
	u.proxy = &httputil.ReverseProxy{
		// Unlike Director, Rewrite adds no X-Forwarded-For, which IMDS refuses.
		Rewrite: func(p *httputil.ProxyRequest) {
			target := p.In.Context().Value(upstreamKey{}).(*url.URL)
			p.Out.URL, p.Out.Host = target, addr.String()
			p.Out.Method, p.Out.Body, p.Out.ContentLength = http.MethodGet, nil, 0
			p.Out.Header = http.Header{"Metadata": {"true"}, "User-Agent": {"podidentity-nmi"}}
		},
		Transport: &http.Transport{
			Proxy:                  nil, // IMDS must never be reached through a proxy
			DialContext:            dial,
			MaxConnsPerHost:        forwardRate,
			MaxIdleConnsPerHost:    1,
			IdleConnTimeout:        30 * time.Second,
			ResponseHeaderTimeout:  forwardTimeout,
			MaxResponseHeaderBytes: 16 << 10,
			DisableCompression:     true,
		},
		ModifyResponse: func(r *http.Response) error {
			if r.ContentLength > maxForwardBytes {
				return fmt.Errorf("the response of IMDS has %d bytes; NMI forwards at most %d", r.ContentLength, maxForwardBytes)
			}
			r.Body = limitedBody{io.LimitReader(r.Body, maxForwardBytes), r.Body}
			return nil
		},
		ErrorHandler: func(w http.ResponseWriter, _ *http.Request, err error) {
			unreachable(err).Write(w)
		},
		// NMI logs every request. In addition the proxy would only log that it could not copy a response body completely.
		ErrorLog: log.New(io.Discard, "", 0),
	}
	return u
}

type limitedBody struct {
	io.Reader
	io.Closer
}

func unreachable(err error) *Error {
	detail := "Forwarding the request to the metadata service of the VM failed: " + err.Error()
	if errors.Is(err, context.DeadlineExceeded) {
		detail = "The metadata service of the VM did not respond in time"
	}
	return Unavailable(identity.UpstreamUnavailable, detail, time.Second)
}

// Forward forwards the request to IMDS. It writes the response of IMDS, or an Unavailable error if forwarding fails. It
// returns an error, and writes nothing, if the request gets no turn within forwardWait or the client disconnects before
// that.
func (u *Upstream) Forward(w http.ResponseWriter, r *http.Request, req Request) *Error {
	waitCtx, cancel := context.WithTimeout(r.Context(), forwardWait)
	defer cancel()
	if err := u.limiter.Wait(waitCtx); err != nil {
		return Throttled(identity.UpstreamThrottled, fmt.Sprintf("The pods of this node have used up the %d requests per second that the metadata service allows", forwardRate), time.Second)
	}
	ctx, cancel := context.WithTimeout(context.WithValue(r.Context(), upstreamKey{}, req.upstreamURL()), forwardTimeout)
	defer cancel()
	u.proxy.ServeHTTP(w, r.WithContext(ctx))
	return nil
}

// upstreamURL builds the URL only from the route and parsed values.
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
