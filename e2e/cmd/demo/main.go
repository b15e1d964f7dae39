// Command demo installs Pod Identity with its chart on a real cluster on this host, with a fake Azure, and shows what
// it does. It explains each step, checks what it shows, exits 0 only if all checks pass, and removes everything.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/podidentity/podidentity/e2e/azure"
	"github.com/podidentity/podidentity/e2e/cluster"
)

const vault = "https://vault.azure.net"

var shop = azure.Identity{
	ClientID:   "0d46a1b2-0000-4000-8000-00000000cafe",
	ObjectID:   "77777777-0000-4000-8000-00000000cafe",
	ResourceID: "/subscriptions/" + cluster.SubscriptionID + "/resourcegroups/shop/providers/Microsoft.ManagedIdentity/userAssignedIdentities/shop",
	TenantID:   cluster.TenantID,
}

const objects = `apiVersion: aadpodidentity.k8s.io/v1
kind: AzureIdentity
metadata: {name: shop}
spec:
  type: 0
  clientID: %s
  resourceID: %s
---
apiVersion: aadpodidentity.k8s.io/v1
kind: AzureIdentityBinding
metadata: {name: shop}
spec: {azureIdentity: shop, selector: shop}
`

const pods = `apiVersion: v1
kind: Pod
metadata: {name: web, labels: {aadpodidbinding: shop}}
spec:
  nodeName: node1
  terminationGracePeriodSeconds: 0
  containers: [{name: web, image: %[1]s, imagePullPolicy: Never}]
---
apiVersion: v1
kind: Pod
metadata: {name: stranger}
spec:
  nodeName: node1
  terminationGracePeriodSeconds: 0
  containers: [{name: stranger, image: %[1]s, imagePullPolicy: Never}]
`

// robot is an application in Entra ID without a secret. Pod robot gets tokens of it with a federated credential.
var robot = azure.Identity{ClientID: "0d46a1b2-0000-4000-8000-00000000beef", ObjectID: "77777777-0000-4000-8000-00000000beef"}

const federated = `apiVersion: aadpodidentity.k8s.io/v1
kind: AzureIdentity
metadata: {name: robot}
spec: {type: 3, clientID: %s, tenantID: %s}
---
apiVersion: aadpodidentity.k8s.io/v1
kind: AzureIdentityBinding
metadata: {name: robot}
spec: {azureIdentity: robot, selector: robot}
---
apiVersion: v1
kind: Pod
metadata: {name: robot, labels: {aadpodidbinding: robot}}
spec:
  nodeName: node2
  terminationGracePeriodSeconds: 0
  containers: [{name: robot, image: %s, imagePullPolicy: Never}]
`

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	start := time.Now()
	err := run(ctx)
	if err != nil {
		fmt.Fprintln(os.Stderr, "\ndemo failed:", err)
		os.Exit(1)
	}
	fmt.Printf("\nAll checks passed. The demo took %.0f s.\n", time.Since(start).Seconds())
}

// demo is the cluster, with the context of the demo.
type demo struct {
	*cluster.Cluster
	ctx context.Context
}

func run(ctx context.Context) (err error) {
	title("A cluster of two nodes, and a fake Azure")
	say("etcd, API server, controllers, two kubelets with containerd, and a fake Azure with Entra ID and the metadata\nservice, all in network namespaces of this host without a route out. The first time, Kubernetes is built from source.")
	var images errgroup.Group
	images.Go(func() error { return cluster.BuildProductImages(ctx, step, true) }) // while the cluster starts
	c, err := cluster.Start(ctx, cluster.Options{Progress: step})
	if err != nil {
		return err
	}
	defer func() {
		title("Removing everything")
		err = errors.Join(err, c.Stop())
	}()
	d := &demo{c, ctx}

	if err := images.Wait(); err != nil {
		return err
	}
	title("Installing the chart")
	if err := c.InstallChart(ctx, "--set", "nmi.captureHostNetwork=bound"); err != nil {
		return err
	}
	if err := d.show("kubectl get pods -n "+cluster.ChartNamespace+" -o wide", d.kubectl("get", "pods", "-n", cluster.ChartNamespace, "-o", "wide"), "Running"); err != nil {
		return err
	}
	for _, part := range []func() error{d.rules, d.binding, d.token, d.refusal, d.hostNetwork, d.federated, d.observability,
		d.standardMode, d.assignment, d.release, d.armCalls} {
		if err := errors.Join(ctx.Err(), part()); err != nil {
			return err
		}
	}
	return nil
}

