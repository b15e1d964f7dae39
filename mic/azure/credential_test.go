package azure

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/azidentity"
)

const clientSecret = "the~client.secret-of-forty-characters-0123"

// directory is a fake of Entra ID, IMDS and ARM together. token responds to requests for a token.
func directory(token func(n int, r *http.Request) (*http.Response, error)) *fakeAzure {
	n := 0
	var mu sync.Mutex
	return &fakeAzure{respond: func(_ int, r *http.Request) (*http.Response, error) {
		authority := "https://" + r.URL.Host
		switch {
		case strings.HasSuffix(r.URL.Path, "/.well-known/openid-configuration"):
			return reply(r, 200, fmt.Sprintf(`{"issuer":"%s/t/v2.0","authorization_endpoint":"%[1]s/t/authorize","token_endpoint":"%[1]s/t/oauth2/v2.0/token"}`, authority))
		case strings.Contains(r.URL.Path, "/oauth2/"):
			mu.Lock()
			n++
			count := n
			mu.Unlock()
			return token(count, r)
		}
		return reply(r, 200, describe(vm, "Succeeded", "None"))
	}}
}

func issueToken(_ int, r *http.Request) (*http.Response, error) {
	return reply(r, 200, fmt.Sprintf(`{"access_token":"%s","token_type":"Bearer","expires_in":86400,"expires_on":"%d","resource":"r"}`, bearer, time.Now().Add(24*time.Hour).Unix()))
}

var serial atomic.Int32

// unique returns another name in each call, because azidentity caches the tokens of managed identities for the whole
// process, and a test must not get the token of another test.
func unique() string { return fmt.Sprintf("identity-%d", serial.Add(1)) }

