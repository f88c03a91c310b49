{{/* The settings file: what the chart sets, and `settings` of the values beside it. */}}
{{- define "isthmus.settings" -}}
{{- include "isthmus.refuseSettings" . -}}
{{- $own := include "isthmus.ownSettings" . | fromYaml -}}
{{- toYaml (merge $own (deepCopy .Values.settings)) -}}
{{- end }}

{{/* Fails where a setting of the chart is given too, or one that would do nothing here. */}}
{{- define "isthmus.refuseSettings" -}}
{{- $given := include "isthmus.paths" (dict "values" .Values.settings "before" "") | splitList "\n" -}}
{{- range $path, $instead := include "isthmus.settingsElsewhere" . | fromYaml -}}
{{- if has $path $given -}}
{{- fail (printf "settings.%s is set by the chart: %s" $path $instead) -}}
{{- end -}}
{{- end -}}
{{- if and (has "tls" $given) (or (eq .Values.tls.mode "off") (not (kindIs "map" .Values.settings.tls))) -}}
{{- fail "settings.tls is set by the chart: use tls.mode" -}}
{{- end -}}
{{- if and (has "gateway.http.tls" $given) (eq .Values.tls.mode "off") -}}
{{- fail "settings.gateway.http.tls is set by the chart: use tls.mode" -}}
{{- end -}}
{{- end }}

{{/* Every key of a map and of maps in it, a line each: "gateway", "gateway.replays". */}}
{{- define "isthmus.paths" -}}
{{- range $key, $value := .values -}}
{{- $path := printf "%s%s" $.before $key -}}
{{- $path }}
{{ if kindIs "map" $value -}}
{{- include "isthmus.paths" (dict "values" $value "before" (printf "%s." $path)) -}}
{{- end -}}
{{- end -}}
{{- end }}

{{/* Settings that `settings` may not have, and what says the same. Some would win over flags or be lost to them. */}}
{{- define "isthmus.settingsElsewhere" -}}
cluster_id: use clusterId
model: use model
address: it is that of the Ray in the head's pod
prefill: use prefill.replicas
decode: use decode.replicas
prefill_gpus: use prefill.gpu.count
decode_gpus: use decode.gpu.count
worker_port: policies and probes name it
host: gateways listen on their pod's address
port: use service.port
drain_s: use gateway.drainSeconds
threads: use resources.limits.cpu of prefill and decode
store_dir: use pageStore
store_gib: use pageStore.storeGib
tls.ca: use tls.mode
tls.cert: use tls.mode
tls.key: use tls.mode
gateway.supervisor: it is the release's own
gateway.workers: the supervisor tells gateways their workers
gateway.admin_listen: it is on loopback, for kubectl port-forward
gateway.health_listen: probes name its port
gateway.http_listen: use service.httpPort
gateway.propagation_s: use gateway.propagationSeconds
gateway.jobs_db: use jobs.existingSecret, for its URL may hold a password
gateway.access.keys_file: use auth.existingSecret
gateway.access.anonymous: use auth.enabled
supervisor.listen: policies and a Service name its port
supervisor.health_listen: probes name its port
{{- range list "prefill" "decode" }}
{{ . }}_worker.model: use model
{{ . }}_worker.cluster_id: use clusterId
{{ . }}_worker.tls: use tls.mode
{{ . }}_worker.name: each pod's worker has a name of its own
{{ . }}_worker.listen: it is the pod's address and the port of workers
{{ . }}_worker.advertise: it is the pod's address
{{ . }}_worker.health_listen: probes name its port
{{ . }}_worker.threads: use {{ . }}.resources.limits.cpu
{{- end }}
prefill_worker.store_dir: use pageStore
prefill_worker.store_gib: use pageStore.storeGib
{{- end }}

{{- define "isthmus.ownSettings" -}}
{{- $threads := dict "prefill" 1024 "decode" 1024 -}}
{{- $counts := dict "prefill" 0 "decode" 0 -}}
{{- $gpus := dict -}}
{{- range (include "isthmus.groups" . | fromJsonArray) -}}
{{- $_ := set $threads .role (min (index $threads .role) (include "isthmus.groupCores" . | int)) -}}
{{- $_ := set $counts .role (add (index $counts .role) .replicas) -}}
{{- $_ := set $gpus .role (int .gpu.count) -}}
{{- end -}}
cluster_id: {{ include "isthmus.clusterId" . }}
model: {{ .Values.model }}
# Of the Ray that runs beside the supervisor.
address: 127.0.0.1:6379
prefill: {{ $counts.prefill }}
decode: {{ $counts.decode }}
prefill_gpus: {{ $gpus.prefill }}
decode_gpus: {{ $gpus.decode }}
worker_port: 50061
{{- if eq .Values.tls.mode "off" }}
tls: "off"
{{- else }}
tls:
  ca: /etc/isthmus-tls/ca.crt
  cert: /etc/isthmus-tls/tls.crt
  key: /etc/isthmus-tls/tls.key
{{- end }}
gateway:
  supervisor: {{ include "isthmus.fullname" . }}-supervisor:50053
  admin_listen: 127.0.0.1:50052
  health_listen: 0.0.0.0:50054
  http_listen: {{ empty .Values.service.httpPort | ternary "none" "0.0.0.0:8000" }}
  {{- if eq .Values.tls.mode "off" }}
  http:
    tls: "off"
  {{- end }}
  {{- if not .Values.jobs.existingSecret }}
  jobs_db: none
  {{- end }}
  {{- if .Values.auth.enabled }}
  access:
    keys_file: /etc/isthmus-keys/{{ .Values.auth.existingSecretKey }}
  {{- else }}
  access:
    anonymous: true
  {{- end }}
supervisor:
  listen: 0.0.0.0:50053
  health_listen: 0.0.0.0:50055
prefill_worker:
  health_listen: 0.0.0.0:50062
  threads: {{ $threads.prefill }}
decode_worker:
  health_listen: 0.0.0.0:50062
  threads: {{ $threads.decode }}
{{- if .Values.pageStore.enabled }}
# Not the volume itself, which is root's: a folder that is the worker's alone.
store_dir: /var/lib/isthmus-pages/pages
store_gib: {{ .Values.pageStore.storeGib }}
{{- end }}
{{- end }}
