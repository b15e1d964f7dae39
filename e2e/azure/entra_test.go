package azure

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"io"
	"math/big"
	"net/http"
	"net/url"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/cloud"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"
	"github.com/Azure/azure-sdk-for-go/sdk/azidentity"
	"github.com/golang-jwt/jwt/v5"
)

const (
	audience  = "api://AzureADTokenExchange"
	clusterID = "https://cluster.test"
	account   = "system:serviceaccount:ns:sa"
	vault     = "https://vault.azure.net/.default"
)

var app = App{ClientID: guid(30), ObjectID: guid(31), Secrets: []AppSecret{{Value: "hush"}}}

// https returns a client that trusts only the CA of the fake Azure.
func (s *fakeAzure) https() *http.Client {
	s.t.Helper()
	ca, err := os.ReadFile(stateDir + "/" + CAFile)
	s.must(err)
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(ca) {
		s.t.Fatalf("%s in %s contains no CA certificate", CAFile, stateDir)
	}
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool}, ForceAttemptHTTP2: true}
	s.t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport}
}

func (s *fakeAzure) options() policy.ClientOptions {
	return policy.ClientOptions{
		Cloud: cloud.Configuration{ActiveDirectoryAuthorityHost: "https://" + s.at.Entra}, Transport: s.https(),
		Retry: policy.RetryOptions{MaxRetries: -1},
	}
}

// ask posts a form to a path of the fake Entra ID, and returns the status and the body
// of the response.
func (s *fakeAzure) ask(path string, form url.Values) (int, map[string]any) {
	s.t.Helper()
	resp, err := s.https().PostForm("https://"+s.at.Entra+path, form)
	s.must(err)
	defer resp.Body.Close()
	data, err := io.ReadAll(resp.Body)
	s.must(err)
	var body map[string]any
	s.must(json.Unmarshal(data, &body))
	return resp.StatusCode, body
}

func bySecret(change ...string) url.Values {
	v := url.Values{"grant_type": {"client_credentials"}, "client_id": {app.ClientID}, "client_secret": {"hush"}, "scope": {vault}}
	for i := 0; i < len(change); i += 2 {
		v.Set(change[i], change[i+1])
	}
	return v
}

func (s *fakeAzure) tokenOf(cred azcore.TokenCredential, scope string) Claims {
	s.t.Helper()
	token, err := cred.GetToken(s.t.Context(), policy.TokenRequestOptions{Scopes: []string{scope}})
	s.must(err)
	claims, err := s.Verify(token.Token)
	s.must(err)
	return claims
}

func TestAnUnmodifiedClientGetsATokenWithASecret(t *testing.T) {
	s := start(t)
	s.must(s.AddApp(t.Context(), app))
	cred, err := azidentity.NewClientSecretCredential(tenant, app.ClientID, "hush", &azidentity.ClientSecretCredentialOptions{
		ClientOptions: s.options(), DisableInstanceDiscovery: true,
	})
	s.must(err)
	claims := s.tokenOf(cred, "https://management.core.windows.net//.default")
	if claims.Audience != "https://management.core.windows.net/" || claims.AppID != app.ClientID || claims.ObjectID != app.ObjectID ||
		claims.TenantID != tenant || claims.AppIDACR != acrSecret || claims.ResourceID != "" {
		t.Errorf("claims %+v, want the application, its tenant, the requested audience, and a secret in appidacr",
			claims)
	}
	if e := s.lastEntry(); e.Service != serviceEntra || e.ClientID != app.ClientID || e.TokenID != claims.TokenID ||
		e.Resource != "https://management.core.windows.net/" {
		t.Errorf("logged %+v, want Entra ID, the client ID, the resource, and the token ID of the token", e)
	}
	entries, err := s.Log(t.Context(), 0)
	s.must(err)
	if text := string(encode(entries)); strings.Contains(text, "hush") {
		t.Error("the secret is in the log")
	}
}

func makeCert(t *testing.T, notAfter time.Time) (*rsa.PrivateKey, *x509.Certificate, string) {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "app"},
		NotBefore: notAfter.Add(-48 * time.Hour), NotAfter: notAfter}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return key, cert, string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
}

