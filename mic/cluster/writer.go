package cluster

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"

	v1 "github.com/podidentity/podidentity/api/v1"
	"github.com/podidentity/podidentity/mic/telemetry"
)

// Writer writes AzureAssignedIdentity objects. Cluster.AssignmentsOf returns the results of its writes at once.
type Writer struct {
	client  rest.Interface
	cluster *Cluster
	metrics *telemetry.Metrics
}

// NewWriter returns a Writer that works with the client of the custom resources.
func NewWriter(client rest.Interface, c *Cluster, m *telemetry.Metrics) *Writer {
	return &Writer{client, c, m}
}

// Create creates an assignment without a state, which counts as Created. Create returns nil without an error if an
// object of that name exists already (the watch has yet to deliver it), or if the namespace is being deleted.
func (w *Writer) Create(ctx context.Context, p *Pod, d DesiredAssignment) (*Assignment, error) {
	o := &v1.AzureAssignedIdentity{
		ObjectMeta: metav1.ObjectMeta{
			Namespace:  p.Namespace,
			Name:       d.Name,
			Labels:     map[string]string{v1.NodeNameLabel: v1.NodeNameLabelValue(p.Node)},
			Finalizers: []string{v1.AssignedIdentityFinalizer},
			// The garbage collector of Kubernetes deletes the assignment after its pod.
			OwnerReferences: []metav1.OwnerReference{{APIVersion: "v1", Kind: "Pod", Name: p.Name, UID: types.UID(p.UID)}},
		},
		Spec: v1.AzureAssignedIdentitySpec{
			AzureIdentityRef: d.Identity.Full.Copy(), AzureBindingRef: d.Binding.Full.Copy(),
			Pod: p.Name, PodNamespace: p.Namespace, NodeName: p.Node,
		},
	}
	start := time.Now()
	var created v1.AzureAssignedIdentity
	err := w.client.Post().Namespace(p.Namespace).Resource(v1.AzureAssignedIdentities).Body(o).Do(ctx).Into(&created)
	if apierrors.IsAlreadyExists(err) || apierrors.HasStatusCause(err, "NamespaceTerminating") {
		return nil, nil
	}
	if err := w.metrics.Wrote(telemetry.Create, start, err); err != nil {
		return nil, fmt.Errorf("creating AzureAssignedIdentity %s/%s: %w", p.Namespace, d.Name, err)
	}
	return w.cluster.recordWrite(&created), nil
}

// UpdateCopies replaces the copies of the identity and the binding in an assignment, after an edit that does not change
// the name of the assignment. It returns nil without an error if the assignment was deleted.
func (w *Writer) UpdateCopies(ctx context.Context, d DesiredAssignment, a *Assignment) (*Assignment, error) {
	// A merge patch would keep fields that the new copies do not have. These operations of a JSON patch replace the
	// copies as a whole.
	return w.patch(ctx, a, types.JSONPatchType, "", []map[string]any{
		{"op": "add", "path": "/spec/azureIdentityRef", "value": d.Identity.Full.Copy()},
		{"op": "add", "path": "/spec/azureBindingRef", "value": d.Binding.Full.Copy()},
	})
}

// SetState writes the status of an assignment.
func (w *Writer) SetState(ctx context.Context, a *Assignment, state v1.AssignmentState, message string) error {
	status := map[string]any{"status": state, "message": nil}
	if message != "" {
		status["message"] = message
	}
	_, err := w.patch(ctx, a, types.MergePatchType, "status", map[string]any{"status": status})
	return err
}

// patch patches an assignment and returns the result. It returns nil without an error if the assignment was deleted;
// the watch delivers the deletion.
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
	var patched v1.AzureAssignedIdentity
	err = request.Body(body).Do(ctx).Into(&patched)
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
	return w.cluster.recordWrite(&patched), nil
}

// Delete deletes an assignment and removes the finalizer of MIC. If detached is true, Delete first writes the state
// Unassigned. It is no error if the assignment is already gone.
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
		return nil // it was deleted, and there may be another one of that name
	}
	if err != nil {
		w.metrics.APIFailed(string(telemetry.Delete))
		return fmt.Errorf("removing the finalizer of AzureAssignedIdentity %s: %w", a.Key(), err)
	}
	if len(a.otherFinalizers) == 0 {
		w.cluster.own.recordReleased(a)
	}
	return nil
}
