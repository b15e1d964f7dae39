package chart_test

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// micFlags are the flags of the mic program that the chart may set.
var micFlags = []string{
	"ca-bundle", "client-burst", "client-qps", "cloudconfig", "custom-user-agent", "detach-delay", "enable-profile",
	"force-namespaced", "http-probe-port", "identity-assignment-reconcile-interval", "immutable-user-msis",
	"leader-election-duration", "leader-election-instance", "leader-election-name", "leader-election-namespace", "log-format",
	"log-level", "prometheus-port", "workers",
}

// standard returns the values together with the value that selects standard mode, the mode with MIC.
func standard(values string) string { return "operationMode: standard\n" + values }

var micLabels = map[string]string{
	"app.kubernetes.io/name": "podidentity", "app.kubernetes.io/instance": "podidentity", "app.kubernetes.io/component": "mic",
}

func TestManagedModeHasNoObjectsOfMIC(t *testing.T) {
	objects := render(t, `
adminsecret: {tenantID: a, clientID: b, clientSecret: c}
mic: {uninstall: true, caBundle: "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----", podDisruptionBudget: {minAvailable: 1}}
`)
	if len(objects.deployments)+len(objects.budgets)+len(objects.secrets)+len(objects.configMaps)+len(objects.custom) != 0 ||
		len(objects.serviceAccounts) != 1 || len(objects.clusterRoles) != 1 {
		t.Errorf("managed mode has objects that are not NMI's: %+v", objects)
	}
}

func TestNMIWaitsForAssignmentsInStandardMode(t *testing.T) {
	for values, wait := range map[string]string{"": "25s", "nmi: {assignmentWait: 40s}": "40s"} {
		_, container := render(t, standard(values)).nmi(t)
		args := arguments(t, flags, container.Args)
		if args["operation-mode"] != "standard" || args["assignment-wait"] != wait || args["force-namespaced"] != "false" {
			t.Errorf("%q: NMI is started with %v, want standard mode, the assignment-wait of the values, and force-namespaced=false", values, container.Args)
		}
	}
}

func TestTwoReplicasOfMICRunOnDifferentNodes(t *testing.T) {
	objects := render(t, standard(""))
	deployment, container := objects.mic(t)
	if *deployment.Spec.Replicas != 2 || deployment.Namespace != "kube-system" || deployment.Name != "podidentity-mic" {
		t.Errorf("Deployment %s/%s has %d replicas, want kube-system/podidentity-mic with 2", deployment.Namespace, deployment.Name, *deployment.Spec.Replicas)
	}
	wantStrategy := appsv1.DeploymentStrategy{
		Type: appsv1.RollingUpdateDeploymentStrategyType,
		RollingUpdate: &appsv1.RollingUpdateDeployment{
			MaxUnavailable: new(intstr.FromInt32(0)), MaxSurge: new(intstr.FromInt32(1)),
		},
	}
	if diff := cmp.Diff(wantStrategy, deployment.Spec.Strategy); diff != "" {
		t.Errorf("strategy (-want +got):\n%s", diff)
	}
	pod := deployment.Spec.Template.Spec
	wantAffinity := &corev1.Affinity{PodAntiAffinity: &corev1.PodAntiAffinity{
		PreferredDuringSchedulingIgnoredDuringExecution: []corev1.WeightedPodAffinityTerm{{
			Weight: 100,
			PodAffinityTerm: corev1.PodAffinityTerm{
				TopologyKey: "kubernetes.io/hostname", LabelSelector: &metav1.LabelSelector{MatchLabels: micLabels},
			},
		}},
	}}
	if diff := cmp.Diff(wantAffinity, pod.Affinity); diff != "" {
		t.Errorf("affinity (-want +got):\n%s", diff)
	}
	if pod.HostNetwork || pod.PriorityClassName != "system-cluster-critical" || pod.ServiceAccountName != "podidentity-mic" ||
		!maps.Equal(pod.NodeSelector, map[string]string{"kubernetes.io/os": "linux"}) {
		t.Errorf("pod is %+v, want no hostNetwork, priority class system-cluster-critical, ServiceAccount podidentity-mic, Linux nodes", pod)
	}
	if container.Image != "podidentity/mic:0.1.0" || container.ImagePullPolicy != corev1.PullIfNotPresent {
		t.Errorf("the image is %s and its pull policy %s, want podidentity/mic:0.1.0 and IfNotPresent", container.Image, container.ImagePullPolicy)
	}
	if _, limited := container.Resources.Limits[corev1.ResourceCPU]; limited {
		t.Error("the container has a CPU limit, want none")
	}
	if !maps.Equal(deployment.Spec.Selector.MatchLabels, micLabels) {
		t.Errorf("the selector is %v, want the labels name, instance and component of MIC", deployment.Spec.Selector.MatchLabels)
	}
	wantLabels := maps.Clone(micLabels)
	wantLabels["podidentity.io/mic"] = "podidentity-mic"
	if labels := deployment.Spec.Template.Labels; !maps.Equal(labels, wantLabels) {
		t.Errorf("pod labels are %v, want %v: a label that changes with the chart would restart the pods", labels, wantLabels)
	}
	if len(deployment.Spec.Template.Annotations) != 0 {
		t.Errorf("annotations are %v, want none", deployment.Spec.Template.Annotations)
	}
}

