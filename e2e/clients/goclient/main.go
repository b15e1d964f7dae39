// Goclient requests one token with a Go library of Azure, like an application that knows nothing of Pod Identity, and
// prints the result as one JSON line.
//
// It protects the end-to-end tests against a misreading of the protocol: requests, retries and errors are those of the
// libraries. This program only records the statuses of the responses.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"
	"github.com/Azure/azure-sdk-for-go/sdk/azidentity"
	"github.com/Azure/go-autorest/autorest/adal"
)

const usage = `usage: goclient managed|default|adal [FLAGS]
  managed   azidentity's ManagedIdentityCredential
  default   azidentity's DefaultAzureCredential; AZURE_CLIENT_ID may name an identity
  adal      the predecessor of azidentity
flags:
  --resource URI       audience of the token (default https://vault.azure.net)
  --client-id, --object-id, --resource-id
                       the identity; at most one (not for default; adal has no --object-id)
  --chain              use a chain of the credential and one that always returns a token (not for adal)
  --wait               print "ready" to standard error, and wait for the end of standard input before the first request
`

// outcome is the line that the program prints. The JavaScript client prints the same fields.
type outcome struct {
	OK         bool    `json:"ok"`
	Token      string  `json:"token,omitempty"`
	ExpiresOn  int64   `json:"expires_on,omitempty"`
	Kind       string  `json:"kind,omitempty"` // type of the error
	Error      string  `json:"error,omitempty"`
	Statuses   []int   `json:"statuses"` // of the responses, in their order
	DurationMS float64 `json:"duration_ms"`
}

// request has the values of the command line.
type request struct {
	resource, clientID, objectID, resourceID string
	chain, wait                              bool
}

func main() {
	if len(os.Args) < 2 {
		fail("a subcommand is missing")
	}
	var r request
	flags := flag.NewFlagSet(os.Args[1], flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	flags.StringVar(&r.resource, "resource", "https://vault.azure.net", "")
	flags.StringVar(&r.clientID, "client-id", "", "")
	flags.StringVar(&r.objectID, "object-id", "", "")
	flags.StringVar(&r.resourceID, "resource-id", "", "")
	flags.BoolVar(&r.chain, "chain", false, "")
	flags.BoolVar(&r.wait, "wait", false, "")
	if err := flags.Parse(os.Args[2:]); err != nil {
		fail(err.Error())
	}
	get := map[string]func(request, *recorder) (azcore.AccessToken, error){
		"managed": managed, "default": defaultCredential, "adal": legacy,
	}[os.Args[1]]
	if get == nil {
		fail(fmt.Sprintf("unknown subcommand %q", os.Args[1]))
	}
	if r.wait {
		fmt.Fprintln(os.Stderr, "ready")
		_, _ = io.Copy(io.Discard, os.Stdin)
	}
	rec := &recorder{}
	start := time.Now()
	token, err := get(r, rec)
	result := outcome{OK: err == nil, Statuses: rec.statuses(), DurationMS: float64(time.Since(start).Microseconds()) / 1000}
	if err != nil {
		result.Kind, result.Error = kind(err), err.Error()
	} else {
		result.Token, result.ExpiresOn = token.Token, token.ExpiresOn.Unix()
	}
	_ = json.NewEncoder(os.Stdout).Encode(result)
}

func managed(r request, rec *recorder) (azcore.AccessToken, error) {
	options := &azidentity.ManagedIdentityCredentialOptions{ClientOptions: rec.options()}
	switch {
	case r.clientID != "":
		options.ID = azidentity.ClientID(r.clientID)
	case r.objectID != "":
		options.ID = azidentity.ObjectID(r.objectID)
	case r.resourceID != "":
		options.ID = azidentity.ResourceID(r.resourceID)
	}
	credential, err := azidentity.NewManagedIdentityCredential(options)
	if err != nil {
		return azcore.AccessToken{}, err
	}
	return ask(r, credential)
}

func defaultCredential(r request, rec *recorder) (azcore.AccessToken, error) {
	credential, err := azidentity.NewDefaultAzureCredential(&azidentity.DefaultAzureCredentialOptions{ClientOptions: rec.options()})
	if err != nil {
		return azcore.AccessToken{}, err
	}
	return ask(r, credential)
}

func ask(r request, credential azcore.TokenCredential) (azcore.AccessToken, error) {
	if r.chain {
		var err error
		if credential, err = azidentity.NewChainedTokenCredential([]azcore.TokenCredential{credential, next{}}, nil); err != nil {
			return azcore.AccessToken{}, err
		}
	}
	return credential.GetToken(context.Background(), policy.TokenRequestOptions{Scopes: []string{r.resource + "/.default"}})
}

// next is the second credential of the chain. It always returns a token.
type next struct{}

func (next) GetToken(context.Context, policy.TokenRequestOptions) (azcore.AccessToken, error) {
	return azcore.AccessToken{Token: "of the next credential", ExpiresOn: time.Now().Add(time.Hour)}, nil
}

// legacy gets a token with adal. It first asks adal whether IMDS is available, like an application that supports
// several token sources. rec does not record the request that adal sends for this check.
func legacy(r request, rec *recorder) (azcore.AccessToken, error) {
	ctx := context.Background()
	if !adal.MSIAvailable(ctx, nil) {
		return azcore.AccessToken{}, errors.New("adal.MSIAvailable reports that IMDS is not available")
	}
	token, err := adal.NewServicePrincipalTokenFromManagedIdentity(r.resource, &adal.ManagedIdentityOptions{ClientID: r.clientID, IdentityResourceID: r.resourceID})
	if err != nil {
		return azcore.AccessToken{}, err
	}
	token.SetSender(rec)
	if err := token.EnsureFreshWithContext(ctx); err != nil {
		return azcore.AccessToken{}, err
	}
	return azcore.AccessToken{Token: token.OAuthToken(), ExpiresOn: token.Token().Expires()}, nil
}

// recorder keeps the statuses that the library receives. It writes a line to standard error for each request and each
// response, so that a test knows when the client waits for a response.
type recorder struct {
	mu   sync.Mutex
	list []int
}

func (a *recorder) options() azcore.ClientOptions {
	return azcore.ClientOptions{PerRetryPolicies: []policy.Policy{perRetry{a}}}
}

type perRetry struct{ *recorder }

func (p perRetry) Do(r *policy.Request) (*http.Response, error) { return p.record(r.Next) }

// Do implements adal.Sender.
func (a *recorder) Do(r *http.Request) (*http.Response, error) {
	return a.record(func() (*http.Response, error) { return http.DefaultClient.Do(r) })
}

func (a *recorder) record(send func() (*http.Response, error)) (*http.Response, error) {
	fmt.Fprintln(os.Stderr, "request")
	resp, err := send()
	if err == nil {
		a.mu.Lock()
		defer a.mu.Unlock()
		a.list = append(a.list, resp.StatusCode)
		fmt.Fprintln(os.Stderr, "response", resp.StatusCode)
	}
	return resp, err
}

func (a *recorder) statuses() []int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return append([]int{}, a.list...)
}

// kind returns the name of the error's type without its package. Applications and credential chains decide by the type
// what to do.
func kind(err error) string {
	name := fmt.Sprintf("%T", err)
	return name[strings.LastIndex(name, ".")+1:]
}

func fail(message string) {
	fmt.Fprintf(os.Stderr, "goclient: %s\n%s", message, usage)
	os.Exit(2)
}
