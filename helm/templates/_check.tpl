{{/* What a schema cannot say, in words of what to do. */}}
{{- define "isthmus.check" -}}
{{- $values := .Values -}}
{{- if eq ($values.image.tag | default .Chart.AppVersion) "latest" -}}
{{- fail "image.tag is latest: pods of two versions would run under one name; name a version" -}}
{{- end -}}
{{- $names := list -}}
{{- range (include "isthmus.groups" . | fromJsonArray) -}}
{{- if has .name $names -}}
{{- fail (printf "two groups are called %q; give each of extraGroups a name of its own" .name) -}}
{{- end -}}
{{- $names = append $names .name -}}
{{- if gt (int .gpu.count) 1 -}}
{{- fail (printf "group %s: gpu.count is %d; a worker uses one GPU (there is no tensor parallelism yet): set 1, and more replicas" .name (int .gpu.count)) -}}
{{- end -}}
{{- if and .resourceClaims .gpu.resource (gt (int .gpu.count) 0) -}}
{{- fail (printf "group %s: resourceClaims and gpu.resource both ask for a GPU; set gpu.resource \"\" to use the claims" .name) -}}
{{- end -}}
{{- if and (gt (int .gpu.count) 0) (not .gpu.resource) (not .resourceClaims) -}}
{{- fail (printf "group %s: gpu.count is %d, but neither gpu.resource nor resourceClaims says where it comes from" .name (int .gpu.count)) -}}
{{- end -}}
{{- if ne (int .gpu.count) (int (index $values .role).gpu.count) -}}
{{- fail (printf "group %s: gpu.count is %d, that of %s %d; all workers of a role have as many" .name (int .gpu.count) .role (int (index $values .role).gpu.count)) -}}
{{- end -}}
{{- if gt (int .minReplicas) (int .maxReplicas) -}}
{{- fail (printf "group %s: minReplicas %d is more than maxReplicas %d" .name (int .minReplicas) (int .maxReplicas)) -}}
{{- end -}}
{{- if and $values.autoscaling.enabled (or (lt (int .replicas) (int .minReplicas)) (gt (int .replicas) (int .maxReplicas))) -}}
{{- fail (printf "group %s: replicas %d is not between minReplicas %d and maxReplicas %d" .name (int .replicas) (int .minReplicas) (int .maxReplicas)) -}}
{{- end -}}
{{- end -}}
{{- $own := list "HOME" "HF_HOME" "HF_HUB_OFFLINE" "HF_TOKEN" "RAY_USAGE_STATS_ENABLED" "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S" "RAY_GCS_RPC_SERVER_RECONNECT_TIMEOUT_S" "RAY_AUTH_MODE" "RAY_AUTH_TOKEN" -}}
{{- range $values.extraEnv -}}
{{- if and (hasPrefix "ISTHMUS_" (upper .name)) (not (has .name (list "ISTHMUS_BF16" "ISTHMUS_COMPILED" "ISTHMUS_DEBUG"))) -}}
{{- fail (printf "extraEnv: %s would win over the settings file, which is checked: put it under settings" .name) -}}
{{- end -}}
{{- if has (upper .name) $own -}}
{{- fail (printf "extraEnv: %s is set by the chart: use hub or ray" .name) -}}
{{- end -}}
{{- end -}}
{{- if and (not $values.auth.enabled) (dig "gateway" "access" "jwt" dict $values.settings) -}}
{{- fail "auth.enabled is false, which lets everybody in, and settings.gateway.access.jwt asks for tokens: remove one of them" -}}
{{- end -}}
{{- if $values.pageStore.enabled -}}
{{- include "isthmus.checkPageStore" . -}}
{{- end -}}
{{- with $values.gateway.autoscaling -}}
{{- if gt (int .minReplicas) (int .maxReplicas) -}}
{{- fail (printf "gateway.autoscaling: minReplicas %d is more than maxReplicas %d" (int .minReplicas) (int .maxReplicas)) -}}
{{- end -}}
{{- end -}}
{{- if and $values.gcsFaultTolerance.enabled (not $values.gcsFaultTolerance.redisAddress) -}}
{{- fail "gcsFaultTolerance.enabled: name the Redis in gcsFaultTolerance.redisAddress (redis://HOST:6379)" -}}
{{- end -}}
{{- if and $values.preload.enabled (not $values.models.enabled) -}}
{{- fail "preload.enabled: the model is fetched onto the models volume; set models.enabled too" -}}
{{- end -}}
{{- if and $values.preload.enabled (not (contains "/" $values.model)) -}}
{{- fail (printf "preload.enabled: model %q is not OWNER/NAME of the Hugging Face hub" $values.model) -}}
{{- end -}}
{{- if and $values.preload.enabled (hasPrefix "/" $values.model) -}}
{{- fail (printf "preload.enabled: model %q is a folder, which nobody fetches" $values.model) -}}
{{- end -}}
{{- if and (eq $values.models.accessMode "ReadOnlyMany") (not $values.models.existingClaim) $values.models.enabled -}}
{{- fail "models.accessMode ReadOnlyMany: nobody could fill a new claim; name one in models.existingClaim" -}}
{{- end -}}
{{- if and (eq $values.models.accessMode "ReadOnlyMany") $values.preload.enabled -}}
{{- fail "preload.enabled: nothing can be written to a models volume that is ReadOnlyMany" -}}
{{- end -}}
{{- if and $values.inferencePool.enabled (not $values.inferencePool.endpointPicker.name) -}}
{{- fail "inferencePool.enabled: name the Service that picks endpoints in inferencePool.endpointPicker.name" -}}
{{- end -}}
{{- if eq (int $values.service.port) (int $values.service.httpPort) -}}
{{- fail (printf "service.port and service.httpPort are both %d: set one of them to another port" (int $values.service.port)) -}}
{{- end -}}
{{- if and $values.httpRoute.enabled (not $values.service.httpPort) -}}
{{- fail "httpRoute.enabled: gateways do not answer HTTP; set service.httpPort too" -}}
{{- end -}}
{{- if and $values.httpRoute.enabled (not $values.httpRoute.parentRefs) -}}
{{- fail "httpRoute.enabled: name the Gateway in httpRoute.parentRefs" -}}
{{- end -}}
{{- if and $values.grpcRoute.enabled (not $values.grpcRoute.parentRefs) -}}
{{- fail "grpcRoute.enabled: name the Gateway in grpcRoute.parentRefs" -}}
{{- end -}}
{{- end }}