func TestEveryValueOfMICSetsItsFlag(t *testing.T) {
	_, container := render(t, standard("")).mic(t)
	wantDefaults := map[string]string{
		"cloudconfig": "/etc/kubernetes/azure.json", "force-namespaced": "false",
		"identity-assignment-reconcile-interval": "3m", "detach-delay": "2m", "client-qps": "200", "client-burst": "400",
		"workers": "32", "http-probe-port": "8080", "prometheus-port": "8888", "leader-election-namespace": "kube-system",
		"leader-election-name": "aad-pod-identity-mic", "leader-election-duration": "15s", "enable-profile": "false",
		"log-level": "info", "log-format": "json",
	}
	if diff := cmp.Diff(wantDefaults, arguments(t, micFlags, container.Args)); diff != "" {
		t.Errorf("defaults (-want +got):\n%s", diff)
	}
	_, container = render(t, standard(`
forceNamespaced: "true"
customUserAgent: "team a/1.0: #1"
mic:
  cloudConfig: /etc/cloud/azure.json
  immutableUserMSIs: [c11e0000-0000-4000-8000-000000000001, c11e0000-0000-4000-8000-000000000002]
  identityAssignmentReconcileInterval: 1m30s
  detachDelay: 0s
  clientQps: 7.5
  clientBurst: 20000
  workers: 64
  probePort: 8081
  prometheusPort: 8889
  leaderElection: {instance: east, namespace: leases, name: mic, duration: 20s}
  enableProfile: true
  logLevel: debug
  loggingFormat: text
  caBundle: |
    -----BEGIN CERTIFICATE-----
    -----END CERTIFICATE-----
`)).mic(t)
	wantOthers := map[string]string{
		"cloudconfig": "/etc/cloud/azure.json", "force-namespaced": "true", "custom-user-agent": "team a/1.0: #1",
		"immutable-user-msis":                    "c11e0000-0000-4000-8000-000000000001,c11e0000-0000-4000-8000-000000000002",
		"identity-assignment-reconcile-interval": "1m30s", "detach-delay": "0s", "client-qps": "7.5", "client-burst": "20000",
		"workers": "64", "http-probe-port": "8081", "prometheus-port": "8889", "leader-election-instance": "east-$(POD_NAME)",
		"leader-election-namespace": "leases", "leader-election-name": "mic", "leader-election-duration": "20s",
		"enable-profile": "true", "log-level": "debug", "log-format": "text", "ca-bundle": "/ca-bundle/ca.pem",
	}
	if diff := cmp.Diff(wantOthers, arguments(t, micFlags, container.Args)); diff != "" {
		t.Errorf("other values (-want +got):\n%s", diff)
	}
	if name := variable(container, "POD_NAME"); name == nil || name.ValueFrom.FieldRef.FieldPath != "metadata.name" {
		t.Errorf("POD_NAME is %+v, want the field metadata.name", name)
	}
}

func variable(container *corev1.Container, name string) *corev1.EnvVar {
	for i := range container.Env {
		if container.Env[i].Name == name {
			return &container.Env[i]
		}
	}
	return nil
}

