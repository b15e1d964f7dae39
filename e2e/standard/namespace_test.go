package standard

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	v1 "github.com/podidentity/podidentity/api/v1"
	"github.com/podidentity/podidentity/e2e/azure"
	"github.com/podidentity/podidentity/e2e/cluster"
)

// testNamespace is the Kubernetes namespace of one test.
type testNamespace struct {
	*testEnvironment
	t    *testing.T
	name string
}

func (l *testEnvironment) newNamespace(t *testing.T) *testNamespace {
	t.Helper()
	s := &testNamespace{l, t, fmt.Sprintf("test-%d", l.serial.Add(1))}
	s.create(&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: s.name}})
	t.Cleanup(func() {
		if t.Failed() {
			s.logState()
		}
		_ = l.kube.Delete(context.Background(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: s.name}})
	})
	eventually(t, reactionTimeout, func() error { // the API server refuses pods until their ServiceAccount exists
		return l.kube.Get(t.Context(), client.ObjectKey{Namespace: s.name, Name: "default"}, new(corev1.ServiceAccount))
	})
	return s
}

// logState writes the objects, events and logs after a failure. It does not use t.Log: e2e/gotest.sh repeats what t.Log
// writes, and must repeat the message of the failure only.
func (s *testNamespace) logState() {
	ctx := context.Background()
	objects, _ := s.Kubectl(ctx, "get", "pods,jobs,azureidentities,azureidentitybindings,azureassignedidentities", "-o", "wide", "-n", s.name)
	events, _ := s.Kubectl(ctx, "get", "events", "-n", s.name, "--field-selector", "type=Warning")
	nmi, _ := s.Kubectl(ctx, "logs", "-n", cluster.ChartNamespace, "-l", "app.kubernetes.io/component=nmi", "--prefix", "--tail", "15")
	mic, _ := s.Kubectl(ctx, "logs", "-n", cluster.ChartNamespace, "-l", "app.kubernetes.io/component=mic", "--prefix", "--tail", "40")
	machines, _ := s.cloud.Machines(ctx)
	fmt.Fprintf(s.t.Output(), "namespace %s:\n%s\n%s\nNMI:\n%s\nMIC:\n%s\nmachines: %+v\n", s.name, objects, events, nmi, mic, machines)
}

func (s *testNamespace) create(objects ...client.Object) {
	s.t.Helper()
	for _, o := range objects {
		must(s.t, s.kube.Create(s.t.Context(), o))
	}
}

func (s *testNamespace) meta(name string) metav1.ObjectMeta {
	return metav1.ObjectMeta{Namespace: s.name, Name: name}
}

// label makes the value of a label unique to this test: bindings select pods in all namespaces.
func (s *testNamespace) label(value string) string { return s.name + "-" + value }

// bind creates an AzureIdentity, and a binding of the same name for pods that startPod starts with the same label.
func (s *testNamespace) bind(name, label string, spec v1.AzureIdentitySpec) {
	s.t.Helper()
	s.create(&v1.AzureIdentity{ObjectMeta: s.meta(name), Spec: spec},
		&v1.AzureIdentityBinding{ObjectMeta: s.meta(name), Spec: v1.AzureIdentityBindingSpec{AzureIdentity: name, Selector: s.label(label)}})
}

func managed(id azure.Identity) v1.AzureIdentitySpec {
	return v1.AzureIdentitySpec{ResourceID: id.ResourceID, ClientID: id.ClientID}
}

// edit replaces the spec of an AzureIdentity.
func (s *testNamespace) edit(name string, spec v1.AzureIdentitySpec) {
	s.t.Helper()
	var i v1.AzureIdentity
	must(s.t, s.kube.Get(s.t.Context(), client.ObjectKey{Namespace: s.name, Name: name}, &i))
	before := i.DeepCopy()
	i.Spec = spec
	must(s.t, s.kube.Patch(s.t.Context(), &i, client.MergeFrom(before)))
}

// podSpec is the spec of a pod that runs podclient with args.
func podSpec(node string, args ...string) corev1.PodSpec {
	grace := int64(1)
	return corev1.PodSpec{
		NodeSelector:                  map[string]string{corev1.LabelHostname: node},
		TerminationGracePeriodSeconds: &grace,
		Containers:                    []corev1.Container{{Name: "c", Image: cluster.TestImage, ImagePullPolicy: corev1.PullNever, Args: args}},
	}
}

// startPod creates a pod that runs podclient with args. Without args podclient only waits.
func (s *testNamespace) startPod(name, label, node string, args ...string) {
	s.t.Helper()
	p := &corev1.Pod{ObjectMeta: s.meta(name), Spec: podSpec(node, args...)}
	p.Labels = map[string]string{v1.BindingLabel: s.label(label)}
	s.create(p)
}

// deletePod deletes a pod and waits until it is gone. It returns the time of the delete request.
func (s *testNamespace) deletePod(name string) time.Time {
	s.t.Helper()
	deleted := time.Now()
	must(s.t, s.kube.Delete(s.t.Context(), &corev1.Pod{ObjectMeta: s.meta(name)}))
	s.waitUntilDeleted(s.t, &corev1.Pod{ObjectMeta: s.meta(name)})
	return deleted
}

// assignments returns the assignments of a pod. If pod is "", it returns those of all pods of the namespace.
func (s *testNamespace) assignments(pod string) []v1.AzureAssignedIdentity {
	s.t.Helper()
	var all v1.AzureAssignedIdentityList
	must(s.t, s.kube.List(s.t.Context(), &all, client.InNamespace(s.name)))
	return slices.DeleteFunc(all.Items, func(a v1.AzureAssignedIdentity) bool { return pod != "" && a.Spec.Pod != pod })
}

