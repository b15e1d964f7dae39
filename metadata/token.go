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

// tokenBody has the fields of the real answer, in its order (alphabetical: one client library takes the last of
// expires_in and expires_on) and all as strings (numbers and empty strings break others).
type tokenBody struct {
	AccessToken  string `json:"access_token"`
	ClientID     string `json:"client_id,omitempty"`
	ExpiresIn    string `json:"expires_in"`
	ExpiresOn    string `json:"expires_on"`
	ExtExpiresIn string `json:"ext_expires_in"`
	NotBefore    string `json:"not_before"`
	Resource     string `json:"resource"`
	TokenType    string `json:"token_type"`
}

var buffers = sync.Pool{New: func() any { return new(bytes.Buffer) }}

// Write sends the token. expires_in is what is left of its life at now.
func (a TokenAnswer) Write(w http.ResponseWriter, now time.Time) {
	buf := buffers.Get().(*bytes.Buffer)
	defer buffers.Put(buf)
	buf.Reset()
	enc := json.NewEncoder(buf)
	enc.SetEscapeHTML(false) // "&" of a resource stays "&": byte for byte
	err := enc.Encode(tokenBody{
		AccessToken:  a.AccessToken,
		ClientID:     a.ClientID,
		ExpiresIn:    seconds(a.ExpiresOn.Sub(now)),
		ExpiresOn:    strconv.FormatInt(a.ExpiresOn.Unix(), 10),
		ExtExpiresIn: seconds(a.Lifetime),
		NotBefore:    strconv.FormatInt(a.NotBefore.Unix(), 10),
		Resource:     a.Resource,
		TokenType:    "Bearer",
	})
	if err != nil { // strings always encode
		panic(err)
	}
	w.Header()["Cache-Control"] = noStore
	writeJSON(w, http.StatusOK, bytes.TrimSuffix(buf.Bytes(), []byte("\n")))
}

var noStore = []string{"no-store"}

func seconds(d time.Duration) string {
	return strconv.FormatInt(int64(max(d, 0)/time.Second), 10)
}

// WriteInfo answers /metadata/identity/info.
func WriteInfo(w http.ResponseWriter, tenantID string) {
	body, err := json.Marshal(map[string]string{"tenantId": tenantID})
	if err != nil { // strings always marshal
		panic(err)
	}
	writeJSON(w, http.StatusOK, body)
}
