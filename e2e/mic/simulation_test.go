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

// simulation is one test's cluster, Azure and controllers.
type simulation struct {
	t                testing.TB
	api              *apiServer
	arm              *azure.ARM
	cfg              mic.Config
	log              *zap.Logger
	newTrace         func(process string) func(request, string) // nil: no trace
	onStart          func(*process)                             // before it does anything; may be nil
	ownIdentities    []string                                   // client IDs of MIC's own identities
	seed             uint64
	processes        []*process
	objectsByVersion map[int64]*objects // by version
	azureState
}

func newSimulation(t testing.TB) *simulation {
	w := &simulation{t: t, api: newAPIServer(), arm: azure.NewARM(azure.ARMOptions{}), cfg: mic.DefaultConfig(), log: zap.NewNop(), objectsByVersion: map[int64]*objects{}, azureState: newAzureState()}
	w.cfg.Namespace, w.cfg.Workers = micNamespace, 4
	w.addNamespace(micNamespace)
	w.addNamespace("default")
	return w
}

// close ends all controllers; a bubble ends only when everything in it has.
func (w *simulation) close() {
	for _, p := range w.processes {
		p.kill()
	}
	for _, p := range w.processes {
		select {
		case <-p.done:
		case <-time.After(10 * time.Minute):
			w.t.Errorf("%s: Run has not returned ten minutes after its context ended", p.conn.name)
			<-p.done
		}
		if p.err != nil {
			w.t.Errorf("%s: %v", p.conn.name, p.err)
		}
	}
}

// process is a controller that leads, or did.
type process struct {
	conn *connection
	stop context.CancelFunc // it loses the lease
	done chan struct{}
	err  error
}

// start makes another controller the leader.
func (w *simulation) start() *process {
	ctx, cancel := context.WithCancel(context.Background())
	p := &process{conn: newConnection(fmt.Sprintf("mic-%d", len(w.processes)+1), w.seed+uint64(len(w.processes))), stop: cancel, done: make(chan struct{})}
	w.processes = append(w.processes, p)
	if w.onStart != nil {
		w.onStart(p)
	}
	if w.newTrace != nil {
		p.conn.trace = w.newTrace(p.conn.name)
	}
	client, err := micazure.New(micazure.Config{}, micazure.Options{Transport: p.conn.armTransport(w.arm), Credential: credential{}})
	if err != nil {
		w.t.Fatal(err)
	}
	c, err := mic.New(w.cfg, mic.Deps{
		Kube:     &rest.Config{Host: "http://api.test", Transport: p.conn.apiTransport(w.api)},
		Machines: machinesClient{client, w.ownIdentities}, Log: w.log.Named(p.conn.name), Registry: prometheus.NewRegistry(),
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
	p.conn.disconnect()
	p.stop()
}

// crashAt kills it at its n-th write from now on, before it takes effect or after.
func (p *process) crashAt(n int, applied bool, killed func()) {
	var left atomic.Int64
	left.Store(int64(n))
	die := func(r request) error {
		if !r.isWrite || left.Add(-1) != 0 {
			return nil
		}
		p.conn.disconnect()
		killed()
		return errProcessKilled
	}
	if applied {
		p.conn.hook(nil, die)
	} else {
		p.conn.hook(die, nil)
	}
}

// stepDown ends its term as a leader that steps down does, and waits until it has.
func (p *process) stepDown() {
	p.stop()
	<-p.done
}

type machinesClient struct {
	*micazure.Client
	own []string
}

func (m machinesClient) OwnIdentities() []string { return m.own }

type credential struct{}

func (credential) GetToken(context.Context, policy.TokenRequestOptions) (azcore.AccessToken, error) {
	return azcore.AccessToken{Token: "mic", ExpiresOn: time.Now().Add(24 * time.Hour)}, nil
}

// armTransport is the way to ARM.
func (l *connection) armTransport(arm *azure.ARM) policy.Transporter {
	return transporter(func(r *http.Request) (*http.Response, error) {
		q := request{r.Context(), toARM, r.Method + " " + azure.FoldID(r.URL.Path), r.Method == http.MethodPatch}
		return l.roundTrip(q, func(ctx context.Context) (*http.Response, error) { return arm.Do(r.WithContext(ctx)) })
	})
}

type transporter func(*http.Request) (*http.Response, error)

func (f transporter) Do(r *http.Request) (*http.Response, error) { return f(r) }

// The objects of the cluster, as short as they can be.

func (w *simulation) requireNoError(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

func (w *simulation) addNamespace(name string) {
	_, err := createObject(w.api, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name}, Status: corev1.NamespaceStatus{Phase: corev1.NamespaceActive}})
	w.requireNoError(err)
}

// addScaleSet makes one with nodes on it.
func (w *simulation) addScaleSet(name string, nodes ...string) string {
	id := scaleSetID(name)
	w.requireNoError(w.arm.AddMachine(azure.Machine{ID: id}))
	for i, node := range nodes {
		w.addNode(node, fmt.Sprintf("azure://%s/virtualMachines/%d", id, i))
	}
	return id
}

// addVirtualMachine makes one that is a node.
func (w *simulation) addVirtualMachine(name string) string {
	id := virtualMachineID(name)
	w.requireNoError(w.arm.AddMachine(azure.Machine{ID: id}))
	w.addNode(name, "azure://"+id)
	return id
}

func (w *simulation) addNode(name, providerID string) {
	_, err := createObject(w.api, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: corev1.NodeSpec{ProviderID: providerID}})
	w.requireNoError(err)
}

