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

// clientID derives a GUID from the first six characters of a name.
func clientID(name string) string {
	return fmt.Sprintf("00000000-0000-4000-8000-%012x", []byte(fmt.Sprintf("%-6.6s", name)))
}

// simulation is the cluster, the Azure and the controllers of one test.
type simulation struct {
	t                testing.TB
	api              *apiServer
	handle           apiHandler // of api, or of a real API server
	cfg              mic.Config
	log              *zap.Logger
	newTrace         func(process string) func(request, string) // returns connection.trace for a process; nil: no trace
	onStart          func(*process)                             // called before the process does anything; may be nil
	ownIdentities    []string                                   // client IDs of MIC's own identities
	seed             uint64
	processes        []*process
	objectsByVersion map[int64]*objects // cache of objectsAt, by version of the API server
	azureState
}

func newSimulation(t testing.TB) *simulation {
	sim := &simulation{t: t, api: newAPIServer(), cfg: mic.DefaultConfig(), log: zap.NewNop(), objectsByVersion: map[int64]*objects{}, azureState: newAzureState(t)}
	sim.handle = sim.api.handle
	sim.cfg.Namespace, sim.cfg.Workers = micNamespace, 4
	sim.addNamespace(micNamespace)
	sim.addNamespace("default")
	return sim
}

// close ends all controllers: a synctest bubble ends only when all its goroutines have ended.
func (sim *simulation) close() {
	for _, p := range sim.processes {
		p.kill()
	}
	for _, p := range sim.processes {
		select {
		case <-p.done:
		case <-time.After(10 * time.Minute):
			sim.t.Errorf("%s: Run of the controller has not returned ten minutes after the context was cancelled", p.conn.name)
			<-p.done
		}
		if p.err != nil {
			sim.t.Errorf("%s: Run of the controller failed: %v", p.conn.name, p.err)
		}
	}
}

// process is a controller that is or was the leader.
type process struct {
	conn *connection
	stop context.CancelFunc // makes the controller step down, as if it had lost the lease
	done chan struct{}
	err  error
}

// start starts another controller as the leader.
func (sim *simulation) start() *process {
	ctx, cancel := context.WithCancel(context.Background())
	p := &process{conn: newConnection(fmt.Sprintf("mic-%d", len(sim.processes)+1), sim.seed+uint64(len(sim.processes))), stop: cancel, done: make(chan struct{})}
	sim.processes = append(sim.processes, p)
	if sim.onStart != nil {
		sim.onStart(p)
	}
	if sim.newTrace != nil {
		p.conn.trace = sim.newTrace(p.conn.name)
	}
	client, err := micazure.New(micazure.Config{}, micazure.Options{Transport: p.conn.armTransport(sim.arm), Credential: credential{}})
	if err != nil {
		sim.t.Fatal(err)
	}
	c, err := mic.New(sim.cfg, mic.Deps{
		Kube:     &rest.Config{Host: "http://api.test", Transport: p.conn.apiTransport(sim.api, sim.handle)},
		Machines: machinesClient{client, sim.ownIdentities}, Log: sim.log.Named(p.conn.name), Registry: prometheus.NewRegistry(),
	})
	if err != nil {
		sim.t.Fatal(err)
	}
	go func() {
		defer close(p.done)
		p.err = c.Run(ctx)
	}()
	return p
}

// kill acts like SIGKILL: no more requests of the process arrive, and no responses reach it.
func (p *process) kill() {
	p.conn.disconnect()
	p.stop()
}

