package nmi

import (
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
	keyIdentity   = "identity"
	keyClientID   = "client_id"
	keyResource   = "resource"
	keyCache      = "cache"
	keyDurationMS = "duration_ms"
	keyNode       = "node"
	keyRepaired   = "repaired"
	keyBackend    = "backend"
)

// flushEvery bounds how late a line appears. Lines are collected because writing each by itself costs more than
// answering a request from the cache.
const flushEvery = 200 * time.Millisecond

// NewLogger returns a logger that writes lines of JSON, or of text for eyes, to w. stop writes what is left.
func NewLogger(w zapcore.WriteSyncer, level zapcore.Level, text bool) (log *zap.Logger, stop func()) {
	config := zap.NewProductionEncoderConfig()
	config.TimeKey, config.EncodeTime = "time", zapcore.RFC3339NanoTimeEncoder
	encoder := zapcore.NewJSONEncoder(config)
	if text {
		config.EncodeLevel = zapcore.CapitalLevelEncoder
		encoder = zapcore.NewConsoleEncoder(config)
	}
	buffered := &zapcore.BufferedWriteSyncer{WS: w, FlushInterval: flushEvery}
	return zap.New(zapcore.NewCore(encoder, buffered, level)), func() { _ = buffered.Stop() }
}

// shorten keeps enough of an ID to recognise it and not enough to use it. It bounds a client's text, too.
func shorten(id string) string {
	if len(id) <= 8 {
		return id
	}
	return id[:4] + "…" + id[len(id)-4:]
}

// clip bounds a client's text in a log line; the encoder escapes it.
func clip(s string) string {
	const most = 256
	if len(s) > most {
		return s[:most] + "…"
	}
	return s
}