func tokenFile(t *testing.T, content string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

var customCloud = Environment{ResourceManagerEndpoint: "https://management.stack/", ActiveDirectoryEndpoint: "https://login.stack/", ServiceManagementEndpoint: "https://audience.stack/x"}

// configuredCredentials are configurations with the token request and the ARM endpoint that follow from each.
var configuredCredentials = []struct {
	name    string
	cfg     func(t *testing.T) Config
	host    string
	form    url.Values // parameters of the token request, in its body or URL
	without string
	arm     string
}{
	{"managed identity, by client ID", func(*testing.T) Config { return Config{UseManagedIdentity: true, UserAssignedIdentityID: unique()} },
		"http://169.254.169.254", url.Values{"resource": {"https://management.core.windows.net/"}, "client_id": {"*"}}, "msi_res_id", "https://management.azure.com"},
	{"managed identity, by resource ID", func(*testing.T) Config { return Config{UseManagedIdentity: true, UserAssignedIdentityID: id(unique())} },
		"http://169.254.169.254", url.Values{"msi_res_id": {"*"}}, "client_id", "https://management.azure.com"},
	{"the machine's own identity, in a custom cloud", func(*testing.T) Config {
		return Config{Cloud: "AzureStackCloud", Environment: Environment{ResourceManagerEndpoint: "https://management.stack/", TokenAudience: "https://" + unique()}, UseManagedIdentity: true}
	}, "http://169.254.169.254", url.Values{"resource": {"*"}}, "client_id", "https://management.stack"},
	{"service principal", func(*testing.T) Config {
		return Config{TenantID: "tenant", ClientID: "app", ClientSecret: clientSecret}
	},
		"https://login.microsoftonline.com", url.Values{"client_id": {"app"}, "client_secret": {clientSecret}, "scope": {"https://management.core.windows.net//.default openid offline_access profile"}}, "client_assertion", "https://management.azure.com"},
	{"service principal, for the US government", func(*testing.T) Config {
		return Config{Cloud: "AZUREUSGOVERNMENTCLOUD", TenantID: "tenant", ClientID: "app", ClientSecret: clientSecret}
	}, "https://login.microsoftonline.us", url.Values{"client_id": {"app"}}, "client_assertion", "https://management.usgovcloudapi.net"},
	{"service principal, in China", func(*testing.T) Config {
		return Config{Cloud: "AzureChinaCloud", TenantID: "tenant", ClientID: "app", ClientSecret: clientSecret}
	}, "https://login.chinacloudapi.cn", url.Values{"scope": {"https://management.core.chinacloudapi.cn//.default openid offline_access profile"}}, "client_assertion", "https://management.chinacloudapi.cn"},
	{"service principal, in a custom cloud", func(*testing.T) Config {
		return Config{Cloud: "AzureStackCloud", Environment: customCloud, TenantID: "tenant", ClientID: "app", ClientSecret: clientSecret}
	}, "https://login.stack", url.Values{"scope": {"https://audience.stack/x/.default openid offline_access profile"}}, "client_assertion", "https://management.stack"},
	{"workload identity", func(t *testing.T) Config {
		return Config{UseWorkloadIdentity: true, TenantID: "tenant", ClientID: "app", FederatedTokenFile: tokenFile(t, "assertion"), UseManagedIdentity: true, AuthorityHost: "https://login.other/"}
	}, "https://login.other", url.Values{"client_id": {"app"}, "client_assertion": {"assertion"}}, "client_secret", "https://management.azure.com"},
}

func TestMICAuthenticatesAsConfigured(t *testing.T) {
	for _, c := range configuredCredentials {
		t.Run(c.name, func(t *testing.T) {
			azure := directory(issueToken)
			client, err := New(c.cfg(t), Options{Transport: azure})
			if err != nil {
				t.Fatal(err)
			}
			if len(azure.requests()) != 0 {
				t.Error("New requests a token before one is needed")
			}
			if _, err := client.Get(t.Context(), vm); err != nil {
				t.Fatal(err)
			}
			requests := azure.requests()
			last := requests[len(requests)-1]
			if !strings.HasPrefix(last.url, c.arm+"/subscriptions/") || last.header.Get("Authorization") != "Bearer "+bearer {
				t.Errorf("the last request is %+v, want one to ARM with the token", last)
			}
			tokenRequest := requests[len(requests)-2]
			if !strings.HasPrefix(tokenRequest.url, c.host+"/") {
				t.Errorf("the token is from %s, want %s", tokenRequest.url, c.host)
			}
			u, _ := url.Parse(tokenRequest.url)
			form := u.Query()
			if tokenRequest.method == http.MethodPost {
				form, _ = url.ParseQuery(tokenRequest.body)
			}
			for name, want := range c.form {
				if got := form.Get(name); got != want[0] && (want[0] != "*" || got == "") {
					t.Errorf("%s is %q, want %q", name, got, want[0])
				}
			}
			if form.Has(c.without) {
				t.Errorf("the token request contains the parameter %s", c.without)
			}
			for _, r := range requests {
				if strings.Contains(r.url, "discovery/instance") {
					t.Errorf("there is an instance discovery request: %s", r.url)
				}
			}
		})
	}
}

func TestAConfigurationWithoutACredentialSaysWhatToDo(t *testing.T) {
	own := Environment{ResourceManagerEndpoint: "https://arm.stack/", TokenAudience: "a"}
	cases := []struct {
		name     string
		cfg      Config
		contains string
	}{
		{"none", Config{}, "set useManagedIdentityExtension (USE_MSI)"},
		{"a certificate", Config{TenantID: "t", ClientID: "c", ClientCertPath: "/etc/cert"}, "aadClientCertPath"},
		{"a secret of nobody", Config{ClientSecret: clientSecret}, "not both tenantId and aadClientId"},
		{"a secret without a tenant", Config{ClientID: "c", ClientSecret: clientSecret}, "not both tenantId and aadClientId"},
		{"a tenant that is none", Config{TenantID: "a tenant/../x", ClientID: "c", ClientSecret: clientSecret}, "correct tenantId"},
		{"workload identity without a file", Config{UseWorkloadIdentity: true, TenantID: "t", ClientID: "c"}, "AZURE_FEDERATED_TOKEN_FILE"},
		{"a custom cloud without Entra ID", Config{Cloud: "AzureStackCloud", Environment: own, TenantID: "t", ClientID: "c", ClientSecret: clientSecret}, "activeDirectoryEndpoint"},
		{"workload identity there", Config{Cloud: "AzureStackCloud", Environment: own, UseWorkloadIdentity: true, TenantID: "t", ClientID: "c", FederatedTokenFile: "f"}, "activeDirectoryEndpoint"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			_, err := New(c.cfg, Options{})
			if err == nil || !strings.Contains(err.Error(), c.contains) || strings.Contains(err.Error(), clientSecret) || strings.Contains(err.Error(), "\n") {
				t.Errorf("got %v, want %q", err, c.contains)
			}
		})
	}
	if _, err := New(Config{}, Options{Credential: credential(hasToken)}); err != nil {
		t.Errorf("New with Options.Credential returned %v, want no error", err)
	}
}

func responding(status int, body string, headers ...string) func(int, *http.Request) (*http.Response, error) {
	return func(_ int, r *http.Request) (*http.Response, error) { return reply(r, status, body, headers...) }
}

func secretConfig(*testing.T) Config {
	return Config{TenantID: "tenant", ClientID: "app", ClientSecret: clientSecret}
}

func managedConfig(*testing.T) Config {
	return Config{UseManagedIdentity: true, UserAssignedIdentityID: unique()}
}

