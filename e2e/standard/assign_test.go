package standard

import (
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/tools/cache"
	toolswatch "k8s.io/client-go/tools/watch"
	"sigs.k8s.io/controller-runtime/pkg/client"

	v1 "github.com/podidentity/podidentity/api/v1"
	"github.com/podidentity/podidentity/e2e/azure"
	"github.com/podidentity/podidentity/e2e/cluster"
)

// stateHistory has the states of a namespace's assignments in the order of the watch events.
type stateHistory struct {
	mu     sync.Mutex
	states []string
}

const gone = "gone"

// recordStates records the states of the assignments until the test ends. It watches from the resourceVersion of a
// list. A watch without a resourceVersion waits until the cache of the API server is up to date. With a version of etcd
// that does not report progress, such watches can fail for many seconds.
func (s *testNamespace) recordStates() *stateHistory {
	s.t.Helper()
	var now v1.AzureAssignedIdentityList
	must(s.t, s.kube.List(s.t.Context(), &now, client.InNamespace(s.name)))
	w, err := toolswatch.NewRetryWatcherWithContext(s.t.Context(), now.ResourceVersion, &cache.ListWatch{
		WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
			return s.kube.Watch(ctx, &v1.AzureAssignedIdentityList{}, client.InNamespace(s.name), &client.ListOptions{Raw: &o})
		},
	})
	must(s.t, err)
	h := &stateHistory{}
	go h.record(w.ResultChan())
	return h
}

// record records the states until the watch ends.
func (h *stateHistory) record(events <-chan watch.Event) {
	for e := range events {
		a, ok := e.Object.(*v1.AzureAssignedIdentity)
		var state string
		switch {
		case !ok:
			state = "the watch failed: " + asJSON(e.Object)
		case e.Type == watch.Deleted:
			state = gone
		case a.Status.Status == v1.AssignmentLegacy:
			state = string(v1.AssignmentCreated) // MIC has not written a status yet
		default:
			state = string(a.Status.Status)
		}
		h.mu.Lock()
		h.states = append(h.states, state)
		h.mu.Unlock()
	}
}

// is returns nil if the recorded states, without consecutive repetitions, equal want.
func (h *stateHistory) is(want ...string) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if got := slices.Compact(slices.Clone(h.states)); !slices.Equal(got, want) {
		return fmt.Errorf("the states were %v; want %v", got, want)
	}
	return nil
}

func fromFirstToLastPod(t *testing.T, l *testEnvironment) {
	s, id := l.newNamespace(t), l.newIdentity(t)
	states := s.recordStates()
	// The update must take longer than the start of the pod, also on a busy computer. NMI waits 25 s for the identity.
	must(t, l.cloud.SetDelay(t.Context(), "node1", 20*time.Second))
	resetDelay := func() error { return l.cloud.SetDelay(context.Background(), "node1", -1) }
	t.Cleanup(func() { _ = resetDelay() })
	s.bind("app", "app", managed(id))
	s.startPod("p", "app", "node1", "token", "--resource", vault)

	first := s.outcome("p")
	must(t, resetDelay())
	first.answer().mustBeOf(t, l, id)
	updates := l.updates(t, id)
	if len(updates) != 1 || !first.Started.Before(updates[0].End) {
		t.Fatalf("want one update, and a request that began (at %s) before the end of that update; the updates: %+v", first.Started, updates)
	}
	t.Parallel()
	t.Logf("the first request took %.1f s; its answer came %.1f s after ARM had attached the identity",
		first.DurationMS/1000, first.Started.Add(first.answer().took).Sub(updates[0].End).Seconds())
	a := s.waitUntilAssigned("p", "app", id)
	if a.Labels[v1.NodeNameLabel] != "node1" || len(a.OwnerReferences) != 1 || a.OwnerReferences[0].Name != "p" {
		t.Errorf("the assignment has the labels %v and the owners %v", a.Labels, a.OwnerReferences)
	}
	p := s.clientIn("p")
	p.ask().mustBeOf(t, l, id)

	deleted := s.deletePod("p")
	l.mustBeDetachedAfterDelay(t, "node1", id, deleted)
	s.waitUntilReleased("")
	eventually(t, reactionTimeout, func() error {
		return states.is(string(v1.AssignmentCreated), string(v1.AssignmentAssigned), string(v1.AssignmentUnassigned), gone)
	})
	if updates := l.updates(t, id); len(updates) != 2 {
		t.Errorf("want one update to attach and one to detach the identity; got %+v", updates)
	}
}

