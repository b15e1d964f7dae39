package azure

import (
	"crypto/subtle"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/golang-jwt/jwt/v5"
)

// In responses of the v2.0 endpoint, expires_in and ext_expires_in are numbers. In
// responses of the v1.0 endpoint, they are strings.

type tokenAnswerV2 struct {
	TokenType    string `json:"token_type"`
	ExpiresIn    int    `json:"expires_in"`
	ExtExpiresIn int    `json:"ext_expires_in"`
	AccessToken  string `json:"access_token"`
}

type tokenAnswerV1 struct {
	TokenType    string `json:"token_type"`
	ExpiresIn    string `json:"expires_in"`
	ExtExpiresIn string `json:"ext_expires_in"`
	ExpiresOn    string `json:"expires_on"`
	NotBefore    string `json:"not_before"`
	Resource     string `json:"resource"`
	AccessToken  string `json:"access_token"`
}

// annotate sets the trace of the request. It adds the correlation ID to the log entry
// and, for a token request, the client ID, the kind of credential and the subject of
// a federated token. The entry has these values also if a fault replaces the response.
func (s *entra) annotate(x *requestContext) {
	x.trace = newTrace(x.Header.Get("Client-Request-Id"))
	x.entry.CorrelationID = x.trace.correlation
	if x.class != classToken {
		return
	}
	if form, err := url.ParseQuery(string(x.body)); err == nil {
		x.entry.ClientID = truncate(form.Get("client_id"))
		x.entry.Credential, x.entry.Subject = credentialIn(form)
	}
}

// credentialIn returns the kind of the credential in the form, and the subject of a
// federated token. It does not check the credential. kind is "" if there is no
// credential or the assertion is malformed.
func credentialIn(form url.Values) (kind, subject string) {
	assertion := form.Get("client_assertion")
	switch {
	case assertion == "" && form.Get("client_secret") != "":
		return CredentialSecret, ""
	case assertion == "":
		return "", ""
	}
	var claims jwt.RegisteredClaims
	if _, _, err := jwt.NewParser().ParseUnverified(assertion, &claims); err != nil {
		return "", ""
	}
	if selfIssued(claims, form.Get("client_id")) {
		return CredentialCertificate, ""
	}
	return CredentialFederated, truncate(claims.Subject)
}

func (s *entra) token(x *requestContext, tenant string, v2 bool) response {
	m, err := s.issueToken(x, tenant, v2)
	if err != nil {
		var e *entraError
		if !errors.As(err, &e) {
			e = &entraError{http.StatusInternalServerError, "server_error", 50000, err.Error()}
		}
		return s.refuse(x, e)
	}
	x.entry.TokenID = m.claims.TokenID
	left := m.expires().Sub(s.now())
	if v2 {
		n := int(left / time.Second)
		return withoutCaching(jsonResponse(200, tokenAnswerV2{"Bearer", n, n, m.raw}))
	}
	return withoutCaching(jsonResponse(200, tokenAnswerV1{
		TokenType: "Bearer", ExpiresIn: seconds(left), ExtExpiresIn: seconds(left),
		ExpiresOn: strconv.FormatInt(m.expires().Unix(), 10),
		NotBefore: strconv.FormatInt(m.claims.NotBefore.Unix(), 10),
		Resource:  m.claims.Audience, AccessToken: m.raw,
	}))
}

