package chart_test

import (
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
)

// The tests of this file check how MIC authenticates to Azure: its credentials, the files that its container mounts for
// them, and the user that the container runs as to read these files.

const (
	servicePrincipal = "adminsecret: {cloud: AzureChinaCloud, tenantID: t, clientID: c, clientSecret: 'hush hush', subscriptionID: '01'}"
	federatedMIC     = "mic: {workloadIdentity: {enabled: true, clientID: c11e0000-0000-4000-8000-000000000001, tenantID: contoso.com}}"
)

func TestMICMountsOnlyFilesOfTheHostAndRunsAsRootOnlyForThem(t *testing.T) {
	file := corev1.HostPathFile
	for values, want := range map[string][]string{
		"": {"/etc/kubernetes/azure.json"},
		"mic: {cloudConfig: /etc/cloud/azure.json}":                                         {"/etc/cloud/azure.json"},
		"mic: {customCloud: {enabled: true}}":                                               {"/etc/kubernetes/azure.json", "/etc/kubernetes/akscustom.json"},
		"mic: {cloudConfig: ''}":                                                            nil,
		"mic: {cloudConfig: '', customCloud: {enabled: true, configPath: /etc/cloud.json}}": {"/etc/cloud.json"},
		servicePrincipal:              nil,
		"adminsecret: {useMSI: true}": nil,
		federatedMIC:                  nil,
	} {
		deployment, container := render(t, standard(values)).mic(t)
		var got []string
		for _, volume := range deployment.Spec.Template.Spec.Volumes {
			if volume.HostPath == nil {
				continue
			}
			got = append(got, volume.HostPath.Path)
			if *volume.HostPath.Type != file {
				t.Errorf("%q: the host path %s has type %s, want File", values, volume.HostPath.Path, *volume.HostPath.Type)
			}
			wantMount := corev1.VolumeMount{Name: volume.Name, MountPath: volume.HostPath.Path, ReadOnly: true}
			if !slices.ContainsFunc(container.VolumeMounts, func(m corev1.VolumeMount) bool { return cmp.Equal(m, wantMount) }) {
				t.Errorf("%q: mounts %+v lack %+v", values, container.VolumeMounts, wantMount)
			}
		}
		if !slices.Equal(got, want) {
			t.Errorf("%q: the mounted files of the host are %v, want %v", values, got, want)
		}
		wantContext := &corev1.SecurityContext{
			RunAsUser: new(int64(0)), RunAsGroup: new(int64(0)),
			ReadOnlyRootFilesystem: new(true), AllowPrivilegeEscalation: new(false),
			Capabilities:   &corev1.Capabilities{Drop: []corev1.Capability{"ALL"}},
			SeccompProfile: &corev1.SeccompProfile{Type: corev1.SeccompProfileTypeRuntimeDefault},
		}
		if len(want) == 0 {
			wantContext.RunAsNonRoot, wantContext.RunAsUser, wantContext.RunAsGroup = new(true), new(int64(65532)), new(int64(65532))
		}
		if diff := cmp.Diff(wantContext, container.SecurityContext); diff != "" {
			t.Errorf("%q: security context (-want +got):\n%s", values, diff)
		}
		_, hasFlag := arguments(t, micFlags, container.Args)["cloudconfig"]
		if wantFlag := slices.ContainsFunc(want, func(f string) bool { return strings.HasSuffix(f, "azure.json") }); hasFlag != wantFlag {
			t.Errorf("%q: the flag --cloudconfig must be there if azure.json is mounted, and only then; arguments are %v", values, container.Args)
		}
	}
	_, container := render(t, standard("mic: {customCloud: {enabled: true}}")).mic(t)
	if v := variable(container, "AZURE_ENVIRONMENT_FILEPATH"); v == nil || v.Value != "/etc/kubernetes/akscustom.json" {
		t.Errorf("AZURE_ENVIRONMENT_FILEPATH is %+v, want /etc/kubernetes/akscustom.json", v)
	}
}

