package cluster

import (
	"context"
	"fmt"
	"time"

	"go.uber.org/zap"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	v1 "github.com/podidentity/podidentity/api/v1"
	"github.com/podidentity/podidentity/nmi/telemetry"
)

// preflightTimeout bounds a question to the API server before the rules are in. Without an answer NMI goes on: a node
// that starts while the API server is away has to be closed all the same.
const preflightTimeout = 5 * time.Second

// CheckNode refuses a node name that the cluster does not have: with it no pod would ever be found.
func (w *Watch) CheckNode(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, preflightTimeout)
	defer cancel()
	err := w.core.Get().Resource("nodes").Name(w.node).Do(ctx).Into(&corev1.Node{})
	switch {
	case err == nil:
	case apierrors.IsNotFound(err):
		return fmt.Errorf("--node %s: the cluster has no node of this name; give the name that kubectl get nodes shows for this machine", w.node)
	default:
		w.log.Warn("could not check that the cluster has this node", zap.String(telemetry.KeyNode, w.node), zap.Error(err))
	}
	return nil
}

// CheckCRDs asks, by discovery, whether the API server serves the resources that NMI watches.
func (w *Watch) CheckCRDs(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, preflightTimeout)
	defer cancel()
	var list metav1.APIResourceList
	err := w.crds.Get().AbsPath("/apis/" + v1.GroupVersion.String()).Do(ctx).Into(&list)
	if err != nil && !apierrors.IsNotFound(err) {
		return fmt.Errorf("asking the API server for its resources: %w", err)
	}
	served := map[string]bool{}
	for _, r := range list.APIResources {
		served[r.Name] = true
	}
	needed := []string{v1.AzureIdentities, v1.AzureIdentityBindings, v1.AzurePodIdentityExceptions}
	if w.assignments != nil {
		needed = append(needed, v1.AzureAssignedIdentities)
	}
	for _, r := range needed {
		if !served[r] {
			return fmt.Errorf("the cluster does not have %s.%s; install the custom resource definitions of the chart", r, v1.GroupName)
		}
	}
	return nil
}