// issueToken issues a token in the client credentials flow, with any kind of credential.
func (s *entra) issueToken(x *requestContext, tenant string, v2 bool) (minted, error) {
	form, err := url.ParseQuery(string(x.body))
	if err != nil {
		return minted{}, &entraError{400, "invalid_request", 900144, "The request body is not a form."}
	}
	for _, name := range []string{"grant_type", "client_id"} {
		if form.Get(name) == "" {
			return minted{}, missing(name)
		}
	}
	if g := form.Get("grant_type"); g != "client_credentials" {
		return minted{}, &entraError{400, "unsupported_grant_type", 70003,
			fmt.Sprintf("The app requested an unsupported grant type '%s'.", g)}
	}
	p, ok := s.dir.principal(form.Get("client_id"))
	if !ok || !p.inTenant(tenant) {
		return minted{}, &entraError{400, "unauthorized_client", 700016, fmt.Sprintf(
			"Application with identifier '%s' was not found in the directory '%s'. "+
				"This can happen if the application has not been installed by the administrator of the tenant.",
			form.Get("client_id"), tenant)}
	}
	x.entry.ClientID = p.ClientID
	resource, err := requestedResource(form, v2)
	if err != nil {
		return minted{}, err
	}
	x.entry.Resource = truncate(resource)
	acr, err := s.authenticate(x, p, tenant, form)
	if err != nil {
		return minted{}, err
	}
	if !knownResource(resource) {
		return minted{}, unknownResource(resource, tenant)
	}
	p.TenantID = tenant
	return s.issuer.mint(p.Identity, resource, acr, x.faults.tokenLifetime)
}

func missing(name string) error {
	return &entraError{400, "invalid_request", 900144,
		fmt.Sprintf("The request body must contain the following parameter: '%s'.", name)}
}

// requestedResource returns the resource that the form requests. In a request to the
// v1.0 endpoint, this is the parameter resource. In a request to the v2.0 endpoint,
// exactly one scope must end in /.default: the resource is this scope without /.default.
// A trailing slash of the resource itself remains.
func requestedResource(form url.Values, v2 bool) (string, error) {
	if !v2 {
		if r := form.Get("resource"); r != "" {
			return r, nil
		}
		return "", missing("resource")
	}
	var resources []string
	for _, scope := range strings.Fields(form.Get("scope")) {
		if r, ok := strings.CutSuffix(scope, "/.default"); ok {
			resources = append(resources, r)
		} else if scope != "openid" && scope != "offline_access" && scope != "profile" {
			return "", &entraError{400, "invalid_scope", 1002012, fmt.Sprintf(
				"The provided value for scope %s is not valid. Client credential flows must have a scope value "+
					"with /.default suffixed to the resource identifier (application ID URI).", scope)}
		}
	}
	if len(resources) != 1 || resources[0] == "" {
		return "", &entraError{400, "invalid_scope", 70011, fmt.Sprintf(
			"The provided request must include a 'scope' input parameter. The provided value for the input parameter 'scope' is not valid. The scope %s is not valid.",
			form.Get("scope"))}
	}
	return resources[0], nil
}

const assertionType = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"

// authenticate checks the client's credential and returns the appidacr claim of the
// token.
func (s *entra) authenticate(x *requestContext, p principal, tenant string, form url.Values) (string, error) {
	switch {
	case form.Get("client_assertion") != "":
		if t := form.Get("client_assertion_type"); t != assertionType {
			return "", &entraError{400, "invalid_request", 50027, fmt.Sprintf("The client assertion type '%s' is not supported.", t)}
		}
		return acrKey, s.authenticateByAssertion(x, p, tenant, form.Get("client_assertion"))
	case form.Get("client_secret") != "":
		return acrSecret, s.authenticateBySecret(p, form.Get("client_secret"))
	}
	return "", &entraError{401, "invalid_client", 7000218,
		"The request body must contain the following parameter: 'client_assertion' or 'client_secret'."}
}

func (s *entra) authenticateBySecret(p principal, secret string) error {
	expired := false
	for _, have := range p.secrets {
		if subtle.ConstantTimeCompare([]byte(have.Value), []byte(secret)) != 1 {
			continue
		}
		if have.Expires.IsZero() || have.Expires.After(s.now()) {
			return nil
		}
		expired = true
	}
	if expired {
		return &entraError{401, "invalid_client", 7000222, fmt.Sprintf("The provided client secret keys for app '%s' are expired.", p.ClientID)}
	}
	return &entraError{401, "invalid_client", 7000215, fmt.Sprintf(
		"Invalid client secret provided. Ensure the secret being sent in the request is the client secret value, "+
			"not the client secret ID, for a secret added to app '%s'.", p.ClientID)}
}
