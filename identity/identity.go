// Package identity decides which Azure identity, if any, a pod may use.
//
// NMI uses it for each token request that it can attribute to a pod, and MIC to find the identities that a pod needs.
// It consists of pure functions over plain values: no I/O, no clock, no log. The same input has the same result
// everywhere, and the result has a [Reason] that is spelled the same in the HTTP error, the log and the metrics.
//
// It prevents a pod from getting an identity that is not bound to the pod. It never guesses. In a doubtful case it
// refuses the request and names the objects involved. For example, a case is doubtful if several different identities
// are bound and the request names none of them, if no bound identity exists, or if the identity is invalid. Text that
// the client chooses can only narrow the set of identities that the cluster's objects allow.
//
// The package also has the list of all reason codes of NMI, with the cause and the remedy of each for the documents.
package identity

import (
	"cmp"
	"fmt"
	"reflect"
	"slices"
	"strings"

	v1 "github.com/podidentity/podidentity/api/v1"
)

// Mode is the operation mode of the installation.
type Mode int

const (
	// Managed mode: an operator attaches identities to the machines beforehand. Pod, binding and identity are in the same
	// namespace.
	Managed Mode = iota
	// Standard mode: MIC attaches identities and records them in assignments. Bindings match across namespaces unless the
	// identity or the installation forbids it.
	Standard
)

// Kind is AzureIdentity's spec.type.
type Kind int

const (
	UserAssigned                Kind = 0 // a managed identity attached to the machine
	ServicePrincipalSecret      Kind = 1 // a service principal with a client secret
	ServicePrincipalCertificate Kind = 2 // a service principal with a certificate
	Federated                   Kind = 3 // an app or managed identity that trusts the cluster's issuer
)

// Rules are the settings of the installation that affect the decision.
type Rules struct {
	Mode Mode
	// ForceNamespaced restricts each binding to pods of its own namespace. Managed mode always does.
	ForceNamespaced bool
	// AllowCrossNamespaceSecrets allows an identity to name a Secret in another namespace. Users who may create
	// identities can then use every Secret that NMI may read.
	AllowCrossNamespaceSecrets bool
	// ExceptUnlabelledHostPods excepts pods in the host network that have no label for bindings.
	ExceptUnlabelledHostPods bool
}

// Pod is the pod that the decision is about.
type Pod struct {
	Namespace, Name string
	// UID distinguishes the pod from earlier pods of the same name. Only assignments are compared with it.
	UID    string
	Labels map[string]string
	// HostNetwork says that the pod has the network of the node.
	HostNetwork bool
}

// Selector is the identity that the caller requests. At most one field is set; the parser of the request ensures that.
type Selector struct {
	ClientID, ObjectID, ResourceID string
}

// IsZero reports whether the caller requests no particular identity.
func (s Selector) IsZero() bool { return s == Selector{} }

func (s Selector) String() string {
	switch {
	case s.ClientID != "":
		return fmt.Sprintf("client_id %q", s.ClientID)
	case s.ObjectID != "":
		return fmt.Sprintf("object_id %q", s.ObjectID)
	case s.ResourceID != "":
		return fmt.Sprintf("msi_res_id %q", s.ResourceID)
	}
	return "no particular identity"
}

// Identity is an AzureIdentity.
type Identity struct {
	Namespace, Name string
	Kind            Kind
	ClientID        string
	ResourceID      string
	TenantID        string
	// AuxiliaryTenantIDs are further tenants to request tokens from, for ServicePrincipalSecret.
	AuxiliaryTenantIDs []string
	// ADEndpoint is the URL of Entra ID; if empty, NMI uses that of the installation. Not for UserAssigned.
	ADEndpoint string
	// SecretNamespace and SecretName name the Secret with the client secret or certificate. The namespace defaults to
	// that of the identity.
	SecretNamespace, SecretName string
	// ObjectID is not part of the AzureIdentity. Callers that have received a token of this identity set it from the oid
	// claim. Only a request by object_id needs it.
	ObjectID string
	// Namespaced restricts the identity to pods of its own namespace. The annotation v1.BehaviorAnnotation sets it.
	Namespaced bool
}

// Equal reports whether all fields of i and o are equal. Two states of an AzureIdentity that differ only in fields that
// FromAzureIdentity does not copy are therefore equal.
func (i Identity) Equal(o Identity) bool { return reflect.DeepEqual(i, o) }

// Key returns namespace/name.
func (i Identity) Key() string { return i.Namespace + "/" + i.Name }

