package azure

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/cloud"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"
	"github.com/Azure/azure-sdk-for-go/sdk/azidentity"

	"github.com/podidentity/podidentity/internal/text"
)

// ownCredential is whom MIC is to Azure, and how its failures are told.
type ownCredential struct {
	azcore.TokenCredential
	cleaner
	subject    string // for sentences
	advice string // what to look at where Azure says no
	// fromIMDS: the Instance Metadata Service answers, which says 404 when it is not ready.
	fromIMDS bool
}

// credential makes the credential that the configuration describes.
func (c Config) credential(where cloud.Configuration, direct, proxied policy.Transporter, userAgent string) (*ownCredential, error) {
	own := &ownCredential{cleaner: cleaner{c.ClientSecret}}
	options := policy.ClientOptions{
		Cloud:     where,
		Transport: transporter{next: proxied, maxBytes: maxTokenResponse},
		Telemetry: policy.TelemetryOptions{ApplicationID: userAgent},
		// Short: who asks comes again.
		Retry: policy.RetryOptions{
			MaxRetries: 2, RetryDelay: 250 * time.Millisecond, MaxRetryDelay: time.Second, TryTimeout: 10 * time.Second,
			ShouldRetry: shouldRetry,
		},
	}
	var err error
	switch {
	case c.UseWorkloadIdentity:
		err = own.workloadIdentity(c, options)
	case c.UseManagedIdentity:
		options.Transport = transporter{next: direct, maxBytes: maxTokenResponse}
		err = own.managedIdentity(c, options)
	case c.ClientSecret != "":
		err = own.servicePrincipal(c, options)
	case c.ClientCertPath != "":
		err = fmt.Errorf("%s has a service principal with a certificate (aadClientCertPath), which MIC does not take; give it a managed identity, workload identity or a client secret", c.source())
	default:
		err = fmt.Errorf("%s has no credential for MIC: set useManagedIdentityExtension (USE_MSI), or tenantId, aadClientId and aadClientSecret (TENANT_ID, CLIENT_ID, CLIENT_SECRET), or let MIC's pod have workload identity", c.source())
	}
	if err != nil {
		return nil, err
	}
	return own, nil
}

func (own *ownCredential) managedIdentity(c Config, options policy.ClientOptions) error {
	own.fromIMDS = true
	own.subject = "the machine's system-assigned identity"
	own.advice = "see that the machine MIC runs on has it, or name another as userAssignedIdentityID in " + c.source()
	o := &azidentity.ManagedIdentityCredentialOptions{ClientOptions: options}
	if id := c.UserAssignedIdentityID; id != "" {
		own.subject = "managed identity " + text.OneLine(id, maxMessage/2)
		own.advice = "see that it is attached to the machine MIC runs on, and that userAssignedIdentityID in " + c.source() + " is its client ID"
		o.ID = azidentity.ClientID(id)
		if strings.HasPrefix(id, "/") {
			o.ID = azidentity.ResourceID(id)
		}
	}
	credential, err := azidentity.NewManagedIdentityCredential(o)
	own.TokenCredential = credential
	return own.creationError(err)
}

func (own *ownCredential) servicePrincipal(c Config, options policy.ClientOptions) error {
	if c.TenantID == "" || c.ClientID == "" {
		return fmt.Errorf("%s has a client secret, but not both tenantId and aadClientId (TENANT_ID, CLIENT_ID); add what is missing", c.source())
	}
	if err := needsAuthority(options.Cloud); err != nil {
		return err
	}
	own.subject = fmt.Sprintf("service principal %s of tenant %s", text.OneLine(c.ClientID, maxID), text.OneLine(c.TenantID, maxID))
	own.advice = "correct tenantId, aadClientId and aadClientSecret in " + c.source()
	credential, err := azidentity.NewClientSecretCredential(c.TenantID, c.ClientID, string(c.ClientSecret), &azidentity.ClientSecretCredentialOptions{
		// The authority comes from the operator, so nobody needs to vouch for it.
		ClientOptions: options, DisableInstanceDiscovery: true,
	})
	own.TokenCredential = credential
	return own.creationError(err)
}

