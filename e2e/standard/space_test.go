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

// space is the Kubernetes namespace of one test.
type space struct {
	*layout
	t    *testing.T
	name string
}

func (l *layout) newSpace(t *testing.T) *space {
	t.Helper()
	s := &space{l, t, fmt.Sprintf("test-%d", l.serial.Add(1))}
	s.make(&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: s.name}})
	t.Cleanup(func() {
		if t.Failed() {
			s.tell()
		}
		_ = l.kube.Delete(context.Background(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: s.name}})
	})
	eventually(t, time.Minute, func() error { // no pod is let in before
		return l.kube.Get(t.Context(), client.ObjectKey{Namespace: s.name, Name: "default"}, new(corev1.ServiceAccount))
	})
	return s
}

// tell says how things stand after a failure.
func (s *space) tell() {
	ctx := context.Background()
	objects, _ := s.Kubectl(ctx, "get", "pods,jobs,azureidentities,azureidentitybindings,azureassignedidentities", "-o", "wide", "-n", s.name)
	events, _ := s.Kubectl(ctx, "get", "events", "-n", s.name, "--field-selector", "type=Warning")
	nmi, _ := s.Kubectl(ctx, "logs", "-n", cluster.ChartNamespace, "-l", "app.kubernetes.io/component=nmi", "--prefix", "--tail", "15")
	mic, _ := s.Kubectl(ctx, "logs", "-n", cluster.ChartNamespace, "-l", "app.kubernetes.io/component=mic", "--prefix", "--tail", "40")
	machines, _ := s.cloud.Machines(ctx)
	s.t.Logf("namespace %s:\n%s\n%s\nNMI:\n%s\nMIC:\n%s\nmachines: %+v", s.name, objects, events, nmi, mic, machines)
}

func (s *space) make(objects ...client.Object) {
	s.t.Helper()
	for _, o := range objects {
		must(s.t, s.kube.Create(s.t.Context(), o))
	}
}

func (s *space) meta(name string) metav1.ObjectMeta {
	return metav1.ObjectMeta{Namespace: s.name, Name: name}
}

// label makes a label's value one of this test: bindings select pods of all namespaces.
func (s *space) label(value string) string { return s.name + "-" + value }

// bind makes an AzureIdentity, and a binding of its name for pods with the label.
func (s *space) bind(name, label string, spec v1.AzureIdentitySpec) {
	s.t.Helper()
	s.make(&v1.AzureIdentity{ObjectMeta: s.meta(name), Spec: spec},
		&v1.AzureIdentityBinding{ObjectMeta: s.meta(name), Spec: v1.AzureIdentityBindingSpec{AzureIdentity: name, Selector: s.label(label)}})
}

func managed(id azure.Identity) v1.AzureIdentitySpec {
	return v1.AzureIdentitySpec{ResourceID: id.ResourceID, ClientID: id.ClientID}
}

// edit changes fields of the spec of an AzureIdentity.
func (s *space) edit(name string, spec v1.AzureIdentitySpec) {
	s.t.Helper()
	var i v1.AzureIdentity
	must(s.t, s.kube.Get(s.t.Context(), client.ObjectKey{Namespace: s.name, Name: name}, &i))
	before := i.DeepCopy()
	i.Spec = spec
	must(s.t, s.kube.Patch(s.t.Context(), &i, client.MergeFrom(before)))
}

// podSpec is that of a pod of the test image; args are podclient's.
func podSpec(node string, args ...string) corev1.PodSpec {
	grace := int64(1)
	return corev1.PodSpec{
		NodeSelector:                  map[string]string{corev1.LabelHostname: node},
		TerminationGracePeriodSeconds: &grace,
		Containers:                    []corev1.Container{{Name: "c", Image: cluster.TestImage, ImagePullPolicy: corev1.PullNever, Args: args}},
	}
}

// start makes a pod, which idles unless there are other args.
func (s *space) start(name, label, node string, args ...string) {
	s.t.Helper()
	p := &corev1.Pod{ObjectMeta: s.meta(name), Spec: podSpec(node, args...)}
	p.Labels = map[string]string{v1.BindingLabel: s.label(label)}
	s.make(p)
}

// end deletes a pod, waits until it is gone, and returns when it was told to go.
func (s *space) end(name string) time.Time {
	s.t.Helper()
	told := time.Now()
	must(s.t, s.kube.Delete(s.t.Context(), &corev1.Pod{ObjectMeta: s.meta(name)}))
	s.untilGone(s.t, &corev1.Pod{ObjectMeta: s.meta(name)})
	return told
}

// assignments are those of a pod, or with "" of all pods.
func (s *space) assignments(pod string) []v1.AzureAssignedIdentity {
	s.t.Helper()
	var all v1.AzureAssignedIdentityList
	must(s.t, s.kube.List(s.t.Context(), &all, client.InNamespace(s.name)))
	return slices.DeleteFunc(all.Items, func(a v1.AzureAssignedIdentity) bool { return pod != "" && a.Spec.Pod != pod })
}

