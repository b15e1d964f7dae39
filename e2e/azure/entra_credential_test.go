package azure

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/pem"
	"maps"
	"math/big"
	"net"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore/cloud"
	"github.com/Azure/azure-sdk-for-go/sdk/azidentity"
	"github.com/golang-jwt/jwt/v5"
)

// byAssertion returns the form of a token request with the assertion.
func byAssertion(clientID, assertion string) url.Values {
	return url.Values{"grant_type": {"client_credentials"}, "client_id": {clientID}, "scope": {vault},
		"client_assertion_type": {assertionType}, "client_assertion": {assertion}}
}

func TestEachCurveHasItsSignatureAlgorithm(t *testing.T) {
	s := start(t)
	endpoint := "https://" + s.at.Entra + "/" + tenant + "/oauth2/v2.0/token"
	a := app
	type signer struct {
		method *jwt.SigningMethodECDSA
		key    *ecdsa.PrivateKey
		header map[string]any
	}
	var signers []signer
	for _, c := range []struct {
		curve  elliptic.Curve
		method *jwt.SigningMethodECDSA
	}{{elliptic.P256(), jwt.SigningMethodES256}, {elliptic.P384(), jwt.SigningMethodES384}, {elliptic.P521(), jwt.SigningMethodES512}} {
		key, err := ecdsa.GenerateKey(c.curve, rand.Reader)
		s.must(err)
		template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "app"},
			NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour)}
		der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
		s.must(err)
		a.Certificates = append(a.Certificates, string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})))
		sum := sha256.Sum256(der)
		signers = append(signers, signer{c.method, key, map[string]any{"x5t#S256": base64.RawURLEncoding.EncodeToString(sum[:])}})
	}
	s.must(s.AddApp(t.Context(), a))
	claims := jwt.RegisteredClaims{Issuer: a.ClientID, Subject: a.ClientID, Audience: jwt.ClaimStrings{endpoint}, ExpiresAt: jwt.NewNumericDate(time.Now().Add(time.Minute))}
	for i, one := range signers {
		good := signed(t, one.method, one.key, one.header, claims)
		if status, body := s.ask("/"+tenant+"/oauth2/v2.0/token", byAssertion(a.ClientID, good)); status != 200 {
			t.Errorf("%s: token request got %d %v, want 200", one.method.Name, status, body)
		}
		// The header of this assertion names the certificate of other, but the key of one signs it.
		other := signers[(i+1)%len(signers)]
		status, body := s.ask("/"+tenant+"/oauth2/v2.0/token", byAssertion(a.ClientID, signed(t, one.method, one.key, other.header, claims)))
		if codes, _ := body["error_codes"].([]any); status != 401 || len(codes) != 1 || codes[0] != 700027.0 {
			t.Errorf("%s with another certificate: token request got %d %v, want 401 with code 700027",
				one.method.Name, status, body)
		}
	}
}

func TestEachResponseHasTheIDsOfItsLogEntry(t *testing.T) {
	s := start(t)
	s.must(s.AddApp(t.Context(), app))
	send := func(method, path, correlation string, form url.Values) *http.Response {
		t.Helper()
		req, err := http.NewRequestWithContext(t.Context(), method, "https://"+s.at.Entra+path, strings.NewReader(form.Encode()))
		s.must(err)
		req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
		if correlation != "" {
			req.Header.Set("client-request-id", correlation)
		}
		resp, err := s.https().Do(req)
		s.must(err)
		resp.Body.Close()
		return resp
	}
	endpoint := "/" + tenant + "/oauth2/v2.0/token"
	seen := map[string]bool{}
	for _, c := range []struct {
		method, path string
		form         url.Values
		status       int
	}{
		{"POST", endpoint, bySecret(), 200},
		{"POST", "/" + tenant + "/oauth2/token", bySecret("resource", "https://vault.azure.net"), 200},
		{"POST", endpoint, bySecret("client_secret", "wrong"), 401},
		{"GET", "/" + tenant + "/v2.0/.well-known/openid-configuration", nil, 200},
		{"GET", "/nothing", nil, 404},
	} {
		for _, sent := range []string{guid(60), "", "no GUID"} {
			resp := send(c.method, c.path, sent, c.form)
			got, request := resp.Header.Get("client-request-id"), resp.Header.Get("x-ms-request-id")
			if resp.StatusCode != c.status || !isGUID(got) || !isGUID(request) || (got == sent) != isGUID(sent) || seen[request] {
				t.Errorf("%s %s for client-request-id %q: got %d, client-request-id %q, x-ms-request-id %q; want GUIDs",
					c.method, c.path, sent, resp.StatusCode, got, request)
			}
			seen[request] = true
			if e := s.lastEntry(); e.CorrelationID != got {
				t.Errorf("%s: logged %+v, want the correlation ID of the response, %q", c.path, e, got)
			}
		}
	}
}