{{/* What a store may take: a file system has its own part of a volume, and pods write on before they see it is full. */}}
{{- define "isthmus.checkPageStore" -}}
{{- $store := .Values.pageStore -}}
{{- $size := $store.size -}}
{{- $volume := "pageStore.size" -}}
{{- if and (eq $store.kind "pvc") $store.existingClaim -}}
{{- $claim := lookup "v1" "PersistentVolumeClaim" .Release.Namespace $store.existingClaim -}}
{{- $size = dig "status" "capacity" "storage" (dig "spec" "resources" "requests" "storage" "" $claim) $claim -}}
{{- $volume = printf "the claim %s" $store.existingClaim -}}
{{- end -}}
{{- if $size -}}
{{- $most := mulf 0.95 (include "isthmus.gib" $size | float64) -}}
{{- if gt (float64 $store.storeGib) $most -}}
{{- fail (printf "pageStore.storeGib %v does not fit %s, %v: set at most %v, which leaves a twentieth free" $store.storeGib $volume $size (floor $most)) -}}
{{- end -}}
{{- end -}}
{{- end }}

{{/* A quantity of bytes in GiB. */}}
{{- define "isthmus.gib" -}}
{{- $text := toString . -}}
{{- $unit := regexFind "[a-zA-Z]*$" $text -}}
{{- $bytes := dict "" 1 "m" 0.001 "k" 1e3 "M" 1e6 "G" 1e9 "T" 1e12 "Ki" 1024 "Mi" 1048576 "Gi" 1073741824 "Ti" 1099511627776 -}}
{{- divf (mulf (trimSuffix $unit $text | float64) (index $bytes $unit)) 1073741824 -}}
{{- end }}
