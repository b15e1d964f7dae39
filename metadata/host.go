package metadata

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strconv"
	"time"

	"github.com/podidentity/podidentity/identity"
)

// Headers with which a program of the node names the pod that the token is for.
const (
	headerPodNamespace = "podns"
	headerPodName      = "podname"
)

// maxName is the greatest length, in bytes, of the name of a pod that Kubernetes allows. Names of namespaces are
// shorter.
const maxName = 253

// ParseHostToken parses a request for /host/token, with which a program of the node requests a token on behalf of a
// pod: the Azure provider of the Secrets Store CSI driver and the Key Vault FlexVolume do that before the pod runs. The
// protocol is that of AAD Pod Identity, not of IMDS: headers name the pod, and neither a Metadata header nor an
// api-version is required. ParseHostToken does not check that the client may request tokens for pods; the server must.
func ParseHostToken(r *http.Request) (Request, *Error) {
	req := Request{Route: RouteUnknown}
	rawPath, rawQuery := split(r)
	path, err := normalize(rawPath)
	if err != nil {
		return req, &Error{Status: http.StatusBadRequest, Code: codeBadRequest, Description: "Invalid request path", Reason: identity.PathRefused}
	}
	if path != "/host/token" {
		return req, &Error{Status: http.StatusNotFound, Code: codeNotFound, Description: "No such endpoint", Reason: identity.PathUnknown}
	}
	req.Route = RouteHostToken
	if _, forwarded := r.Header["X-Forwarded-For"]; forwarded {
		return req, &Error{Status: http.StatusBadRequest, Code: codeInvalid, Description: "Requests with an X-Forwarded-For header are not served", Reason: identity.Forwarded}
	}
	if r.Method != http.MethodGet {
		return req, &Error{Status: http.StatusMethodNotAllowed, Code: codeMethod, Description: "Only GET is allowed", Reason: identity.MethodNotAllowed}
	}
	for name, into := range map[string]*string{headerPodNamespace: &req.PodNamespace, headerPodName: &req.PodName} {
		given := r.Header[http.CanonicalHeaderKey(name)]
		if len(given) != 1 || given[0] == "" || len(given[0]) > maxName || !printable(given[0]) {
			return req, malformed(fmt.Sprintf("the headers %s and %s must each be present once, and contain the namespace and the name of the pod that the token is for", headerPodNamespace, headerPodName))
		}
		*into = given[0]
	}
	values, problem := parameters(rawQuery)
	if problem != "" {
		return req, malformed(problem)
	}
	return parseTokenParameters(req, values)
}

// hostTokenResponse has the field names of AAD Pod Identity.
type hostTokenResponse struct {
	Token struct {
		AccessToken  string `json:"access_token"`
		RefreshToken string `json:"refresh_token"` // always empty
		ExpiresIn    string `json:"expires_in"`
		ExpiresOn    string `json:"expires_on"`
		NotBefore    string `json:"not_before"`
		Resource     string `json:"resource"`
		Type         string `json:"token_type"`
	} `json:"token"`
	ClientID string `json:"clientid"`
}

// WriteHostToken writes the token as the response to a request for /host/token.
func (a TokenResponse) WriteHostToken(w http.ResponseWriter, now time.Time) {
	var response hostTokenResponse
	response.ClientID = a.ClientID
	t := &response.Token
	t.AccessToken, t.Resource, t.Type = a.AccessToken, a.Resource, "Bearer"
	t.ExpiresIn = strconv.FormatInt(int64(max(a.ExpiresOn.Sub(now), 0)/time.Second), 10)
	t.ExpiresOn, t.NotBefore = strconv.FormatInt(a.ExpiresOn.Unix(), 10), strconv.FormatInt(a.NotBefore.Unix(), 10)
	body, err := json.Marshal(response)
	if err != nil { // strings always marshal
		panic(err)
	}
	w.Header()["Cache-Control"] = noStore
	writeJSON(w, http.StatusOK, body)
}
