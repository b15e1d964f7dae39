package token

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"syscall"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"
)

const (
	// authorityConcurrent is the maximum number of concurrent requests to one authority. Each authority has its own
	// limit, so an authority that hangs delays only requests to itself.
	authorityConcurrent = 8
	// authorityHosts bounds the number of semaphores that are kept, one for each host. An evicted host starts with a
	// new semaphore.
	authorityHosts = 256
)

// authorities is the transport to Entra ID, or to the host that an AzureIdentity names instead. Users who may create an
// AzureIdentity choose that host, and this process runs in the node's network. To keep these users from reaching
// services that only the node can reach, the transport does not connect to an address for which forbidden returns true.
// NMI sets forbidden to isNodeAddress, which returns true for loopback and link-local addresses and Azure's WireServer,
// among others.
type authorities struct {
	// direct connects to the host of the request, unless the address is forbidden. proxied connects to the HTTP proxy.
	direct, proxied http.RoundTripper
	// proxy returns the proxy for a request, from environment variables such as HTTPS_PROXY. The operator of NMI
	// chooses the proxy, so the proxy itself may have any address.
	proxy     func(*http.Request) (*url.URL, error)
	forbidden func(netip.Addr) bool
	hosts     *lru.Cache[string, semaphore]
}

func newAuthorities(roots *x509.CertPool) (*authorities, error) {
	hosts, err := lru.New[string, semaphore](authorityHosts)
	if err != nil {
		return nil, err
	}
	a := &authorities{proxy: http.ProxyFromEnvironment, forbidden: isNodeAddress, hosts: hosts}
	guarded := &net.Dialer{Timeout: 5 * time.Second, ControlContext: a.checkAddress}
	unguarded := &net.Dialer{Timeout: 5 * time.Second}
	a.direct = authorityTransport(roots, nil, guarded)
	a.proxied = authorityTransport(roots, func(r *http.Request) (*url.URL, error) { return a.proxy(r) }, unguarded)
	return a, nil
}

func authorityTransport(roots *x509.CertPool, proxy func(*http.Request) (*url.URL, error), dialer *net.Dialer) *http.Transport {
	return &http.Transport{
		Proxy:                  proxy,
		DialContext:            dialer.DialContext,
		TLSClientConfig:        &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12},
		TLSHandshakeTimeout:    5 * time.Second,
		MaxIdleConns:           32,
		MaxIdleConnsPerHost:    authorityConcurrent,
		IdleConnTimeout:        30 * time.Second,
		ResponseHeaderTimeout:  10 * time.Second,
		MaxResponseHeaderBytes: 16 << 10,
	}
}

// RoundTrip implements http.RoundTripper. It first acquires a slot of the host's semaphore, and returns an error if the
// request's context ends before that.
func (a *authorities) RoundTrip(r *http.Request) (*http.Response, error) {
	if r.URL.Scheme != "https" {
		return nil, errNotHTTPS
	}
	transport := a.direct
	if proxy, err := a.proxy(r); err != nil {
		return nil, err
	} else if proxy != nil {
		// The proxy resolves host names and decides itself which addresses it connects to. So RoundTrip can check only
		// a host that is an IP address.
		if ip, err := netip.ParseAddr(r.URL.Hostname()); err == nil && a.forbidden(ip) {
			return nil, nodeAddressError(ip)
		}
		transport = a.proxied
	}
	return a.slots(strings.ToLower(r.URL.Host)).roundTrip(r, transport.RoundTrip)
}

var errNotHTTPS = &Error{Class: Denied, Detail: "the host that spec.adEndpoint or --authority-host names returned the address of a token endpoint without https; NMI sends no credential there; correct spec.adEndpoint or --authority-host"}

func (a *authorities) slots(host string) semaphore {
	if s, ok := a.hosts.Get(host); ok {
		return s
	}
	s := make(semaphore, authorityConcurrent)
	if earlier, ok, _ := a.hosts.PeekOrAdd(host, s); ok {
		return earlier
	}
	return s
}

// checkAddress returns an error if address is forbidden. The dialer of the transport direct calls it before each
// connection, with the IP address and port that it is about to connect to. An earlier check of the host name would not
// be enough, because the name could resolve to another address when the dialer connects.
func (a *authorities) checkAddress(_ context.Context, _, address string, _ syscall.RawConn) error {
	ap, err := netip.ParseAddrPort(address)
	if err != nil {
		return fmt.Errorf("checking the address of the authority: %w", err)
	}
	if a.forbidden(ap.Addr()) {
		return nodeAddressError(ap.Addr())
	}
	return nil
}

// wireServer is the address of Azure's WireServer, which like IMDS serves only the VM itself.
var wireServer = netip.AddrFrom4([4]byte{168, 63, 129, 16})

func isNodeAddress(ip netip.Addr) bool {
	ip = ip.Unmap()
	return ip.IsLoopback() || ip.IsLinkLocalUnicast() || ip.IsUnspecified() || ip.IsMulticast() || ip == wireServer
}

// nodeAddressError says that NMI does not connect to an address, because isNodeAddress returns true for it.
type nodeAddressError netip.Addr

func (n nodeAddressError) Error() string {
	return netip.Addr(n).String() + " is an address of the node itself, a link-local or multicast address, or Azure's WireServer"
}

// NonRetriable keeps the Azure SDK from retrying: NMI would refuse the address again.
func (nodeAddressError) NonRetriable() {}