func TestAnUnmodifiedClientGetsATokenWithACertificate(t *testing.T) {
	s := start(t)
	key, cert, text := makeCert(t, time.Now().Add(time.Hour))
	a := app
	a.Secrets, a.Certificates = nil, []string{text}
	s.must(s.AddApp(t.Context(), a))
	cred, err := azidentity.NewClientCertificateCredential(tenant, a.ClientID, []*x509.Certificate{cert}, crypto.PrivateKey(key),
		&azidentity.ClientCertificateCredentialOptions{ClientOptions: s.options(), DisableInstanceDiscovery: true})
	s.must(err)
	if claims := s.tokenOf(cred, vault); claims.AppIDACR != acrKey || claims.Audience != "https://vault.azure.net" {
		t.Errorf("claims %+v, want the requested audience, and a key in appidacr", claims)
	}
}

// cluster issues tokens of ServiceAccounts.
type cluster struct{ *issuer }

func newCluster(t *testing.T) cluster {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	return cluster{newIssuer(key, time.Now)}
}

func (c cluster) token(t *testing.T, issuer, subject, audience string, expires time.Time) string {
	t.Helper()
	return signed(t, jwt.SigningMethodRS256, c.key, map[string]any{"kid": c.kid}, jwt.RegisteredClaims{
		Issuer: issuer, Subject: subject, Audience: jwt.ClaimStrings{audience}, ExpiresAt: jwt.NewNumericDate(expires),
	})
}