// tokenFailures are failures to get a token, each with the class of the resulting error and a part of its text.
var tokenFailures = []struct {
	name     string
	cfg      func(*testing.T) Config
	respond  func(int, *http.Request) (*http.Response, error)
	class    Class
	contains string
}{
	{"a wrong secret", secretConfig, responding(401, `{"error":"invalid_client","error_description":"AADSTS7000215: Invalid client secret `+clientSecret+` provided.\r\nTrace ID: x","error_codes":[7000215]}`), Denied, "AADSTS7000215: Invalid client secret [...] provided."},
	{"no such application", secretConfig, responding(400, `{"error":"unauthorized_client","error_description":"AADSTS700016"}`), Denied, "correct tenantId, aadClientId and aadClientSecret (TENANT_ID, CLIENT_ID, CLIENT_SECRET) in the configuration"},
	{"a response that is not JSON", secretConfig, responding(403, `<html>`+clientSecret), Denied, "status 403"},
	{"Entra ID is busy", secretConfig, responding(429, `{}`, "Retry-After: 30"), Unavailable, "retry after 30s"},
	{"Entra ID is broken", secretConfig, responding(503, `{}`), Unavailable, "status 503"},
	{"no token in the response", secretConfig, responding(200, `{"secret":"`+clientSecret+`"}`), Unavailable, "no usable token"},
	{"an expired token", secretConfig, responding(200, `{"access_token":"`+bearer+`","token_type":"Bearer","expires_in":1}`), Unavailable, "check the clock of the node"},
	{"an endless response", secretConfig, responding(200, strings.Repeat("x", maxTokenResponse+1)), Unavailable, "larger than"},
	{"nobody there", secretConfig, func(int, *http.Request) (*http.Response, error) { return nil, errors.New("refused " + clientSecret) }, Unavailable, "refused [...]"},
	{"Entra ID hangs", secretConfig, func(_ int, r *http.Request) (*http.Response, error) { return hung(r) }, Unavailable, "no response in time"},
	{"not attached to the machine", managedConfig, responding(400, `{"error":"invalid_request","error_description":"Identity not found"}`), Denied, "check that it is attached to the machine MIC runs on"},
	{"the metadata service is not ready", managedConfig, responding(404, ``), Unavailable, "status 404"},
	{"the metadata service is updated", managedConfig, responding(410, ``), Unavailable, "status 410"},
	{"the metadata service is broken", managedConfig, responding(500, ``), Unavailable, "status 500"},
	{"the metadata service hangs", managedConfig, func(_ int, r *http.Request) (*http.Response, error) { return hung(r) }, Unavailable, "no response in time"},
	{"no file", func(*testing.T) Config {
		return Config{UseWorkloadIdentity: true, TenantID: "t", ClientID: "c", FederatedTokenFile: "/nowhere/token"}
	}, issueToken, Denied, "/nowhere/token"},
	{"no federated credential", func(t *testing.T) Config {
		return Config{UseWorkloadIdentity: true, TenantID: "t", ClientID: "c", FederatedTokenFile: tokenFile(t, bearer)}
	}, responding(401, `{"error":"invalid_client","error_description":"AADSTS700213: no match for `+bearer+`"}`), Denied, "no match for [...]; check that it has a federated credential"},
}

func TestATokenFailureIsClassifiedAndContainsNoSecret(t *testing.T) {
	for _, c := range tokenFailures {
		t.Run(c.name, func(t *testing.T) {
			cfg := c.cfg(t)
			synctest.Test(t, func(t *testing.T) {
				observer := &calls{}
				client, err := New(cfg, Options{Transport: directory(c.respond), Observer: observer})
				if err != nil {
					t.Fatal(err)
				}
				_, err = client.Get(t.Context(), vm)
				var failed *Error
				if !errors.As(err, &failed) || failed.Class != c.class || failed.Operation != "vm_get" || !strings.Contains(err.Error(), c.contains) {
					t.Errorf("got %v\nwant %s, %q", err, c.class, c.contains)
				}
				if observer.all() != "vm_get "+string(c.class) {
					t.Errorf("the Observer was called with %s", observer.all())
				}
				for e := err; e != nil; e = errors.Unwrap(e) {
					if strings.Contains(e.Error(), clientSecret) || strings.Contains(e.Error(), bearer) || strings.ContainsAny(e.Error(), "\r\n") {
						t.Errorf("the message is %q, want one line without a secret", e)
					}
				}
			})
		})
	}
}

