package kube

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"testing"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

func TestOnlyAServerThatCannotRespondIsUnavailable(t *testing.T) {
	resource := schema.GroupResource{Resource: "pods"}
	for _, c := range []struct {
		err         error
		unavailable bool
	}{
		{errors.New("dial tcp: connection refused"), true},
		{context.DeadlineExceeded, true},
		{apierrors.NewServiceUnavailable("starting"), true},
		{apierrors.NewTooManyRequests("slow down", 1), true},
		{apierrors.NewInternalError(errors.New("etcd")), true},
		{apierrors.NewGenericServerResponse(http.StatusGatewayTimeout, "get", resource, "", "", 0, true), true},
		{apierrors.NewForbidden(resource, "x", nil), false},
		{apierrors.NewResourceExpired("too old"), false},
		{apierrors.NewNotFound(resource, "x"), false},
		{fmt.Errorf("watching: %w", apierrors.NewForbidden(resource, "x", nil)), false},
		{fmt.Errorf("watching: %w", apierrors.NewServiceUnavailable("starting")), true},
	} {
		if got := IsUnavailable(c.err); got != c.unavailable {
			t.Errorf("%v: %t", c.err, got)
		}
	}
}
