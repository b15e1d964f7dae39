package kube

import (
	"errors"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
)

// IsUnavailable reports whether a request failed because the API server cannot respond now, so that a retry can
// succeed. It returns false for a response that refuses the request. It returns true for an error that is not a
// response of the API server, such as a failed connection.
func IsUnavailable(err error) bool {
	if status := apierrors.APIStatus(nil); !errors.As(err, &status) {
		return true
	}
	return apierrors.IsServiceUnavailable(err) || apierrors.IsInternalError(err) || apierrors.IsServerTimeout(err) ||
		apierrors.IsTimeout(err) || apierrors.IsTooManyRequests(err)
}
