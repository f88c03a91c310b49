{{/* The settings file: what the chart sets, and `settings` of the values beside it. */}}
{{- define "isthmus.settings" -}}
{{- $own := include "isthmus.ownSettings" . | fromYaml -}}
{{- include "isthmus.refuseBoth" (dict "own" $own "given" .Values.settings "path" "settings") -}}
{{- toYaml (merge $own (deepCopy .Values.settings)) -}}
{{- end }}

{{/* Fails where a setting of the chart is given too. */}}
{{- define "isthmus.refuseBoth" -}}
{{- range $key, $value := .own -}}
{{- if hasKey $.given $key -}}
{{- $path := printf "%s.%s" $.path $key -}}
{{- $theirs := index $.given $key -}}
{{- if and (kindIs "map" $value) (kindIs "map" $theirs) -}}
{{- include "isthmus.refuseBoth" (dict "own" $value "given" $theirs "path" $path) -}}
{{- else -}}
{{- fail (printf "%s is set by the chart; remove it" $path) -}}
{{- end -}}
{{- end -}}
{{- end -}}
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
