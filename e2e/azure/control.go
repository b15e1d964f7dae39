package azure

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strconv"
)

// Addresses are the listen addresses of IMDS and of Entra ID, with the actual port if
// port 0 was configured. ARM has the address of Entra ID.
type Addresses struct {
	IMDS  string `json:"imds"`
	Entra string `json:"entra"`
}

type identityRequest struct {
	Identity Identity `json:"identity"`
	Nodes    []string `json:"nodes,omitempty"`
}

type detachRequest struct {
	ID    string   `json:"id"` // client, object or resource ID of an identity; client ID of an application
	Nodes []string `json:"nodes,omitempty"`
}

type federatedRequest struct {
	ClientID   string              `json:"clientID"`
	Credential FederatedCredential `json:"credential"`
}

type controlError struct {
	Error string `json:"error"`
}

// control is the API of the unix socket. It checks no credentials: the mode of the
// socket lets only root and the user that runs the fake Azure open it.
type control struct {
	dir       *directory
	arm       *ARM
	switches  *switches
	rec       *recorder
	keys      Keys
	addresses Addresses
}

func (c *control) handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /ready", serveJSON(func() any { return c.addresses }))
	mux.HandleFunc("GET /keys", serveJSON(func() any { return c.keys }))
	mux.HandleFunc("GET /stats", serveJSON(func() any {
		stats := c.rec.stats()
		stats.ARM = c.arm.Stats()
		return stats
	}))
	mux.HandleFunc("GET /log", c.log)
	mux.HandleFunc("DELETE /log", func(w http.ResponseWriter, _ *http.Request) {
		c.rec.reset()
		c.arm.ResetLog()
		respond(w, nil)
	})
	mux.HandleFunc("GET /switches", serveJSON(func() any { return c.switches.all() }))
	mux.HandleFunc("PATCH /switches", acceptJSON(c.switches.set))
	mux.HandleFunc("GET /identities", serveJSON(func() any { return c.dir.listIdentities() }))
	mux.HandleFunc("PUT /identities", acceptJSON(func(q identityRequest) error { return c.dir.addIdentity(q.Identity, q.Nodes) }))
	mux.HandleFunc("POST /identities/detach", acceptJSON(func(q detachRequest) error { return c.dir.detach(q.ID, q.Nodes) }))
	mux.HandleFunc("DELETE /identities", acceptJSON(func(q detachRequest) error {
		c.dir.removeIdentity(q.ID)
		return nil
	}))
	mux.HandleFunc("PUT /apps", acceptJSON(c.dir.addApp))
	mux.HandleFunc("DELETE /apps", acceptJSON(func(q detachRequest) error {
		c.dir.removeApp(q.ID)
		return nil
	}))
	mux.HandleFunc("PUT /federated", acceptJSON(func(q federatedRequest) error { return c.dir.addFederated(q.ClientID, q.Credential) }))
	mux.HandleFunc("DELETE /federated", acceptJSON(func(q federatedRequest) error {
		c.dir.removeFederated(q.ClientID, q.Credential.Issuer, q.Credential.Subject)
		return nil
	}))
	c.handleARM(mux)
	return mux
}

func serveJSON(value func() any) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		_, _ = w.Write(append(encode(value()), '\n'))
	}
}

// acceptJSON decodes the request body, calls apply, and responds with status 204
// or, after an error, 400. An unknown field in the body is an error.
func acceptJSON[T any](apply func(T) error) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		var q T
		dec := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxBodyBytes))
		dec.DisallowUnknownFields()
		if err := dec.Decode(&q); err != nil {
			respond(w, fmt.Errorf("decoding the request body: %w", err))
			return
		}
		respond(w, apply(q))
	}
}

func respond(w http.ResponseWriter, err error) {
	if err == nil {
		w.WriteHeader(http.StatusNoContent)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(http.StatusBadRequest)
	_, _ = w.Write(append(encode(controlError{err.Error()}), '\n'))
}

func (c *control) log(w http.ResponseWriter, r *http.Request) { serveLines(w, r, c.rec.entries) }

// serveLines responds with the entries as JSON lines. The query parameter since
// selects the entries with a greater sequence number.
func serveLines[T any](w http.ResponseWriter, r *http.Request, entries func(since int) []T) {
	since := 0
	if text := r.URL.Query().Get("since"); text != "" {
		n, err := strconv.Atoi(text)
		if err != nil || n < 0 {
			respond(w, fmt.Errorf("query parameter since=%q is not a sequence number", text))
			return
		}
		since = n
	}
	w.Header().Set("Content-Type", "application/x-ndjson")
	enc := json.NewEncoder(w)
	enc.SetEscapeHTML(false)
	for _, e := range entries(since) {
		if enc.Encode(e) != nil {
			return // the client has disconnected
		}
	}
}
