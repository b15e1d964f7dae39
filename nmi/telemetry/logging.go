package telemetry

import (
	"strings"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

// Keys of log lines. A token or a secret is under none of them.
const (
	KeyRequest    = "request_id"
	KeyRoute      = "route"
	KeyStatus     = "status"
	KeyReason     = "reason"
	KeyDetail     = "detail"
	KeySource     = "source"
	KeyNamespace  = "pod_namespace"
	KeyPod        = "pod"
	KeyPodUID     = "pod_uid"
	KeyAccount    = "service_account"
	KeyIdentity   = "identity"
	KeyClientID   = "client_id"
	KeyResource   = "resource"
	KeyCache      = "cache"
	KeyTokenID    = "token_id"
	KeyEntra      = "correlation_id"
	KeyDurationMS = "duration_ms"
	KeyNode       = "node"
	KeyRepaired   = "repaired"
	KeyBackend    = "backend"
	KeyAddress    = "address"
)

// flushEvery bounds how late a line appears. Lines are collected because writing each by itself costs more than
// answering a request from the cache.
const flushEvery = 200 * time.Millisecond

// Loggers are where NMI writes. Both write to one place; each has a level of its own.
type Loggers struct {
	Main *zap.Logger
	// Audit has one line for each token that was issued (at level info) or refused (warn).
	Audit *zap.Logger
}

// NewLoggers returns loggers that write lines of JSON, or of text for eyes, to w. auditLevel above every level that is
// used switches the audit off. stop writes what is left.
func NewLoggers(w zapcore.WriteSyncer, level, auditLevel zapcore.Level, text bool) (logs Loggers, stop func()) {
	config := zap.NewProductionEncoderConfig()
	config.TimeKey, config.EncodeTime = "time", zapcore.RFC3339NanoTimeEncoder
	encoder := zapcore.NewJSONEncoder(config)
	if text {
		config.EncodeLevel = zapcore.CapitalLevelEncoder
		encoder = zapcore.NewConsoleEncoder(config)
	}
	buffered := &zapcore.BufferedWriteSyncer{WS: w, FlushInterval: flushEvery}
	return Loggers{
		Main:  zap.New(zapcore.NewCore(encoder, buffered, level)),
		Audit: zap.New(zapcore.NewCore(encoder, buffered, auditLevel)).Named("audit"),
	}, func() { _ = buffered.Stop() }
}

// Shorten keeps enough of an ID to recognise it and not enough to use it. It bounds a client's text, too.
func Shorten(id string) string {
	if len(id) <= 8 {
		return id
	}
	return id[:4] + "…" + id[len(id)-4:]
}

// Clip bounds a client's text in a log line; the encoder escapes it.
func Clip(s string) string { return cut(s, 256) }

// cut returns at most the first bytes of a text, and no half of a character.
func cut(s string, most int) string {
	if len(s) <= most {
		return s
	}
	return strings.ToValidUTF8(s[:most], "") + "…"
}
