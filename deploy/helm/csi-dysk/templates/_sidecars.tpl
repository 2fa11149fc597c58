{{- /* A sidecar of the controller: dict "root" $ "name" "csi-provisioner"
"of" .Values.sidecars.provisioner "port" 8081 "args" list. */ -}}
{{- define "dysk.controllerSidecar" -}}
- name: {{ .name }}
  image: {{ .of.image }}
  imagePullPolicy: {{ .root.Values.image.pullPolicy }}
  args:
    - --csi-address=/csi/csi.sock
    - --leader-election
    - --leader-election-namespace=$(NAMESPACE)
    - --http-endpoint=:{{ .port }}
    - --timeout={{ .root.Values.controller.timeout }}
    - --v={{ .root.Values.controller.logLevel }}
    {{- range .args }}
    - {{ . }}
    {{- end }}
  env:
    - name: NAMESPACE
      valueFrom:
        fieldRef:
          fieldPath: metadata.namespace
  ports:
    - name: {{ .short }}
      containerPort: {{ .port }}
      protocol: TCP
  # A leader that cannot renew its leadership is ended, so that another leads.
  livenessProbe:
    httpGet:
      path: /healthz/leader-election
      port: {{ .short }}
    initialDelaySeconds: 10
    timeoutSeconds: 10
    periodSeconds: 20
  securityContext:
    {{- include "dysk.unprivileged" . | nindent 4 }}
  resources:
    {{- toYaml .of.resources | nindent 4 }}
  volumeMounts:
    - name: socket
      mountPath: /csi
{{- end }}
