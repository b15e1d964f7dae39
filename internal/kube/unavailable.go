package kube

import (
	"errors"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
)

// IsUnavailable reports whether a request failed because the API server cannot serve it now, so that a retry can
// succeed. It returns true for an error that is not a response of the API server, such as a failed connection. It
// returns false for a response with another cause, such as a refusal.
func IsUnavailable(err error) bool {
	if status := apierrors.APIStatus(nil); !errors.As(err, &status) {
		return true
	}
	return apierrors.IsServiceUnavailable(err) || apierrors.IsInternalError(err) || apierrors.IsServerTimeout(err) ||
		apierrors.IsTimeout(err) || apierrors.IsTooManyRequests(err)
}