func (i Identity) usesSecret() bool {
	return i.Kind == ServicePrincipalSecret || i.Kind == ServicePrincipalCertificate
}

// sameCredential reports whether two objects describe the same principal with the same credential, so that either can
// be used.
func (i Identity) sameCredential(o Identity) bool {
	if i.Kind != o.Kind || !strings.EqualFold(i.ClientID, o.ClientID) {
		return false
	}
	switch i.Kind {
	case UserAssigned:
		return strings.EqualFold(i.ResourceID, o.ResourceID)
	case Federated:
		return strings.EqualFold(i.TenantID, o.TenantID) && i.ADEndpoint == o.ADEndpoint
	}
	return false // two service principals always count as different: their Secrets are not compared
}

// Binding is an AzureIdentityBinding.
type Binding struct {
	Namespace, Name string
	AzureIdentity   string // name of an AzureIdentity in the binding's namespace
	Selector        string // compared for equality with the pod's label
}

// Exception is an AzurePodIdentityException.
type Exception struct {
	Namespace, Name string
	PodLabels       map[string]string
}

// Facts are the objects that the decision depends on. Objects that do not concern the pod are ignored.
type Facts struct {
	Exceptions  []Exception
	Bindings    []Binding
	Identities  []Identity
	Assignments []Assignment // read in standard mode only
}

// Outcome is the result of a decision.
type Outcome int

const (
	Refused Outcome = iota // a retry is refused too, until the objects change
	Pending                // not yet granted; the caller can wait
	Granted
)

// Decision is the result of Decide.
type Decision struct {
	Outcome Outcome
	Reason  Reason
	// Identity is the identity that the pod may use, or that is pending. It is nil if the request is refused, and for an
	// excepted pod (Reason Excepted), which uses the identities of the machine itself.
	Identity *Identity
	// Detail is one sentence for an operator; empty when granted.
	Detail string
}

// Decide returns the decision about a request of the pod for the identity that want names. If want names none, only one
// identity may be bound to the pod; objects with the same credential count as one.
func Decide(rules Rules, pod Pod, want Selector, facts Facts) Decision {
	if IsExcepted(rules, pod, facts) {
		return Decision{Outcome: Granted, Reason: Excepted}
	}
	bound, refusal := Bound(rules, pod, facts)
	if refusal != nil {
		return *refusal
	}
	chosen, refusal := choose(pod, want, bound)
	if refusal != nil {
		return *refusal
	}
	if refusal := Usable(rules, *chosen); refusal != nil {
		return *refusal
	}
	if rules.Mode == Standard {
		if pending := Assigned(pod, chosen, facts.Assignments); pending != nil {
			return *pending
		}
	}
	return Decision{Outcome: Granted, Reason: Allowed, Identity: chosen}
}

// Usable returns the refusal for an identity that no pod can use, or nil.
func Usable(rules Rules, i Identity) *Decision {
	if problem := i.Problem(); problem != "" {
		d := refuse(IdentityInvalid, "AzureIdentity %s is invalid: %s", i.Key(), problem)
		return &d
	}
	if i.usesSecret() && i.SecretNamespace != i.Namespace && !rules.AllowCrossNamespaceSecrets {
		d := refuse(SecretNotAllowed, "AzureIdentity %s names Secret %s/%s, which is in another namespace than the identity; move the Secret to namespace %s, or set --allow-cross-namespace-secrets of NMI (chart value nmi.allowCrossNamespaceSecrets)", i.Key(), i.SecretNamespace, i.SecretName, i.Namespace)
		return &d
	}
	return nil
}

// IsExcepted reports whether the pod uses the identities of the machine itself: an exception among the facts matches it, or
// the rules except it.
func IsExcepted(rules Rules, pod Pod, facts Facts) bool {
	unlabelled := pod.HostNetwork && pod.Labels[v1.BindingLabel] == ""
	return unlabelled && rules.ExceptUnlabelledHostPods || excepted(pod, facts.Exceptions)
}

func refuse(r Reason, format string, args ...any) Decision {
	return Decision{Outcome: Refused, Reason: r, Detail: fmt.Sprintf(format, args...)}
}

// excepted applies the rule of AAD Pod Identity: one matching label of one exception in the pod's namespace is enough,
// and the case of values is ignored.
func excepted(pod Pod, exceptions []Exception) bool {
	for _, e := range exceptions {
		if e.Namespace != pod.Namespace {
			continue
		}
		for k, v := range e.PodLabels {
			if have, ok := pod.Labels[k]; ok && strings.EqualFold(have, v) {
				return true
			}
		}
	}
	return false
}