func (d *demo) rules() error {
	title("The capture on a node")
	say("Programs at the cgroup of all pods redirect connections to the metadata address to NMI, and tell NMI which pod opened\neach. Rules do the same for packets that these programs do not see, such as those of virtual machines.")
	if err := d.show("node1$ curl -s http://127.0.0.1:9090/metrics | grep captures", func() (string, error) {
		out, err := d.InNode(d.ctx, "node1", "curl", "-s", "http://127.0.0.1:9090/metrics")
		return grep(out, "podidentity_nmi_captures{"), err
	}, `podidentity_nmi_captures{kind="bpf"} 1`, `podidentity_nmi_captures{kind="iptables"} 1`); err != nil {
		return err
	}
	say("Requests of pods to the metadata address are redirected to NMI (nat). A second rule drops packets to the\nmetadata address that would be forwarded nevertheless (filter FORWARD), and a third protects NMI's own address (filter INPUT).")
	return d.show("node1# iptables-save | grep -i podidentity", func() (string, error) {
		out, err := d.InNode(d.ctx, "node1", "iptables-save")
		return grep(out, "podidentity"), err
	}, "DNAT --to-destination", "DROP")
}

func (d *demo) binding() error {
	title("An identity, its binding, and two pods")
	say("Azure has a managed identity \"shop\", attached to the virtual machines. The binding gives it to pods labelled\naadpodidbinding: shop. Pod web has that label; pod stranger has none.")
	if err := d.Azure().AddIdentity(d.ctx, shop); err != nil {
		return err
	}
	text := fmt.Sprintf(objects, shop.ClientID, shop.ResourceID)
	fmt.Print(indent(text))
	if err := d.Apply(d.ctx, text); err != nil {
		return err
	}
	if err := d.Apply(d.ctx, fmt.Sprintf(pods, cluster.TestImage)); err != nil {
		return err
	}
	if _, err := d.Kubectl(d.ctx, "wait", "--for=condition=Ready", "pod/web", "pod/stranger", "--timeout=60s"); err != nil {
		return err
	}
	return d.show("kubectl get pods,azureidentities,azureidentitybindings", d.kubectl("get", "pods,azureidentities,azureidentitybindings"), "web", "stranger", shop.ClientID)
}

const ask = "http://169.254.169.254/metadata/identity/oauth2/token?api-version=2018-02-01&resource=" + vault

func (d *demo) curl(pod string) func() (string, error) {
	return func() (string, error) {
		return d.InPod(d.ctx, "default", pod, "curl", "-s", "-H", "Metadata: true", ask)
	}
}

func (d *demo) token() error {
	title("Pod web requests a token")
	say("It sends the request with an unmodified curl, to the address that every Azure SDK uses.")
	return d.showToken("web", shop)
}

// showToken requests a token inside the pod, prints the response, and checks that the token is for the identity want.
func (d *demo) showToken(pod string, want azure.Identity) error {
	out, err := d.curl(pod)()
	if err != nil {
		return err
	}
	return d.checkToken(pod, out, want)
}

