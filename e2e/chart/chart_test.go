package chart_test

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// flags are the flags of the nmi program that the chart may set.
var flags = []string{
	"allow-cross-namespace-secrets", "allow-network-plugin-kubenet", "assignment-wait", "audit-level", "authority-host",
	"block-instance-metadata", "bpf-mount", "ca-bundle", "capture", "capture-host-network", "cgroup-mount", "custom-user-agent", "enable-profile", "events", "force-namespaced",
	"host-token", "http-probe-port", "iptables-backend", "iptables-sync-interval", "kubelet-config", "log-format", "managed-identity-by",
	"log-level", "metadata-header-required", "metadata-ip", "metadata-port", "nmi-bpf-port", "nmi-listen-address", "nmi-port", "node",
	"operation-mode", "pod-lookup-timeout", "pod-uid", "pod-verification", "prometheus-port", "shutdown-timeout", "state-dir", "tenant-id",
}

func TestLintIsClean(t *testing.T) {
	if stdout, stderr, err := helm(t, "lint", "--strict", chart); err != nil {
		t.Errorf("helm lint: %v\n%s%s", err, stdout, stderr)
	}
}

func TestContainerHasOnlyTheNecessaryPrivileges(t *testing.T) {
	_, container := render(t, "").nmi(t)
	want := &corev1.SecurityContext{
		RunAsUser:                new(int64(0)),
		RunAsGroup:               new(int64(0)),
		ReadOnlyRootFilesystem:   new(true),
		AllowPrivilegeEscalation: new(false),
		Capabilities: &corev1.Capabilities{
			Drop: []corev1.Capability{"ALL"},
			Add:  []corev1.Capability{"BPF", "NET_ADMIN", "NET_RAW"},
		},
		SeccompProfile: &corev1.SeccompProfile{Type: corev1.SeccompProfileTypeRuntimeDefault},
	}
	if diff := cmp.Diff(want, container.SecurityContext); diff != "" {
		t.Errorf("security context (-want +got):\n%s", diff)
	}
}

func TestPodsRunOnEveryLinuxNodeInTheHostNetwork(t *testing.T) {
	daemonSet, container := render(t, "").nmi(t)
	pod := daemonSet.Spec.Template.Spec
	if !pod.HostNetwork || pod.DNSPolicy != corev1.DNSClusterFirstWithHostNet {
		t.Errorf("the host network is %v and the DNS policy %s, want true and ClusterFirstWithHostNet", pod.HostNetwork, pod.DNSPolicy)
	}
	if !cmp.Equal(pod.Tolerations, []corev1.Toleration{{Operator: corev1.TolerationOpExists}}) {
		t.Errorf("tolerations are %v, want one that tolerates every taint", pod.Tolerations)
	}
	if !cmp.Equal(pod.NodeSelector, map[string]string{"kubernetes.io/os": "linux"}) {
		t.Errorf("the node selector is %v, want only kubernetes.io/os: linux", pod.NodeSelector)
	}
	if pod.PriorityClassName != "system-node-critical" {
		t.Errorf("the priority class is %s, want system-node-critical", pod.PriorityClassName)
	}
	if container.Image != "podidentity/nmi:0.1.0" || container.ImagePullPolicy != corev1.PullIfNotPresent {
		t.Errorf("the image is %s and its pull policy %s, want podidentity/nmi:0.1.0 and IfNotPresent", container.Image, container.ImagePullPolicy)
	}
	if len(container.Ports) != 0 {
		t.Errorf("the container has ports %v, which are reserved on the node because of hostNetwork", container.Ports)
	}
	want := appsv1.DaemonSetUpdateStrategy{
		Type: appsv1.RollingUpdateDaemonSetStrategyType,
		RollingUpdate: &appsv1.RollingUpdateDaemonSet{
			MaxUnavailable: new(intstr.FromInt32(1)),
			MaxSurge:       new(intstr.FromInt32(0)),
		},
	}
	if diff := cmp.Diff(want, daemonSet.Spec.UpdateStrategy); diff != "" {
		t.Errorf("update strategy (-want +got):\n%s", diff)
	}
	if labels := daemonSet.Spec.Template.Labels; !maps.Equal(labels, daemonSet.Spec.Selector.MatchLabels) {
		t.Errorf("pod labels are %v, want those of the selector: a label that changes with the chart would restart the pods", labels)
	}
}

