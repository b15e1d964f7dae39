package mic

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"strings"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	v1 "github.com/podidentity/podidentity/api/v1"
)

// assignmentName names the assignment of an identity to a pod. The hash has all that makes it another assignment: the
// pod itself, not one that has its name later, the AzureIdentity, and what that stands for. What is before the hash is
// for people; a name may have 253 bytes.
func assignmentName(p *Pod, i *AzureIdentity) string {
	const most = 100
	sum := sha256.Sum256([]byte(strings.Join([]string{p.UID, i.Namespace, i.Name, fmt.Sprint(int(i.Value.Kind)), i.ResourceID}, "\x00")))
	readable := func(s string) string { return strings.TrimRight(s[:min(len(s), most)], ".-") }
	return readable(p.Name) + "-" + readable(i.Name) + "-" + hex.EncodeToString(sum[:8])
}

// create makes an assignment. Until its state is written it counts as Created. nil: it exists, and the watch is behind.
func (c *Controller) create(ctx context.Context, p *Pod, w wanted) (*Assignment, error) {
	o := &v1.AzureAssignedIdentity{
		ObjectMeta: metav1.ObjectMeta{
			Namespace:  p.Namespace,
			Name:       w.name,
			Labels:     map[string]string{v1.NodeNameLabel: v1.NodeNameLabelValue(p.Node)},
			Finalizers: []string{v1.AssignedIdentityFinalizer},
			// The cluster's garbage collector deletes what a pod leaves behind.
			OwnerReferences: []metav1.OwnerReference{{APIVersion: "v1", Kind: "Pod", Name: p.Name, UID: types.UID(p.UID)}},
		},
		Spec: v1.AzureAssignedIdentitySpec{
			AzureIdentityRef: w.identity.Full.Copy(), AzureBindingRef: w.binding.Full.Copy(),
			Pod: p.Name, PodNamespace: p.Namespace, NodeName: p.Node,
		},
	}
	start := time.Now()
	var made v1.AzureAssignedIdentity
	err := c.crds.Post().Namespace(p.Namespace).Resource(v1.AzureAssignedIdentities).Body(o).Do(ctx).Into(&made)
	if apierrors.IsAlreadyExists(err) || apierrors.HasStatusCause(err, "NamespaceTerminating") {
		return nil, nil
	}
	if err := c.wrote(addition, start, err); err != nil {
		return nil, fmt.Errorf("creating AzureAssignedIdentity %s/%s: %w", p.Namespace, w.name, err)
	}
	return c.cluster.recordWrite(&made), nil
}

// copyAgain brings the copies in an assignment up to date: something was edited that does not make it another one.
func (c *Controller) copyAgain(ctx context.Context, w wanted, a *Assignment) (*Assignment, error) {
	// In a merge patch what is absent stays, so the copies are replaced whole.
	return c.patchAssignment(ctx, a, types.JSONPatchType, "", []map[string]any{
		{"op": "add", "path": "/spec/azureIdentityRef", "value": w.identity.Full.Copy()},
		{"op": "add", "path": "/spec/azureBindingRef", "value": w.binding.Full.Copy()},
	})
}

// setState writes how far an assignment is.
func (c *Controller) setState(ctx context.Context, a *Assignment, state v1.AssignmentState, message string) error {
	status := map[string]any{"status": state, "message": nil}
	if message != "" {
		status["message"] = message
	}
	_, err := c.patchAssignment(ctx, a, types.MergePatchType, "status", map[string]any{"status": status})
	return err
}

// patchAssignment changes an assignment, and returns it as it is then; nil if it is gone, of which the watch will tell.
func (c *Controller) patchAssignment(ctx context.Context, a *Assignment, kind types.PatchType, subresource string, patch any) (*Assignment, error) {
	body, err := json.Marshal(patch)
	if err != nil {
		return nil, err
	}
	start := time.Now()
	request := c.crds.Patch(kind).Namespace(a.Namespace).Resource(v1.AzureAssignedIdentities).Name(a.Name)
	if subresource != "" {
		request = request.SubResource(subresource)
	}
	var now v1.AzureAssignedIdentity
	err = request.Body(body).Do(ctx).Into(&now)
	if apierrors.IsNotFound(err) {
		return nil, nil
	}
	operation := change
	if subresource != "" {
		operation = changeStatus
	}
	if err := c.wrote(operation, start, err); err != nil {
		return nil, fmt.Errorf("updating AzureAssignedIdentity %s: %w", a.Key(), err)
	}
	return c.cluster.recordWrite(&now), nil
}

// finalize deletes an assignment. One whose identity has been detached says so first.
func (c *Controller) finalize(ctx context.Context, a *Assignment, detached bool) error {
	start := time.Now()
	if detached && a.State != v1.AssignmentUnassigned && a.HasFinalizer {
		if err := c.setState(ctx, a, v1.AssignmentUnassigned, ""); err != nil {
			return err
		}
	}
	if !a.Deleting {
		uid := types.UID(a.UID)
		err := c.crds.Delete().Namespace(a.Namespace).Resource(v1.AzureAssignedIdentities).Name(a.Name).
			Body(&metav1.DeleteOptions{Preconditions: &metav1.Preconditions{UID: &uid}}).Do(ctx).Error()
		if apierrors.IsNotFound(err) || apierrors.IsConflict(err) {
			return nil
		}
		if err := c.wrote(deletion, start, err); err != nil {
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
	err = c.crds.Patch(types.MergePatchType).Namespace(a.Namespace).Resource(v1.AzureAssignedIdentities).Name(a.Name).Body(body).Do(ctx).Error()
	if apierrors.IsNotFound(err) || apierrors.IsConflict(err) || apierrors.IsInvalid(err) {
		return nil // it is gone, or one that has its name now
	}
	if err != nil {
		c.metrics.apiFailed(string(deletion))
		return fmt.Errorf("letting AzureAssignedIdentity %s go: %w", a.Key(), err)
	}
	if len(a.otherFinalizers) == 0 {
		c.cluster.recordReleased(a)
	}
	return nil
}