func TestMICGetsItsNamespaceAndItsMemoryLimit(t *testing.T) {
	_, container := render(t, standard("mic: {resources: {limits: {memory: 512Mi}}, extraEnv: [{name: HTTPS_PROXY, value: p}]}")).mic(t)
	if v := variable(container, "MIC_POD_NAMESPACE"); v == nil || v.ValueFrom.FieldRef.FieldPath != "metadata.namespace" {
		t.Errorf("MIC_POD_NAMESPACE is %+v, want the field metadata.namespace", v)
	}
	if v := variable(container, "GOMEMLIMIT"); v == nil || v.Value != "419430KiB" {
		t.Errorf("GOMEMLIMIT is %+v, want 419430KiB", v)
	}
	if v := variable(container, "HTTPS_PROXY"); v == nil || v.Value != "p" {
		t.Errorf("HTTPS_PROXY is %+v, want p, the value in mic.extraEnv", v)
	}
}

func TestValuesForPodsApplyToMIC(t *testing.T) {
	deployment, container := render(t, standard(`
imagePullSecrets: [{name: pull}]
mic:
  image: controller
  tag: v2@sha256:0
  replicas: 3
  priorityClassName: ""
  podAnnotations: {a: b}
  podLabels: {c: d}
  nodeSelector: {pool: system}
  tolerations: [{key: CriticalAddonsOnly, operator: Exists}]
  affinity: {nodeAffinity: {requiredDuringSchedulingIgnoredDuringExecution: {nodeSelectorTerms: [{matchFields: [{key: metadata.name, operator: In, values: [node1]}]}]}}}
  topologySpreadConstraints: [{maxSkew: 1, topologyKey: zone, whenUnsatisfiable: ScheduleAnyway}]
  serviceAccount: {name: robot, annotations: {e: f}}
  terminationGracePeriodSeconds: 60
  prometheusAnnotations: true
  prometheusPort: 8889
`)).mic(t)
	pod := deployment.Spec.Template.Spec
	if *deployment.Spec.Replicas != 3 || container.Image != "podidentity/controller:v2@sha256:0" || pod.PriorityClassName != "" ||
		deployment.Spec.Template.Labels["c"] != "d" || pod.NodeSelector["pool"] != "system" || len(pod.Tolerations) != 1 ||
		pod.Affinity.PodAntiAffinity != nil || pod.Affinity.NodeAffinity == nil || len(pod.TopologySpreadConstraints) != 1 ||
		pod.ServiceAccountName != "robot" || *pod.TerminationGracePeriodSeconds != 60 || pod.ImagePullSecrets[0].Name != "pull" {
		t.Errorf("the spec of the Deployment lacks one of the values, or has the default affinity: %+v", deployment.Spec)
	}
	want := map[string]string{"a": "b", "prometheus.io/scrape": "true", "prometheus.io/port": "8889", "prometheus.io/path": "/metrics"}
	if diff := cmp.Diff(want, deployment.Spec.Template.Annotations); diff != "" {
		t.Errorf("annotations (-want +got):\n%s", diff)
	}
}

func TestProbesOfMICUseItsProbePort(t *testing.T) {
	_, container := render(t, standard("mic: {probePort: 8081}")).mic(t)
	wantPorts := []corev1.ContainerPort{{Name: "probes", ContainerPort: 8081}, {Name: "metrics", ContainerPort: 8888}}
	for i := range container.Ports {
		container.Ports[i].Protocol = ""
	}
	if diff := cmp.Diff(wantPorts, container.Ports); diff != "" {
		t.Errorf("ports (-want +got):\n%s", diff)
	}
	for path, probe := range map[string]*corev1.Probe{"/healthz": container.LivenessProbe, "/readyz": container.ReadinessProbe} {
		if probe == nil || !cmp.Equal(probe.HTTPGet, &corev1.HTTPGetAction{Port: intstr.FromString("probes"), Path: path}) {
			t.Errorf("the probe of %s is %+v, want a GET request to the port named probes", path, probe)
		}
	}
}

func TestOneOfSeveralReplicasOfMICMayBeEvicted(t *testing.T) {
	for values, want := range map[string]string{
		"":                   "maxUnavailable 1",
		"mic: {replicas: 1}": "none",
		"mic: {replicas: 3}": "maxUnavailable 1",
		"mic: {podDisruptionBudget: {maxUnavailable: 50%}}":          "maxUnavailable 50%",
		"mic: {replicas: 1, podDisruptionBudget: {minAvailable: 1}}": "minAvailable 1",
	} {
		budgets, got := render(t, standard(values)).budgets, "none"
		if len(budgets) == 1 {
			spec := budgets[0].Spec
			switch {
			case spec.MinAvailable != nil && spec.MaxUnavailable != nil:
				got = "both"
			case spec.MinAvailable != nil:
				got = "minAvailable " + spec.MinAvailable.String()
			case spec.MaxUnavailable != nil:
				got = "maxUnavailable " + spec.MaxUnavailable.String()
			}
			if !maps.Equal(spec.Selector.MatchLabels, micLabels) {
				t.Errorf("%q: the budget selects %v, want the labels name, instance and component of MIC", values, spec.Selector.MatchLabels)
			}
		}
		if got != want {
			t.Errorf("%q: the budget is %s, want %s", values, got, want)
		}
	}
}

