package identity

import (
	"net/http"
	"slices"
)

// Explanation tells an operator what a reason means and what to do.
type Explanation struct {
	Reason Reason
	// Status has the HTTP statuses of a response with this reason; empty if no response is sent.
	Status []int
	// Cause and Remedy are Markdown sentences without line breaks.
	Cause, Remedy string
	// Command checks or repairs the cause; words in capitals are to be replaced. Empty if no command helps.
	Command string
}

// Explanations returns one entry for each reason. Reasons that are not errors are first. The errors follow in groups,
// in the order in which NMI processes a request: the request itself, the pod that sent it, the decision, the
// credential, the source of the token. The documentation is generated from the entries.
func Explanations() []Explanation { return slices.Clone(explanations) }

// URL is the address of the reason's section in the documentation.
func (r Reason) URL() string {
	return "https://github.com/podidentity/podidentity/blob/main/docs/troubleshooting.md#" + string(r)
}

var explanations = []Explanation{
	// No error.
	{
		Reason: Allowed, Status: []int{http.StatusOK},
		Cause:  "The pod gets a token of the identity that is bound to it.",
		Remedy: "Nothing to do.",
	},
	{
		Reason: Excepted, Status: []int{http.StatusOK},
		Cause:   "An AzurePodIdentityException in the pod's namespace matches a label of the pod; or the pod is in the host network and has no label `aadpodidbinding`, and `nmi.captureHostNetwork` is `bound`. The pod gets a token of the identities that are attached to the VM or scale set itself.",
		Remedy:  "Nothing to do if this is intended. Otherwise delete the exception, or remove the label that it names from the pod. For a pod in the host network, add the label `aadpodidbinding`.",
		Command: "kubectl get azurepodidentityexceptions -n NAMESPACE -o yaml",
	},
	{
		Reason: Forwarding, Status: []int{http.StatusOK},
		Cause:  "NMI forwarded the request to the IMDS of the node and returned its response. This reason is used for requests that do not ask for a token, such as `/metadata/instance`; the status is the one that IMDS returned.",
		Remedy: "Nothing to do. To refuse `/metadata/instance` to pods, set the chart value `nmi.blockInstanceMetadata`.",
	},
	{
		Reason: ClientGone,
		Cause:  "The client closed the connection before NMI had a response. The reason appears in the log and in the metric only.",
		Remedy: "If it happens often, raise the client's timeout above the time that NMI may wait: `nmi.podLookupTimeout`, and in standard mode `nmi.assignmentWait`.",
	},

	// The request.
	{
		Reason: HeaderMissing, Status: []int{http.StatusBadRequest},
		Cause:  "The request has no header `Metadata: true`, or has several `Metadata` headers that differ. IMDS refuses such requests too.",
		Remedy: "Send the header `Metadata: true`. For a client that cannot do that, set the chart value `nmi.metadataHeaderRequired` to `false`.",
	},
	{
		Reason: Forwarded, Status: []int{http.StatusBadRequest},
		Cause:  "The request has an `X-Forwarded-For` header, so a proxy sent it on behalf of somebody else. IMDS refuses such requests too.",
		Remedy: "Send requests for 169.254.169.254 directly: add the address to `NO_PROXY` of the application.",
	},
	{
		Reason: MethodNotAllowed, Status: []int{http.StatusMethodNotAllowed},
		Cause:  "The request uses another HTTP method than GET.",
		Remedy: "Send a GET request, as the Azure SDKs do.",
	},
	{
		Reason: PathRefused, Status: []int{http.StatusBadRequest},
		Cause:  "The path is not in a form that every server reads in the same way: it contains an encoded slash, a backslash, `..` or the like.",
		Remedy: "Request the plain path, `/metadata/identity/oauth2/token`.",
	},
	{
		Reason: PathUnknown, Status: []int{http.StatusNotFound},
		Cause:  "NMI does not serve this path.",
		Remedy: "Correct the path. [Requests and responses](clients.md#requests-and-responses) lists what NMI serves.",
	},
	{
		Reason: RouteBlocked, Status: []int{http.StatusForbidden},
		Cause:  "NMI does not give this information to pods: attested documents and scheduled events represent the VM, `/metadata/instance` is blocked by `nmi.blockInstanceMetadata`, and `/host/token` serves programs of the node only.",
		Remedy: "Nothing to do for a pod that has no use for it. For `/metadata/instance`, set `nmi.blockInstanceMetadata` to `false`.",
	},
	{
		Reason: RequestMalformed, Status: []int{http.StatusBadRequest},
		Cause:  "A query parameter is given twice, is malformed or too long, there are too many parameters, or two of them name an identity. A request to `/host/token` also needs headers that name the pod. `error_description` says which rule the request breaks.",
		Remedy: "Correct the request as `error_description` says.",
	},
	{
		Reason: APIVersion, Status: []int{http.StatusBadRequest},
		Cause:  "The parameter `api-version` of a token request is missing, is not a date, or is older than `2018-02-01`, the first version of IMDS with identities.",
		Remedy: "Add `api-version=2018-02-01` to the request.",
	},
	{
		Reason: ResourceMissing, Status: []int{http.StatusBadRequest},
		Cause:  "The parameter `resource` is missing or empty.",
		Remedy: "Name the resource that the token is for, such as `resource=https://vault.azure.net`.",
	},

	// The pod.
	{
		Reason: PodUnknown, Status: []int{http.StatusServiceUnavailable},
		Cause:   "No pod of the node has the UID that the kernel recorded for the caller, or, without a record, its source address (finished pods do not count). NMI waited for such a pod for `nmi.podLookupTimeout`. Either the API server has not reported the pod or its address yet, or the pod is gone, or the program runs outside a pod, or the network plugin changes the source address. For `/host/token`: no such pod has the requested name.",
		Remedy:  "Let the client retry: the response has `Retry-After`. If it persists, compare the UID in the response with `metadata.uid` of the pod (of a static pod, with its annotation `kubernetes.io/config.hash`), or the address in NMI's log line (`source`) with `status.podIPs`.",
		Command: "kubectl get pods -A -o wide --field-selector spec.nodeName=NODE",
	},
	{
		Reason: PodAmbiguous, Status: []int{http.StatusServiceUnavailable},
		Cause:   "The API server reports the same address for several pods of the node (finished pods do not count), and NMI cannot confirm which of them has it. NMI gives a token to none of them.",
		Remedy:  "Let the client retry. If it persists, delete the pod that no longer uses the address, and check the network plugin's address management.",
		Command: "kubectl get pods -A -o wide --field-selector spec.nodeName=NODE",
	},
	{
		Reason: PodUnverified, Status: []int{http.StatusForbidden},
		Cause:   "The kernel has no record of the pod that opened the connection, and `nmi.podVerification` is `required`. The pod runs in a virtual machine of its own (Kata Containers, gVisor with its own network), or its packets were captured by iptables and not by cgroup.",
		Remedy:  "Set `nmi.podVerification` to `auto` if the address of such pods may identify them, or run the pod with a runtime that uses the kernel of the node.",
		Command: "kubectl get pod POD -n NAMESPACE -o jsonpath='{.spec.runtimeClassName}'",
	},
	{
		Reason: PodUnconfirmed, Status: []int{http.StatusServiceUnavailable},
		Cause:   "The cgroup of the caller is unknown, and NMI cannot confirm that the pod that the API server reports with the address still has it. The response names the cause, such as `pod_too_old`. The metric `podidentity_nmi_unconfirmed_addresses_total` counts the causes.",
		Remedy:  "Let the client retry: the response has `Retry-After`. If it persists, [Causes of an unconfirmed address](#causes-of-an-unconfirmed-address) has the remedy for each cause.",
		Command: "kubectl get pod POD -n NAMESPACE -o jsonpath='{.status.startTime} {.status.podIPs} {.status.containerStatuses[*].state}'",
	},
	{
		Reason: NotReady, Status: []int{http.StatusServiceUnavailable},
		Cause:   "NMI has not loaded the cluster's objects yet, or it has lost its connection to the API server and would otherwise refuse the request permanently because of an object that may exist by now. The custom resource definitions may also be missing. In rare cases the objects that the request depends on changed during each of several fetches of the token.",
		Remedy:  "Let the client retry. If it persists, check that NMI is ready, that the node reaches the API server, and that the definitions are installed.",
		Command: "kubectl get crds | grep aadpodidentity.k8s.io; kubectl get pods -A -l app.kubernetes.io/component=nmi -o wide",
	},
	{
		Reason: PodThrottled, Status: []int{http.StatusTooManyRequests},
		Cause:  "The pod requests tokens that are not cached more than twice a second (after a burst of 10), or more than 64 different tokens, or its identities use more than 64 Secrets.",
		Remedy: "Let the application reuse one credential object and its tokens. The Azure SDKs do that by default; a program that starts a new process for each request does not.",
	},

	// The decision.
	{
		Reason: PodNotLabelled, Status: []int{http.StatusBadRequest},
		Cause:   "The pod has no label `aadpodidbinding`, or the label is empty, so no AzureIdentityBinding can select it.",
		Remedy:  "Add the label to the pod template of the Deployment, StatefulSet, DaemonSet or CronJob; its value is `spec.selector` of the binding. Create a Job again with the label: its pod template cannot be changed. For a pod without a controller: `kubectl label pod POD -n NAMESPACE aadpodidbinding=SELECTOR`.",
		Command: `kubectl patch deployment DEPLOYMENT -n NAMESPACE -p '{"spec":{"template":{"metadata":{"labels":{"aadpodidbinding":"SELECTOR"}}}}}'`,
	},
	{
		Reason: NoMatchingBinding, Status: []int{http.StatusBadRequest},
		Cause:   "No AzureIdentityBinding has the value of the pod's label `aadpodidbinding` as its `spec.selector`. Upper and lower case differ. The binding must be in the namespace of the pod in managed mode, with `forceNamespaced`, and if its AzureIdentity has the annotation `aadpodidentity.k8s.io/Behavior: namespaced`.",
		Remedy:  "Create the binding in the pod's namespace, or make label and selector equal.",
		Command: "kubectl get azureidentitybindings -A; kubectl get pods -n NAMESPACE -L aadpodidbinding",
	},
	{
		Reason: IdentityMissing, Status: []int{http.StatusBadRequest},
		Cause:   "The binding names an AzureIdentity that does not exist in the namespace of the binding.",
		Remedy:  "Create the AzureIdentity in the namespace of the binding, or correct `spec.azureIdentity` of the binding.",
		Command: "kubectl get azureidentities,azureidentitybindings -n NAMESPACE",
	},
	{
		Reason: IdentityNotBound, Status: []int{http.StatusBadRequest},
		Cause:   "The request names an identity (`client_id`, `object_id` or `msi_res_id`) that is not bound to this pod. The detail lists the identities that are.",
		Remedy:  "Correct the client ID in the application (often the environment variable `AZURE_CLIENT_ID`), or bind the identity to the pod. Several bindings may have the same selector.",
		Command: "kubectl get azureidentities -n NAMESPACE -o wide",
	},
	{
		Reason: MultipleIdentities, Status: []int{http.StatusBadRequest},
		Cause:  "Several identities are bound to the pod and the request names none of them.",
		Remedy: "Name one in the application, for example with the environment variable `AZURE_CLIENT_ID`, or remove the bindings that are not needed.",
	},
	{
		Reason: IdentityAmbiguous, Status: []int{http.StatusForbidden},
		Cause:   "The request names an identity by an ID that several AzureIdentity objects bound to the pod have, and the credentials of these objects may differ: the objects differ in another field, or they are service principals (types 1 and 2), whose Secrets NMI does not compare.",
		Remedy:  "Delete all but one of the AzureIdentity objects that the detail lists, or their bindings.",
		Command: "kubectl get azureidentities -n NAMESPACE -o yaml",
	},
	{
		Reason: IdentityInvalid, Status: []int{http.StatusForbidden},
		Cause:   "The AzureIdentity cannot produce a token whatever Azure says: a field is missing or malformed. The detail names the field. The API server refuses most of these mistakes in new objects, but not all of them, and not in objects that were stored before the current definitions were installed.",
		Remedy:  "Correct the field that the detail names.",
		Command: "kubectl edit azureidentity NAME -n NAMESPACE",
	},
	{
		Reason: SecretNotAllowed, Status: []int{http.StatusForbidden},
		Cause:  "`spec.clientPassword` of the AzureIdentity names a Secret of another namespace.",
		Remedy: "Move the Secret into the namespace of the AzureIdentity. Only if every author of AzureIdentity objects may use every Secret that NMI may read, set `nmi.allowCrossNamespaceSecrets` to `true` instead.",
	},
	{
		Reason: AssignmentPending, Status: []int{http.StatusServiceUnavailable},
		Cause:   "Standard mode: MIC is attaching the identity to the VM or scale set, and that took longer than `nmi.assignmentWait`.",
		Remedy:  "Let the client retry: the response has `Retry-After`. If it persists, see [standard mode](#standard-mode-a-pod-does-not-get-its-identity).",
		Command: "kubectl get azureassignedidentities -n NAMESPACE -o wide",
	},
	{
		Reason: AssignmentFailed, Status: []int{http.StatusServiceUnavailable},
		Cause:   "Standard mode: MIC could not attach the identity yet, in most cases because Azure refuses it. `error_description` ends with `status.message` of the AzureAssignedIdentity, which says why and what to do, such as which role to grant.",
		Remedy:  "Do what `error_description` says; MIC retries by itself. See [standard mode](#standard-mode-a-pod-does-not-get-its-identity).",
		Command: "kubectl get azureassignedidentities -n NAMESPACE -o yaml",
	},

	// The credential.
	{
		Reason: SecretMissing, Status: []int{http.StatusForbidden},
		Cause:   "The Secret that `spec.clientPassword` of the AzureIdentity names does not exist.",
		Remedy:  "Create the Secret, or correct `spec.clientPassword`.",
		Command: "kubectl create secret generic SECRET -n NAMESPACE --from-literal=clientSecret=VALUE",
	},
	{
		Reason: SecretUnreadable, Status: []int{http.StatusForbidden},
		Cause:   "NMI has no right to read the Secret.",
		Remedy:  "Add the namespace of the Secret to the chart value `nmi.secretNamespaces`. The command replaces the whole list: name the other namespaces too.",
		Command: "helm upgrade podidentity deploy/podidentity -n podidentity-system --reset-then-reuse-values --set 'nmi.secretNamespaces={NAMESPACE,OTHER}'",
	},
	{
		Reason: SecretInvalid, Status: []int{http.StatusForbidden},
		Cause:  "The Secret does not hold a usable client secret or certificate. The detail says what is wrong; it never contains the content.",
		Remedy: "Correct the Secret: [types 1 and 2](identities.md#types-1-and-2-service-principals) describes its keys. The next request uses the new content.",
	},
	{
		Reason: ServiceAccountForbidden, Status: []int{http.StatusForbidden},
		Cause:   "NMI has no right to request tokens of the pod's ServiceAccount.",
		Remedy:  "Add the pod's namespace to the chart value `nmi.federatedNamespaces`. The command replaces the whole list: name the other namespaces too.",
		Command: "helm upgrade podidentity deploy/podidentity -n podidentity-system --reset-then-reuse-values --set 'nmi.federatedNamespaces={NAMESPACE,OTHER}'",
	},
	{
		Reason: FederationUntrusted, Status: []int{http.StatusForbidden},
		Cause:   "Entra ID finds no federated credential that matches the token of the pod's ServiceAccount. Entra ID can take some minutes to recognize a new credential everywhere. NMI retries for about twelve seconds, then it refuses the request.",
		Remedy:  "Create the federated credential with the issuer, subject and audience that the detail lists, letter by letter. After some minutes, restart clients that gave up.",
		Command: "az identity federated-credential create -g GROUP --identity-name NAME --name CREDENTIAL --issuer ISSUER --subject system:serviceaccount:NAMESPACE:SERVICEACCOUNT --audiences api://AzureADTokenExchange",
	},
	{
		Reason: PodStale, Status: []int{http.StatusServiceUnavailable},
		Cause:  "NMI or the API server finds that the pod is gone, was created again under the same name, or runs as another ServiceAccount, or the API server issues no token of the ServiceAccount for another reason, for example because it does not exist. `error_description` says which.",
		Remedy: "Let the client retry. Nothing to do for a pod that is being deleted. Create a missing ServiceAccount.",
	},

	// The source of the token.
	{
		Reason: UpstreamRefused, Status: []int{http.StatusBadRequest, http.StatusForbidden},
		Cause:   "IMDS or Entra ID refused the request. `error_description` is its own text, with its error code and correlation ID. If NMI did not send the request, for example because `spec.adEndpoint` leads to an address of the node, `error_description` says why. \"Identity not found\" from IMDS means that no identity with this `spec.clientID` is attached to this VM or scale set.",
		Remedy:  "Look up the code, such as AADSTS500011 (the resource is unknown in the tenant), AADSTS700016 (`spec.clientID` or `spec.tenantID` is wrong) or AADSTS7000215 (the value in the Secret is wrong). For \"Identity not found\" compare `spec.clientID` with `az identity show --ids RESOURCE-ID --query clientId`, and attach the identity; in standard mode check whether somebody detached it.",
		Command: "az vmss identity show -g NODE-RESOURCE-GROUP -n SCALE-SET",
	},
	{
		Reason: UpstreamThrottled, Status: []int{http.StatusTooManyRequests},
		Cause:  "IMDS limits the requests of the node, or Entra ID those of the application. NMI itself limits requests for instance metadata to what IMDS allows for a node. Cached tokens are still served.",
		Remedy: "Let the client retry: the response has `Retry-After`. If it persists, look for a pod that requests tokens for many resources in `podidentity_nmi_upstream_requests_total` and the audit log.",
	},
	{
		Reason: UpstreamUnavailable, Status: []int{http.StatusServiceUnavailable},
		Cause:  "IMDS, Entra ID or the API server does not respond, or responds with an error of its own or with something unusable, or the Secret of the identity changed during the request. Cached tokens are still served until they expire.",
		Remedy: "Let the client retry. If it persists, check that the node reaches IMDS, `login.microsoftonline.com:443` (types 1 to 3) and the API server; behind a proxy set `HTTPS_PROXY` and `NO_PROXY` in `nmi.extraEnv`. For types 1 to 3 also check `spec.adEndpoint`.",
	},
}
