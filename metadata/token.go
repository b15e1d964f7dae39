// Package metadata speaks the protocol of the Azure Instance Metadata Service (IMDS): it reads a pod's request
// strictly and writes a token, an error or what the real service says, in the form that client libraries expect.
//
// What it protects against: requests that mean one thing to the reader that authorises and another to the one that
// answers. A path is decoded once and compared with a short list; parameters that come twice, forwarded requests and
// requests without the Metadata header are refused; whatever goes to the real service is built here from parsed parts
// and never from the client's text. Paths that hand out credentials of the machine are not on the list.
//
// The facts about the protocol are from Microsoft's documentation of the service
// (learn.microsoft.com/azure/virtual-machines/instance-metadata-service and
// learn.microsoft.com/entra/identity/managed-identities-azure-resources/how-to-use-vm-token), from captures of real
// answers, and from the client libraries, which rely on more than is documented.
package metadata

import (
	"bytes"
	"encoding/json"
	"net/http"
	"strconv"
	"sync"
	"time"
)

// TokenAnswer is a token on its way to a client.
type TokenAnswer struct {
	AccessToken string
	// ClientID is the identity's; empty for an identity the request did not name and nobody knows the ID of.
	ClientID string
	// Resource is echoed as the client wrote it: clients use it as a key of their caches.
	Resource  string
	ExpiresOn time.Time
	NotBefore time.Time
	// Lifetime is that of the token when it was issued; it does not count down.
	Lifetime time.Duration
}

var buffers = sync.Pool{New: func() any { return new([]byte) }}

// Write sends the token. expires_in is what is left of its life at now.
//
// The fields are those of the real answer, in its order (alphabetical: one client library takes the last of expires_in
// and expires_on) and all as strings (numbers and empty strings break others).
func (a TokenAnswer) Write(w http.ResponseWriter, now time.Time) {
	write(w, func(b []byte) []byte { return a.append(b, now) })
}

// WriteTokens sends the tokens of an identity of several tenants, as the predecessor did: an array, the home tenant's
// first.
func WriteTokens(w http.ResponseWriter, tokens []TokenAnswer, now time.Time) {
	write(w, func(b []byte) []byte {
		b = append(b, '[')
		for i, t := range tokens {
			if i > 0 {
				b = append(b, ',')
			}
			b = t.append(b, now)
		}
		return append(b, ']')
	})
}

func write(w http.ResponseWriter, body func([]byte) []byte) {
	pooled := buffers.Get().(*[]byte)
	defer buffers.Put(pooled)
	*pooled = body((*pooled)[:0])
	w.Header()["Cache-Control"] = noStore
	writeJSON(w, http.StatusOK, *pooled)
}

func (a TokenAnswer) append(b []byte, now time.Time) []byte {
	b = appendJSON(append(b, `{"access_token":`...), a.AccessToken)
	if a.ClientID != "" {
		b = appendJSON(append(b, `,"client_id":`...), a.ClientID)
	}
	b = appendSeconds(append(b, `,"expires_in":`...), a.ExpiresOn.Sub(now))
	b = appendNumber(append(b, `,"expires_on":`...), a.ExpiresOn.Unix())
	b = appendSeconds(append(b, `,"ext_expires_in":`...), a.Lifetime)
	b = appendNumber(append(b, `,"not_before":`...), a.NotBefore.Unix())
	b = appendJSON(append(b, `,"resource":`...), a.Resource)
	return append(b, `,"token_type":"Bearer"}`...)
}

// appendJSON appends a string of JSON. Tokens and most resources need no escaping, and a token is long.
func appendJSON(b []byte, s string) []byte {
	for i := range len(s) {
		if c := s[i]; c < 0x20 || c >= 0x7f || c == '"' || c == '\\' {
			return appendEscaped(b, s)
		}
	}
	return append(append(append(b, '"'), s...), '"')
}

func appendEscaped(b []byte, s string) []byte {
	var escaped bytes.Buffer
	enc := json.NewEncoder(&escaped)
	enc.SetEscapeHTML(false) // "&" of a resource stays "&": byte for byte
	if err := enc.Encode(s); err != nil {
		panic(err) // strings always encode
	}
	return append(b, bytes.TrimSuffix(escaped.Bytes(), []byte("\n"))...)
}

func appendSeconds(b []byte, d time.Duration) []byte {
	return appendNumber(b, int64(max(d, 0)/time.Second))
}

func appendNumber(b []byte, n int64) []byte {
	return append(strconv.AppendInt(append(b, '"'), n, 10), '"')
}

var noStore = []string{"no-store"}

// WriteInfo answers /metadata/identity/info.
func WriteInfo(w http.ResponseWriter, tenantID string) {
	body, err := json.Marshal(map[string]string{"tenantId": tenantID})
	if err != nil { // strings always marshal
		panic(err)
	}
	writeJSON(w, http.StatusOK, body)
}
