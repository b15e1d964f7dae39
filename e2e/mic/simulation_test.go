package mic

import (
	"context"
	"fmt"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"

	v1 "github.com/podidentity/podidentity/api/v1"
	"github.com/podidentity/podidentity/e2e/azure"
	"github.com/podidentity/podidentity/mic"
	micazure "github.com/podidentity/podidentity/mic/azure"
)

const (
	subscription = "/subscriptions/5ab5c21f-0000-4000-8000-000000000001"
	group        = subscription + "/resourceGroups/MC_Group"
	micNamespace = "mic"
)

func scaleSetID(name string) string {
	return group + "/providers/Microsoft.Compute/virtualMachineScaleSets/" + name
}

func virtualMachineID(name string) string {
	return group + "/providers/Microsoft.Compute/virtualMachines/" + name
}

func identityID(name string) string {
	return subscription + "/resourceGroups/Identities/providers/Microsoft.ManagedIdentity/userAssignedIdentities/" + name
}

// clientID is a GUID made of the name.
func clientID(name string) string {
	return fmt.Sprintf("00000000-0000-4000-8000-%012x", []byte(fmt.Sprintf("%-6.6s", name)))
}

// world is one test's cluster, Azure and controllers.
type world struct {
	t         testing.TB
	api       *apiServer
	arm       *azure.ARM
	cfg       mic.Config
	log       *zap.Logger
	trace     func(process string) func(request, string) // nil: no trace
	onStart   func(*process)                             // before it does anything; may be nil
	own       []string                                   // client IDs of MIC's own identities
	seed      uint64
	processes []*process
	known     map[int64]*objects // by version
	azureFacts
}

func newWorld(t testing.TB) *world {
	w := &world{t: t, api: newAPIServer(), arm: azure.NewARM(azure.ARMOptions{}), cfg: mic.DefaultConfig(), log: zap.NewNop(), known: map[int64]*objects{}, azureFacts: newAzureFacts()}
	w.cfg.Namespace, w.cfg.Workers = micNamespace, 4
	w.namespace(micNamespace)
	w.namespace("default")
	return w
}

// close ends all controllers; a bubble ends only when everything in it has.
func (w *world) close() {
	for _, p := range w.processes {
		p.kill()
	}
	for _, p := range w.processes {
		select {
		case <-p.done:
		case <-time.After(10 * time.Minute):
			w.t.Errorf("%s: Run has not returned ten minutes after its context ended", p.line.name)
			<-p.done
		}
		if p.err != nil {
			w.t.Errorf("%s: %v", p.line.name, p.err)
		}
	}
}

// process is a controller that leads, or did.
type process struct {
	line *line
	stop context.CancelFunc // it loses the lease
	done chan struct{}
	err  error
}

// start makes another controller the leader.
func (w *world) start() *process {
	ctx, cancel := context.WithCancel(context.Background())
	p := &process{line: newLine(fmt.Sprintf("mic-%d", len(w.processes)+1), w.seed+uint64(len(w.processes))), stop: cancel, done: make(chan struct{})}
	w.processes = append(w.processes, p)
	if w.onStart != nil {
		w.onStart(p)
	}
	if w.trace != nil {
		p.line.trace = w.trace(p.line.name)
	}
	client, err := micazure.New(micazure.Config{}, micazure.Options{Transport: p.line.azure(w.arm), Credential: credential{}})
	if err != nil {
		w.t.Fatal(err)
	}
	c, err := mic.New(w.cfg, mic.Deps{
		Kube:     &rest.Config{Host: "http://api.test", Transport: p.line.api(w.api)},
		Machines: machines{client, w.own}, Log: w.log.Named(p.line.name), Registry: prometheus.NewRegistry(),
	})
	if err != nil {
		w.t.Fatal(err)
	}
	go func() {
		defer close(p.done)
		p.err = c.Run(ctx)
	}()
	return p
}

// kill is SIGKILL: nothing that it sends arrives any more, and nothing that was answered reaches it.
func (p *process) kill() {
	p.line.cut()
	p.stop()
}

// crashAt kills it at its n-th write from now on, before it takes effect or after.
func (p *process) crashAt(n int, applied bool, killed func()) {
	var left atomic.Int64
	left.Store(int64(n))
	die := func(r request) error {
		if !r.write || left.Add(-1) != 0 {
			return nil
		}
		p.line.cut()
		killed()
		return errCut
	}
	if applied {
		p.line.hook(nil, die)
	} else {
		p.line.hook(die, nil)
	}
}

// leave ends its term as a leader that steps down does, and waits until it has.
func (p *process) leave() {
	p.stop()
	<-p.done
}

type machines struct {
	*micazure.Client
	own []string
}

func (m machines) OwnIdentities() []string { return m.own }

type credential struct{}

