package azure

import (
	"cmp"
	"fmt"
	"regexp"
	"strings"
	"time"

	"github.com/podidentity/podidentity/internal/text"
)

// Class groups failures by how to react to them. It has few values, so it can be a metric label.
type Class string

const (
	// NotFound: the machine does not exist, or is being deleted.
	NotFound Class = "not_found"
	// Throttled: ARM throttles the subscription. A retry can succeed after RetryAfter.
	Throttled Class = "throttled"
	// Conflict: another operation changes the machine, or has changed it since the update was planned. Read the machine
	// and plan again.
	Conflict Class = "conflict"
	// BadIdentity: Azure refuses some of the identities, or MIC may not assign them. If ARM refused the request, it
	// applied nothing of the update. An operation that began may have applied a part.
	BadIdentity Class = "bad_identity"
	// Denied: MIC lacks a permission, or its credential is refused or cannot be read. A retry fails until somebody
	// corrects this.
	Denied Class = "denied"
	// Unavailable: no response, a response that shows a failure of Azure such as a 5xx, or an update that failed for
	// another reason than the classes above. A retry can succeed.
	Unavailable Class = "unavailable"
	// Invalid: ARM does not understand the request, or the resume token or the response is unusable. A retry fails.
	Invalid Class = "invalid"
	// Unconfigured: there is no usable configuration for Azure.
	Unconfigured Class = "unconfigured"
)

// Error is a call to Azure that failed.
type Error struct {
	Class     Class
	Operation string // such as "vmss_update"
	// Status and Code are those of the response; zero if there was none. If a running update failed, Status is that of
	// the poll response that reports the failure, usually 200.
	Status int
	Code   string
	// Message is the error message of Azure, or a message of this package.
	Message       string
	CorrelationID string // identifies the call in Azure's logs; may be empty
	// Identities are the refused identities, folded. Empty if Azure named none.
	Identities []string
	// RetryAfter is the time to wait before the next request. 0 means unknown; with class Throttled it is never 0.
	RetryAfter time.Duration
	Err        error
}

// Error returns one line.
func (e *Error) Error() string {
	var b strings.Builder
	b.WriteString(e.Operation + ": " + string(e.Class))
	if e.Status != 0 {
		fmt.Fprintf(&b, ", status %d", e.Status)
	}
	if e.Code != "" {
		b.WriteString(", " + e.Code)
	}
	if e.Message != "" {
		b.WriteString(": " + e.Message)
	} else if e.Err != nil {
		b.WriteString(": " + text.OneLine(e.Err.Error(), maxMessage))
	}
	if e.RetryAfter > 0 {
		fmt.Fprintf(&b, " (retry after %s)", e.RetryAfter.Round(time.Second))
	}
	if e.CorrelationID != "" {
		b.WriteString(" (correlation ID " + e.CorrelationID + ")")
	}
	return b.String()
}

func (e *Error) Unwrap() error { return e.Err }

// NonRetriable keeps the Azure SDK from retrying. An *Error inside the pipeline of the SDK is a failure to get a token,
// and the token request has its own retries.
func (e *Error) NonRetriable() {}

// Maximum sizes of texts from outside, in bytes. A message of ARM about a missing permission has about 600 bytes, with
// the action and the scope in the first 500.
const (
	maxMessage = 1024
	maxCode    = 128
	maxID      = 64
)

// jwt matches JSON Web Tokens, the format of the tokens of Entra ID.
var jwt = regexp.MustCompile(`eyJ[\w-]+\.[\w-]+(\.[\w-]*)?`)

// minSecret is the minimum length of a secret that clean removes from texts. Client secrets of Entra ID have 40
// characters; removing all occurrences of a very short one would make texts unreadable.
const minSecret = 8

// cleaner removes secrets from texts: the client secret, and everything that looks like a token.
type cleaner struct{ secret Secret }

func (c cleaner) clean(s string, maxBytes int) string {
	if len(c.secret) >= minSecret {
		s = strings.ReplaceAll(s, string(c.secret), redacted)
	}
	return text.OneLine(jwt.ReplaceAllString(s, redacted), maxBytes)
}

// noResponse returns the Error of a failure without a response.
func (c cleaner) noResponse(operation string, err error) *Error {
	return &Error{Class: Unavailable, Operation: operation, Message: cmp.Or(c.clean(err.Error(), maxMessage), "no response"), Err: contextError(err)}
}
