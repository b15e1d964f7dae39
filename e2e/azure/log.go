package azure

import (
	"net/http"
	"strings"
	"time"
)

// Kinds of log entries.
const (
	// KindRequest is a request and its outcome.
	KindRequest = "request"
	// KindConnection is a TCP connection to IMDS whose source address is not that of a
	// node, even if it carries no request. While NMI runs, there must be no such
	// connection. All other connections are only counted, in Stats.
	KindConnection = "connection"
)

// Kinds of credentials in token requests to Entra ID.
const (
	CredentialSecret      = "secret"
	CredentialCertificate = "certificate"
	CredentialFederated   = "federated"
)

// Entry is one entry of the log of IMDS and Entra ID. A request is logged before its
// response is written, so that a test finds the entry as soon as a client has the
// response.
type Entry struct {
	Seq      int               `json:"seq"` // never reset, so that the parameter since of Client.Log stays valid
	Time     time.Time         `json:"time"`
	Kind     string            `json:"kind"`
	Service  string            `json:"service"`
	Node     string            `json:"node"` // empty: the source address belongs to no node
	Source   string            `json:"source"`
	FromPod  bool              `json:"from_pod"`
	Class    string            `json:"class,omitempty"`
	Method   string            `json:"method,omitempty"`
	Path     string            `json:"path,omitempty"` // raw request URI
	Headers  map[string]string `json:"headers,omitempty"`
	Status   int               `json:"status"` // 0: no response (dropped, or the client disconnected)
	Error    string            `json:"error,omitempty"`
	ClientID string            `json:"client_id,omitempty"`
	Resource string            `json:"resource,omitempty"`
	TokenID  string            `json:"token_id,omitempty"` // the uti claim of the token in the response
	Cached   bool              `json:"cached,omitempty"`   // the token is from the cache of IMDS
	// CorrelationID, Credential and Subject are only set for Entra ID. CorrelationID is
	// the response header Client-Request-Id. Subject is the subject of a federated token.
	CorrelationID string  `json:"correlation_id,omitempty"`
	Credential    string  `json:"credential,omitempty"`
	Subject       string  `json:"subject,omitempty"`
	DurationMS    float64 `json:"duration_ms"`
}

const (
	logCapacity    = 100_000
	maxLoggedBytes = 4 << 10 // of one text from a request
)

// ring keeps the newest entries and counts those it dropped. Its owner's lock
// guards it.
type ring[T any, P interface {
	*T
	number(seq int)
}] struct {
	capacity int
	entries  []T
	oldest   int // index of the oldest entry once the ring is full
	seq      int
	dropped  int
}

// requestLog is the log of IMDS and Entra ID. The recorder owns it.
type requestLog = ring[Entry, *Entry]

func (e *Entry) number(seq int) { e.Seq = seq }

func (l *ring[T, P]) add(e T) {
	l.seq++
	P(&e).number(l.seq)
	if len(l.entries) < l.capacity {
		l.entries = append(l.entries, e)
		return
	}
	l.entries[l.oldest] = e
	l.oldest = (l.oldest + 1) % l.capacity
	l.dropped++
}

// since returns the entries with a sequence number greater than seq, oldest first.
func (l *ring[T, P]) since(seq int) []T {
	n := len(l.entries)
	skip := min(max(0, n-(l.seq-seq)), n)
	out := make([]T, 0, n-skip)
	for i := skip; i < n; i++ {
		out = append(out, l.entries[(l.oldest+i)%n])
	}
	return out
}

func (l *ring[T, P]) reset() {
	l.entries, l.oldest, l.dropped = nil, 0, 0
}

// loggedHeaders are the request headers in the log. User-Agent names the client. IMDS
// refuses a request without Metadata and a request with X-Forwarded-For. A header with
// an empty value is logged, too, because IMDS refuses even an empty X-Forwarded-For.
var loggedHeaders = []string{"Metadata", "User-Agent", "X-Forwarded-For"}

func headersOf(r *http.Request) map[string]string {
	out := map[string]string{}
	for _, name := range loggedHeaders {
		if values, ok := r.Header[name]; ok {
			out[name] = truncate(strings.Join(values, ", "))
		}
	}
	return out
}

func truncate(s string) string {
	if len(s) > maxLoggedBytes {
		return s[:maxLoggedBytes] + "…"
	}
	return s
}