// Bound returns the identities that are bound to the pod, each once, sorted by namespace and name, or the refusal if
// there is none. It ignores exceptions.
func Bound(rules Rules, pod Pod, facts Facts) ([]Identity, *Decision) {
	label := pod.Labels[v1.BindingLabel]
	if label == "" {
		d := refuse(PodNotLabelled, "pod %s/%s has no label %s, or the label is empty, so no AzureIdentityBinding can select it; label the pod with the selector of its binding", pod.Namespace, pod.Name, v1.BindingLabel)
		return nil, &d
	}
	var bound []Identity
	var missing []string
	matched := 0
	for _, b := range facts.Bindings {
		sameNamespace := b.Namespace == pod.Namespace
		if b.Selector != label || (!sameNamespace && (rules.Mode == Managed || rules.ForceNamespaced)) {
			continue
		}
		i := slices.IndexFunc(facts.Identities, func(i Identity) bool {
			return i.Namespace == b.Namespace && i.Name == b.AzureIdentity
		})
		if i < 0 {
			matched++
			missing = append(missing, fmt.Sprintf("%s/%s (named by AzureIdentityBinding %s)", b.Namespace, b.AzureIdentity, b.Name))
			continue
		}
		if facts.Identities[i].Namespaced && !sameNamespace {
			continue
		}
		matched++
		bound = append(bound, facts.Identities[i])
	}
	if matched == 0 {
		d := refuse(NoMatchingBinding, "no AzureIdentityBinding %swith selector %q matches pod %s/%s; correct the label %s of the pod, or create the binding in namespace %s", where(rules, pod), label, pod.Namespace, pod.Name, v1.BindingLabel, pod.Namespace)
		return nil, &d
	}
	if len(bound) == 0 {
		slices.Sort(missing)
		d := refuse(IdentityMissing, "AzureIdentity %s does not exist; create it, or correct spec.azureIdentity of the binding", strings.Join(missing, ", "))
		return nil, &d
	}
	if len(bound) == 1 {
		return bound, nil
	}
	slices.SortFunc(bound, func(a, b Identity) int {
		return cmp.Or(strings.Compare(a.Namespace, b.Namespace), strings.Compare(a.Name, b.Name))
	})
	return slices.CompactFunc(bound, func(a, b Identity) bool { return a.Namespace == b.Namespace && a.Name == b.Name }), nil
}

func where(rules Rules, pod Pod) string {
	if rules.Mode == Managed || rules.ForceNamespaced {
		return fmt.Sprintf("in namespace %s ", pod.Namespace)
	}
	return ""
}

// choose returns the identity of bound that want names, or the only one if want names none; otherwise it returns the
// refusal. If several objects match, they count as one identity only if all have the same credential.
func choose(pod Pod, want Selector, bound []Identity) (*Identity, *Decision) {
	candidates := bound
	if !want.IsZero() {
		candidates = nil
		for _, i := range bound {
			if want.matches(i) {
				candidates = append(candidates, i)
			}
		}
	}
	if len(candidates) == 0 {
		d := refuse(IdentityNotBound, "pod %s/%s requested %s, which is not one of the identities bound to it: %s", pod.Namespace, pod.Name, want, names(bound))
		return nil, &d
	}
	first := candidates[0]
	for _, other := range candidates[1:] {
		if first.sameCredential(other) {
			continue
		}
		if want.IsZero() {
			d := refuse(MultipleIdentities, "several identities are bound to pod %s/%s (%s) and the request names none; set client_id, object_id or msi_res_id", pod.Namespace, pod.Name, names(candidates))
			return nil, &d
		}
		d := refuse(IdentityAmbiguous, "%s matches several AzureIdentity objects whose credentials may differ: %s; delete all but one, or their bindings", want, names(candidates))
		return nil, &d
	}
	return &first, nil
}

func (s Selector) matches(i Identity) bool {
	switch {
	case s.ClientID != "":
		return strings.EqualFold(s.ClientID, i.ClientID)
	case s.ObjectID != "":
		return strings.EqualFold(s.ObjectID, i.ObjectID)
	default:
		return sameResource(s.ResourceID, i.ResourceID)
	}
}

// sameResource compares resource IDs like Azure: it ignores case and a slash at the end.
func sameResource(a, b string) bool {
	return strings.EqualFold(strings.TrimSuffix(a, "/"), strings.TrimSuffix(b, "/"))
}

func names(ids []Identity) string {
	keys := make([]string, len(ids))
	for i, id := range ids {
		keys[i] = id.Key()
	}
	return strings.Join(keys, ", ")
}