// otherValues sets each value with a flag of its own to another value than the default.
const otherValues = `
forceNamespaced: "true"
customUserAgent: "team a/1.0: #1"
nmi:
  listenAddress: 169.254.25.80
  port: 2580
  metadataIP: 169.254.169.253
  metadataPort: 81
  probePort: 8086
  prometheusPort: 9091
  iptablesBackend: legacy
  iptablesSyncInterval: 1m30s
  podLookupTimeout: 500ms
  blockInstanceMetadata: true
  metadataHeaderRequired: false
  kubeletConfig: /var/lib/kubelet/flags
  tenantID: contoso.onmicrosoft.com
  logLevel: debug
  loggingFormat: text
  enableProfile: true
  shutdownTimeout: 5s
  allowCrossNamespaceSecrets: true
  auditLevel: warn
  authorityHost: https://login.microsoftonline.us
  events: false
  hostToken: false
  managedIdentityBy: resource-id
  capture: both
  podVerification: required
  captureHostNetwork: bound
  bpfPort: 2577
  caBundle: |
    -----BEGIN CERTIFICATE-----
    -----END CERTIFICATE-----
`

func TestEveryValueSetsItsFlag(t *testing.T) {
	_, container := render(t, "").nmi(t)
	defaults := arguments(t, flags, container.Args)
	wantDefaults := map[string]string{
		"node": "$(NODE_NAME)", "operation-mode": "managed", "force-namespaced": "false",
		"nmi-listen-address": "169.254.25.79", "nmi-port": "2579", "metadata-ip": "169.254.169.254", "metadata-port": "80",
		"http-probe-port": "8085", "prometheus-port": "9090", "iptables-backend": "auto", "iptables-sync-interval": "10s",
		"pod-lookup-timeout": "5s", "block-instance-metadata": "false", "metadata-header-required": "true",
		"allow-network-plugin-kubenet": "false", "kubelet-config": "/etc/default/kubelet", "log-level": "info",
		"log-format": "json", "enable-profile": "false", "shutdown-timeout": "20s",
		"allow-cross-namespace-secrets": "false", "audit-level": "info", "events": "true", "host-token": "true", "managed-identity-by": "client-id",
		"pod-uid": "$(POD_UID)", "capture": "auto", "pod-verification": "auto", "capture-host-network": "none", "nmi-bpf-port": "2578",
		"cgroup-mount": "/node/cgroup", "bpf-mount": "/node/bpf", "state-dir": "/run/podidentity",
	}
	if diff := cmp.Diff(wantDefaults, defaults); diff != "" {
		t.Errorf("defaults (-want +got):\n%s", diff)
	}

	_, container = render(t, otherValues).nmi(t)
	wantOthers := map[string]string{
		"node": "$(NODE_NAME)", "operation-mode": "managed", "force-namespaced": "true", "custom-user-agent": "team a/1.0: #1",
		"nmi-listen-address": "169.254.25.80", "nmi-port": "2580", "metadata-ip": "169.254.169.253", "metadata-port": "81",
		"http-probe-port": "8086", "prometheus-port": "9091", "iptables-backend": "legacy",
		"iptables-sync-interval": "1m30s", "pod-lookup-timeout": "500ms", "block-instance-metadata": "true",
		"metadata-header-required": "false", "allow-network-plugin-kubenet": "false",
		"kubelet-config": "/var/lib/kubelet/flags", "tenant-id": "contoso.onmicrosoft.com", "log-level": "debug",
		"log-format": "text", "enable-profile": "true", "shutdown-timeout": "5s",
		"allow-cross-namespace-secrets": "true", "audit-level": "warn", "authority-host": "https://login.microsoftonline.us",
		"ca-bundle": "/ca-bundle/ca.pem", "events": "false", "host-token": "false", "managed-identity-by": "resource-id",
		"pod-uid": "$(POD_UID)", "capture": "both", "pod-verification": "required", "capture-host-network": "bound", "nmi-bpf-port": "2577",
		"cgroup-mount": "/node/cgroup", "bpf-mount": "/node/bpf", "state-dir": "/run/podidentity",
	}
	if diff := cmp.Diff(wantOthers, arguments(t, flags, container.Args)); diff != "" {
		t.Errorf("other values (-want +got):\n%s", diff)
	}
}

func TestValuesCanAddEnvironmentVariables(t *testing.T) {
	_, container := render(t, "nmi: {extraEnv: [{name: HTTPS_PROXY, value: 'http://proxy.example:3128'}]}").nmi(t)
	last := container.Env[len(container.Env)-1]
	if len(container.Env) < 2 || last.Name != "HTTPS_PROXY" || last.Value != "http://proxy.example:3128" {
		t.Errorf("the environment is %+v, want at least two variables, the last of them HTTPS_PROXY", container.Env)
	}
}

