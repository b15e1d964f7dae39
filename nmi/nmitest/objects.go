// Package nmitest has what the tests of several packages of NMI share: objects of a cluster, a fake API server and a
// fake source of tokens. It imports none of the packages whose internal tests use it.
package nmitest

import (
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/podidentity/podidentity/identity"
)

// Pod returns a running pod of namespace ns.
func Pod(name, uid string, ips ...string) *corev1.Pod {
	p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: name, UID: types.UID(uid)}, Status: corev1.PodStatus{Phase: corev1.PodRunning}}
	for _, ip := range ips {
		p.Status.PodIPs = append(p.Status.PodIPs, corev1.PodIP{IP: ip})
	}
	return p
}

// With calls change with the pod, and returns the same pod.
func With(p *corev1.Pod, change func(*corev1.Pod)) *corev1.Pod {
	change(p)
	return p
}

// Client IDs of the identities of Facts, and the path of a token request.
const (
	ClientX   = "11111111-0000-0000-0000-000000000001"
	ClientY   = "22222222-0000-0000-0000-000000000002"
	ClientS   = "33333333-0000-0000-0000-000000000003"
	ClientF   = "44444444-0000-0000-0000-000000000004"
	TokenPath = "/metadata/identity/oauth2/token?api-version=2018-02-01&resource=https://vault.azure.net"
)

// Pods returns the pods of a node: x (bound to identity x), both (bound to x and y), none (no binding), free
// (excepted), sp (bound to a service principal), foreign (bound to a service principal whose Secret is in another
// namespace), fed (bound to a federated identity), and twin1 and twin2, which have the same address.
func Pods() []*corev1.Pod {
	withLabel := func(p *corev1.Pod, label string) *corev1.Pod {
		p.Labels = map[string]string{"aadpodidbinding": label}
		return p
	}
	return []*corev1.Pod{withLabel(Pod("x", "1", "10.0.0.1"), "x"), withLabel(Pod("both", "2", "10.0.0.2"), "both"), Pod("none", "3", "10.0.0.3"),
		withLabel(Pod("free", "4", "10.0.0.4"), "free"), withLabel(Pod("sp", "5", "10.0.0.5"), "sp"),
		withLabel(Pod("foreign", "8", "10.0.0.8"), "foreign"), withLabel(Pod("fed", "9", "10.0.0.9"), "fed"), Pod("twin1", "6", "10.0.0.6"), Pod("twin2", "7", "10.0.0.6"),
	}
}

// Facts returns the identities, bindings and exceptions for Pods.
func Facts() identity.Facts {
	id := func(name, client string) identity.Identity {
		return identity.Identity{Namespace: "ns", Name: name, ClientID: client, ResourceID: ResourceID(name)}
	}
	return identity.Facts{
		Identities: []identity.Identity{id("x", ClientX), id("y", ClientY),
			{Namespace: "ns", Name: "sp", Kind: identity.ServicePrincipalSecret, ClientID: ClientS, TenantID: "t", AuxiliaryTenantIDs: []string{"t2"}, SecretNamespace: "ns", SecretName: "password"},
			{Namespace: "ns", Name: "foreign", Kind: identity.ServicePrincipalCertificate, ClientID: ClientS, TenantID: "t", SecretNamespace: "other", SecretName: "password"},
			{Namespace: "ns", Name: "fed", Kind: identity.Federated, ClientID: ClientF, TenantID: "t"}},
		Bindings: []identity.Binding{
			{Namespace: "ns", Name: "bx", AzureIdentity: "x", Selector: "x"}, {Namespace: "ns", Name: "b1", AzureIdentity: "x", Selector: "both"},
			{Namespace: "ns", Name: "b2", AzureIdentity: "y", Selector: "both"}, {Namespace: "ns", Name: "bsp", AzureIdentity: "sp", Selector: "sp"},
			{Namespace: "ns", Name: "bforeign", AzureIdentity: "foreign", Selector: "foreign"}, {Namespace: "ns", Name: "bfed", AzureIdentity: "fed", Selector: "fed"},
		},
		Exceptions: []identity.Exception{{Namespace: "ns", Name: "e", PodLabels: map[string]string{"aadpodidbinding": "free"}}},
	}
}

// CopyOf returns the facts with a copy of the identities, because a request writes object IDs into the identities.
func CopyOf(f identity.Facts) identity.Facts {
	f.Identities = append([]identity.Identity(nil), f.Identities...)
	return f
}

// ResourceID returns the resource ID of the managed identity of this name.
func ResourceID(name string) string {
	return "/subscriptions/s/resourcegroups/g/providers/Microsoft.ManagedIdentity/userAssignedIdentities/" + name
}
