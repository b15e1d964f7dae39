{{- define "podidentity.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 50 | trimSuffix "-" }}
{{- end }}

{{/* Names are cut so that what is appended (-nmi, and the hashes of pods) still fits into a label. */}}
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

{{/* These select the pods, and can never change in a release. */}}
{{- define "podidentity.nmi.selector" -}}
app.kubernetes.io/name: {{ include "podidentity.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: nmi
{{- end }}

{{- define "podidentity.nmi.serviceAccount" -}}
{{- if .Values.nmi.serviceAccount.create }}
{{- default (include "podidentity.nmi.name" .) .Values.nmi.serviceAccount.name }}
{{- else }}
{{- required "nmi.serviceAccount.name is needed when nmi.serviceAccount.create is false" .Values.nmi.serviceAccount.name }}
{{- end }}
{{- end }}

{{/* Four fifths of a memory limit written in Ki, Mi or Gi, as Go writes it; nothing for any other limit. */}}
{{- define "podidentity.goMemoryLimit" -}}
{{- $limit := dig "limits" "memory" "" .Values.nmi.resources | toString }}
{{- if regexMatch "^[0-9]+[KMG]i$" $limit }}
{{- $kibibytes := trunc -2 $limit | get (dict "Ki" 1 "Mi" 1024 "Gi" 1048576) | mul (trimSuffix (trunc -2 $limit) $limit | int64) }}
{{- div (mul $kibibytes 4) 5 }}KiB
{{- end }}
{{- end }}

{{/* What the schema cannot say, or not in words. */}}
{{- define "podidentity.checks" -}}
{{- if ne .Values.operationMode "managed" }}
{{- fail "operationMode: write managed. In standard mode MIC attaches identities to machines, and this version has no MIC yet; in managed mode attach them to the machines yourself." }}
{{- end }}
{{- $ports := list (int .Values.nmi.port) (int .Values.nmi.probePort) (int .Values.nmi.prometheusPort) }}
{{- if ne (len (uniq $ports)) 3 }}
{{- fail (printf "nmi.port, nmi.probePort and nmi.prometheusPort must differ, and are %v" $ports) }}
{{- end }}
{{- end }}