// Without quotes, YAML reads the word off as the boolean false. NMI knows only the word, so the chart must write it.
func TestTheWordOffNeedsNoQuotes(t *testing.T) {
	for value, flag := range map[string]string{"auditLevel": "audit-level", "podVerification": "pod-verification"} {
		for _, off := range []string{"off", `"off"`, "false"} {
			_, container := render(t, "nmi: {"+value+": "+off+"}").nmi(t)
			if got := arguments(t, flags, container.Args)[flag]; got != "off" {
				t.Errorf("%s: %s gives the flag %s=%q, want off", value, off, flag, got)
			}
		}
	}
}

// arguments returns the flags in args, with their values. The parameter flags has the flags of the program. arguments
// fails the test if args has a flag that is not in flags, or has a flag twice.
func arguments(t *testing.T, flags, args []string) map[string]string {
	t.Helper()
	parsed := map[string]string{}
	for _, arg := range args {
		name, value, found := strings.Cut(strings.TrimPrefix(arg, "--"), "=")
		if !found || !strings.HasPrefix(arg, "--") || !slices.Contains(flags, name) {
			t.Errorf("the argument %s is not --FLAG=VALUE with a flag of the program", arg)
		}
		if _, twice := parsed[name]; twice {
			t.Errorf("--%s is given twice", name)
		}
		parsed[name] = value
	}
	return parsed
}

func TestProbesUseLoopback(t *testing.T) {
	_, container := render(t, "nmi: {probePort: 8086}").nmi(t)
	// The space makes a second key for the same path.
	for path, probe := range map[string]*corev1.Probe{
		"/healthz": container.LivenessProbe, "/healthz ": container.StartupProbe, "/readyz": container.ReadinessProbe,
	} {
		want := &corev1.HTTPGetAction{Host: "127.0.0.1", Port: intstr.FromInt32(8086), Path: strings.TrimSpace(path)}
		if probe == nil || !cmp.Equal(probe.HTTPGet, want) {
			t.Errorf("the probe of %s is %+v, want a GET request to port 8086 of 127.0.0.1", path, probe)
		}
	}
}

func TestNodeNameComesFromThePodAndMemoryLimitFromResources(t *testing.T) {
	for limit, want := range map[string]string{"256Mi": "209715KiB", "1Gi": "838860KiB", "400000Ki": "320000KiB", "300M": ""} {
		_, container := render(t, "nmi: {resources: {limits: {memory: "+limit+"}}}").nmi(t)
		got := ""
		for _, variable := range container.Env {
			switch variable.Name {
			case "NODE_NAME":
				if variable.ValueFrom == nil || variable.ValueFrom.FieldRef.FieldPath != "spec.nodeName" {
					t.Errorf("NODE_NAME is %+v, want the field spec.nodeName", variable)
				}
			case "GOMEMLIMIT":
				got = variable.Value
			}
		}
		if got != want {
			t.Errorf("with limit %s GOMEMLIMIT is %q, want %q", limit, got, want)
		}
	}
	_, container := render(t, "").nmi(t)
	if _, limited := container.Resources.Limits[corev1.ResourceCPU]; limited {
		t.Error("the container has a CPU limit, want none")
	}
	if got := container.Resources.Limits.Memory().String(); got != "256Mi" {
		t.Errorf("the memory limit is %s, want 256Mi", got)
	}
}

