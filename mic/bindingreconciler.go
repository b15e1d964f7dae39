package mic

import (
	"context"
	"fmt"
	"time"

	v1 "github.com/podidentity/podidentity/api/v1"
	"github.com/podidentity/podidentity/internal/kube"
	"github.com/podidentity/podidentity/mic/cluster"
	"github.com/podidentity/podidentity/mic/telemetry"
)

// bindingReconciler reports bindings that cannot work.
type bindingReconciler struct {
	cluster *cluster.Cluster
	report  *telemetry.Reporter
}

func (r *bindingReconciler) reconcile(_ context.Context, key string) (time.Duration, error) {
	b := r.cluster.Binding(key)
	if b == nil {
		return 0, nil
	}
	name := kube.Key(b.Namespace, b.Value.AzureIdentity)
	i := r.cluster.Identity(name)
	reason, text := "", ""
	switch {
	case b.Value.Selector == "":
		reason, text = telemetry.ReasonInvalid, "spec.selector is empty, so the binding selects no pod; set it to the value of the pods' label "+v1.BindingLabel
	case i == nil:
		reason, text = telemetry.ReasonMissing, fmt.Sprintf("AzureIdentity %s does not exist; create it in the binding's namespace, or correct spec.azureIdentity", name)
	case i.Value.Problem() != "":
		reason, text = telemetry.ReasonInvalid, fmt.Sprintf("AzureIdentity %s cannot work: %s", name, i.Value.Problem())
	}
	r.report.BindingProblem(b.Reference(), reason, text)
	return 0, nil
}
