package telemetry

// Keys of log lines. NMI writes no token and no secret as their value.
const (
	KeyRequestID      = "request_id"
	KeyRoute          = "route"
	KeyStatus         = "status"
	KeyReason         = "reason"
	KeyDetail         = "detail"
	KeySource         = "source"
	KeyNamespace      = "pod_namespace"
	KeyPod            = "pod"
	KeyPodUID         = "pod_uid"
	KeyServiceAccount = "service_account"
	KeyIdentity       = "identity"
	KeyClientID       = "client_id"
	KeyResource       = "resource"
	KeyCache          = "cache"
	KeyTokenID        = "token_id"
	KeyCorrelationID  = "correlation_id"
	KeyDuration       = "duration_ms"
	KeyNode           = "node"
	KeyRepaired       = "repaired"
	KeyBackend        = "backend"
	KeyAddress        = "address"
)
