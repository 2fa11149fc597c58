{{- define "dysk.driver" -}}
csi-dysk
{{- end }}

{{- /* The labels of a part of the release: dict "root" $ "part" "node". */ -}}
{{- define "dysk.labels" -}}
{{ include "dysk.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/part-of: dysk
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
{{- end }}

{{- define "dysk.selector" -}}
app.kubernetes.io/name: csi-dysk
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .part }}
{{- end }}

{{- define "dysk.image" -}}
{{- with .Values.image -}}
{{- if .digest }}{{ .repository }}@{{ .digest }}{{ else }}{{ .repository }}:{{ .tag | default $.Chart.AppVersion }}{{ end }}
{{- end }}
{{- end }}

{{- define "dysk.dyskdImage" -}}
{{ .Values.dyskd.image | default (include "dysk.image" .) }}
{{- end }}

{{- /* The priority class of a part's pods: dict "root" $ "named" what its values name. */ -}}
{{- define "dysk.priorityClass" -}}
{{- with .root.Values.priorityClass }}{{ if .create }}{{ .name }}{{ else }}{{ $.named }}{{ end }}{{ end }}
{{- end }}

{{- define "dysk.secretNamespace" -}}
{{ .Values.secret.namespace | default .Release.Namespace }}
{{- end }}

{{- /* What no container of the controller needs: everything. */ -}}
{{- define "dysk.unprivileged" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
capabilities:
  drop: [ALL]
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{- /* A sidecar on a node: root, since the socket is root's, and nothing else. */ -}}
{{- define "dysk.bareRoot" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsUser: 0
capabilities:
  drop: [ALL]
# Sockets and folders of the node have other labels than a container's.
seLinuxOptions:
  type: spc_t
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{- /* The Secrets of all classes, as JSON lines "namespace name", each once. */ -}}
{{- define "dysk.secrets" -}}
{{- $all := list (dict "name" .Values.secret.name "namespace" (include "dysk.secretNamespace" .)) }}
{{- range .Values.storageClasses }}
{{- with .secret }}
{{- $all = append $all (dict "name" .name "namespace" (.namespace | default (include "dysk.secretNamespace" $))) }}
{{- end }}
{{- end }}
{{- range .Values.rbac.extraSecrets }}
{{- $all = append $all (dict "name" .name "namespace" (.namespace | default $.Release.Namespace)) }}
{{- end }}
{{- range $all }}
{{- if and (not $.Values.rbac.clusterSecrets) (contains "${" (printf "%s%s" .name .namespace)) }}
{{- fail (printf "the Secret %s/%s is a template: set rbac.clusterSecrets, so that the controller may read what it stands for" .namespace .name) }}
{{- end }}
{{- end }}
{{- $all | uniq | toJson }}
{{- end }}