func TestOnlyTheLockFileAndTheStateFolderAreCreatedOnTheNode(t *testing.T) {
	file, folder := corev1.HostPathFile, corev1.HostPathDirectory
	for _, test := range []struct {
		values, path string
		kind         *corev1.HostPathType
		cgroups      bool
	}{
		{"", "/etc/default", &folder, true},
		{"nmi: {kubeletConfigMustExist: true}", "/etc/default/kubelet", &file, true},
		{"nmi: {kubeletConfig: ''}", "", nil, true},
		{"nmi: {allowNetworkPluginKubenet: true, capture: iptables}", "", nil, false},
		{"nmi: {uninstall: true}", "", nil, false},
	} {
		daemonSet, container := render(t, test.values).nmi(t)
		want := map[string]corev1.HostPathVolumeSource{
			"xtables-lock": {Path: "/run/xtables.lock", Type: new(corev1.HostPathFileOrCreate)},
			"bpf":          {Path: "/sys/fs/bpf", Type: &folder},
			"state":        {Path: "/run/podidentity", Type: new(corev1.HostPathDirectoryOrCreate)},
		}
		wantMounts := []corev1.VolumeMount{{Name: "xtables-lock", MountPath: "/run/xtables.lock"}, {Name: "bpf", MountPath: "/node/bpf"}, {Name: "state", MountPath: "/run/podidentity"}}
		if test.cgroups {
			want["cgroup"] = corev1.HostPathVolumeSource{Path: "/sys/fs/cgroup", Type: &folder}
			wantMounts = append(wantMounts, corev1.VolumeMount{Name: "cgroup", MountPath: "/node/cgroup", ReadOnly: true})
		}
		if test.path != "" {
			want["kubelet-config"] = corev1.HostPathVolumeSource{Path: test.path, Type: test.kind}
			wantMounts = append(wantMounts, corev1.VolumeMount{Name: "kubelet-config", MountPath: test.path, ReadOnly: true})
		}
		got := map[string]corev1.HostPathVolumeSource{}
		for _, volume := range daemonSet.Spec.Template.Spec.Volumes {
			got[volume.Name] = *volume.HostPath
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%q: volumes (-want +got):\n%s", test.values, diff)
		}
		if diff := cmp.Diff(wantMounts, container.VolumeMounts); diff != "" {
			t.Errorf("%q: mounts (-want +got):\n%s", test.values, diff)
		}
	}
}

const certificate = "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n"

func caBundle(text string) string { return fmt.Sprintf("nmi: {caBundle: %q}", text) }

func TestCABundleIsMountedReadOnlyAndAChangeRestartsThePods(t *testing.T) {
	objects := render(t, caBundle("# ours\n"+certificate))
	if len(objects.configMaps) != 1 || objects.configMaps[0].Namespace != "kube-system" ||
		!maps.Equal(objects.configMaps[0].Data, map[string]string{"ca.pem": "# ours\n" + certificate}) {
		t.Fatalf("ConfigMaps are %+v, want one with the CA bundle as ca.pem", objects.configMaps)
	}
	daemonSet, container := objects.nmi(t)
	wantVolume := corev1.Volume{Name: "ca-bundle", VolumeSource: corev1.VolumeSource{ConfigMap: &corev1.ConfigMapVolumeSource{
		LocalObjectReference: corev1.LocalObjectReference{Name: objects.configMaps[0].Name},
	}}}
	if got := daemonSet.Spec.Template.Spec.Volumes; !slices.ContainsFunc(got, func(v corev1.Volume) bool { return cmp.Equal(v, wantVolume) }) {
		t.Errorf("volumes %+v lack %+v", got, wantVolume)
	}
	wantMount := corev1.VolumeMount{Name: "ca-bundle", MountPath: "/ca-bundle", ReadOnly: true}
	if got := container.VolumeMounts; !slices.ContainsFunc(got, func(m corev1.VolumeMount) bool { return cmp.Equal(m, wantMount) }) {
		t.Errorf("mounts %+v lack %+v", got, wantMount)
	}
	other, _ := render(t, caBundle(certificate)).nmi(t)
	if maps.Equal(daemonSet.Spec.Template.Annotations, other.Spec.Template.Annotations) {
		t.Error("a change of the CA bundle does not change the pods' annotations, so the pods do not restart")
	}
	without := render(t, "")
	if daemonSet, _ := without.nmi(t); len(without.configMaps) != 0 || len(daemonSet.Spec.Template.Annotations) != 0 {
		t.Errorf("without a CA bundle the chart renders the ConfigMaps %v and the annotations %v, want none", without.configMaps,
			daemonSet.Spec.Template.Annotations)
	}
}