// untilAssigned waits until a pod has an AzureIdentity, as the resource that it is now, whatever else it has.
func (s *space) untilAssigned(pod, identity string, id azure.Identity) (a v1.AzureAssignedIdentity) {
	s.t.Helper()
	eventually(s.t, inTime, func() error {
		have := s.assignments(pod)
		i := slices.IndexFunc(have, func(a v1.AzureAssignedIdentity) bool {
			ref := a.Spec.AzureIdentityRef
			return ref.Metadata.Name == identity && azure.FoldID(ref.Spec.ResourceID) == azure.FoldID(id.ResourceID)
		})
		if i < 0 || have[i].Status.Status != v1.AssignmentAssigned {
			return fmt.Errorf("pod %s is not assigned %s: %s", pod, identity, brief(have))
		}
		a = have[i]
		return nil
	})
	return a
}

// untilReleased waits until a pod, or with "" the namespace, has no assignments.
func (s *space) untilReleased(pod string) {
	s.t.Helper()
	eventually(s.t, inTime, func() error {
		if have := s.assignments(pod); len(have) > 0 {
			return fmt.Errorf("pod %s still has %s", pod, brief(have))
		}
		return nil
	})
}

func brief(assignments []v1.AzureAssignedIdentity) string {
	var out []string
	for _, a := range assignments {
		out = append(out, fmt.Sprintf("%s (%s on %s: %q %s)", a.Name, a.Spec.AzureIdentityRef.Spec.ResourceID, a.Spec.NodeName, a.Status.Status, a.Status.Message))
	}
	return "assignments: " + strings.Join(out, ", ")
}

const vault = "https://vault.azure.net"

// answer is what a pod got from the metadata service.
type answer struct {
	status int
	body   map[string]string
	header http.Header
	raw    string
	took   time.Duration
}

// asking lets a pod ask for tokens.
type asking struct {
	s    *space
	from *http.Client
}

func (s *space) in(pod string) asking {
	s.t.Helper()
	return asking{s, s.from(s.t, s.name, pod)}
}

// fresh is a parameter of the request that keeps NMI from answering from its cache.
const fresh = "bypass_cache=true"

// ask asks for a token of the Key Vault. A connection that fails is status 0.
func (a asking) ask(query ...string) answer {
	target := "http://169.254.169.254/metadata/identity/oauth2/token?api-version=2018-02-01&resource=" + url.QueryEscape(vault)
	began := time.Now()
	status, header, body, err := get(a.s.t.Context(), a.from, strings.Join(append([]string{target}, query...), "&"))
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

// mustBeOf checks the signature of the answer's token, and whose it is.
func (a answer) mustBeOf(t *testing.T, l *layout, id azure.Identity) {
	t.Helper()
	if err := a.isOf(l, id); err != nil {
		t.Fatal(err)
	}
}

func (a answer) isOf(l *layout, id azure.Identity) error {
	if a.status != http.StatusOK {
		return fmt.Errorf("status %d after %s: %s", a.status, a.took, a.raw)
	}
	claims, err := l.cloud.Verify(a.body["access_token"])
	if err != nil {
		return err
	}
	if claims.AppID != id.ClientID || claims.ObjectID != id.ObjectID || claims.Audience != vault || a.body["client_id"] != id.ClientID {
		return fmt.Errorf("this is a token of appid %s, oid %s for %s; want %+v", claims.AppID, claims.ObjectID, claims.Audience, id)
	}
	return nil
}

func (a answer) mustBeRefused(t *testing.T, status int, reason string) {
	t.Helper()
	if a.status != status || a.body["reason"] != reason || a.body["access_token"] != "" {
		t.Errorf("got %d %s; want %d and reason %s", a.status, a.raw, status, reason)
	}
}

// outcome is what the program of a pod got that asks as soon as it runs.
type outcome struct {
	Started    time.Time
	Status     int
	Body       string
	Headers    map[string]string
	Error      string
	DurationMS float64 `json:"duration_ms"`
}

func (s *space) outcome(pod string) (got outcome) {
	s.t.Helper()
	eventually(s.t, inTime, func() error {
		out, err := s.Kubectl(s.t.Context(), "logs", pod, "-n", s.name)
		if err != nil {
			return err
		}
		if err := json.Unmarshal([]byte(out), &got); err != nil {
			return fmt.Errorf("the log of %s: %q: %w", pod, out, err)
		}
		return nil
	})
	return got
}

func (o outcome) answer() answer {
	return newAnswer(o.Status, nil, o.Body+o.Error, time.Duration(o.DurationMS*float64(time.Millisecond)))
}

// events are the messages of the warnings about an object.
func (s *space) events(kind, name string) string {
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
