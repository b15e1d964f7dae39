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

// ownCredential is MIC's credential for Azure, with the texts for its failures.
type ownCredential struct {
	azcore.TokenCredential
	cleaner
	subject string // the identity, for messages
	advice  string // what to check when Azure refuses
	// fromIMDS says that the token comes from the Instance Metadata Service, which responds with 404 while it is not
	// ready.
	fromIMDS bool
}

// credential creates the credential that the configuration describes.
func (c Config) credential(where cloud.Configuration, direct, proxied policy.Transporter, userAgent string) (*ownCredential, error) {
	own := &ownCredential{cleaner: cleaner{c.ClientSecret}}
	options := policy.ClientOptions{
		Cloud:     where,
		Transport: transporter{next: proxied, maxBytes: maxTokenResponse},
		Telemetry: policy.TelemetryOptions{ApplicationID: userAgent},
		// Few retries in a short time, because callers retry, too.
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
		err = fmt.Errorf("%s has a service principal with a certificate (aadClientCertPath), which MIC does not support; use a managed identity, workload identity or a client secret", c.source())
	default:
		err = fmt.Errorf("%s has no credential for MIC: set useManagedIdentityExtension (USE_MSI), or tenantId, aadClientId and aadClientSecret (TENANT_ID, CLIENT_ID, CLIENT_SECRET), or configure workload identity for MIC's pod", c.source())
	}
	if err != nil {
		return nil, err
	}
	return own, nil
}

func (own *ownCredential) managedIdentity(c Config, options policy.ClientOptions) error {
	own.fromIMDS = true
	own.subject = "the machine's system-assigned identity"
	own.advice = "enable it on the machine MIC runs on, or set userAssignedIdentityID (USER_ASSIGNED_MSI_CLIENT_ID) in " + c.source() + " to another identity"
	o := &azidentity.ManagedIdentityCredentialOptions{ClientOptions: options}
	if id := c.UserAssignedIdentityID; id != "" {
		own.subject = "managed identity " + text.OneLine(id, maxMessage/2)
		own.advice = "check that it is attached to the machine MIC runs on, and that userAssignedIdentityID (USER_ASSIGNED_MSI_CLIENT_ID) in " + c.source() + " is its client ID or resource ID"
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
		return fmt.Errorf("%s has a client secret, but not both tenantId and aadClientId (TENANT_ID, CLIENT_ID); add the missing one", c.source())
	}
	if err := needsAuthority(options.Cloud); err != nil {
		return err
	}
	own.subject = fmt.Sprintf("service principal %s of tenant %s", text.OneLine(c.ClientID, maxID), text.OneLine(c.TenantID, maxID))
	own.advice = "correct tenantId, aadClientId and aadClientSecret (TENANT_ID, CLIENT_ID, CLIENT_SECRET) in " + c.source()
	credential, err := azidentity.NewClientSecretCredential(c.TenantID, c.ClientID, string(c.ClientSecret), &azidentity.ClientSecretCredentialOptions{
		// Instance discovery need not check the authority: it is that of a known cloud, or the operator configured it.
		ClientOptions: options, DisableInstanceDiscovery: true,
	})
	own.TokenCredential = credential
	return own.creationError(err)
}

func (own *ownCredential) workloadIdentity(c Config, options policy.ClientOptions) error {
	if c.TenantID == "" || c.ClientID == "" || c.FederatedTokenFile == "" {
		return fmt.Errorf("MIC is configured for workload identity, by useFederatedWorkloadIdentityExtension in %s or by AZURE_FEDERATED_TOKEN_FILE, but the tenant, the client ID or the path of the token file is not set; check that the webhook set AZURE_TENANT_ID, AZURE_CLIENT_ID and AZURE_FEDERATED_TOKEN_FILE in MIC's pod", c.source())
	}
	if err := needsAuthority(options.Cloud); err != nil {
		return err
	}
	own.subject = fmt.Sprintf("workload identity %s of tenant %s", text.OneLine(c.ClientID, maxID), text.OneLine(c.TenantID, maxID))
	own.advice = "check that it has a federated credential for MIC's ServiceAccount"
	// The kubelet rotates the token in the file, so each token request reads the file.
	assertion := func(ctx context.Context) (string, error) {
		text, err := readFile(c.FederatedTokenFile)
		if seen, _ := ctx.Value(lastResponseKey{}).(*lastResponse); seen != nil && err != nil {
			*seen = lastResponse{err: unreadableAssertionError{err}}
		}
		return string(text), err
	}
	credential, err := azidentity.NewClientAssertionCredential(c.TenantID, c.ClientID, assertion, &azidentity.ClientAssertionCredentialOptions{
		ClientOptions: options, DisableInstanceDiscovery: true,
	})
	own.TokenCredential = credential
	return own.creationError(err)
}