// checkToken prints the response to the pod, and checks that its token is for the identity want.
func (d *demo) checkToken(pod, out string, want azure.Identity) error {
	var answer map[string]string
	if err := json.Unmarshal([]byte(out), &answer); err != nil {
		return fmt.Errorf("the response to pod %s is not JSON: %w\n%s", pod, err, out)
	}
	token := answer["access_token"]
	if token == "" {
		return fmt.Errorf("the response to pod %s has no token: %s", pod, out)
	}
	fmt.Printf("  %s$ curl -s -H 'Metadata: true' '%s'\n%s\n", pod, ask, indent(strings.Replace(out, token, token[:24]+"…", 1)))
	claims, err := d.Azure().Verify(token)
	if err != nil {
		return fmt.Errorf("verifying the token of pod %s: %w", pod, err)
	}
	if claims.AppID != want.ClientID || claims.Audience != vault {
		return fmt.Errorf("the token of pod %s has client ID %s and audience %s, want %s and %s", pod, claims.AppID, claims.Audience, want.ClientID, vault)
	}
	say("The token is signed by the fake Entra ID and contains: appid %s, aud %s.", claims.AppID, claims.Audience)
	return nil
}

func (d *demo) refusal() error {
	title("Pod stranger requests a token, too")
	say("No binding applies to it, because it has no label. NMI responds with the error of IMDS for an identity that does not\nexist, and adds the reason.")
	return d.show("stranger$ curl -s -H 'Metadata: true' '"+ask+"'", d.curl("stranger"), `"error":"invalid_request"`, `"error_description":"Identity not found"`, `"reason":"pod_not_labelled"`)
}

// agent is a pod in the host network, with the same identity as pod web.
const agent = `apiVersion: v1
kind: Pod
metadata: {name: agent, labels: {aadpodidbinding: shop}}
spec:
  nodeName: node1
  hostNetwork: true
  terminationGracePeriodSeconds: 0
  containers: [{name: agent, image: %s, imagePullPolicy: Never, args: [token, --resource, %q]}]
`

func (d *demo) hostNetwork() error {
	title("Pod agent is in the host network")
	say("It has the address of the node, as all pods in the host network, but a cgroup of its own. The chart value\nnmi.captureHostNetwork is bound, so a pod in the host network with the label gets its own identity, too.")
	if err := d.Apply(d.ctx, fmt.Sprintf(agent, cluster.TestImage, vault)); err != nil {
		return err
	}
	var out string
	if err := cluster.Retry(time.Minute, func() (err error) {
		if out, err = d.Kubectl(d.ctx, "logs", "agent"); err == nil && out == "" {
			err = errors.New("pod agent has not printed anything")
		}
		return err
	}); err != nil {
		return err
	}
	var outcome struct{ Body string }
	if err := json.Unmarshal([]byte(out), &outcome); err != nil {
		return fmt.Errorf("the output of pod agent is not JSON: %w\n%s", err, out)
	}
	return d.checkToken("agent", outcome.Body, shop)
}

func (d *demo) federated() error {
	title("Pod robot requests a token of a federated identity")
	say("Its identity is an application that trusts the pod's ServiceAccount: the application has no secret, and is not attached\nto the virtual machine. NMI sends Entra ID a token of the ServiceAccount that the API server has bound to this pod.")
	if err := d.Azure().AddApp(d.ctx, azure.App{ClientID: robot.ClientID, ObjectID: robot.ObjectID}); err != nil {
		return err
	}
	if err := d.Trust(d.ctx, robot.ClientID, "default", "default"); err != nil {
		return err
	}
	if err := d.Apply(d.ctx, fmt.Sprintf(federated, robot.ClientID, cluster.TenantID, cluster.TestImage)); err != nil {
		return err
	}
	if _, err := d.Kubectl(d.ctx, "wait", "--for=condition=Ready", "pod/robot", "--timeout=60s"); err != nil {
		return err
	}
	return d.showToken("robot", robot)
}

