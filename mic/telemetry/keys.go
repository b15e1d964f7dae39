package telemetry

// Keys of log lines.
const (
	KeyMachine  = "machine"
	KeyIdentity = "identity"
	KeyPod      = "pod"
	KeyBinding  = "binding"
	KeyReason   = "reason"
	KeyDetail   = "detail"
)