// creationError adds the identity and the advice to an error of azidentity, because that error does not quote the
// invalid value.
func (own *ownCredential) creationError(err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s: %s; %s", own.subject, own.clean(err.Error(), maxMessage), own.advice)
}

func needsAuthority(where cloud.Configuration) error {
	if where.ActiveDirectoryAuthorityHost == "" {
		return fmt.Errorf("MIC needs the address of Entra ID to sign in with a client secret or as a workload identity, but the file that %s names contains no activeDirectoryEndpoint; add it, or use a managed identity", environmentFile)
	}
	return nil
}

// unreadableAssertionError is the error of reading the file with the token of MIC's ServiceAccount.
type unreadableAssertionError struct{ err error }

func (u unreadableAssertionError) Error() string {
	return u.err.Error() + "; check that the webhook of workload identity added the volume with this file to MIC's pod"
}

// failure classifies a failure to get a token by w, the last response. If w has a response, failure does not use the
// error of the SDK, which may quote the response in full.
func (own *ownCredential) failure(w *lastResponse, err error) *Error {
	var unreadable unreadableAssertionError
	switch {
	case errors.Is(err, errExpiredToken):
		return own.tokenError(Unavailable, err.Error())
	case errors.As(w.err, &unreadable):
		return own.tokenError(Denied, unreadable.Error())
	case w.err != nil && timedOut(w.err):
		return own.tokenError(Unavailable, "no response in time")
	case w.err != nil:
		return own.tokenError(Unavailable, w.err.Error())
	case w.status == 0 && timedOut(err):
		return own.tokenError(Unavailable, "no response in time")
	case w.status == 0:
		return own.givenCredentialFailure(err)
	case w.status < 300:
		return own.tokenError(Unavailable, "the response contains no usable token")
	}
	var body struct {
		Error       string `json:"error"`
		Description string `json:"error_description"`
	}
	_ = json.Unmarshal(w.body, &body) // fields that cannot be read stay empty
	message := fmt.Sprintf("status %d", w.status)
	for _, each := range []string{body.Error, body.Description} {
		if each != "" {
			message += ", " + own.clean(each, maxMessage/2)
		}
	}
	temporary := w.status >= 500 || w.status == http.StatusTooManyRequests || w.status == http.StatusRequestTimeout ||
		own.fromIMDS && (w.status == http.StatusNotFound || w.status == http.StatusGone)
	if temporary {
		e := own.tokenError(Unavailable, message)
		e.RetryAfter = retryAfter(w.header)
		return e
	}
	return own.tokenError(Denied, message+"; "+own.advice)
}

// givenCredentialFailure classifies a failure for which no response was recorded. Usually it is a failure of
// Options.Credential, whose requests do not pass through this package.
func (own *ownCredential) givenCredentialFailure(err error) *Error {
	var responseErr *azidentity.AuthenticationFailedError
	if errors.As(err, &responseErr) && responseErr.RawResponse != nil {
		status := responseErr.RawResponse.StatusCode
		if status >= 400 && status < 500 && status != http.StatusTooManyRequests {
			return own.tokenError(Denied, fmt.Sprintf("status %d", status))
		}
	}
	return own.tokenError(Unavailable, err.Error())
}

func (own *ownCredential) tokenError(class Class, what string) *Error {
	return &Error{Class: class, Message: own.clean("no token for "+cmp.Or(own.subject, "MIC")+": "+what, maxMessage)}
}
