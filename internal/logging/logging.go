// Package logging creates the loggers of NMI and MIC, so that both write the same format. Unless plain text is
// requested, lines are JSON, which escapes text from outside: a client cannot forge a line.
package logging

import (
	"fmt"
	"strings"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

// FlushInterval bounds the time from the write of a line to a buffered writer until the line appears.
const FlushInterval = 200 * time.Millisecond

// ParseLevel parses the value of the flag --log-level. It accepts only what the flag documents, in upper or
// lower case. With a level above error, the log would lack the errors.
func ParseLevel(name string) (zapcore.Level, error) {
	switch strings.ToLower(name) {
	case "debug":
		return zapcore.DebugLevel, nil
	case "info":
		return zapcore.InfoLevel, nil
	case "warn":
		return zapcore.WarnLevel, nil
	case "error":
		return zapcore.ErrorLevel, nil
	}
	return zapcore.InvalidLevel, fmt.Errorf("--log-level %q is unknown; give debug, info, warn or error", name)
}

// NewLogger returns a logger that writes lines of JSON to w, or of plain text if asText is true.
func NewLogger(w zapcore.WriteSyncer, level zapcore.LevelEnabler, asText bool) *zap.Logger {
	config := zap.NewProductionEncoderConfig()
	config.TimeKey, config.EncodeTime = "time", zapcore.RFC3339NanoTimeEncoder
	encoder := zapcore.NewJSONEncoder(config)
	if asText {
		config.EncodeLevel = zapcore.CapitalLevelEncoder
		encoder = zapcore.NewConsoleEncoder(config)
	}
	return zap.New(zapcore.NewCore(encoder, w, level))
}

// Buffer returns a writer that collects lines for at most FlushInterval. NMI needs this: a system call that writes one
// line would cost more than the whole response with a cached token. Loggers that share a writer share its buffer. stop
// writes what is left; call it once, before the process ends.
func Buffer(w zapcore.WriteSyncer) (buffered zapcore.WriteSyncer, stop func()) {
	b := &zapcore.BufferedWriteSyncer{WS: w, FlushInterval: FlushInterval}
	return b, func() { _ = b.Stop() }
}