func (own *ownCredential) workloadIdentity(c Config, options policy.ClientOptions) error {
	if c.TenantID == "" || c.ClientID == "" || c.FederatedTokenFile == "" {
		return fmt.Errorf("%s asks for workload identity, but lacks the tenant, the client ID or the token file; see that MIC's pod has the webhook's AZURE_TENANT_ID, AZURE_CLIENT_ID and AZURE_FEDERATED_TOKEN_FILE", c.source())
	}
	if err := needsAuthority(options.Cloud); err != nil {
		return err
	}
	own.subject = fmt.Sprintf("workload identity %s of tenant %s", text.OneLine(c.ClientID, maxID), text.OneLine(c.TenantID, maxID))
	own.advice = "see that it has a federated credential for MIC's ServiceAccount"
	// The token is replaced in its file from time to time, so the file is read each time.
	assertion := func(ctx context.Context) (string, error) {
		text, err := readFile(c.FederatedTokenFile)
		if seen, _ := ctx.Value(lastResponseKey{}).(*lastResponse); seen != nil && err != nil {
			*seen = lastResponse{err: unreadableAssertion{err}}
		}
		return string(text), err
	}
	credential, err := azidentity.NewClientAssertionCredential(c.TenantID, c.ClientID, assertion, &azidentity.ClientAssertionCredentialOptions{
		ClientOptions: options, DisableInstanceDiscovery: true,
	})
	own.TokenCredential = credential
	return own.creationError(err)
}

// creationError tells what azidentity has against the tenant or the client ID, which it does not quote.
func (own *ownCredential) creationError(err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s: %s; %s", own.subject, own.clean(err.Error(), maxMessage), own.advice)
}

func needsAuthority(where cloud.Configuration) error {
	if where.ActiveDirectoryAuthorityHost == "" {
		return fmt.Errorf("this credential needs Entra ID; write activeDirectoryEndpoint into the file that %s names, or use a managed identity", environmentFile)
	}
	return nil
}

// unreadableAssertion is the failure to read the file with the Kubernetes token.
type unreadableAssertion struct{ err error }

func (u unreadableAssertion) Error() string {
	return u.err.Error() + "; see that MIC's pod has the webhook's volume"
}

// failure sorts a failure to get a token by what was on the wire. The library's errors are not kept: they quote answers
// in full.
func (own *ownCredential) failure(w *lastResponse, err error) *Error {
	var unreadable unreadableAssertion
	switch {
	case errors.Is(err, errExpiredToken):
		return own.tokenError(Unavailable, err.Error())
	case errors.As(w.err, &unreadable):
		return own.tokenError(Denied, unreadable.Error())
	case w.err != nil && timedOut(w.err):
		return own.tokenError(Unavailable, "no answer in time")
	case w.err != nil:
		return own.tokenError(Unavailable, w.err.Error())
	case w.status == 0 && timedOut(err):
		return own.tokenError(Unavailable, "no answer in time")
	case w.status == 0:
		return own.givenCredentialFailure(err)
	case w.status < 300:
		return own.tokenError(Unavailable, "the answer holds no token that can be used")
	}
	var body struct {
		Error       string `json:"error"`
		Description string `json:"error_description"`
	}
	_ = json.Unmarshal(w.body, &body) // what is not as expected stays empty
	said := fmt.Sprintf("status %d", w.status)
	for _, each := range []string{body.Error, body.Description} {
		if each != "" {
			said += ", " + own.clean(each, maxMessage/2)
		}
	}
	temporary := w.status >= 500 || w.status == http.StatusTooManyRequests || w.status == http.StatusRequestTimeout ||
		own.fromIMDS && (w.status == http.StatusNotFound || w.status == http.StatusGone)
	if temporary {
		e := own.tokenError(Unavailable, said)
		e.RetryAfter = retryAfter(w.header)
		return e
	}
	return own.tokenError(Denied, said+"; "+own.advice)
}

// givenCredentialFailure sorts the failure of a credential that was given, of whose doings nothing is seen.
func (own *ownCredential) givenCredentialFailure(err error) *Error {
	var answered *azidentity.AuthenticationFailedError
	if errors.As(err, &answered) && answered.RawResponse != nil {
		status := answered.RawResponse.StatusCode
		if status >= 400 && status < 500 && status != http.StatusTooManyRequests {
			return own.tokenError(Denied, fmt.Sprintf("status %d", status))
		}
	}
	return own.tokenError(Unavailable, err.Error())
}

func (own *ownCredential) tokenError(class Class, what string) *Error {
	return &Error{Class: class, Message: own.clean("no token for "+cmp.Or(own.subject, "MIC")+": "+what, maxMessage)}
}