func TestLogAndCountsDistinguishCredentials(t *testing.T) {
	s, c := start(t), newCluster(t)
	s.must(s.AddApp(t.Context(), app))
	s.must(s.AddFederated(t.Context(), app.ClientID, c.trusted()))
	key, cert, text := makeCert(t, time.Now().Add(time.Hour))
	a := app
	a.Certificates = []string{text}
	s.must(s.AddApp(t.Context(), a))
	endpoint := "/" + tenant + "/oauth2/v2.0/token"
	sum := sha256.Sum256(cert.Raw)
	own := signed(t, jwt.SigningMethodPS256, key, map[string]any{"x5t#S256": base64.RawURLEncoding.EncodeToString(sum[:])}, jwt.RegisteredClaims{
		Issuer: a.ClientID, Subject: a.ClientID, Audience: jwt.ClaimStrings{"https://" + s.at.Entra + endpoint}, ExpiresAt: jwt.NewNumericDate(time.Now().Add(time.Hour))})
	for _, one := range []struct {
		form                      url.Values
		credential, subject, want string
	}{
		{bySecret(), CredentialSecret, "", ""},
		{byAssertion(a.ClientID, own), CredentialCertificate, "", ""},
		{byAssertion(a.ClientID, c.token(t, clusterID, account, audience, time.Now().Add(time.Hour))), CredentialFederated, account, ""},
		{byAssertion(a.ClientID, c.token(t, clusterID, "other", audience, time.Now().Add(time.Hour))), CredentialFederated, "other", "AADSTS700213"},
		{byAssertion(a.ClientID, "nonsense"), "", "", "AADSTS50027"},
	} {
		s.ask(endpoint, one.form)
		if e := s.lastEntry(); e.Credential != one.credential || e.Subject != one.subject || e.ClientID != a.ClientID || !strings.Contains(e.Error, one.want) {
			t.Errorf("logged %+v, want the credential, the subject and the error of %+v", e, one)
		}
	}
	s.set("entra.status=503") // a request counts even if a fault replaces its response
	s.ask(endpoint, bySecret())
	resp, err := s.https().Get("https://" + s.at.Entra + "/" + tenant + "/v2.0/.well-known/openid-configuration")
	s.must(err)
	resp.Body.Close()
	want := map[string]int{CredentialSecret: 2, CredentialCertificate: 1, CredentialFederated: 2, "": 1}
	if st := s.stats().Entra; !maps.Equal(st.ByCredential, want) || st.ByClass["openid"] != 1 || st.Token.Requests != 6 {
		t.Errorf("counts of Entra ID %+v, want 6 token requests by credential as in the test, and 1 of class openid",
			st)
	}
	if n := len(s.stats().IMDS.ByCredential); n != 0 {
		t.Errorf("IMDS counts %d kinds of credentials, want 0: requests to IMDS have none", n)
	}
}

// Clients compare the host of the issuer with the host of the authority, so the fake Entra ID must use the host of each
// request in its responses.
func TestUnmodifiedClientsGetTokensAtEachHost(t *testing.T) {
	s := start(t, func(c *Config) { c.EntraHosts = []string{"login.a.test", "10.246.0.2", "login.b.test"} })
	s.must(s.AddApp(t.Context(), app))
	key, cert, text := makeCert(t, time.Now().Add(time.Hour))
	a := app
	a.Certificates = []string{text}
	s.must(s.AddApp(t.Context(), a))
	client := s.https()
	client.Transport.(*http.Transport).DialContext = func(ctx context.Context, network, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, network, s.at.Entra)
	}
	for _, host := range []string{"login.a.test", "login.b.test", "10.246.0.2", "login.a.test:443", "10.246.0.2:443"} {
		options := s.options()
		options.Transport = client
		options.Cloud = cloud.Configuration{ActiveDirectoryAuthorityHost: "https://" + host}
		bySecret, err := azidentity.NewClientSecretCredential(tenant, a.ClientID, "hush", &azidentity.ClientSecretCredentialOptions{
			ClientOptions: options, DisableInstanceDiscovery: true})
		s.must(err)
		byCertificate, err := azidentity.NewClientCertificateCredential(tenant, a.ClientID, []*x509.Certificate{cert}, key,
			&azidentity.ClientCertificateCredentialOptions{ClientOptions: options, DisableInstanceDiscovery: true})
		s.must(err)
		if first, second := s.tokenOf(bySecret, vault), s.tokenOf(byCertificate, vault); first.AppID != a.ClientID || second.AppID != a.ClientID {
			t.Errorf("host %s: claims %+v by secret, %+v by certificate; want the client ID of the application in both",
				host, first, second)
		}
	}
}