func (d *demo) observability() error {
	title("What the operator sees")
	say("An Event on the refused pod has the reason:")
	if err := d.eventually("kubectl get events --field-selector involvedObject.name=stranger,reason=TokenRefused", d.kubectl("get", "events", "--field-selector", "involvedObject.name=stranger,reason=TokenRefused"), "pod_not_labelled"); err != nil {
		return err
	}
	say("NMI's audit log contains who got which token, and who did not:")
	pod, err := d.Kubectl(d.ctx, "get", "pods", "-n", cluster.ChartNamespace, "--field-selector", "spec.nodeName=node1", "-o", "name")
	if err != nil {
		return err
	}
	pod = strings.TrimSpace(pod)
	if err := d.eventually("kubectl logs -n "+cluster.ChartNamespace+" "+pod+" | grep pod_namespace", func() (string, error) {
		out, err := d.Kubectl(d.ctx, "logs", "-n", cluster.ChartNamespace, pod)
		return grep(out, "pod_namespace"), err
	}, `"pod":"web"`, `"reason":"allowed"`, `"verified":"cgroup"`, `"pod":"agent"`, `"pod":"stranger"`, `"reason":"pod_not_labelled"`); err != nil {
		return err
	}
	say("And in the metrics:")
	if err := d.show("node1$ curl -s http://127.0.0.1:9090/metrics | grep -E 'decisions|cache_requests|upstream_requests'", func() (string, error) {
		out, err := d.InNode(d.ctx, "node1", "curl", "-s", "http://127.0.0.1:9090/metrics")
		return grep(out, "nmi_decisions_total{", "nmi_token_cache_requests_total{", "nmi_upstream_requests_total{"), err
	}, `podidentity_nmi_decisions_total{reason="allowed"} 2`, `podidentity_nmi_decisions_total{reason="pod_not_labelled"} 1`); err != nil {
		return err
	}
	stats, err := d.Azure().Stats(d.ctx)
	if err != nil {
		return err
	}
	say("The metadata service received %d token request(s) and %d connections from pods.", stats.IMDS.Token.Requests, stats.IMDS.ConnectionsFromPods)
	if stats.IMDS.Token.Requests != 1 || stats.IMDS.ConnectionsFromPods != 0 {
		return errors.New("the metadata service should have received exactly one token request, and no connection from a pod")
	}
	return nil
}

func (d *demo) kubectl(args ...string) func() (string, error) {
	return func() (string, error) { return d.Kubectl(d.ctx, args...) }
}

// eventually calls show until it succeeds, for at most a minute, because the output may appear a moment later.
func (d *demo) eventually(command string, do func() (string, error), wants ...string) error {
	deadline := time.Now().Add(time.Minute) // a busy host is slow
	for {
		err := d.show(command, do, wants...)
		if err == nil || time.Now().After(deadline) {
			return err
		}
		time.Sleep(200 * time.Millisecond)
	}
}

// show prints a command and its output. If the output lacks one of the texts in wants, show returns an error and prints
// nothing.
func (d *demo) show(command string, do func() (string, error), wants ...string) error {
	out, err := do()
	if err != nil {
		return fmt.Errorf("%s: %w", command, err)
	}
	for _, want := range wants {
		if !strings.Contains(out, want) {
			return fmt.Errorf("%s: the output does not contain %s:\n%s", command, want, out)
		}
	}
	fmt.Printf("  %s\n%s\n", command, indent(out))
	return nil
}

func title(s string) { fmt.Printf("\n== %s\n\n", s) }

func say(format string, args ...any) { fmt.Printf(format+"\n\n", args...) }

func step(line string) { fmt.Println("  ", line) }

func grep(text string, patterns ...string) string {
	var kept strings.Builder
	for line := range strings.Lines(text) {
		for _, a := range patterns {
			if strings.Contains(strings.ToLower(line), a) {
				kept.WriteString(line)
				break
			}
		}
	}
	return kept.String()
}

func indent(text string) string {
	var out strings.Builder
	for line := range strings.Lines(text) {
		out.WriteString("    " + line)
	}
	return strings.TrimRight(out.String(), "\n") + "\n"
}
