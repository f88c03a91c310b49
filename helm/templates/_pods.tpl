{{/* Whole cores of a quantity, at least one. */}}
{{- define "isthmus.cores" -}}
{{- $text := toString . -}}
{{- if hasSuffix "m" $text -}}
{{- max 1 (div (trimSuffix "m" $text | int) 1000) -}}
{{- else -}}
{{- max 1 (float64 $text | floor | int) -}}
{{- end -}}
{{- end }}

{{/* Cores of a group's container: its limit, else its request. */}}
{{- define "isthmus.groupCores" -}}
{{- $limits := .resources.limits | default dict -}}
{{- $requests := .resources.requests | default dict -}}
{{- include "isthmus.cores" ($limits.cpu | default $requests.cpu | default 1) -}}
{{- end }}

{{/* The groups in their fixed order: prefill, decode, then the further ones, each with the keys of its role. */}}
{{- define "isthmus.groups" -}}
{{- $groups := list (merge (dict "name" "prefill" "role" "prefill") .Values.prefill) (merge (dict "name" "decode" "role" "decode") .Values.decode) -}}
{{- range .Values.extraGroups -}}
{{- $groups = append $groups (mergeOverwrite (deepCopy (index $.Values .role)) .) -}}
{{- end -}}
{{- toJson $groups -}}
{{- end }}

{{/* Pods of a group now: what the autoscaler made of it, so that an upgrade changes nothing. */}}
{{- define "isthmus.replicas" -}}
{{- $replicas := int .group.replicas -}}
{{- if .root.Values.autoscaling.enabled -}}
{{- $live := lookup "ray.io/v1" "RayCluster" .root.Release.Namespace (include "isthmus.fullname" .root) -}}
{{- range ((($live).spec).workerGroupSpecs) -}}
{{- if eq .groupName $.group.name -}}
{{- $replicas = int .replicas -}}
{{- end -}}
{{- end -}}
{{- $replicas = min (max $replicas (int .group.minReplicas)) (int .group.maxReplicas) -}}
{{- end -}}
{{- $replicas -}}
{{- end }}

{{- define "isthmus.podSecurity" -}}
runAsNonRoot: true
runAsUser: 1000
runAsGroup: 1000
fsGroup: 1000
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{- define "isthmus.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
capabilities:
  drop: [ALL]
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{/* Settings of a pod that all of them have. */}}
{{- define "isthmus.podCommon" -}}
enableServiceLinks: false
securityContext:
  {{- include "isthmus.podSecurity" . | nindent 2 }}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- define "isthmus.placement" -}}
{{- with .nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- end }}

{{/* Environment of every container that runs isthmus. */}}
{{- define "isthmus.env" -}}
- {name: HOME, value: /home/isthmus}
- {name: ISTHMUS_CONFIG, value: /etc/isthmus/isthmus.yaml}
- {name: ISTHMUS_CACHE, value: {{ eq (include "isthmus.sharedCache" .) "true" | ternary "/models/cache" "/var/cache/isthmus" }}}
- {name: HF_HOME, value: {{ .Values.models.enabled | ternary "/models/hub" "/var/cache/isthmus/hub" }}}
{{- if or .Values.hub.offline .Values.preload.enabled }}
- {name: HF_HUB_OFFLINE, value: "1"}
{{- else if .Values.hub.tokenSecret }}
- name: HF_TOKEN
  valueFrom:
    secretKeyRef: {name: {{ .Values.hub.tokenSecret }}, key: {{ .Values.hub.tokenKey }}}
{{- end }}
{{- end }}

{{/* Environment of nodes of the Ray cluster, and of what joins one. */}}
{{- define "isthmus.rayEnv" -}}
- {name: RAY_USAGE_STATS_ENABLED, value: "0"}
- {name: RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S, value: {{ .Values.ray.shutdownSeconds | quote }}}
- {name: RAY_gcs_rpc_server_reconnect_timeout_s, value: {{ int64 .Values.ray.headLostSeconds | quote }}}
{{- end }}

{{- define "isthmus.mounts" -}}
- {name: tmp, mountPath: /tmp}
- {name: home, mountPath: /home/isthmus}
{{- if ne (include "isthmus.sharedCache" .) "true" }}
- {name: cache, mountPath: /var/cache/isthmus}
{{- end }}
- {name: config, mountPath: /etc/isthmus, readOnly: true}
{{- if ne .Values.tls.mode "off" }}
- {name: tls, mountPath: /etc/isthmus-tls, readOnly: true}
{{- end }}
{{- if .Values.models.enabled }}
- {name: models, mountPath: /models, readOnly: {{ eq .Values.models.accessMode "ReadOnlyMany" }}}
{{- end }}
{{- with .Values.extraVolumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* Workers are paired where their codecs are calibrated alike: a cache for all makes them share one calibration. */}}
{{- define "isthmus.sharedCache" -}}
{{- and .Values.models.enabled (eq .Values.models.accessMode "ReadWriteMany") -}}
{{- end }}

{{/* Volumes of a pod: `role` names the certificate. */}}
{{- define "isthmus.volumes" -}}
- {name: tmp, emptyDir: {}}
- {name: home, emptyDir: {}}
{{- if ne (include "isthmus.sharedCache" .root) "true" }}
- {name: cache, emptyDir: {}}
{{- end }}
- name: config
  configMap: {name: {{ include "isthmus.fullname" .root }}}
{{- if ne .root.Values.tls.mode "off" }}
- name: tls
  secret: {secretName: {{ include "isthmus.tlsSecret" . }}, defaultMode: 0440}
{{- end }}
{{- if .root.Values.models.enabled }}
- name: models
  persistentVolumeClaim: {claimName: {{ include "isthmus.modelsClaim" .root }}, readOnly: {{ eq .root.Values.models.accessMode "ReadOnlyMany" }}}
{{- end }}
{{- with .root.Values.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* KubeRay would add these two by the same names, without a size. */}}
{{- define "isthmus.rayMounts" -}}
- {name: ray-logs, mountPath: /tmp/ray}
- {name: shared-mem, mountPath: /dev/shm}
{{- end }}

{{- define "isthmus.rayVolumes" -}}
- {name: ray-logs, emptyDir: {}}
- name: shared-mem
  emptyDir: {medium: Memory, sizeLimit: {{ .Values.ray.sharedMemory }}}
{{- end }}

{{/* Ports of Ray's own processes, fixed, so that a NetworkPolicy can name them. Values are strings. */}}
{{- define "isthmus.rayPorts" -}}
node-manager-port: "6700"
object-manager-port: "6701"
dashboard-agent-grpc-port: "6702"
runtime-env-agent-port: "6703"
dashboard-agent-listen-port: "52365"
metrics-export-port: "8080"
min-worker-port: "10010"
max-worker-port: "10109"
{{- end }}

{{- define "isthmus.rayProbes" -}}
# KubeRay's own ask with wget, twice as often; nothing here looks at a model or its load.
startupProbe:
  httpGet: {path: /api/local_raylet_healthz, port: 52365}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: 60
livenessProbe:
  httpGet: {path: /api/local_raylet_healthz, port: 52365}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 12
{{- end }}