func sharedIdentity(t *testing.T, l *testEnvironment) {
	s, id := l.newNamespace(t), l.newIdentity(t)
	here, there := l.nodesOfOneMachine()
	s.bind("app", "app", managed(id))
	s.startPod("a", "app", here)
	s.startPod("b", "app", there)
	s.clientIn("a").waitForTokenOf(id)
	b := s.clientIn("b")
	b.waitForTokenOf(id)
	s.deletePod("a")
	s.waitUntilReleased("a") // without a delay, because the identity stays attached
	time.Sleep(detachDelay + 2*time.Second)
	b.ask(fresh).mustBeOf(t, l, id)
	deleted := s.deletePod("b")
	l.mustBeDetachedAfterDelay(t, there, id, deleted)
	if changes := l.changes(t, there, id); len(changes) != 2 {
		t.Errorf("want the identity attached and detached once; got %+v", changes)
	}
	s.waitUntilReleased("")
}

func recreatedPod(t *testing.T, l *testEnvironment) {
	s, id := l.newNamespace(t), l.newIdentity(t)
	s.bind("app", "app", managed(id))
	s.startPod("web-0", "app", "node1")
	s.clientIn("web-0").waitForTokenOf(id)
	deleted := s.deletePod("web-0")
	s.startPod("web-0", "app", "node2")
	s.clientIn("web-0").waitForTokenOf(id)
	eventually(t, updateTimeout, func() error {
		have := s.assignments("web-0")
		if len(have) != 1 || have[0].Spec.NodeName != "node2" || have[0].Labels[v1.NodeNameLabel] != "node2" || have[0].Status.Status != v1.AssignmentAssigned {
			return fmt.Errorf("after its move to node2 the pod has %s", describe(have))
		}
		return nil
	})
	if !l.vms {
		if changes := l.changes(t, "node2", id); len(changes) != 1 {
			t.Errorf("the pod stayed on its scale set, but the scale set was changed: %+v", changes)
		}
		return
	}
	l.mustBeDetachedAfterDelay(t, "node1", id, deleted)
	s.clientIn("web-0").ask(fresh).mustBeOf(t, l, id)
}

func completedJob(t *testing.T, l *testEnvironment) {
	s, id := l.newNamespace(t), l.newIdentity(t)
	s.bind("app", "app", managed(id))
	job := &batchv1.Job{ObjectMeta: s.meta("job")}
	job.Spec.Template.Labels = map[string]string{v1.BindingLabel: s.label("app")}
	job.Spec.Template.Spec = podSpec("node1", "token", "--resource", vault, "--exit")
	job.Spec.Template.Spec.RestartPolicy = corev1.RestartPolicyNever
	s.create(job)
	var pods corev1.PodList
	eventually(t, updateTimeout, func() error {
		must(t, s.kube.List(t.Context(), &pods, client.InNamespace(s.name)))
		if len(pods.Items) != 1 || pods.Items[0].Status.Phase != corev1.PodSucceeded {
			return fmt.Errorf("the pods of the Job are %s", asJSON(pods.Items))
		}
		return nil
	})
	s.outcome(pods.Items[0].Name).answer().mustBeOf(t, l, id)
	l.waitUntilDetached(t, "node1", id)
	s.waitUntilReleased("")
	must(t, s.kube.Get(t.Context(), client.ObjectKeyFromObject(&pods.Items[0]), new(corev1.Pod))) // the completed pod still exists
}

