{{- define "isthmus.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" -}}
{{- end }}

{{/* KubeRay adds to the cluster's name in those of Services and pods: 40 characters leave room. */}}
{{- define "isthmus.fullname" -}}
{{- $name := include "isthmus.name" . -}}
{{- $full := .Values.fullnameOverride -}}
{{- if not $full -}}
{{- $full = contains $name .Release.Name | ternary .Release.Name (printf "%s-%s" .Release.Name $name) -}}
{{- end -}}
{{- $full = $full | trunc 40 | trimSuffix "-" -}}
{{- if not (regexMatch "^[a-z]" $full) -}}
{{- fail (printf "the name %q does not begin with a letter, as that of a RayCluster must; set fullnameOverride" $full) -}}
{{- end -}}
{{- $full -}}
{{- end }}

{{- define "isthmus.clusterId" -}}
{{- .Values.clusterId | default (include "isthmus.fullname" .) | trunc 32 | trimSuffix "-" -}}
{{- end }}

{{/* What pods are found by; KubeRay sets app.kubernetes.io/name of its pods where it is missing. */}}
{{- define "isthmus.selector" -}}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- define "isthmus.labels" -}}
{{ include "isthmus.selector" . }}
app.kubernetes.io/name: {{ include "isthmus.name" .root }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
{{- with .root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* Labels of pods: what changes with each version of the chart would roll them for nothing. */}}
{{- define "isthmus.podLabels" -}}
{{ include "isthmus.selector" . }}
app.kubernetes.io/name: {{ include "isthmus.name" .root }}
{{- with .root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "isthmus.image" -}}
{{- $image := .Values.image -}}
{{- if $image.digest -}}
{{- printf "%s@%s" $image.repository $image.digest -}}
{{- else -}}
{{- printf "%s:%s" $image.repository ($image.tag | default .Chart.AppVersion) -}}
{{- end -}}
{{- end }}

{{- define "isthmus.tlsSecret" -}}
{{- if eq .root.Values.tls.mode "existing" -}}
{{- required (printf "tls.existing.%s: name the Secret with ca.crt, tls.crt and tls.key of this role" .role) (index .root.Values.tls.existing .role) -}}
{{- else -}}
{{- printf "%s-tls-%s" (include "isthmus.fullname" .root) .role -}}
{{- end -}}
{{- end }}

{{- define "isthmus.authSecret" -}}
{{- .Values.auth.existingSecret | default (printf "%s-keys" (include "isthmus.fullname" .)) -}}
{{- end }}

{{- define "isthmus.rayTokenSecret" -}}
{{- .Values.ray.tokenSecret | default (include "isthmus.fullname" .) -}}
{{- end }}

{{- define "isthmus.modelsClaim" -}}
{{- .Values.models.existingClaim | default (printf "%s-models" (include "isthmus.fullname" .)) -}}
{{- end }}

{{- define "isthmus.pagesClaim" -}}
{{- .Values.pageStore.existingClaim | default (printf "%s-pages" (include "isthmus.fullname" .)) -}}
{{- end }}
