package azure

import (
	"cmp"
	"fmt"
	"regexp"
	"strings"
	"time"

	"github.com/podidentity/podidentity/internal/text"
)

// Class sorts failures by what to do about them. It is fit to be a metric label.
type Class string

const (
	// NotFound: the machine is gone.
	NotFound Class = "not_found"
	// Throttled: ARM asked for the subscription to be left alone for RetryAfter.
	Throttled Class = "throttled"
	// Conflict: the machine is not in the state that was planned from. Read it anew.
	Conflict Class = "conflict"
	// BadIdentity: Azure refuses some of the identities, or MIC may not assign them. None of the update was done.
	BadIdentity Class = "bad_identity"
	// Denied: Azure does not let MIC do this, or gives it no token, until somebody changes something.
	Denied Class = "denied"
	// Unavailable: nobody answered, or with a 5xx. It passes.
	Unavailable Class = "unavailable"
	// Invalid: ARM cannot make sense of the request, and will not the next time.
	Invalid Class = "invalid"
	// Unconfigured: there is no configuration to reach Azure with.
	Unconfigured Class = "unconfigured"
)

// Error is a call to Azure that failed.
type Error struct {
	Class     Class
	Operation string // such as "vmss_update"
	// Status and Code are those of the answer; zero if there was none. Of an update that failed on its way the status is
	// that of the answer which says so: 200.
	Status int
	Code   string
	// Message is what Azure says, or a sentence of our own.
	Message       string
	CorrelationID string // by which Azure's logs know the call; may be empty
	// Identities are those that Azure named as bad, folded. Empty if it named none.
	Identities []string
	// RetryAfter is how long to leave the subscription alone; 0 if that was not said.
	RetryAfter time.Duration
	Err        error
}

// Error is one line.
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
		fmt.Fprintf(&b, " (again after %s)", e.RetryAfter.Round(time.Second))
	}
	if e.CorrelationID != "" {
		b.WriteString(" (correlation ID " + e.CorrelationID + ")")
	}
	return b.String()
}

func (e *Error) Unwrap() error { return e.Err }

// NonRetriable keeps the Azure SDK from trying again: an Error that is seen inside its pipeline is already the end of
// several attempts.
func (e *Error) NonRetriable() {}

// What is kept of texts from outside. A message of ARM about one missing permission has about 600 bytes, with the action
// and the scope in the first 500.
const (
	maxMessage = 1024
	maxCode    = 128
	maxID      = 64
)

// jwt is what a token looks like.
var jwt = regexp.MustCompile(`eyJ[\w-]+\.[\w-]+(\.[\w-]*)?`)

// minSecret is how long a secret is at least that is looked for in texts. Entra ID's have 40 characters; to take out
// all that equals a shorter one would leave nothing to read.
const minSecret = 8

// cleaner takes out of texts what must not be told: the client secret, and whatever looks like a token.
type cleaner struct{ secret Secret }

func (c cleaner) clean(s string, most int) string {
	if len(c.secret) >= minSecret {
		s = strings.ReplaceAll(s, string(c.secret), redacted)
	}
	return text.OneLine(jwt.ReplaceAllString(s, redacted), most)
}

// noResponse makes an Error of a failure in which nothing was answered.
func (c cleaner) noResponse(operation string, err error) *Error {
	return &Error{Class: Unavailable, Operation: operation, Message: cmp.Or(c.clean(err.Error(), maxMessage), "no answer"), Err: contextError(err)}
}
