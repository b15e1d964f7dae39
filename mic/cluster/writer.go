package cluster

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	"github.com/podidentity/podidentity/mic/telemetry"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"

	v1 "github.com/podidentity/podidentity/api/v1"
)

// Writer writes AzureAssignedIdentity objects. The Cluster shows its writes at once.
type Writer struct {
	client  rest.Interface
	cluster *Cluster
	metrics *telemetry.Metrics
}

// NewWriter returns a Writer that works with the client of the custom resources.
func NewWriter(client rest.Interface, c *Cluster, m *telemetry.Metrics) *Writer {
	return &Writer{client, c, m}
}

// create makes an assignment. Until its state is written it counts as Created. nil: it exists, and the watch is behind.
func (w *Writer) Create(ctx context.Context, p *Pod, d DesiredAssignment) (*Assignment, error) {
	o := &v1.AzureAssignedIdentity{
		ObjectMeta: metav1.ObjectMeta{
			Namespace:  p.Namespace,
			Name:       d.Name,
			Labels:     map[string]string{v1.NodeNameLabel: v1.NodeNameLabelValue(p.Node)},
			Finalizers: []string{v1.AssignedIdentityFinalizer},
			// The cluster's garbage collector deletes what a pod leaves behind.
			OwnerReferences: []metav1.OwnerReference{{APIVersion: "v1", Kind: "Pod", Name: p.Name, UID: types.UID(p.UID)}},
		},
		Spec: v1.AzureAssignedIdentitySpec{
			AzureIdentityRef: d.Identity.Full.Copy(), AzureBindingRef: d.Binding.Full.Copy(),
			Pod: p.Name, PodNamespace: p.Namespace, NodeName: p.Node,
		},
	}
	start := time.Now()
	var made v1.AzureAssignedIdentity
	err := w.client.Post().Namespace(p.Namespace).Resource(v1.AzureAssignedIdentities).Body(o).Do(ctx).Into(&made)
	if apierrors.IsAlreadyExists(err) || apierrors.HasStatusCause(err, "NamespaceTerminating") {
		return nil, nil
	}
	if err := w.metrics.Wrote(telemetry.Create, start, err); err != nil {
		return nil, fmt.Errorf("creating AzureAssignedIdentity %s/%s: %w", p.Namespace, d.Name, err)
	}
	return w.cluster.recordWrite(&made), nil
}

// copyAgain brings the copies in an assignment up to date: something was edited that does not make it another one.
func (w *Writer) UpdateCopies(ctx context.Context, d DesiredAssignment, a *Assignment) (*Assignment, error) {
	// In a merge patch what is absent stays, so the copies are replaced whole.
	return w.patch(ctx, a, types.JSONPatchType, "", []map[string]any{
		{"op": "add", "path": "/spec/azureIdentityRef", "value": d.Identity.Full.Copy()},
		{"op": "add", "path": "/spec/azureBindingRef", "value": d.Binding.Full.Copy()},
	})
}

// setState writes how far an assignment is.
func (w *Writer) SetState(ctx context.Context, a *Assignment, state v1.AssignmentState, message string) error {
	status := map[string]any{"status": state, "message": nil}
	if message != "" {
		status["message"] = message
	}
	_, err := w.patch(ctx, a, types.MergePatchType, "status", map[string]any{"status": status})
	return err
}

// patchAssignment changes an assignment, and returns it as it is then; nil if it is gone, of which the watch will tell.
func (w *Writer) patch(ctx context.Context, a *Assignment, kind types.PatchType, subresource string, patch any) (*Assignment, error) {
	body, err := json.Marshal(patch)
	if err != nil {
		return nil, err
	}
	start := time.Now()
	request := w.client.Patch(kind).Namespace(a.Namespace).Resource(v1.AzureAssignedIdentities).Name(a.Name)
	if subresource != "" {
		request = request.SubResource(subresource)
	}
	var now v1.AzureAssignedIdentity
	err = request.Body(body).Do(ctx).Into(&now)
	if apierrors.IsNotFound(err) {
		return nil, nil
	}
	operation := telemetry.UpdateCopies
	if subresource != "" {
		operation = telemetry.UpdateState
	}
	if err := w.metrics.Wrote(operation, start, err); err != nil {
		return nil, fmt.Errorf("updating AzureAssignedIdentity %s: %w", a.Key(), err)
	}
	return w.cluster.recordWrite(&now), nil
}

// finalize deletes an assignment. One whose identity has been detached says so first.
func (w *Writer) Delete(ctx context.Context, a *Assignment, detached bool) error {
	start := time.Now()
	if detached && a.State != v1.AssignmentUnassigned && a.HasFinalizer {
		if err := w.SetState(ctx, a, v1.AssignmentUnassigned, ""); err != nil {
			return err
		}
	}
	if !a.Deleting {
		uid := types.UID(a.UID)
		err := w.client.Delete().Namespace(a.Namespace).Resource(v1.AzureAssignedIdentities).Name(a.Name).
			Body(&metav1.DeleteOptions{Preconditions: &metav1.Preconditions{UID: &uid}}).Do(ctx).Error()
		if apierrors.IsNotFound(err) || apierrors.IsConflict(err) {
			return nil
		}
		if err := w.metrics.Wrote(telemetry.Delete, start, err); err != nil {
			return fmt.Errorf("deleting AzureAssignedIdentity %s: %w", a.Key(), err)
		}
	}
	if !a.HasFinalizer {
		return nil
	}
	body, err := json.Marshal(map[string]any{"metadata": map[string]any{"uid": a.UID, "finalizers": append([]string{}, a.otherFinalizers...)}})
	if err != nil {
		return err
	}
	err = w.client.Patch(types.MergePatchType).Namespace(a.Namespace).Resource(v1.AzureAssignedIdentities).Name(a.Name).Body(body).Do(ctx).Error()
	if apierrors.IsNotFound(err) || apierrors.IsConflict(err) || apierrors.IsInvalid(err) {
		return nil // it is gone, or one that has its name now
	}
	if err != nil {
		w.metrics.APIFailed(string(telemetry.Delete))
		return fmt.Errorf("letting AzureAssignedIdentity %s go: %w", a.Key(), err)
	}
	if len(a.otherFinalizers) == 0 {
		w.cluster.own.recordReleased(a)
	}
	return nil
}
