package identity

// Reason is the reason code of a result. It is spelled the same in the error response, in the log, in the metrics and
// in explanations. The set is closed, so a reason can be a metric label.
type Reason string

// Reasons of the decision.
const (
	Allowed            Reason = "allowed"
	Excepted           Reason = "excepted"
	PodNotLabelled     Reason = "pod_not_labelled"
	NoMatchingBinding  Reason = "no_matching_binding"
	IdentityMissing    Reason = "identity_missing"
	IdentityNotBound   Reason = "identity_not_bound"
	IdentityInvalid    Reason = "identity_invalid"
	IdentityAmbiguous  Reason = "identity_ambiguous"
	SecretNotAllowed   Reason = "secret_not_allowed"
	MultipleIdentities Reason = "multiple_identities"
	AssignmentPending  Reason = "assignment_pending"
	AssignmentFailed   Reason = "assignment_failed"
)

// Reasons that do not come from the decision: the request itself, the pod that sent it, objects that NMI lacks or that
// keep changing (NotReady), or a client that closed the connection.
const (
	HeaderMissing    Reason = "metadata_header_missing"
	Forwarded        Reason = "forwarded_request"
	MethodNotAllowed Reason = "method_not_allowed"
	PathRefused      Reason = "path_refused"
	PathUnknown      Reason = "path_unknown"
	RouteBlocked     Reason = "route_blocked"
	RequestMalformed Reason = "request_malformed"
	APIVersion       Reason = "api_version"
	ResourceMissing  Reason = "resource_missing"
	PodUnknown       Reason = "pod_unknown"
	PodAmbiguous     Reason = "pod_ambiguous"
	PodUnverified    Reason = "pod_unverified"
	PodUnconfirmed   Reason = "pod_unconfirmed"
	NotReady         Reason = "not_ready"
	ClientGone       Reason = "client_gone"
)

// Reasons after the decision: the credential, the source of the token, and the limit of one pod (PodThrottled).
// Forwarding, UpstreamThrottled and UpstreamUnavailable are also for requests that NMI forwards to IMDS without a
// decision.
const (
	SecretMissing           Reason = "secret_missing"
	SecretUnreadable        Reason = "secret_unreadable"
	SecretInvalid           Reason = "secret_invalid"
	ServiceAccountForbidden Reason = "service_account_forbidden"
	PodStale                Reason = "pod_stale"
	FederationUntrusted     Reason = "federation_untrusted"
	UpstreamThrottled       Reason = "upstream_throttled"
	UpstreamUnavailable     Reason = "upstream_unavailable"
	UpstreamRefused         Reason = "upstream_refused"
	PodThrottled            Reason = "pod_throttled"
	Forwarding              Reason = "passed_through"
)