func signed(t *testing.T, method jwt.SigningMethod, key any, header map[string]any, claims jwt.Claims) string {
	t.Helper()
	token := jwt.NewWithClaims(method, claims)
	for name, value := range header {
		token.Header[name] = value
	}
	raw, err := token.SignedString(key)
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

func (c cluster) trusted() FederatedCredential {
	return FederatedCredential{Issuer: clusterID, Subject: account, Audience: audience, JWKS: c.jwks()}
}

func TestAServiceAccountTokenIsExchangedForAManagedIdentitysToken(t *testing.T) {
	s, c := start(t), newCluster(t)
	s.add(red)
	s.must(s.AddFederated(t.Context(), red.ClientID, c.trusted()))
	file := t.TempDir() + "/token"
	s.must(os.WriteFile(file, []byte(c.token(t, clusterID, account, audience, time.Now().Add(time.Hour))), 0o600))
	cred, err := azidentity.NewWorkloadIdentityCredential(&azidentity.WorkloadIdentityCredentialOptions{
		ClientOptions: s.options(), DisableInstanceDiscovery: true, ClientID: red.ClientID, TenantID: tenant, TokenFilePath: file,
	})
	s.must(err)
	if claims := s.tokenOf(cred, vault); claims.ObjectID != red.ObjectID || claims.ResourceID != red.ResourceID {
		t.Errorf("claims %+v, want the object ID and the resource ID of red", claims)
	}
}

func TestEachInvalidAssertionHasItsErrorCode(t *testing.T) {
	s, c, foreign := start(t), newCluster(t), newCluster(t)
	later, past := time.Now().Add(time.Hour), time.Now().Add(-time.Hour)
	key, cert, text := makeCert(t, later)
	oldKey, oldCert, oldText := makeCert(t, past)
	a := app
	a.Certificates = []string{text, oldText}
	a.Federated = []FederatedCredential{c.trusted()}
	s.must(s.AddApp(t.Context(), a))
	bare := App{ClientID: guid(40), ObjectID: guid(41)}
	s.must(s.AddApp(t.Context(), bare))
	endpoint := "https://" + s.at.Entra + "/" + tenant + "/oauth2/v2.0/token"
	own := func(k *rsa.PrivateKey, x *x509.Certificate, sub, aud string, exp time.Time) string {
		sum := sha256.Sum256(x.Raw)
		return signed(t, jwt.SigningMethodPS256, k, map[string]any{"x5t#S256": base64.RawURLEncoding.EncodeToString(sum[:])},
			jwt.RegisteredClaims{Issuer: a.ClientID, Subject: sub, Audience: jwt.ClaimStrings{aud}, ExpiresAt: jwt.NewNumericDate(exp)})
	}
	_, unknown, _ := makeCert(t, later)
	elliptical, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	s.must(err)
	curved := signed(t, jwt.SigningMethodES256, elliptical, map[string]any{"kid": c.kid}, jwt.RegisteredClaims{
		Issuer: clusterID, Subject: account, Audience: jwt.ClaimStrings{audience}, ExpiresAt: jwt.NewNumericDate(later)})
	for name, ask := range map[string]struct {
		client, assertion string
		code              float64 // 0: accepted
	}{
		"certificate":                {a.ClientID, own(key, cert, a.ClientID, endpoint, later), 0},
		"certificate, other subject": {a.ClientID, own(key, cert, guid(9), endpoint, later), 700021},
		"certificate, audience":      {a.ClientID, own(key, cert, a.ClientID, "https://elsewhere.test", later), 700023},
		"certificate, assertion old": {a.ClientID, own(key, cert, a.ClientID, endpoint, past), 700024},
		"certificate, not known":     {a.ClientID, own(key, unknown, a.ClientID, endpoint, later), 700027},
		"certificate, signature":     {a.ClientID, own(oldKey, cert, a.ClientID, endpoint, later), 700027},
		"certificate, expired":       {a.ClientID, own(oldKey, oldCert, a.ClientID, endpoint, later), 1000502},
		"federated":                  {a.ClientID, c.token(t, clusterID, account, audience, later), 0},
		"federated, none":            {bare.ClientID, c.token(t, clusterID, account, audience, later), 70025},
		"federated, issuer":          {a.ClientID, c.token(t, clusterID+"/", account, audience, later), 700211},
		"federated, subject":         {a.ClientID, c.token(t, clusterID, strings.ToUpper(account), audience, later), 700213},
		"federated, audience":        {a.ClientID, c.token(t, clusterID, account, "else", later), 700212},
		"federated, old":             {a.ClientID, c.token(t, clusterID, account, audience, past), 700024},
		"federated, signature":       {a.ClientID, foreign.token(t, clusterID, account, audience, later), 50013},
		"federated, elliptic":        {a.ClientID, curved, 5002738},
		"no JWT":                     {a.ClientID, "nonsense", 50027},
	} {
		status, body := s.ask("/"+tenant+"/oauth2/v2.0/token", byAssertion(ask.client, ask.assertion))
		if ask.code == 0 {
			if status != 200 {
				t.Errorf("%s: got %d %v, want status 200", name, status, body)
			}
			continue
		}
		if codes, _ := body["error_codes"].([]any); status != 401 || len(codes) != 1 || codes[0] != ask.code {
			t.Errorf("%s: got %d %v, want status 401 and the error code of this case", name, status, body)
		}
	}
}

func TestEachInvalidRequestHasItsErrorCode(t *testing.T) {
	s := start(t)
	a := app
	a.Secrets = []AppSecret{{Value: "hush"}, {Value: "stale", Expires: time.Now().Add(-time.Hour)}}
	s.must(s.AddApp(t.Context(), a))
	home := "/" + tenant + "/oauth2/v2.0/token"
	for name, c := range map[string]struct {
		path   string
		form   url.Values
		status int
		oauth  string
		code   float64
	}{
		"tenant":         {"/" + guid(99) + "/oauth2/v2.0/token", bySecret(), 400, "invalid_request", 90002},
		"client":         {home, bySecret("client_id", guid(98)), 400, "unauthorized_client", 700016},
		"no client":      {home, bySecret("client_id", ""), 400, "invalid_request", 900144},
		"grant type":     {home, bySecret("grant_type", "password"), 400, "unsupported_grant_type", 70003},
		"secret":         {home, bySecret("client_secret", "wrong"), 401, "invalid_client", 7000215},
		"expired secret": {home, bySecret("client_secret", "stale"), 401, "invalid_client", 7000222},
		"no credential":  {home, bySecret("client_secret", ""), 401, "invalid_client", 7000218},
		"no scope":       {home, bySecret("scope", ""), 400, "invalid_scope", 70011},
		"two scopes":     {home, bySecret("scope", vault+" https://other.test/.default"), 400, "invalid_scope", 70011},
		"user scope":     {home, bySecret("scope", "https://vault.azure.net/read"), 400, "invalid_scope", 1002012},
		"resource":       {home, bySecret("scope", "https://nothing.invalid/.default"), 400, "invalid_resource", 500011},
		"path":           {"/" + tenant + "/oauth2/v3.0/token", bySecret(), 404, "invalid_request", 90026},
	} {
		status, body := s.ask(c.path, c.form)
		codes, _ := body["error_codes"].([]any)
		if status != c.status || body["error"] != c.oauth || len(codes) != 1 || codes[0] != c.code {
			t.Errorf("%s: got %d %v, want the status and the error codes of this case", name, status, body)
		}
		for _, field := range []string{"error_description", "timestamp", "trace_id", "correlation_id", "error_uri"} {
			if text, _ := body[field].(string); text == "" {
				t.Errorf("%s: the field %s is missing or empty in %v", name, field, body)
			}
		}
	}
}

func TestTheOldEndpointReturnsStringsAndTheNewOneNumbers(t *testing.T) {
	s := start(t)
	s.must(s.AddApp(t.Context(), app))
	status, v2 := s.ask("/"+tenant+"/oauth2/v2.0/token", bySecret())
	if _, number := v2["expires_in"].(float64); status != 200 || !number || v2["expires_on"] != nil || v2["token_type"] != "Bearer" {
		t.Errorf("v2.0 endpoint: got %d %v, want expires_in as a number", status, v2)
	}
	status, v1 := s.ask("/"+tenant+"/oauth2/token", bySecret("resource", "https://vault.azure.net/"))
	if _, text := v1["expires_in"].(string); status != 200 || !text || v1["resource"] != "https://vault.azure.net/" || v1["expires_on"] == nil {
		t.Errorf("v1.0 endpoint: got %d %v, want expires_in as a string", status, v1)
	}
}

func TestAnApplicationGetsTokensOfEachOfItsTenants(t *testing.T) {
	s := start(t)
	a := app
	a.Tenants = []string{tenant, guid(50)}
	s.must(s.AddApp(t.Context(), a))
	for _, in := range a.Tenants {
		_, body := s.ask("/"+in+"/oauth2/v2.0/token", bySecret())
		raw, _ := body["access_token"].(string)
		claims, err := s.Verify(raw)
		if err != nil || claims.TenantID != in || claims.Issuer != "https://sts.windows.net/"+in+"/" {
			t.Errorf("token of tenant %s: claims %+v, error %v; want this tenant in tid and iss", in, claims, err)
		}
	}
}

func TestDiscoveryReturnsTheHostOfTheRequest(t *testing.T) {
	s := start(t)
	base := "https://" + s.at.Entra
	for path, want := range map[string]string{
		"/" + tenant + "/v2.0/.well-known/openid-configuration": `"issuer":"` + base + `/` + tenant + `/v2.0"`,
		"/" + tenant + "/discovery/v2.0/keys":                   `"kty":"RSA"`,
		"/common/discovery/instance?api-version=1.1&authorization_endpoint=" + base + "/" + tenant + "/oauth2/v2.0/authorize": `"tenant_discovery_endpoint":"` + base + `/` + tenant + `/v2.0/`,
	} {
		resp, err := s.https().Get(base + path)
		s.must(err)
		body, err := io.ReadAll(resp.Body)
		s.must(err)
		resp.Body.Close()
		if resp.StatusCode != 200 || !strings.Contains(string(body), want) {
			t.Errorf("GET %s: got %d %s, want 200 and the text of this case", path, resp.StatusCode, body)
		}
	}
}

func TestFaultsOfEntraIDDoNotAffectIMDS(t *testing.T) {
	s := start(t)
	s.must(s.AddApp(t.Context(), app))
	s.add(red)
	s.set("entra.throttle=1", "entra.retry-after=9")
	resp, err := s.https().PostForm("https://"+s.at.Entra+"/"+tenant+"/oauth2/v2.0/token", bySecret())
	s.must(err)
	resp.Body.Close()
	if resp.StatusCode != 429 || resp.Header.Get("Retry-After") != "9" {
		t.Errorf("got status %d, headers %v; want 429 with Retry-After 9", resp.StatusCode, resp.Header)
	}
	s.set("entra.drop=true")
	if resp, err := s.https().PostForm("https://"+s.at.Entra+"/"+tenant+"/oauth2/v2.0/token", bySecret()); err == nil {
		resp.Body.Close()
		t.Errorf("with the switch entra.drop: got status %d, want no response", resp.StatusCode)
	}
	s.get(nodeA, tokenQuery).token(t)
}