// The name of a Deployment's ReplicaSet is the name of the Deployment, a hyphen and at most ten characters. The name of
// the ReplicaSet must fit into the value of a label, which has at most 63 characters.
func TestNamesFitIntoLabels(t *testing.T) {
	deployment, _ := render(t, standard("fullnameOverride: "+strings.Repeat("n", 63))).mic(t)
	if len(deployment.Name)+11 > 63 {
		t.Errorf("the name %s of the Deployment is too long: the names of its ReplicaSets do not fit into a label", deployment.Name)
	}
}

func TestMICUninstallsWithNMIAndByItself(t *testing.T) {
	serving, _ := render(t, standard("")).mic(t)
	for values, replicas := range map[string]int32{
		"nmi: {uninstall: true}":              2,
		"mic: {uninstall: true}":              2,
		"mic: {uninstall: true, replicas: 1}": 1,
		"mic: {uninstall: true, replicas: 0}": 1,
	} {
		objects := render(t, standard(values))
		deployment, container := objects.mic(t)
		if *deployment.Spec.Replicas != replicas || !slices.Equal(container.Args[:3], []string{"uninstall", "--wait-for-signal", "--cloudconfig=/etc/kubernetes/azure.json"}) {
			t.Errorf("%s: %d pods with arguments %v; the number is wrong, or the arguments do not begin with uninstall, --wait-for-signal and --cloudconfig", values, *deployment.Spec.Replicas, container.Args)
		}
		arguments(t, micFlags, container.Args[2:])
		if container.LivenessProbe != nil || container.ReadinessProbe == nil || container.ReadinessProbe.HTTPGet.Path != "/readyz" {
			t.Errorf("%s: liveness probe %+v, want none; readiness probe %+v, want /readyz, which succeeds when the uninstallation is done", values, container.LivenessProbe, container.ReadinessProbe)
		}
		update := deployment.Spec.Strategy.RollingUpdate
		if update.MaxSurge.String() != "0" || update.MaxUnavailable.String() != "100%" {
			t.Errorf("%s: with the update strategy %+v, an old MIC can run beside the one that uninstalls", values, update)
		}
		if *deployment.Spec.ProgressDeadlineSeconds < 3600 {
			t.Errorf("%s: progressDeadlineSeconds is %d, want at least 3600, because Azure is slow", values, *deployment.Spec.ProgressDeadlineSeconds)
		}
		if !cmp.Equal(serving.Spec.Selector, deployment.Spec.Selector) {
			t.Errorf("%s: the selector differs from that of the Deployment that serves", values)
		}
		if len(objects.clusterRoles["podidentity-mic"].Rules) == 0 || len(objects.roles) != 1 || len(objects.custom) != 1 {
			t.Errorf("%s: a role, or the exception, that MIC needs to uninstall is missing: %+v", values, objects)
		}
	}
	// NMI keeps running if only MIC is uninstalled.
	_, container := render(t, standard("mic: {uninstall: true}")).nmi(t)
	if container.Args[0] == "uninstall" {
		t.Error("NMI uninstalls, although the values uninstall only MIC")
	}
}

func TestNotesExplainHowToWaitForMIC(t *testing.T) {
	const rollout, plan = "deployment/podidentity-mic", "/usr/bin/mic plan"
	for values, want := range map[string][]string{
		"":                                {rollout, plan + " --cloudconfig=/etc/kubernetes/azure.json --detach-delay=2m\n", "Virtual Machine Contributor", "but not MIC, which needs those of this chart", "and MIC\nclean up too"},
		"mic: {cloudConfig: ''}":          {plan + " --detach-delay=2m\n"},
		"forceNamespaced: true":           {plan + " --cloudconfig=/etc/kubernetes/azure.json --force-namespaced --detach-delay=2m\n"},
		"nmi: {uninstall: true}":          {"rollout status -n default " + rollout, "helm uninstall"},
		"mic: {uninstall: true}":          {"rollout status -n default " + rollout, "set operationMode to managed"},
		"operationMode: managed":          nil,
		"adminsecret: {useMSI: \"true\"}": {plan + " --detach-delay=2m\n"},
	} {
		text := standard(values)
		if want == nil {
			text = values
		}
		notes := notesOf(t, text)
		for _, part := range want {
			if !strings.Contains(notes, part) {
				t.Errorf("%q: the notes lack %q:\n%s", values, part, notes)
			}
		}
		if want == nil && (strings.Contains(notes, "MIC a") || strings.Contains(notes, rollout)) {
			t.Errorf("%q: the notes mention MIC:\n%s", values, notes)
		}
		if strings.Contains(notes, "<no value>") || strings.Contains(notes, "\n\n\n") {
			t.Errorf("%q: the notes contain <no value> or two empty lines in a row:\n%s", values, notes)
		}
	}
}