func TestServicePrincipalIsASecretInMICsEnvironment(t *testing.T) {
	objects := render(t, standard(servicePrincipal))
	if len(objects.secrets) != 1 || objects.secrets[0].Namespace != "kube-system" {
		t.Fatalf("Secrets are %+v, want one in namespace kube-system", objects.secrets)
	}
	got := map[string]string{}
	for key, value := range objects.secrets[0].Data {
		got[key] = string(value)
	}
	want := map[string]string{
		"CLOUD": "AzureChinaCloud", "TENANT_ID": "t", "CLIENT_ID": "c", "CLIENT_SECRET": "hush hush", "SUBSCRIPTION_ID": "01",
	}
	if !maps.Equal(got, want) {
		t.Errorf("the Secret holds %v, want the values of adminsecret", got)
	}
	deployment, container := objects.mic(t)
	from := container.EnvFrom
	if len(from) != 1 || from[0].SecretRef == nil || from[0].SecretRef.Name != objects.secrets[0].Name {
		t.Errorf("the environment comes from %+v, want the Secret of the chart", from)
	}
	other, _ := render(t, standard(strings.Replace(servicePrincipal, "hush hush", "hush", 1))).mic(t)
	if maps.Equal(deployment.Spec.Template.Annotations, other.Spec.Template.Annotations) {
		t.Error("a change of the client secret does not change the pods' annotations, so the pods do not restart")
	}
	if notes := notesOf(t, standard(servicePrincipal)); strings.Contains(notes, "hush") {
		t.Errorf("the notes contain the client secret:\n%s", notes)
	}
	if without := render(t, standard("")); len(without.secrets) != 0 {
		t.Errorf("without adminsecret the chart renders the Secrets %+v, want none", without.secrets)
	}
	if _, container := render(t, standard("")).mic(t); len(container.EnvFrom) != 0 {
		t.Errorf("without adminsecret the environment comes from %+v, want no Secret", container.EnvFrom)
	}
}

func TestValuesCanSelectAManagedIdentity(t *testing.T) {
	const client = "c11e0000-0000-4000-8000-000000000001"
	for _, yes := range []string{"true", `"true"`} {
		secrets := render(t, standard("adminsecret: {useMSI: "+yes+", userAssignedMSIClientID: "+client+", cloud: ''}")).secrets
		if len(secrets) != 1 || len(secrets[0].Data) != 2 || string(secrets[0].Data["USE_MSI"]) != "true" ||
			string(secrets[0].Data["USER_ASSIGNED_MSI_CLIENT_ID"]) != client {
			t.Errorf("with useMSI: %s, the Secrets are %+v, want one with only USE_MSI and USER_ASSIGNED_MSI_CLIENT_ID", yes, secrets)
		}
	}
}

func TestWorkloadIdentityHasATokenOnlyForEntraID(t *testing.T) {
	objects := render(t, standard(federatedMIC))
	deployment, container := objects.mic(t)
	for name, want := range map[string]string{
		"AZURE_CLIENT_ID": "c11e0000-0000-4000-8000-000000000001", "AZURE_TENANT_ID": "contoso.com",
		"AZURE_FEDERATED_TOKEN_FILE": "/azure-token/token",
	} {
		if v := variable(container, name); v == nil || v.Value != want {
			t.Errorf("%s is %+v, want %s", name, v, want)
		}
	}
	want := []corev1.VolumeProjection{{ServiceAccountToken: &corev1.ServiceAccountTokenProjection{
		Audience: "api://AzureADTokenExchange", ExpirationSeconds: new(int64(3600)), Path: "token",
	}}}
	volumes := deployment.Spec.Template.Spec.Volumes
	if len(volumes) != 1 || volumes[0].Projected == nil || !cmp.Equal(volumes[0].Projected.Sources, want) {
		t.Errorf("volumes are %+v, want only the token for Entra ID", volumes)
	}
	if !slices.ContainsFunc(container.VolumeMounts, func(m corev1.VolumeMount) bool { return m.MountPath == "/azure-token" && m.ReadOnly }) {
		t.Errorf("mounts are %+v, want /azure-token, read-only", container.VolumeMounts)
	}
	if len(objects.secrets) != 0 {
		t.Errorf("Secrets are %+v, want none", objects.secrets)
	}
}