func TestUninstallRunsOnAllNodesAtOnceWithoutProbes(t *testing.T) {
	daemonSet, container := render(t, `
nmi:
  uninstall: true
  listenAddress: 169.254.25.80
  iptablesBackend: nft
  authorityHost: https://login.microsoftonline.us
  caBundle: |
    -----BEGIN CERTIFICATE-----
    -----END CERTIFICATE-----
`).nmi(t)
	want := []string{
		"uninstall", "--wait-for-signal", "--bpf-mount=/node/bpf", "--state-dir=/run/podidentity",
		"--nmi-listen-address=169.254.25.80", "--nmi-port=2579", "--nmi-bpf-port=2578", "--metadata-ip=169.254.169.254", "--metadata-port=80", "--iptables-backend=nft", "--log-level=info", "--log-format=json",
	}
	if diff := cmp.Diff(want, container.Args); diff != "" {
		t.Errorf("arguments (-want +got):\n%s", diff)
	}
	var mounts []string
	for _, mount := range container.VolumeMounts {
		mounts = append(mounts, mount.Name)
	}
	if want := []string{"xtables-lock", "bpf", "state"}; !slices.Equal(mounts, want) || len(daemonSet.Spec.Template.Spec.Volumes) != len(want) {
		t.Errorf("mounts %q; want %q", mounts, want)
	}
	if container.LivenessProbe != nil || container.ReadinessProbe != nil || container.StartupProbe != nil {
		t.Error("the container has probes, but `nmi uninstall` does not serve them")
	}
	if got := daemonSet.Spec.UpdateStrategy.RollingUpdate.MaxUnavailable.String(); got != "100%" {
		t.Errorf("maxUnavailable is %s, want all pods, so that all nodes are cleaned at once", got)
	}
	serving, _ := render(t, "").nmi(t)
	if diff := cmp.Diff(serving.Spec.Selector, daemonSet.Spec.Selector); diff != "" {
		t.Errorf("the selector differs from that of the DaemonSet that serves:\n%s", diff)
	}
}

func TestIdentitiesAreCreatedFromValues(t *testing.T) {
	got := render(t, `
azureIdentities:
  shop:
    namespace: shop
    type: 0
    resourceID: /subscriptions/s/resourcegroups/g/providers/Microsoft.ManagedIdentity/userAssignedIdentities/i
    clientID: 01234567-89ab-cdef-0123-456789abcdef
    binding:
      selector: "1"
  robot:
    name: robot-1
    type: 1
    clientID: 01234567-89ab-cdef-0123-456789abcdef
    tenantID: contoso.onmicrosoft.com
    clientPassword: {name: secret, namespace: kube-system}
    auxiliaryTenantIDs: [fabrikam.onmicrosoft.com]
    binding: {name: robots, selector: robot}
  web:
    namespace: "1"
    type: 3
    clientID: 01234567-89ab-cdef-0123-456789abcdef
    tenantID: contoso.onmicrosoft.com
    adEndpoint: https://login.microsoftonline.us
nmi:
  secretNamespaces: [kube-system]
  federatedNamespaces: ["1"]
`).custom
	for _, object := range got {
		delete(object["metadata"].(map[string]any), "labels")
	}
	want := []map[string]any{
		object("AzureIdentity", "kube-system", "robot-1", map[string]any{
			"type": 1.0, "clientID": "01234567-89ab-cdef-0123-456789abcdef", "tenantID": "contoso.onmicrosoft.com",
			"clientPassword":     map[string]any{"name": "secret", "namespace": "kube-system"},
			"auxiliaryTenantIDs": []any{"fabrikam.onmicrosoft.com"},
		}),
		object("AzureIdentity", "shop", "shop", map[string]any{
			"type":       0.0,
			"resourceID": "/subscriptions/s/resourcegroups/g/providers/Microsoft.ManagedIdentity/userAssignedIdentities/i",
			"clientID":   "01234567-89ab-cdef-0123-456789abcdef",
		}),
		object("AzureIdentity", "1", "web", map[string]any{
			"type": 3.0, "clientID": "01234567-89ab-cdef-0123-456789abcdef", "tenantID": "contoso.onmicrosoft.com",
			"adEndpoint": "https://login.microsoftonline.us",
		}),
		object("AzureIdentityBinding", "kube-system", "robots", map[string]any{
			"azureIdentity": "robot-1", "selector": "robot",
		}),
		object("AzureIdentityBinding", "shop", "shop-binding", map[string]any{"azureIdentity": "shop", "selector": "1"}),
	}
	if diff := cmp.Diff(want, got, inAnyOrder); diff != "" {
		t.Errorf("objects (-want +got):\n%s", diff)
	}
}

func object(kind, namespace, name string, spec map[string]any) map[string]any {
	return map[string]any{
		"apiVersion": group + "/v1",
		"kind":       kind,
		"metadata":   map[string]any{"name": name, "namespace": namespace},
		"spec":       spec,
	}
}

var inAnyOrder = cmpopts.SortSlices(func(a, b map[string]any) bool {
	key := func(o map[string]any) string { return fmt.Sprint(o["kind"], o["metadata"]) }
	return key(a) < key(b)
})