func TestInvalidValuesOfMICAreRefusedWithAReason(t *testing.T) {
	for values, want := range map[string]string{
		"mic: {createDeleteBatch: 20}":                                     "additional properties 'createDeleteBatch' not allowed",
		"mic: {replicas: 0}":                                               "mic.replicas is 0: in standard mode no pod gets an identity without MIC",
		"mic: {replicas: -1}":                                              "at '/mic/replicas'",
		"mic: {probePort: 8888}":                                           "mic.probePort, mic.prometheusPort and the profiler's 6060 must differ",
		"mic: {probePort: 6060, enableProfile: true}":                      "must differ, and are [6060 8888 6060]",
		"mic: {serviceAccount: {create: false}}":                           "mic.serviceAccount.name is required",
		"mic: {cloudConfig: azure.json}":                                   "at '/mic/cloudConfig'",
		"mic: {cloudConfig: /}":                                            "at '/mic/cloudConfig'",
		"mic: {customCloud: {enabled: true, configPath: ''}}":              "at '/mic/customCloud/configPath'",
		"mic: {immutableUserMSIs: [kubelet]}":                              "at '/mic/immutableUserMSIs/0'",
		"mic: {immutableUserMSIs: a}":                                      "at '/mic/immutableUserMSIs': got string, want array",
		"mic: {detachDelay: 120}":                                          "at '/mic/detachDelay': got number, want string",
		"mic: {identityAssignmentReconcileInterval: ''}":                   "at '/mic/identityAssignmentReconcileInterval'",
		"mic: {clientQps: 0}":                                              "at '/mic/clientQps'",
		"mic: {workers: 1.5}":                                              "at '/mic/workers'",
		"mic: {podDisruptionBudget: {minAvailable: 1, maxUnavailable: 1}}": "at '/mic/podDisruptionBudget'",
		"mic: {leaderElection: {namespace: A}}":                            "at '/mic/leaderElection/namespace'",
		"mic: {leaderElection: {name: ''}}":                                "at '/mic/leaderElection/name'",
		"mic: {workloadIdentity: {enabled: true}}":                         "mic.workloadIdentity needs clientID and tenantID",
		"mic: {workloadIdentity: {enabled: true, clientID: shop}}":         "at '/mic/workloadIdentity/clientID'",
		"adminsecret: {cloud: AzurePublicCloud}":                           "adminsecret needs tenantID, clientID and clientSecret of a service principal, or useMSI: true",
		"adminsecret: {clientsecret: x}":                                   "additional properties 'clientsecret' not allowed",
		"adminsecret: {useMSI: 1}":                                         "at '/adminsecret/useMSI'",
		"installMICException: 'no'":                                        "at '/installMICException'",
		"nmi: {assignmentWait: 25}":                                        "at '/nmi/assignmentWait': got number, want string",
		"mic: {caBundle: /etc/ssl/ca.pem}":                                 "at '/mic/caBundle'",
		fmt.Sprintf("mic: {caBundle: %q}", "-----BEGIN PRIVATE KEY-----\n-----END PRIVATE KEY-----\n"+certificate):                             "mic.caBundle holds a private key",
		"{adminsecret: {useMSI: true}, mic: {workloadIdentity: {enabled: true, clientID: c11e0000-0000-4000-8000-000000000001, tenantID: t}}}": "both say how MIC authenticates to Azure",
	} {
		text := standard(values)
		if strings.HasPrefix(values, "{") {
			text = "{operationMode: standard, " + values[1:]
		}
		if got := refusal(t, text); !strings.Contains(got, want) {
			t.Errorf("%s: the output of Helm\n%s\nlacks %q", values, got, want)
		}
	}
}
