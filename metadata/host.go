package metadata

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strconv"
	"time"

	"github.com/podidentity/podidentity/identity"
)

// Headers by which a program of the node says whose token it wants.
const (
	headerPodNamespace = "podns"
	headerPodName      = "podname"
)

// maxName bounds the name of a namespace or a pod, as Kubernetes does.
const maxName = 253

// ParseHostToken reads a request for /host/token, by which a program of the node asks for a token on behalf of a pod:
// the Azure provider of the Secrets Store CSI driver and the Key Vault FlexVolume do, before the pod runs. It is the
// predecessor's own protocol, not IMDS's: headers name the pod, no Metadata header is wanted, and no api-version. Whether
// the caller may speak for pods is for whoever listens to see to.
func ParseHostToken(r *http.Request) (Request, *Error) {
	req := Request{Route: RouteUnknown}
	rawPath, rawQuery := split(r)
	path, err := normalise(rawPath)
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
			return req, malformed(fmt.Sprintf("the headers %s and %s must each be given once; they name the pod that the token is for", headerPodNamespace, headerPodName))
		}
		*into = given[0]
	}
	values, problem := parameters(rawQuery)
	if problem != "" {
		return req, malformed(problem)
	}
	return parseWhatToken(req, values)
}

// hostAnswer has the field names of the predecessor.
type hostAnswer struct {
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

// WriteHostToken sends the token as the answer to a request for /host/token.
func (a TokenAnswer) WriteHostToken(w http.ResponseWriter, now time.Time) {
	var answer hostAnswer
	answer.ClientID = a.ClientID
	t := &answer.Token
	t.AccessToken, t.Resource, t.Type = a.AccessToken, a.Resource, "Bearer"
	t.ExpiresIn = strconv.FormatInt(int64(max(a.ExpiresOn.Sub(now), 0)/time.Second), 10)
	t.ExpiresOn, t.NotBefore = strconv.FormatInt(a.ExpiresOn.Unix(), 10), strconv.FormatInt(a.NotBefore.Unix(), 10)
	body, err := json.Marshal(answer)
	if err != nil { // strings always marshal
		panic(err)
	}
	w.Header()["Cache-Control"] = noStore
	writeJSON(w, http.StatusOK, body)
}
