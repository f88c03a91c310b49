{{/* Names by which a role is called, beside the one of its identity; gateways and supervisor have Services. */}}
{{- define "isthmus.tlsHosts" -}}
{{- $names := list (printf "%s.%s.isthmus.internal" .role (include "isthmus.clusterId" .root)) -}}
{{- if has .role (list "prefill" "decode") -}}
{{- $names = append $names (printf "worker.%s.isthmus.internal" (include "isthmus.clusterId" .root)) -}}
{{- end -}}
{{- $addresses := list -}}
{{- $services := list -}}
{{- if eq .role "gateway" -}}
{{- $services = list (include "isthmus.fullname" .root) (printf "%s-headless" (include "isthmus.fullname" .root)) -}}
{{- else if eq .role "supervisor" -}}
{{- $services = list (printf "%s-supervisor" (include "isthmus.fullname" .root)) -}}
{{- end -}}
{{- range $services -}}
{{- $names = concat $names (list . (printf "%s.%s" . $.root.Release.Namespace) (printf "%s.%s.svc" . $.root.Release.Namespace) (printf "%s.%s.svc.cluster.local" . $.root.Release.Namespace)) -}}
{{- end -}}
{{- if $services -}}
{{- $names = append $names "localhost" -}}
{{- $addresses = append $addresses "127.0.0.1" -}}
{{- end -}}
{{- if eq .role "gateway" -}}
{{- range .root.Values.tls.hosts -}}
{{- if or (regexMatch "^[0-9.]+$" .) (contains ":" .) -}}
{{- $addresses = append $addresses . -}}
{{- else -}}
{{- $names = append $names . -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- toJson (dict "names" $names "addresses" $addresses) -}}
{{- end }}

{{/* One Secret of a certificate that the chart makes: the one that is there, while it is young and says the same. */}}
{{- define "isthmus.tlsLeaf" -}}
{{- $root := .root -}}
{{- $name := printf "%s-tls-%s" (include "isthmus.fullname" $root) .role -}}
{{- $hosts := include "isthmus.tlsHosts" . | fromJson -}}
{{- $subject := printf "%s %s" .ca.Cert (toJson $hosts) | sha256sum -}}
{{- $now := now | unixEpoch | int64 -}}
{{- $issued := $now -}}
{{- $data := dict -}}
{{- $old := lookup "v1" "Secret" $root.Release.Namespace $name -}}
{{- $notes := (($old).metadata).annotations | default dict -}}
{{- if and (eq (index $notes "isthmus.internal/subject" | default "") $subject) (lt (sub $now (index $notes "isthmus.internal/issued" | default "0" | int64)) (mul $root.Values.tls.days 57600)) -}}
{{- $data = $old.data -}}
{{- $issued = index $notes "isthmus.internal/issued" -}}
{{- else -}}
{{- $made := genSignedCertWithKey (printf "%s-%s" (include "isthmus.fullname" $root) .role) $hosts.addresses $hosts.names (int $root.Values.tls.days) .ca (genPrivateKey "ecdsa") -}}
{{- $data = dict "ca.crt" (b64enc .ca.Cert) "tls.crt" (b64enc $made.Cert) "tls.key" (b64enc $made.Key) -}}
{{- end -}}
apiVersion: v1
kind: Secret
type: kubernetes.io/tls
metadata:
  name: {{ $name }}
  labels:
    {{- include "isthmus.labels" (dict "root" $root "component" .role) | nindent 4 }}
  annotations:
    isthmus.internal/issued: {{ $issued | toString | quote }}
    isthmus.internal/subject: {{ $subject }}
data:
  {{- toYaml $data | nindent 2 }}
{{- end }}

{{/* Whether gateways ask their clients for a certificate too. */}}
{{- define "isthmus.clientCertificates" -}}
{{- $tls := .Values.settings.tls -}}
{{- and (ne .Values.tls.mode "off") (kindIs "map" $tls) (get (kindIs "map" $tls | ternary $tls dict) "client_certificates") -}}
{{- end }}

{{/* Whether HTTP is encrypted; YAML reads `off` as false. */}}
{{- define "isthmus.httpTls" -}}
{{- $word := dig "gateway" "http" "tls" "auto" .Values.settings | toString -}}
{{- and (ne .Values.tls.mode "off") (not (has $word (list "off" "false"))) -}}
{{- end }}
