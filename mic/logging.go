package mic

import (
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

// flushEvery bounds how late a line appears. Lines are collected because a burst of pods brings a burst of them.
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
