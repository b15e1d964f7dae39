{{- define "podidentity.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 50 | trimSuffix "-" }}
{{- end }}

{{/* Names are truncated so that suffixes (-nmi, and the hashes of pods) still fit into a label. */}}
{{- define "podidentity.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 48 | trimSuffix "-" }}
{{- else }}
{{- $name := include "podidentity.name" . }}
{{- if contains $name .Release.Name }}
{{- .Release.Name | trunc 48 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name $name | trunc 48 | trimSuffix "-" }}
{{- end }}
{{- end }}
{{- end }}

{{- define "podidentity.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
app.kubernetes.io/name: {{ include "podidentity.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{- define "podidentity.nmi.name" -}}
{{ include "podidentity.fullname" . }}-nmi
{{- end }}

{{/* The selector of the pods, which cannot change during the life of a release. */}}
{{- define "podidentity.nmi.selector" -}}
app.kubernetes.io/name: {{ include "podidentity.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: nmi
{{- end }}

{{- define "podidentity.nmi.serviceAccount" -}}
{{- if .Values.nmi.serviceAccount.create }}
{{- default (include "podidentity.nmi.name" .) .Values.nmi.serviceAccount.name }}
{{- else }}
{{- required "nmi.serviceAccount.name is required when nmi.serviceAccount.create is false" .Values.nmi.serviceAccount.name }}
{{- end }}
{{- end }}

{{- define "podidentity.mic.name" -}}
{{ include "podidentity.fullname" . }}-mic
{{- end }}

{{/* The selector of the pods, which cannot change during the life of a release. */}}
{{- define "podidentity.mic.selector" -}}
app.kubernetes.io/name: {{ include "podidentity.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: mic
{{- end }}

{{/* The label of MIC's pods that the exception in mic-exception.yaml matches. Give it to no other pod: with the exception,
NMI issues tokens of the VM's own identities to each pod in the namespace of the release that has the label. */}}
{{- define "podidentity.mic.exceptionLabel" -}}
podidentity.io/mic: {{ include "podidentity.mic.name" . }}
{{- end }}

{{- define "podidentity.mic.serviceAccount" -}}
{{- if .Values.mic.serviceAccount.create }}
{{- default (include "podidentity.mic.name" .) .Values.mic.serviceAccount.name }}
{{- else }}
{{- required "mic.serviceAccount.name is required when mic.serviceAccount.create is false" .Values.mic.serviceAccount.name }}
{{- end }}
{{- end }}

{{- define "podidentity.mic.leaseNamespace" -}}
{{- default .Release.Namespace .Values.mic.leaderElection.namespace }}
{{- end }}

{{/* Whether MIC detaches what it attached. It does so too whenever NMI is removed. */}}
{{- define "podidentity.mic.uninstall" -}}
{{- if or .Values.nmi.uninstall .Values.mic.uninstall }}true{{ end }}
{{- end }}

{{/* The file of the host that says how MIC authenticates to Azure; none if values do. */}}
{{- define "podidentity.mic.cloudConfig" -}}
{{- if not (or .Values.adminsecret .Values.mic.workloadIdentity.enabled) }}
{{- .Values.mic.cloudConfig }}
{{- end }}
{{- end }}

{{/* Whether MIC may request its own tokens from IMDS. */}}
{{- define "podidentity.mic.asksIMDS" -}}
{{- if .Values.adminsecret }}
{{- if eq (toString .Values.adminsecret.useMSI) "true" }}true{{ end }}
{{- else if not .Values.mic.workloadIdentity.enabled }}true{{ end }}
{{- end }}

{{/* The arguments of `mic plan`: those of MIC that its result depends on. */}}
{{- define "podidentity.mic.planArguments" -}}
{{- $arguments := list }}
{{- with include "podidentity.mic.cloudConfig" . }}
{{- $arguments = append $arguments (printf "--cloudconfig=%s" .) }}
{{- end }}
{{- if .Values.mic.caBundle }}
{{- $arguments = append $arguments "--ca-bundle=/ca-bundle/ca.pem" }}
{{- end }}
{{- if eq (toString .Values.forceNamespaced) "true" }}
{{- $arguments = append $arguments "--force-namespaced" }}
{{- end }}
{{- with .Values.mic.immutableUserMSIs }}
{{- $arguments = append $arguments (printf "--immutable-user-msis=%s" (join "," .)) }}
{{- end }}
{{- $arguments = append $arguments (printf "--detach-delay=%s" .Values.mic.detachDelay) }}
{{- join " " $arguments }}
{{- end }}

{{/* Four fifths of a memory limit in Ki, Mi or Gi, in Go's notation; nothing for any other limit. */}}
{{- define "podidentity.goMemoryLimit" -}}
{{- $limit := dig "limits" "memory" "" . | toString }}
{{- if regexMatch "^[0-9]+[KMG]i$" $limit }}
{{- $kibibytes := trunc -2 $limit | get (dict "Ki" 1 "Mi" 1024 "Gi" 1048576) | mul (trimSuffix (trunc -2 $limit) $limit | int64) }}
{{- div (mul $kibibytes 4) 5 }}KiB
{{- end }}
{{- end }}

{{/* The entries of nmi.secretNamespaces or nmi.federatedNamespaces as JSON: a list of objects with namespace and names.
The argument value is secretNamespaces or federatedNamespaces. The argument key is the key of the names in an entry. An
empty namespace means the whole cluster, and an empty list of names means all names. */}}
{{- define "podidentity.scopes" -}}
{{- $list := get .nmi .value | default list }}
{{- $scopes := list }}
{{- if eq (toString $list) "all" }}
{{- $scopes = list (dict "namespace" "" "names" list) }}
{{- else }}
{{- $seen := list }}
{{- range $list }}
{{- if eq (toString .) "all" }}
{{- fail (printf "nmi.%s: write the word all in place of the list, not in it; if a namespace is named all, write {namespace: all, %s: [...]}" $.value $.key) }}
{{- end }}
{{- $scope := dict "namespace" . "names" list }}
{{- if kindIs "map" . }}
{{- $scope = dict "namespace" .namespace "names" (get . $.key) }}
{{- end }}
{{- if has $scope.namespace $seen }}
{{- fail (printf "nmi.%s: namespace %s is listed twice; merge the entries" $.value $scope.namespace) }}
{{- end }}
{{- $seen = append $seen $scope.namespace }}
{{- $scopes = append $scopes $scope }}
{{- end }}
{{- end }}
{{- toJson $scopes }}
{{- end }}

{{- define "podidentity.nmi.secretScopes" -}}
{{- include "podidentity.scopes" (dict "nmi" .Values.nmi "value" "secretNamespaces" "key" "names") }}
{{- end }}

{{- define "podidentity.nmi.tokenScopes" -}}
{{- include "podidentity.scopes" (dict "nmi" .Values.nmi "value" "federatedNamespaces" "key" "serviceAccounts") }}
{{- end }}

{{/* A role and its binding to NMI's ServiceAccount, in the namespace of the scope or for the whole cluster. */}}
{{- define "podidentity.nmi.roleAndBinding" -}}
{{- $kind := ternary "Role" "ClusterRole" (ne .scope.namespace "") }}
{{- $name := printf "%s-%s" (include "podidentity.nmi.name" .root) .suffix }}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: {{ $kind }}
metadata:
  name: {{ $name }}
  {{- with .scope.namespace }}
  namespace: {{ . | quote }}
  {{- end }}
  labels:
    {{- include "podidentity.labels" .root | nindent 4 }}
    app.kubernetes.io/component: nmi
rules:
  - apiGroups: [""]
    resources: [{{ .resource }}]
    {{- with .scope.names }}
    resourceNames:
      {{- toYaml . | nindent 6 }}
    {{- end }}
    verbs: [{{ .verbs }}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: {{ $kind }}Binding
metadata:
  name: {{ $name }}
  {{- with .scope.namespace }}
  namespace: {{ . | quote }}
  {{- end }}
  labels:
    {{- include "podidentity.labels" .root | nindent 4 }}
    app.kubernetes.io/component: nmi
roleRef:
  apiGroup: rbac.authorization.k8s.io
  kind: {{ $kind }}
  name: {{ $name }}
subjects:
  - kind: ServiceAccount
    name: {{ include "podidentity.nmi.serviceAccount" .root }}
    namespace: {{ .root.Release.Namespace }}
{{- end }}

{{- define "podidentity.mic.checks" -}}
{{- $mic := .Values.mic }}
{{- if and (eq (int $mic.replicas) 0) (not (include "podidentity.mic.uninstall" .)) }}
{{- fail "mic.replicas is 0: in standard mode no pod gets an identity without MIC; set it to 1 or more, or set operationMode to managed" }}
{{- end }}
{{- $ports := list (int $mic.probePort) (int $mic.prometheusPort) }}
{{- if $mic.enableProfile }}
{{- $ports = append $ports 6060 }}
{{- end }}
{{- if ne (len (uniq $ports)) (len $ports) }}
{{- fail (printf "mic.probePort, mic.prometheusPort and the profiler's 6060 must differ, and are %v" $ports) }}
{{- end }}
{{- if contains "PRIVATE KEY" (default "" $mic.caBundle) }}
{{- fail "mic.caBundle holds a private key; set it to certificates only, because they become a ConfigMap" }}
{{- end }}
{{- $secret := .Values.adminsecret }}
{{- if and $secret $mic.workloadIdentity.enabled }}
{{- fail "adminsecret and mic.workloadIdentity.enabled both say how MIC authenticates to Azure; set only one of them" }}
{{- end }}
{{- if and $mic.workloadIdentity.enabled (not (and $mic.workloadIdentity.clientID $mic.workloadIdentity.tenantID)) }}
{{- fail "mic.workloadIdentity needs clientID and tenantID: of the application or managed identity that trusts MIC's ServiceAccount" }}
{{- end }}
{{- if and $secret (ne (toString $secret.useMSI) "true") (not (and $secret.tenantID $secret.clientID $secret.clientSecret)) }}
{{- fail "adminsecret needs tenantID, clientID and clientSecret of a service principal, or useMSI: true" }}
{{- end }}
{{- end }}

{{/* Checks that the schema cannot express, or not with a readable message. */}}
{{- define "podidentity.checks" -}}
{{- if eq .Values.operationMode "standard" }}
{{- include "podidentity.mic.checks" . }}
{{- end }}
{{- $ports := list (int .Values.nmi.port) (int .Values.nmi.bpfPort) (int .Values.nmi.probePort) (int .Values.nmi.prometheusPort) }}
{{- if ne (len (uniq $ports)) 4 }}
{{- fail (printf "nmi.port, nmi.bpfPort, nmi.probePort and nmi.prometheusPort must differ, and are %v" $ports) }}
{{- end }}
{{- if and (eq .Values.nmi.capture "iptables") (eq (toString .Values.nmi.podVerification) "required") }}
{{- fail "nmi.podVerification=required needs the capture by cgroup; set nmi.capture to auto, bpf or both" }}
{{- end }}
{{- if ne .Values.nmi.captureHostNetwork "none" }}
{{- if or (eq .Values.nmi.capture "iptables") (has (toString .Values.nmi.podVerification) (list "off" "false")) }}
{{- fail (printf "nmi.captureHostNetwork=%s needs the capture by cgroup, which identifies pods in the host network; set nmi.capture to auto, bpf or both, and nmi.podVerification to auto or required" .Values.nmi.captureHostNetwork) }}
{{- end }}
{{- end }}
{{- if contains "PRIVATE KEY" (default "" .Values.nmi.caBundle) }}
{{- fail "nmi.caBundle holds a private key; set it to certificates only, because they become a ConfigMap" }}
{{- end }}
{{- /* A failure of these checks must not prevent the removal of NMI. */}}
{{- if not .Values.nmi.uninstall }}
{{- $secrets := include "podidentity.nmi.secretScopes" . | fromJsonArray }}
{{- $tokens := include "podidentity.nmi.tokenScopes" . | fromJsonArray }}
{{- range $key, $identity := .Values.azureIdentities }}
{{- $namespace := default $.Release.Namespace $identity.namespace }}
{{- $type := int $identity.type }}
{{- if has $type (list 1 2) }}
{{- $secret := dig "clientPassword" "name" "" $identity }}
{{- $secretNamespace := default $namespace (dig "clientPassword" "namespace" "" $identity) }}
{{- if and (ne $secretNamespace $namespace) (not $.Values.nmi.allowCrossNamespaceSecrets) }}
{{- fail (printf "azureIdentities.%s: Secret %s/%s is in another namespace than the identity; move it to namespace %s, or set nmi.allowCrossNamespaceSecrets to true" $key $secretNamespace $secret $namespace) }}
{{- end }}
{{- $covered := false }}
{{- range $secrets }}
{{- if and (has .namespace (list "" $secretNamespace)) (or (not .names) (has $secret .names)) }}
{{- $covered = true }}
{{- end }}
{{- end }}
{{- if and $.Values.rbac.enabled $secret (not $covered) }}
{{- fail (printf "azureIdentities.%s: NMI may not read Secret %s/%s; add its namespace, or {namespace: %s, names: [%s]}, to nmi.secretNamespaces" $key $secretNamespace $secret $secretNamespace $secret) }}
{{- end }}
{{- else if eq $type 3 }}
{{- $covered := false }}
{{- range $tokens }}
{{- if has .namespace (list "" $namespace) }}
{{- $covered = true }}
{{- end }}
{{- end }}
{{- if and $.Values.rbac.enabled (not $covered) }}
{{- fail (printf "azureIdentities.%s: NMI may not request tokens of ServiceAccounts in namespace %s; add it to nmi.federatedNamespaces" $key $namespace) }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}