func deletedNamespace(t *testing.T, l *testEnvironment) {
	s, elsewhere, id := l.newNamespace(t), l.newNamespace(t), l.newIdentity(t)
	elsewhere.bind("app", "app", managed(id))
	p := &corev1.Pod{ObjectMeta: s.meta("p"), Spec: podSpec("node1")}
	p.Labels = map[string]string{v1.BindingLabel: elsewhere.label("app")}
	s.create(p)
	s.clientIn("p").waitForTokenOf(id)
	space := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: s.name}}
	deleted := time.Now()
	must(t, l.kube.Delete(t.Context(), space))
	l.waitUntilDeleted(t, space)
	l.mustBeDetachedAfterDelay(t, "node1", id, deleted) // although its pod and its assignment no longer exist
}

func identitiesWithoutMachine(t *testing.T, l *testEnvironment) {
	s := l.newNamespace(t)
	bySecret, byCertificate, federated := s.newApp("hush", nil), s.newApp("", pkcs12(t)), s.newApp("", nil)
	must(t, l.Trust(t.Context(), federated.ClientID, s.name, "default"))
	of := func(kind v1.IdentityType, id azure.Identity) v1.AzureIdentitySpec {
		spec := v1.AzureIdentitySpec{Type: kind, ClientID: id.ClientID, TenantID: id.TenantID}
		if kind != v1.Federated {
			spec.ClientPassword = corev1.SecretReference{Name: id.ClientID}
		}
		return spec
	}
	s.bind("by-secret", "app", of(v1.ServicePrincipal, bySecret))
	s.bind("by-certificate", "app", of(v1.ServicePrincipalCertificate, byCertificate))
	s.bind("federated", "app", of(v1.Federated, federated))
	s.startPod("p", "app", "node1")
	p := s.clientIn("p")
	fastest := time.Hour
	for _, id := range []azure.Identity{bySecret, byCertificate, federated} {
		began := time.Now()
		p.waitForTokenOf(id, "client_id="+id.ClientID)
		fastest = min(fastest, time.Since(began))
	}
	if fastest > armDelay {
		t.Errorf("each token took at least %s, although none needs an update of the machine", fastest)
	}
	eventually(t, reactionTimeout, func() error {
		have := s.assignments("p")
		if len(have) != 3 || slices.ContainsFunc(have, func(a v1.AzureAssignedIdentity) bool { return a.Status.Status != v1.AssignmentAssigned }) {
			return fmt.Errorf("the pod has %s", describe(have))
		}
		return nil
	})
	s.deletePod("p")
	s.waitUntilReleased("")
}

// newApp registers an application in the fake Entra ID, with the client secret or the certificate if one is given. It
// creates a Secret with this credential, or with an empty one. The name of the Secret is the client ID.
func (s *testNamespace) newApp(secret string, certificate map[string][]byte) azure.Identity {
	s.t.Helper()
	n := s.serial.Add(1)
	app := azure.App{ClientID: fmt.Sprintf("a9900000-0000-4000-8000-%012d", n), ObjectID: fmt.Sprintf("a9900001-0000-4000-8000-%012d", n)}
	data := map[string][]byte{"clientSecret": []byte(secret)}
	if secret != "" {
		app.Secrets = []azure.AppSecret{{Value: secret}}
	}
	if certificate != nil {
		app.Certificates = []string{string(certificate["pem"])}
		data = map[string][]byte{"certificate": certificate["certificate"], "password": nil}
	}
	must(s.t, s.cloud.AddApp(s.t.Context(), app))
	s.create(&corev1.Secret{ObjectMeta: s.meta(app.ClientID), Data: data})
	return azure.Identity{ClientID: app.ClientID, ObjectID: app.ObjectID, TenantID: cluster.TenantID}
}

// pkcs12 issues a certificate: as PEM for Entra ID, and as a PKCS #12 file with its key for a Secret.
func pkcs12(t *testing.T) map[string][]byte {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	must(t, err)
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "app"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	must(t, err)
	public := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	private, err := x509.MarshalPKCS8PrivateKey(key)
	must(t, err)
	file := filepath.Join(t.TempDir(), "both.pem")
	must(t, os.WriteFile(file, append(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private}), public...), 0o600))
	p12, err := exec.CommandContext(t.Context(), "openssl", "pkcs12", "-export", "-passout", "pass:", "-in", file).Output()
	must(t, err)
	return map[string][]byte{"pem": public, "certificate": p12}
}
