package token

import (
	"bytes"
	"context"
	"errors"
	"unicode"
	"unicode/utf8"

	"github.com/podidentity/podidentity/identity"
)

// Secrets gives what Kubernetes Secrets hold now. Its error is an *Error.
type Secrets interface {
	Secret(ctx context.Context, ref Ref) (SecretContent, error)
}

// SecretContent is what a Secret holds.
type SecretContent struct {
	Data map[string][]byte
	// Revision equals a principal's exactly if that was made from this content.
	Revision string
}

// The keys that are read of a Secret.
const (
	secretKey      = "clientSecret"
	certificateKey = "certificate"
	passwordKey    = "password"
)

// maxSecret bounds a client secret or a password. Those that Entra ID makes have 40 characters.
const maxSecret = 4 << 10

// flaw is what is wrong with the content of a Secret: the rest of a sentence that begins with the Secret's name. It
// holds nothing of the content.
type flaw string

func (f flaw) Error() string { return string(f) }

// contentError makes an *Error of what reading the content of a Secret brought.
func contentError(ref Ref, err error) *Error {
	var own *Error
	if errors.As(err, &own) {
		return own
	}
	if f := flaw(""); errors.As(err, &f) {
		return &Error{Class: Denied, Reason: identity.SecretInvalid, Detail: "Secret " + ref.String() + " " + string(f)}
	}
	return &Error{Class: Unavailable, Err: err}
}

// clientSecret finds the client secret. The predecessor took any key, so a Secret with one key may go on calling it as
// it likes; with several it took a random one.
func clientSecret(data map[string][]byte) (string, error) {
	value, ok := data[secretKey]
	switch {
	case ok:
	case len(data) == 0:
		return "", flaw("is empty; write the client secret under its key \"clientSecret\"")
	case len(data) > 1:
		return "", flaw("has several keys and none of them is \"clientSecret\"; write the client secret under that key")
	default:
		for _, value = range data {
		}
	}
	return plainText(value, "client secret")
}

// plainText reads a value that somebody typed. Files and pipes leave ends of lines behind, which no client secret and
// no password has, so those at the end are dropped.
func plainText(value []byte, what flaw) (string, error) {
	value = bytes.TrimRight(value, "\r\n")
	switch {
	case len(value) == 0:
		return "", "holds an empty " + what + "; write the " + what + " as it is, without base64 of your own"
	case len(value) > maxSecret:
		return "", "holds a " + what + " of more than 4 KiB; write the " + what + " alone"
	case !utf8.Valid(value) || bytes.ContainsFunc(value, unicode.IsControl):
		return "", "holds a " + what + " with bytes that are no text, or ends of lines within; write the " + what + " alone, as it is"
	}
	return string(value), nil
}
