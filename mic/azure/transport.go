package azure

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"

	"github.com/podidentity/podidentity/internal/outbound"
	"github.com/podidentity/podidentity/internal/text"
)

const (
	// maxResponse bounds a response of ARM. Scale sets with much configuration have some hundred KiB.
	maxResponse = 8 << 20
	// maxTokenResponse bounds a response to a token request.
	maxTokenResponse = 64 << 10
)

// httpClient returns the HTTP client for Azure. It uses HTTP/1.1, where each running request has its own connection: a
// request that hangs delays no other. For IMDS, which must never be reached through a proxy, proxy is nil.
func httpClient(roots *x509.CertPool, proxy func(*http.Request) (*url.URL, error)) *http.Client {
	dialer := &net.Dialer{Timeout: 10 * time.Second, KeepAlive: 30 * time.Second}
	return &http.Client{
		Transport: &http.Transport{
			Proxy:                  proxy,
			DialContext:            dialer.DialContext,
			TLSClientConfig:        &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12},
			TLSHandshakeTimeout:    10 * time.Second,
			MaxIdleConns:           64,
			MaxIdleConnsPerHost:    32,
			IdleConnTimeout:        60 * time.Second,
			MaxResponseHeaderBytes: 64 << 10,
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
}

// transporter reads each response completely, up to a bound and within the timeout of its request.
type transporter struct {
	next     policy.Transporter
	maxBytes int64
	// host is the only host to which requests may go, with its subdomains, and only over https; empty means any host.
	// Poll URLs come from ARM's responses, or from resume tokens, which are stored where others may write. MIC's token for
	// ARM must not be sent to another host because of such a URL.
	host string
}

func (t transporter) Do(r *http.Request) (*http.Response, error) {
	if to := strings.ToLower(r.URL.Hostname()); t.host != "" && (to != t.host && !strings.HasSuffix(to, "."+t.host) || r.URL.Scheme != "https") {
		return nil, foreignHostError(to)
	}
	seen, _ := r.Context().Value(lastResponseKey{}).(*lastResponse)
	resp, err := t.roundTrip(r)
	if seen != nil {
		seen.record(resp, err)
	}
	return resp, err
}

func (t transporter) roundTrip(r *http.Request) (*http.Response, error) {
	sent, err := outbound.WithOwnBody(r)
	if err != nil {
		return nil, err
	}
	resp, err := t.next.Do(sent)
	if err != nil {
		return nil, withoutURL(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, t.maxBytes+1))
	if err != nil {
		return nil, fmt.Errorf("reading the response: %w", withoutURL(err))
	}
	if int64(len(body)) > t.maxBytes {
		return nil, tooLargeError(t.maxBytes)
	}
	resp.Body = io.NopCloser(bytes.NewReader(body))
	return resp, nil
}

// withoutURL removes the URL from an error of net/http: the query of a poll URL gives access without a credential.
func withoutURL(err error) error {
	var u *url.Error
	if errors.As(err, &u) {
		return u.Err
	}
	return err
}

// foreignHostError is the error of a request to a host that is not ARM's, or without https.
type foreignHostError string

func (e foreignHostError) Error() string {
	return fmt.Sprintf("MIC sends no request to %q, because it is not the host of Azure Resource Manager or the URL is not https", text.OneLine(string(e), 253))
}

// NonRetriable keeps the Azure SDK from trying again.
func (foreignHostError) NonRetriable() {}

// tooLargeError is the error of a response above the bound.
type tooLargeError int64

func (t tooLargeError) Error() string {
	return fmt.Sprintf("the response is larger than %d bytes", int64(t))
}

// NonRetriable keeps the Azure SDK from trying again.
func (tooLargeError) NonRetriable() {}

type lastResponseKey struct{}

// lastResponse is the last response, or transport error, of a token request. Failures are classified by it and not by
// the errors of the SDK, because these do not always contain the status, and quote responses in full. The attempts of a
// request are sequential, so lastResponse needs no lock.
type lastResponse struct {
	status int
	header http.Header
	body   []byte
	err    error
}

func (w *lastResponse) record(resp *http.Response, err error) {
	*w = lastResponse{err: err}
	if err != nil {
		return
	}
	w.status, w.header = resp.StatusCode, resp.Header
	w.body, w.err = io.ReadAll(resp.Body)
	resp.Body = io.NopCloser(bytes.NewReader(w.body))
}

func timedOut(err error) bool {
	var timeout interface{ Timeout() bool }
	return errors.Is(err, context.DeadlineExceeded) || errors.As(err, &timeout) && timeout.Timeout()
}