func (credential) GetToken(context.Context, policy.TokenRequestOptions) (azcore.AccessToken, error) {
	return azcore.AccessToken{Token: "mic", ExpiresOn: time.Now().Add(24 * time.Hour)}, nil
}

// azure is the way to ARM.
func (l *line) azure(arm *azure.ARM) policy.Transporter {
	return transporter(func(r *http.Request) (*http.Response, error) {
		q := request{r.Context(), toARM, r.Method + " " + azure.FoldID(r.URL.Path), r.Method == http.MethodPatch}
		return l.pass(q, func(ctx context.Context) (*http.Response, error) { return arm.Do(r.WithContext(ctx)) })
	})
}

type transporter func(*http.Request) (*http.Response, error)

func (f transporter) Do(r *http.Request) (*http.Response, error) { return f(r) }

// The objects of the cluster, as short as they can be.

func (w *world) must(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) namespace(name string) {
	_, err := put(w.api, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name}, Status: corev1.NamespaceStatus{Phase: corev1.NamespaceActive}})
	w.must(err)
}

// scaleSet makes one with nodes on it.
func (w *world) scaleSet(name string, nodes ...string) string {
	id := scaleSetID(name)
	w.must(w.arm.AddMachine(azure.Machine{ID: id}))
	for i, node := range nodes {
		w.node(node, fmt.Sprintf("azure://%s/virtualMachines/%d", id, i))
	}
	return id
}

// virtualMachine makes one that is a node.
func (w *world) virtualMachine(name string) string {
	id := virtualMachineID(name)
	w.must(w.arm.AddMachine(azure.Machine{ID: id}))
	w.node(name, "azure://"+id)
	return id
}

func (w *world) node(name, providerID string) {
	_, err := put(w.api, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: corev1.NodeSpec{ProviderID: providerID}})
	w.must(err)
}

// managedIdentity makes one in Azure, and returns its resource ID.
func (w *world) managedIdentity(name string) string {
	id := identityID(name)
	w.must(w.arm.DefineIdentity(azure.Identity{ResourceID: id, ClientID: clientID(name), ObjectID: clientID("o" + name)}))
	return id
}

// identity makes an AzureIdentity of type 0. key is namespace/name.
func (w *world) identity(key, resourceID string) {
	namespace, name, _ := strings.Cut(key, "/")
	_, err := put(w.api, &v1.AzureIdentity{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name},
		Spec:       v1.AzureIdentitySpec{ResourceID: resourceID, ClientID: clientID(resourceID[strings.LastIndex(resourceID, "/")+1:])},
	})
	w.must(err)
}

// bind binds an AzureIdentity, by namespace/name, to the pods with a selector.
func (w *world) bind(key, selector string) {
	namespace, name, _ := strings.Cut(key, "/")
	_, err := put(w.api, &v1.AzureIdentityBinding{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name + "-" + selector},
		Spec:       v1.AzureIdentityBindingSpec{AzureIdentity: name, Selector: selector},
	})
	w.must(err)
}

// give is an AzureIdentity for a managed identity of the same name, bound to the pods with that selector.
func (w *world) give(namespace, name string) string {
	id := w.managedIdentity(name)
	w.identity(namespace+"/"+name, id)
	w.bind(namespace+"/"+name, name)
	return id
}

func newPod(namespace, name, node, selector string) *corev1.Pod {
	p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name}, Spec: corev1.PodSpec{NodeName: node}, Status: corev1.PodStatus{Phase: corev1.PodPending}}
	if selector != "" {
		p.Labels = map[string]string{v1.BindingLabel: selector}
	}
	if node != "" {
		p.Status.Phase = corev1.PodRunning
	}
	return p
}

// pod makes a pod, by namespace/name, that runs on a node.
func (w *world) pod(key, node, selector string) *corev1.Pod {
	namespace, name, _ := strings.Cut(key, "/")
	p, err := put(w.api, newPod(namespace, name, node, selector))
	w.must(err)
	return p
}

// assignments returns those of a pod, by namespace/name.
func (w *world) assignments(pod string) (found []*v1.AzureAssignedIdentity) {
	for _, a := range all[v1.AzureAssignedIdentity](w.api) {
		if a.Spec.PodNamespace+"/"+a.Spec.Pod == pod {
			found = append(found, a)
		}
	}
	return found
}

// patches returns the updates that ARM was asked for, of one machine or ("") all.
func (w *world) patches(machine string) (found []azure.ARMRequest) {
	for _, r := range w.arm.Log(0) {
		if r.Operation == azure.OpPatch && (machine == "" || r.Resource == azure.FoldID(machine)) {
			found = append(found, r)
		}
	}
	return found
}

func cut(key string) (namespace, name string) {
	namespace, name, _ = strings.Cut(key, "/")
	return namespace, name
}
