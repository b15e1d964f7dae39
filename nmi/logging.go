package nmi

import (
	"strings"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

// Keys of log lines. A token or a secret is under none of them.
const (
	keyRequest    = "request_id"
	keyRoute      = "route"
	keyStatus     = "status"
	keyReason     = "reason"
	keyDetail     = "detail"
	keySource     = "source"
	keyNamespace  = "pod_namespace"
	keyPod        = "pod"
	keyPodUID     = "pod_uid"
	keyAccount    = "service_account"
	keyIdentity   = "identity"
	keyClientID   = "client_id"
	keyResource   = "resource"
	keyCache      = "cache"
	keyTokenID    = "token_id"
	keyEntra      = "correlation_id"
	keyDurationMS = "duration_ms"
	keyNode       = "node"
	keyRepaired   = "repaired"
	keyBackend    = "backend"
	keyAddress    = "address"
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

// shorten keeps enough of an ID to recognise it and not enough to use it. It bounds a client's text, too.
func shorten(id string) string {
	if len(id) <= 8 {
		return id
	}
	return id[:4] + "…" + id[len(id)-4:]
}

// clip bounds a client's text in a log line; the encoder escapes it.
func clip(s string) string { return cut(s, 256) }

// cut returns at most the first bytes of a text, and no half of a character.
func cut(s string, most int) string {
	if len(s) <= most {
		return s
	}
	return strings.ToValidUTF8(s[:most], "") + "…"
}
