// Package metadata implements the protocol of the Azure Instance Metadata Service (IMDS): it parses a pod's request
// strictly, and writes a token, an error or the response of IMDS in the form that client libraries expect. It also
// parses requests to /host/token, with which programs of the node request tokens for a pod, as in AAD Pod Identity.
//
// It protects against requests that NMI and IMDS or Entra ID interpret differently: NMI would authorize one meaning,
// and IMDS or Entra ID would respond to the other. A path is decoded once and compared with a short list. Repeated
// parameters are refused. Requests to IMDS are built from parsed values, never from the client's text. Paths that
// return credentials of the VM are not on the list. Requests with an X-Forwarded-For header are refused: a proxy in the
// pod may have sent them for somebody else. Requests without the Metadata header are refused too, unless the
// configuration allows them: the pod may have fetched a URL that an attacker chose.
//
// The protocol is taken from Microsoft's documentation of the service
// (learn.microsoft.com/azure/virtual-machines/instance-metadata-service and
// learn.microsoft.com/entra/identity/managed-identities-azure-resources/how-to-use-vm-token), from captured responses
// of IMDS, and from the client libraries, which rely on more than is documented.
package metadata

import (
	"bytes"
	"encoding/json"
	"net/http"
	"strconv"
	"sync"
	"time"
)

// TokenResponse is the response with a token.
type TokenResponse struct {
	AccessToken string
	// ClientID of the identity; empty if NMI does not know it.
	ClientID string
	// Resource exactly as the client sent it: clients use it as a cache key.
	Resource  string
	ExpiresOn time.Time
	NotBefore time.Time
	// Lifetime of the token when NMI fetched it, not the remaining one.
	Lifetime time.Duration
}

var buffers = sync.Pool{New: func() any { return new([]byte) }}

// Write writes the token. expires_in is the remaining lifetime at now.
//
// The fields are those of IMDS's response, in the same alphabetical order: of expires_in and expires_on, one client
// library uses the one that comes last. All values are strings, because numbers break other libraries. An empty
// client_id also breaks libraries, so it is omitted.
func (a TokenResponse) Write(w http.ResponseWriter, now time.Time) {
	write(w, func(b []byte) []byte { return a.append(b, now) })
}

// WriteTokens writes the tokens of an identity with several tenants in the format of AAD Pod Identity: an array, with
// the token of the home tenant first.
func WriteTokens(w http.ResponseWriter, tokens []TokenResponse, now time.Time) {
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

func (a TokenResponse) append(b []byte, now time.Time) []byte {
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

// appendJSON appends s as a JSON string. Tokens are long and, like most resources, need no escaping, so the common case
// avoids the encoder.
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
	enc.SetEscapeHTML(false) // a resource must come back byte for byte, also with "&"
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

// WriteInfo writes the response to /metadata/identity/info.
func WriteInfo(w http.ResponseWriter, tenantID string) {
	body, err := json.Marshal(map[string]string{"tenantId": tenantID})
	if err != nil { // strings always marshal
		panic(err)
	}
	writeJSON(w, http.StatusOK, body)
}