// An exception gives the pods that it matches every identity of their virtual machine, so the chart creates none for
// MIC without need.
func TestMICHasAnExceptionOnlyIfItUsesTheMetadataService(t *testing.T) {
	for values, want := range map[string]bool{
		"":                              true,
		"installMICException: 'true'":   true,
		"installMICException: false":    false,
		"installMICException: 'false'":  false,
		"adminsecret: {useMSI: true}":   true,
		"adminsecret: {useMSI: 'true'}": true,
		"mic: {cloudConfig: ''}":        true, // environment variables may make MIC use the metadata service
		servicePrincipal:                false,
		federatedMIC:                    false,
		"nmi: {uninstall: true}":        true,
	} {
		objects := render(t, standard(values))
		if got := len(objects.custom) == 1; got != want {
			t.Errorf("%q: MIC's AzurePodIdentityException is missing, or must not be there; custom resources are %v", values, objects.custom)
			continue
		}
		if !want {
			continue
		}
		exception := objects.custom[0]
		delete(exception["metadata"].(map[string]any), "labels")
		label := map[string]any{"podidentity.io/mic": "podidentity-mic"}
		wantException := object("AzurePodIdentityException", "kube-system", "podidentity-mic", map[string]any{"podLabels": label})
		if diff := cmp.Diff(wantException, exception); diff != "" {
			t.Errorf("%q: exception (-want +got):\n%s", values, diff)
		}
		deployment, _ := objects.mic(t)
		if deployment.Spec.Template.Labels["podidentity.io/mic"] != "podidentity-mic" {
			t.Errorf("%q: MIC's pods lack the label that the exception matches; their labels are %v", values, deployment.Spec.Template.Labels)
		}
		daemonSet, _ := objects.nmi(t)
		if _, excepted := daemonSet.Spec.Template.Labels["podidentity.io/mic"]; excepted {
			t.Errorf("%q: NMI's pods have the label that the exception matches", values)
		}
	}
}

func TestMICsCABundleIsMountedAndAChangeRestartsThePods(t *testing.T) {
	bundle := func(text string) string {
		return standard("mic: {caBundle: \"" + strings.ReplaceAll(text, "\n", "\\n") + "\"}")
	}
	objects := render(t, bundle(certificate))
	if len(objects.configMaps) != 1 || objects.configMaps[0].Name != "podidentity-mic-ca-bundle" ||
		!maps.Equal(objects.configMaps[0].Data, map[string]string{"ca.pem": certificate}) {
		t.Fatalf("ConfigMaps are %+v, want only podidentity-mic-ca-bundle, with the CA bundle as ca.pem", objects.configMaps)
	}
	deployment, container := objects.mic(t)
	if !slices.ContainsFunc(deployment.Spec.Template.Spec.Volumes, func(v corev1.Volume) bool {
		return v.Name == "ca-bundle" && v.ConfigMap != nil && v.ConfigMap.Name == objects.configMaps[0].Name
	}) || !slices.ContainsFunc(container.VolumeMounts, func(m corev1.VolumeMount) bool { return m.MountPath == "/ca-bundle" && m.ReadOnly }) {
		t.Errorf("the CA bundle is not a volume, or not mounted read-only at /ca-bundle: volumes %+v, mounts %+v", deployment.Spec.Template.Spec.Volumes, container.VolumeMounts)
	}
	other, _ := render(t, bundle("# ours\n"+certificate)).mic(t)
	if maps.Equal(deployment.Spec.Template.Annotations, other.Spec.Template.Annotations) {
		t.Error("a change of the CA bundle does not change the pods' annotations, so the pods do not restart")
	}
}