func TestTheFailureOfAGivenCredentialIsClassifiedByItsResponse(t *testing.T) {
	failedWith := func(status int) error {
		resp, _ := reply(nil, status, clientSecret)
		return &azidentity.AuthenticationFailedError{RawResponse: resp}
	}
	cases := []struct {
		err  error
		want Class
	}{
		{failedWith(401), Denied},
		{failedWith(429), Unavailable},
		{failedWith(503), Unavailable},
		{errors.New("no\nroute, " + bearer), Unavailable},
	}
	for _, c := range cases {
		source := credential(func(context.Context) (azcore.AccessToken, error) { return azcore.AccessToken{}, c.err })
		_, err := newClient(t, replies(replying(200, "")), func(o *Options) { o.Credential = source }).Get(t.Context(), vm)
		var failed *Error
		if !errors.As(err, &failed) || failed.Class != c.want || strings.Contains(err.Error(), bearer) || strings.Contains(err.Error(), "\n") {
			t.Errorf("got %v, want %s", err, c.want)
		}
	}
}

func TestAClaimsChallengeOfARMFetchesAnotherToken(t *testing.T) {
	fetched := 0
	source := credential(func(context.Context) (azcore.AccessToken, error) {
		fetched++
		if fetched > 2 {
			return azcore.AccessToken{}, errors.New("not again")
		}
		return azcore.AccessToken{Token: fmt.Sprintf("token-%d", fetched), ExpiresOn: time.Now().Add(time.Hour)}, nil
	})
	challenge := replying(401, "", `WWW-Authenticate: Bearer error="insufficient_claims", claims="eyJhY2Nlc3NfdG9rZW4iOnt9fQ=="`)
	arm := replies(challenge, replying(200, describe(vm, "Succeeded", "None")), challenge)
	c := newClient(t, arm, func(o *Options) { o.Credential = source })
	if _, err := c.Get(t.Context(), vm); err != nil || arm.requests()[1].header.Get("Authorization") != "Bearer token-2" {
		t.Errorf("got %v after the requests %+v, want no error and token-2 in the second request", err, arm.requests())
	}
	var failed *Error
	if _, err := c.Get(t.Context(), vm); !errors.As(err, &failed) || failed.Class != Unavailable || !strings.Contains(err.Error(), "no token for MIC: not again") {
		t.Errorf("got %v; want class Unavailable and the error of the credential", err)
	}
}

func TestWaitingForATokenEndsWithTheContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		stuck := credential(func(ctx context.Context) (azcore.AccessToken, error) {
			<-ctx.Done()
			return azcore.AccessToken{}, ctx.Err()
		})
		c := newClient(t, replies(replying(200, "")), func(o *Options) { o.Credential = stuck })
		start := time.Now()
		var wg sync.WaitGroup
		for i := range 20 {
			wg.Go(func() {
				most := time.Duration(i+1) * 5 * time.Second
				ctx, cancel := context.WithTimeout(t.Context(), most)
				defer cancel()
				_, err := c.Get(ctx, vm)
				var failed *Error
				if took := time.Since(start); !errors.As(err, &failed) || failed.Class != Unavailable || took != min(most, fetchTimeout) {
					t.Errorf("got %v after %s; want class Unavailable when the context ends after %s, or at fetchTimeout if that is earlier", err, took, most)
				}
			})
		}
		wg.Wait()
	})
}

func TestATokenIsRenewedBeforeItExpiresDespiteFailures(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fetched, broken := 0, false
		source := credential(func(context.Context) (azcore.AccessToken, error) {
			fetched++
			if broken {
				return azcore.AccessToken{}, errors.New("broken")
			}
			return azcore.AccessToken{Token: fmt.Sprintf("token-%d", fetched), ExpiresOn: time.Now().Add(time.Hour)}, nil
		})
		arm := replies(replying(200, describe(vm, "Succeeded", "None")))
		c := newClient(t, arm, func(o *Options) { o.Credential = source })
		call := func(after time.Duration, token string, times int) {
			t.Helper()
			time.Sleep(after)
			_, err := c.Get(t.Context(), vm)
			synctest.Wait()
			if token == "" {
				var failed *Error
				if !errors.As(err, &failed) || failed.Class != Unavailable || fetched != times {
					t.Errorf("got %v after %d fetches, want %d", err, fetched, times)
				}
				return
			}
			requests := arm.requests()
			if got := requests[len(requests)-1].header.Get("Authorization"); err != nil || got != "Bearer "+token || fetched != times {
				t.Errorf("%v, with %q after %d fetches; want %q after %d", err, got, fetched, token, times)
			}
		}
		call(0, "token-1", 1)
		call(54*time.Minute, "token-1", 1)
		broken = true
		call(2*time.Minute, "token-1", 2) // after 56 minutes the replacement is due, and it fails
		call(time.Second, "token-1", 2)   // the failure is cached
		call(10*time.Second, "token-1", 3)
		broken = false
		call(10*time.Second, "token-1", 4) // the call does not wait for the new token
		call(31*time.Second, "token-4", 4) // the SDK takes over a new token at most every 30 s
		broken = true
		call(time.Hour, "", 5)
		call(time.Second, "", 5)
		broken = false
		call(10*time.Second, "token-6", 6)
	})
}
