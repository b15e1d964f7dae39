package token

import (
	"bytes"
	"context"
	"errors"
	"unicode"
	"unicode/utf8"

	"github.com/podidentity/podidentity/identity"
)

// Secrets returns the current content of Kubernetes Secrets. An error that is not an *Error has the same effect as one
// of class Unavailable.
type Secrets interface {
	Secret(ctx context.Context, ref Ref) (SecretContent, error)
}

// SecretContent is the content of a Secret.
type SecretContent struct {
	Data map[string][]byte
	// Revision equals the Revision of a principal if and only if the principal was built from this content.
	Revision string
}

// The keys that NMI reads in a Secret.
const (
	secretKey      = "clientSecret"
	certificateKey = "certificate"
	passwordKey    = "password"
)

// maxSecret bounds a client secret or a password. Entra ID generates client secrets of 40 characters.
const maxSecret = 4 << 10

// flaw says what is wrong with the content of a Secret. It is the rest of a sentence that begins with the Secret's
// name. It contains no value of the Secret, only properties such as the size of a key or the expiry of a certificate.
type flaw string

func (f flaw) Error() string { return string(f) }

// contentError converts an error from reading a Secret or from requesting an assertion into an *Error.
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

// clientSecret returns the client secret, which is the value of the key clientSecret. If the Secret has a single key,
// that key may have any name, as in AAD Pod Identity. If the Secret has several keys and none of them is clientSecret,
// clientSecret returns a flaw. AAD Pod Identity took the value of a random key.
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

// plainText returns value as text, or a flaw. The parameter what is the name of the value in the flaw: "client secret"
// or "password". Line breaks at the end are removed: files and pipes add them, and they are not part of the value.
func plainText(value []byte, what flaw) (string, error) {
	value = bytes.TrimRight(value, "\r\n")
	switch {
	case len(value) == 0:
		return "", "holds an empty " + what + "; write the " + what + " as it is, without encoding it in base64 yourself"
	case len(value) > maxSecret:
		return "", "holds a " + what + " of more than 4 KiB; write the " + what + " and nothing else"
	case !utf8.Valid(value) || bytes.ContainsFunc(value, unicode.IsControl):
		return "", "holds a " + what + " with bytes that are not text, or with line breaks inside; write the " + what + " and nothing else"
	}
	return string(value), nil
}
