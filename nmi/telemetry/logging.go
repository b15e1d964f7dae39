package telemetry

import (
	"github.com/podidentity/podidentity/internal/logging"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

// Keys of log lines. A token or a secret is under none of them.
const (
	KeyRequestID     = "request_id"
	KeyRoute         = "route"
	KeyStatus        = "status"
	KeyReason        = "reason"
	KeyDetail        = "detail"
	KeySource        = "source"
	KeyNamespace     = "pod_namespace"
	KeyPod           = "pod"
	KeyPodUID        = "pod_uid"
	KeyAccount       = "service_account"
	KeyIdentity      = "identity"
	KeyClientID      = "client_id"
	KeyResource      = "resource"
	KeyCache         = "cache"
	KeyTokenID       = "token_id"
	KeyCorrelationID = "correlation_id"
	KeyDuration      = "duration_ms"
	KeyNode          = "node"
	KeyRepaired      = "repaired"
	KeyBackend       = "backend"
	KeyAddress       = "address"
)

// Loggers are where NMI writes. Both write to one place; each has a level of its own.
type Loggers struct {
	Main *zap.Logger
	// Audit has one line for each token that was issued (at level info) or refused (warn).
	Audit *zap.Logger
}

// NewLoggers returns loggers that write lines of JSON, or of text for eyes, to w. auditLevel above every level that is
// used switches the audit off. stop writes what is left.
func NewLoggers(w zapcore.WriteSyncer, level, auditLevel zapcore.Level, asText bool) (logs Loggers, stop func()) {
	buffered, stop := logging.Buffer(w)
	return Loggers{
		Main:  logging.NewLogger(buffered, level, asText),
		Audit: logging.NewLogger(buffered, auditLevel, asText).Named("audit"),
	}, stop
}