// addManagedIdentity makes one in Azure, and returns its resource ID.
func (w *simulation) addManagedIdentity(name string) string {
	id := identityID(name)
	w.requireNoError(w.arm.DefineIdentity(azure.Identity{ResourceID: id, ClientID: clientID(name), ObjectID: clientID("o" + name)}))
	return id
}

// addAzureIdentity makes an AzureIdentity of type 0. key is namespace/name.
func (w *simulation) addAzureIdentity(key, resourceID string) {
	namespace, name, _ := strings.Cut(key, "/")
	_, err := createObject(w.api, &v1.AzureIdentity{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name},
		Spec:       v1.AzureIdentitySpec{ResourceID: resourceID, ClientID: clientID(resourceID[strings.LastIndex(resourceID, "/")+1:])},
	})
	w.requireNoError(err)
}

// addBinding binds an AzureIdentity, by namespace/name, to the pods with a selector.
func (w *simulation) addBinding(key, selector string) {
	namespace, name, _ := strings.Cut(key, "/")
	_, err := createObject(w.api, &v1.AzureIdentityBinding{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name + "-" + selector},
		Spec:       v1.AzureIdentityBindingSpec{AzureIdentity: name, Selector: selector},
	})
	w.requireNoError(err)
}

// addBoundIdentity is an AzureIdentity for a managed identity of the same name, bound to the pods with that selector.
func (w *simulation) addBoundIdentity(namespace, name string) string {
	id := w.addManagedIdentity(name)
	w.addAzureIdentity(namespace+"/"+name, id)
	w.addBinding(namespace+"/"+name, name)
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

// addPod makes a pod, by namespace/name, that runs on a node.
func (w *simulation) addPod(key, node, selector string) *corev1.Pod {
	namespace, name, _ := strings.Cut(key, "/")
	p, err := createObject(w.api, newPod(namespace, name, node, selector))
	w.requireNoError(err)
	return p
}

// assignmentsOf returns those of a pod, by namespace/name.
func (w *simulation) assignmentsOf(pod string) (found []*v1.AzureAssignedIdentity) {
	for _, a := range listObjects[v1.AzureAssignedIdentity](w.api) {
		if a.Spec.PodNamespace+"/"+a.Spec.Pod == pod {
			found = append(found, a)
		}
	}
	return found
}

// patchRequests returns the updates that ARM was asked for, of one machine or ("") all.
func (w *simulation) patchRequests(machine string) (found []azure.ARMRequest) {
	for _, r := range w.arm.Log(0) {
		if r.Operation == azure.OpPatch && (machine == "" || r.Resource == azure.FoldID(machine)) {
			found = append(found, r)
		}
	}
	return found
}

func splitKey(key string) (namespace, name string) {
	namespace, name, _ = strings.Cut(key, "/")
	return namespace, name
}
