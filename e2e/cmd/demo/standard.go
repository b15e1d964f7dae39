package main

import (
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/podidentity/podidentity/e2e/azure"
	"github.com/podidentity/podidentity/e2e/cluster"
)

// stock is a managed identity that is not attached to a machine at first.
var stock = azure.Identity{
	ClientID:   "0d46a1b2-0000-4000-8000-00000000f00d",
	ObjectID:   "77777777-0000-4000-8000-00000000f00d",
	ResourceID: "/subscriptions/" + cluster.SubscriptionID + "/resourcegroups/shop/providers/Microsoft.ManagedIdentity/userAssignedIdentities/stock",
	TenantID:   cluster.TenantID,
}

const assigned = `apiVersion: aadpodidentity.k8s.io/v1
kind: AzureIdentity
metadata: {name: stock}
spec:
  type: 0
  clientID: %s
  resourceID: %s
---
apiVersion: aadpodidentity.k8s.io/v1
kind: AzureIdentityBinding
metadata: {name: stock}
spec: {azureIdentity: stock, selector: stock}
---
apiVersion: v1
kind: Pod
metadata: {name: clerk, labels: {aadpodidbinding: stock}}
spec:
  nodeName: node1
  terminationGracePeriodSeconds: 0
  containers: [{name: clerk, image: %s, imagePullPolicy: Never}]
`

const (
	detachDelay = 10 * time.Second
	armDelay    = 4 * time.Second // the real ARM takes 10 to 60 s
)

func (d *demo) standardMode() error {
	title("Standard mode: MIC attaches identities to the virtual machines")
	say("Until now, the identity \"shop\" was attached manually: this is managed mode. In standard mode, the chart also installs\nMIC. MIC makes Azure Resource Manager (ARM) attach the identities that pods need. MIC makes ARM detach an identity %s\n(by default, two minutes) after its last pod was deleted, but not in the first 30 s after the start of MIC. The pods of\nthe first part are deleted now.", detachDelay)
	if _, err := d.Kubectl(d.ctx, "delete", "pod", "web", "stranger", "robot", "agent"); err != nil {
		return err
	}
	if err := d.InstallStandard(d.ctx, "--set", "mic.detachDelay="+detachDelay.String()); err != nil {
		return err
	}
	return d.show("kubectl get pods -n "+cluster.ChartNamespace+" -o wide", d.kubectl("get", "pods", "-n", cluster.ChartNamespace, "-o", "wide"), "podidentity-mic-", "Running")
}

func (d *demo) assignment() error {
	title("A pod whose identity is not attached")
	say("Azure has a managed identity \"stock\" that is not attached to a machine. A pod that uses it is created, and requests a\ntoken at once.")
	if err := errors.Join(d.Azure().DefineIdentity(d.ctx, stock), d.Azure().Set(d.ctx, map[string]string{"arm.delay": armDelay.String()})); err != nil {
		return err
	}
	if err := d.Apply(d.ctx, fmt.Sprintf(assigned, stock.ClientID, stock.ResourceID, cluster.TestImage)); err != nil {
		return err
	}
	if err := d.eventually("kubectl get azureassignedidentities", d.kubectl("get", "azureassignedidentities"), "clerk", "Created"); err != nil {
		return err
	}
	if _, err := d.Kubectl(d.ctx, "wait", "--for=condition=Ready", "pod/clerk", "--timeout=60s"); err != nil {
		return err
	}
	began := time.Now()
	if err := d.showToken("clerk", stock); err != nil {
		return err
	}
	say("The request waited for %.1f s, until the scale set had the identity; the application did not need to retry.", time.Since(began).Seconds())
	return d.eventually("kubectl get azureassignedidentities", d.kubectl("get", "azureassignedidentities"), "clerk", "Assigned")
}

func (d *demo) release() error {
	title("The last pod is deleted")
	say("mic plan prints what MIC is about to do, and why, without doing it:")
	if _, err := d.Kubectl(d.ctx, "delete", "pod", "clerk"); err != nil {
		return err
	}
	args, err := d.Kubectl(d.ctx, "get", "deployment", "podidentity-mic", "-n", cluster.ChartNamespace, "-o", "go-template={{range (index .spec.template.spec.containers 0).args}}{{.}}\n{{end}}")
	if err != nil {
		return err
	}
	plan := append([]string{"exec", "-n", cluster.ChartNamespace, "deployment/podidentity-mic", "--", "/usr/bin/mic", "plan"}, strings.Fields(args)...)
	if err := d.show("kubectl exec -n "+cluster.ChartNamespace+" deployment/podidentity-mic -- /usr/bin/mic plan …", d.kubectl(plan...), "detach", stock.ResourceID); err != nil {
		return err
	}
	deadline := time.Now().Add(time.Minute)
	for {
		machine, err := d.Azure().Machine(d.ctx, "node1")
		if err != nil {
			return err
		}
		if !slices.Contains(machine.Identities, azure.FoldID(stock.ResourceID)) {
			break
		}
		if time.Now().After(deadline) {
			return errors.New("the identity stock is still attached to the scale set a minute after mic plan showed that MIC detaches it")
		}
		time.Sleep(200 * time.Millisecond)
	}
	say("After the delay the identity is detached from the scale set, and the assignment is deleted:")
	return d.eventually("kubectl get azureassignedidentities", func() (string, error) {
		out, err := d.Kubectl(d.ctx, "get", "azureassignedidentities")
		if err == nil && out == "" {
			out = "No resources found in " + corev1.NamespaceDefault + " namespace.\n"
		}
		return out, err
	}, "No resources found")
}

func (d *demo) armCalls() error {
	title("The requests to ARM")
	say("The requests to the fake ARM (of consecutive polls only the last), and the identities that they attached and detached:")
	log, err := d.Azure().ARMLog(d.ctx, 0)
	if err != nil {
		return err
	}
	changes, err := d.Azure().ARMChanges(d.ctx, 0)
	if err != nil {
		return err
	}
	for i, r := range log {
		if r.Operation == azure.OpPoll && i+1 < len(log) && log[i+1].Operation == azure.OpPoll {
			continue // of consecutive polls print only the last
		}
		about, _, _ := strings.Cut(r.Path, "?")
		fmt.Printf("    %s  %-5s …/%s/%s  %d", r.Time.Format("15:04:05.000"), r.Method, path.Base(path.Dir(about)), path.Base(about), r.Status)
		for _, c := range changes {
			if r.Operation == azure.OpPatch && c.OperationID == r.OperationID {
				fmt.Printf("  %s %s", map[bool]string{true: "attaches", false: "detaches"}[c.Attached], path.Base(c.Identity))
			}
		}
		fmt.Println()
	}
	fmt.Println()
	if len(changes) != 2 || !changes[0].Attached || changes[1].Attached || changes[0].Identity != changes[1].Identity {
		return fmt.Errorf("ARM should have attached one identity and then detached it; its changes are: %+v", changes)
	}
	return nil
}