// waitUntilAssigned waits until the AzureIdentity named identity, with the resource ID of id, is assigned to a pod. The
// pod may have other assignments.
func (s *testNamespace) waitUntilAssigned(pod, identity string, id azure.Identity) (a v1.AzureAssignedIdentity) {
	s.t.Helper()
	eventually(s.t, updateTimeout, func() error {
		have := s.assignments(pod)
		i := slices.IndexFunc(have, func(a v1.AzureAssignedIdentity) bool {
			ref := a.Spec.AzureIdentityRef
			return ref.Metadata.Name == identity && azure.FoldID(ref.Spec.ResourceID) == azure.FoldID(id.ResourceID)
		})
		if i < 0 || have[i].Status.Status != v1.AssignmentAssigned {
			return fmt.Errorf("AzureIdentity %[2]s is not assigned to pod %[1]s, which has %[3]s", pod, identity, describe(have))
		}
		a = have[i]
		return nil
	})
	return a
}

// waitUntilReleased waits until a pod has no assignments. If pod is "", it waits until the namespace has none.
func (s *testNamespace) waitUntilReleased(pod string) {
	s.t.Helper()
	eventually(s.t, updateTimeout, func() error {
		if have := s.assignments(pod); len(have) > 0 {
			return fmt.Errorf("namespace %s still has %s", s.name, describe(have))
		}
		return nil
	})
}

func describe(assignments []v1.AzureAssignedIdentity) string {
	var out []string
	for _, a := range assignments {
		out = append(out, fmt.Sprintf("%s (%s on %s: %q %s)", a.Name, a.Spec.AzureIdentityRef.Spec.ResourceID, a.Spec.NodeName, a.Status.Status, a.Status.Message))
	}
	return "assignments: " + strings.Join(out, ", ")
}

const vault = "https://vault.azure.net"

// answer is the response to a token request of a pod.
type answer struct {
	status int
	body   map[string]string
	header http.Header
	raw    string
	took   time.Duration
}

// podClient requests tokens in the network namespace of a pod.
type podClient struct {
	s    *testNamespace
	http *http.Client
}

func (s *testNamespace) clientIn(pod string) podClient {
	s.t.Helper()
	return podClient{s, s.httpClient(s.t, s.name, pod)}
}

// fresh is the request parameter that makes NMI bypass its cache, at most once in ten seconds for the same token.
const fresh = "bypass_cache=true"

// ask requests a token for Key Vault. The status is 0 if there is no response.
func (a podClient) ask(query ...string) answer {
	target := "http://169.254.169.254/metadata/identity/oauth2/token?api-version=2018-02-01&resource=" + url.QueryEscape(vault)
	began := time.Now()
	status, header, body, err := get(a.s.t.Context(), a.http, strings.Join(append([]string{target}, query...), "&"))
	if err != nil {
		return answer{raw: err.Error(), took: time.Since(began)}
	}
	return newAnswer(status, header, body, time.Since(began))
}

func newAnswer(status int, header http.Header, body string, took time.Duration) answer {
	a := answer{status: status, header: header, raw: body, took: took, body: map[string]string{}}
	_ = json.Unmarshal([]byte(body), &a.body)
	return a
}

// mustBeOf checks that the answer has a token of the identity, and that the signature of the token is valid.
func (a answer) mustBeOf(t *testing.T, l *testEnvironment, id azure.Identity) {
	t.Helper()
	if err := a.isOf(l, id); err != nil {
		t.Fatal(err)
	}
}

func (a answer) isOf(l *testEnvironment, id azure.Identity) error {
	if a.status != http.StatusOK {
		return fmt.Errorf("a token request got status %d after %s: %s", a.status, a.took, a.raw)
	}
	claims, err := l.cloud.Verify(a.body["access_token"])
	if err != nil {
		return err
	}
	if claims.AppID != id.ClientID || claims.ObjectID != id.ObjectID || claims.Audience != vault || a.body["client_id"] != id.ClientID {
		return fmt.Errorf("the token has appid %s, oid %s and audience %s; want %+v", claims.AppID, claims.ObjectID, claims.Audience, id)
	}
	return nil
}

func (a answer) mustBeRefused(t *testing.T, status int, reason string) {
	t.Helper()
	if a.status != status || a.body["reason"] != reason || a.body["access_token"] != "" {
		t.Errorf("got %d %s; want %d and reason %s", a.status, a.raw, status, reason)
	}
}

// outcome is the JSON line that podclient writes to its log after a token request.
type outcome struct {
	Started    time.Time
	Status     int
	Body       string
	Headers    map[string]string
	Error      string
	DurationMS float64 `json:"duration_ms"`
}

func (s *testNamespace) outcome(pod string) (got outcome) {
	s.t.Helper()
	eventually(s.t, updateTimeout, func() error {
		out, err := s.Kubectl(s.t.Context(), "logs", pod, "-n", s.name)
		if err != nil {
			return err
		}
		if err := json.Unmarshal([]byte(out), &got); err != nil {
			return fmt.Errorf("the log of pod %s is not one line of JSON: %q: %w", pod, out, err)
		}
		return nil
	})
	return got
}

func (o outcome) answer() answer {
	return newAnswer(o.Status, nil, o.Body+o.Error, time.Duration(o.DurationMS*float64(time.Millisecond)))
}

// events are the Warning Events about an object, as text.
func (s *testNamespace) events(kind, name string) string {
	s.t.Helper()
	var all corev1.EventList
	must(s.t, s.kube.List(s.t.Context(), &all, client.InNamespace(s.name)))
	var out []string
	for _, e := range all.Items {
		if e.InvolvedObject.Kind == kind && e.InvolvedObject.Name == name && e.Type == corev1.EventTypeWarning {
			out = append(out, e.Reason+": "+e.Message)
		}
	}
	return strings.Join(out, "\n")
}
