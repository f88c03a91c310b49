{{- define "isthmus.workerGroup" -}}
{{- $root := .root -}}
{{- $group := .group -}}
{{- $values := $root.Values -}}
{{- $drain := int $group.drainSeconds -}}
{{- $gpu := dict -}}
{{- if and $group.gpu.resource (gt (int $group.gpu.count) 0) -}}
{{- $gpu = dict $group.gpu.resource (int $group.gpu.count) -}}
{{- end -}}
- groupName: {{ $group.name }}
  replicas: {{ include "isthmus.replicas" . }}
  minReplicas: {{ $values.autoscaling.enabled | ternary $group.minReplicas $group.replicas }}
  maxReplicas: {{ $values.autoscaling.enabled | ternary $group.maxReplicas $group.replicas }}
  {{- if $values.autoscaling.enabled }}
  idleTimeoutSeconds: {{ int64 $group.idleTimeoutSeconds }}
  {{- end }}
  rayStartParams:
    # One worker a pod: each takes the pod's one resource of its role. In single quotes for the shell.
    resources: {{ printf "'{%q: 1}'" $group.role | quote }}
    num-cpus: {{ include "isthmus.groupCores" $group | quote }}
    # Always said: of claims and MIG slices neither KubeRay nor the autoscaler counts GPUs.
    num-gpus: {{ $group.gpu.count | toString | quote }}
    object-store-memory: {{ int64 $values.ray.objectStoreMemory | quote }}
    {{- include "isthmus.rayPorts" $root | nindent 4 }}
  template:
    metadata:
      labels:
        {{- include "isthmus.podLabels" (dict "root" $root "component" $group.role) | nindent 8 }}
      {{- with $group.annotations }}
      annotations:
        {{- toYaml . | nindent 8 }}
      {{- end }}
    spec:
      {{- include "isthmus.podCommon" $root | nindent 6 }}
      {{- include "isthmus.placement" $group | nindent 6 }}
      affinity:
        {{- if $group.affinity }}
        {{- toYaml $group.affinity | nindent 8 }}
        {{- else }}
        podAffinity:
          preferredDuringSchedulingIgnoredDuringExecution:
            - weight: 50
              podAffinityTerm:
                topologyKey: topology.kubernetes.io/zone
                labelSelector:
                  matchLabels:
                    app.kubernetes.io/instance: {{ $root.Release.Name }}
                  matchExpressions:
                    - {key: app.kubernetes.io/component, operator: In, values: [prefill, decode]}
        {{- end }}
      serviceAccountName: {{ include "isthmus.fullname" $root }}
      automountServiceAccountToken: false
      restartPolicy: Never
      # preStop with what it may wait for, Ray's own drain, and time to end.
      terminationGracePeriodSeconds: {{ add 5 $drain $values.ray.shutdownSeconds 15 }}
      {{- with $group.resourceClaims }}
      resourceClaims:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      containers:
        - name: ray-worker
          image: {{ include "isthmus.image" $root }}
          imagePullPolicy: {{ $values.image.pullPolicy }}
          env:
            {{- include "isthmus.env" $root | nindent 12 }}
            {{- include "isthmus.rayEnv" $root | nindent 12 }}
            {{- with $values.extraEnv }}
            {{- toYaml . | nindent 12 }}
            {{- end }}
          ports:
            - {name: worker, containerPort: 50061}
            - {name: health, containerPort: 50062}
            - {name: metrics, containerPort: 8080}
          lifecycle:
            preStop:
              exec:
                command: [isthmus, drain, --local, --timeout, {{ $drain | quote }}]
          {{- include "isthmus.rayProbes" $root | nindent 10 }}
          # Ready: a worker runs here, and takes requests.
          readinessProbe:
            grpc: {port: 50062}
            periodSeconds: 5
            timeoutSeconds: 3
            failureThreshold: 2
          securityContext:
            {{- include "isthmus.containerSecurity" $root | nindent 12 }}
          resources:
            requests:
              {{- toYaml (merge (dict) $group.resources.requests $gpu) | nindent 14 }}
            limits:
              {{- toYaml (merge (dict) ($group.resources.limits | default dict) $gpu) | nindent 14 }}
            {{- with $group.resourceClaims }}
            claims:
              {{- range . }}
              - {name: {{ .name }}}
              {{- end }}
            {{- end }}
          volumeMounts:
            {{- include "isthmus.mounts" $root | nindent 12 }}
            {{- include "isthmus.rayMounts" $root | nindent 12 }}
            {{- if and $values.pageStore.enabled (eq $group.role "prefill") }}
            - {name: pages, mountPath: /var/lib/isthmus-pages}
            {{- end }}
      volumes:
        {{- include "isthmus.volumes" (dict "root" $root "role" $group.role) | nindent 8 }}
        {{- include "isthmus.rayVolumes" $root | nindent 8 }}
        {{- if and $values.pageStore.enabled (eq $group.role "prefill") }}
        - name: pages
          {{- if eq $values.pageStore.kind "pvc" }}
          persistentVolumeClaim: {claimName: {{ include "isthmus.pagesClaim" $root }}}
          {{- else }}
          emptyDir: {sizeLimit: {{ $values.pageStore.size }}}
          {{- end }}
        {{- end }}
{{- end }}