// crashAt makes the process lose its connection at its n-th write from now on, and then calls killed. The n-th write
// takes effect only if applied is true.
func (p *process) crashAt(n int, applied bool, killed func()) {
	var remaining atomic.Int64
	remaining.Store(int64(n))
	die := func(r request) error {
		if !r.isWrite || remaining.Add(-1) != 0 {
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

// stepDown ends the controller gracefully, as a leader that loses the lease does, and waits until it has ended.
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

func (l *connection) armTransport(arm *azure.ARM) policy.Transporter {
	return transporter(func(r *http.Request) (*http.Response, error) {
		q := request{r.Context(), toARM, r.Method + " " + azure.FoldID(r.URL.Path), r.Method == http.MethodPatch}
		return l.roundTrip(q, func(ctx context.Context) (*http.Response, error) { return arm.Do(r.WithContext(ctx)) })
	})
}

type transporter func(*http.Request) (*http.Response, error)

func (f transporter) Do(r *http.Request) (*http.Response, error) { return f(r) }

func requireNoError(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// The functions below whose names begin with add create objects with only the necessary fields.

func (sim *simulation) addNamespace(name string) {
	_, err := createObject(sim.api, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name}, Status: corev1.NamespaceStatus{Phase: corev1.NamespaceActive}})
	requireNoError(sim.t, err)
}

// addScaleSet creates a scale set and its nodes, and returns the ID of the scale set.
func (sim *simulation) addScaleSet(name string, nodes ...string) string {
	id := scaleSetID(name)
	requireNoError(sim.t, sim.arm.AddMachine(azure.Machine{ID: id}))
	for i, node := range nodes {
		sim.addNode(node, fmt.Sprintf("azure://%s/virtualMachines/%d", id, i))
	}
	return id
}

// addVirtualMachine creates a virtual machine and its node, and returns the ID of the machine.
func (sim *simulation) addVirtualMachine(name string) string {
	id := virtualMachineID(name)
	requireNoError(sim.t, sim.arm.AddMachine(azure.Machine{ID: id}))
	sim.addNode(name, "azure://"+id)
	return id
}

func (sim *simulation) addNode(name, providerID string) {
	_, err := createObject(sim.api, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: corev1.NodeSpec{ProviderID: providerID}})
	requireNoError(sim.t, err)
}

// addManagedIdentity creates a managed identity in Azure, and returns its resource ID.
func (sim *simulation) addManagedIdentity(name string) string {
	id := identityID(name)
	requireNoError(sim.t, sim.arm.DefineIdentity(azure.Identity{ResourceID: id, ClientID: clientID(name), ObjectID: clientID("o" + name)}))
	return id
}

// addAzureIdentity creates an AzureIdentity of type 0. key is namespace/name.
func (sim *simulation) addAzureIdentity(key, resourceID string) {
	namespace, name, _ := strings.Cut(key, "/")
	_, err := createObject(sim.api, &v1.AzureIdentity{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name},
		Spec:       v1.AzureIdentitySpec{ResourceID: resourceID, ClientID: clientID(resourceID[strings.LastIndex(resourceID, "/")+1:])},
	})
	requireNoError(sim.t, err)
}

// addBinding creates a binding of an AzureIdentity (key is namespace/name) for the pods whose label aadpodidbinding
// equals selector.
func (sim *simulation) addBinding(key, selector string) {
	namespace, name, _ := strings.Cut(key, "/")
	_, err := createObject(sim.api, &v1.AzureIdentityBinding{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name + "-" + selector},
		Spec:       v1.AzureIdentityBindingSpec{AzureIdentity: name, Selector: selector},
	})
	requireNoError(sim.t, err)
}

// addBoundIdentity creates a managed identity and an AzureIdentity with this name, and a binding with the name as its
// selector. It returns the resource ID of the managed identity.
func (sim *simulation) addBoundIdentity(namespace, name string) string {
	id := sim.addManagedIdentity(name)
	sim.addAzureIdentity(namespace+"/"+name, id)
	sim.addBinding(namespace+"/"+name, name)
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

// addPod creates a pod (namespace/name) that runs on a node.
func (sim *simulation) addPod(key, node, selector string) *corev1.Pod {
	namespace, name, _ := strings.Cut(key, "/")
	p, err := createObject(sim.api, newPod(namespace, name, node, selector))
	requireNoError(sim.t, err)
	return p
}

// assignmentsOf returns the assignments of a pod (namespace/name).
func (sim *simulation) assignmentsOf(pod string) (found []*v1.AzureAssignedIdentity) {
	for _, a := range listObjects[v1.AzureAssignedIdentity](sim.api) {
		if a.Spec.PodNamespace+"/"+a.Spec.Pod == pod {
			found = append(found, a)
		}
	}
	return found
}

// patchRequests returns the updates that ARM received for a machine; "" stands for all machines.
func (sim *simulation) patchRequests(machine string) (found []azure.ARMRequest) {
	for _, r := range sim.arm.Log(0) {
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