func TestInvalidValuesAreRefusedWithAReason(t *testing.T) {
	for values, want := range map[string]string{
		"color: green":                                           "additional properties 'color' not allowed",
		"nmi: {micNamespace: default}":                           "additional properties 'micNamespace' not allowed",
		"nmi: {iptablesBackend: ebtables}":                       "at '/nmi/iptablesBackend': value must be one of 'auto', 'nft', 'legacy'",
		"nmi: {port: 0}":                                         "at '/nmi/port'",
		"nmi: {port: many}":                                      "at '/nmi/port': got string, want integer",
		"nmi: {iptablesSyncInterval: 10}":                        "at '/nmi/iptablesSyncInterval': got number, want string",
		"nmi: {podLookupTimeout: soon}":                          "at '/nmi/podLookupTimeout'",
		"nmi: {listenAddress: 127.0.0.300}":                      "at '/nmi/listenAddress'",
		"nmi: {kubeletConfig: relative/path}":                    "at '/nmi/kubeletConfig'",
		"nmi: {port: 8085}":                                      "nmi.port, nmi.bpfPort, nmi.probePort and nmi.prometheusPort must differ",
		"nmi: {bpfPort: 2579}":                                   "nmi.port, nmi.bpfPort, nmi.probePort and nmi.prometheusPort must differ",
		"nmi: {capture: ebpf}":                                   "at '/nmi/capture': value must be one of 'auto', 'iptables', 'bpf', 'both'",
		"nmi: {capture: iptables, podVerification: required}":    "nmi.podVerification=required needs the capture by cgroup",
		"nmi: {capture: iptables, captureHostNetwork: all}":      "nmi.captureHostNetwork=all needs the capture by cgroup",
		"nmi: {podVerification: off, captureHostNetwork: bound}": "nmi.captureHostNetwork=bound needs the capture by cgroup",
		"nmi: {serviceAccount: {create: false}}":                 "nmi.serviceAccount.name is required",
		"operationMode: both":                                    "at '/operationMode'",
		"azureIdentities: {a: {resourceId: x}}":                  "additional properties 'resourceId' not allowed",
		"azureIdentities: {a: {type: 9}}":                        "at '/azureIdentities/a/type': value must be one of 0, 1, 2, 3",
		"azureIdentities: {a: {binding: {name: b}}}":             "missing property 'selector'",
		"nmi: {hostToken: 'no'}":                                 "at '/nmi/hostToken': got string, want boolean",
		"nmi: {events: 1}":                                       "at '/nmi/events': got number, want boolean",
		"nmi: {tokenRequestPolicy: ''}":                          "at '/nmi/tokenRequestPolicy': got string, want boolean",
		"nmi: {allowCrossNamespaceSecrets: [shop]}":              "at '/nmi/allowCrossNamespaceSecrets': got array, want boolean",
		"nmi: {auditLevel: on}":                                  "at '/nmi/auditLevel': value must be one of 'info', 'warn', 'off', false",
		"nmi: {authorityHost: http://example.com}":               "at '/nmi/authorityHost'",
		"nmi: {authorityHost: https://a.com/tenant}":             "at '/nmi/authorityHost'",
		"nmi: {caBundle: /etc/ssl/ca.pem}":                       "at '/nmi/caBundle'",
		caBundle("-----BEGIN PRIVATE KEY-----\n-----END PRIVATE KEY-----\n" + certificate): "nmi.caBundle holds a private key",
	} {
		if got := refusal(t, values); !strings.Contains(got, want) {
			t.Errorf("%s: the output of Helm\n%s\nlacks %q", values, got, want)
		}
	}
}

// If CRDs were part of a release, deleting the release would delete them, and with them all their objects in the
// cluster. CRDs in the folder crds belong to no release.
func TestNoReleaseOwnsTheCRDs(t *testing.T) {
	files, err := filepath.Glob(filepath.Join(chart, "crds", "*.yaml"))
	if err != nil || len(files) != 4 {
		t.Errorf("the folder crds contains %v (%v), want 4 files", files, err)
	}
	templates, err := filepath.Glob(filepath.Join(chart, "templates", "*"))
	if err != nil || len(templates) == 0 {
		t.Fatal(err)
	}
	for _, file := range templates {
		data, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(string(data), "kind: CustomResourceDefinition") {
			t.Errorf("%s contains a CustomResourceDefinition", file)
		}
	}
}
